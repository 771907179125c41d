"""What `benchmarks.gpu` measures, a part a process: each leaves rows, as JSON.

    python -m benchmarks.gpu_parts attribution.graph --json answer.json [--device cuda] [--tiny]

{"rows": [{column: value}, ...], "notes": [sentences]}. A part imports what it needs inside its function, so that what
is missing on a machine costs that part alone.
"""

import argparse
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from benchmarks.alignment import Case

Row = dict[str, Any]
Answer = dict[str, Any]

ROOT = Path(__file__).parents[1]
PARTS: dict[str, Callable[[argparse.Namespace], Answer]] = {}


def part(name: str) -> Callable[[Any], Any]:
    """Enter a function as the part of that name: (options) -> answer. It may call `leave` with what it has so far."""

    def enter(function: Any) -> Any:
        PARTS[name] = function
        return function

    return enter


def leave(file: Path, answer: Answer) -> None:
    """Write an answer, at once or not at all."""
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(json.dumps(answer, ensure_ascii=False), encoding="utf-8")
    fresh.replace(file)


def rows_of(ways: dict[str, Callable[[], Row]], notes: list[str], options: argparse.Namespace) -> Answer:
    """A row for each way; of one that runs out of memory the reason in its place."""
    import torch

    rows = []
    for name, way in ways.items():
        try:
            rows.append({"way": name, **way()})
        except torch.OutOfMemoryError as error:
            rows.append({"way": name, "remark": str(error).partition(". ")[0]})
            torch.cuda.empty_cache()
        sys.stderr.write(f"{rows[-1]}\n")
        leave(options.json, {"rows": rows, "notes": notes})
    return {"rows": rows, "notes": notes}


class Clock:
    """Milliseconds of a call, the median of `repeats` after one that warms up; a GPU's peak memory."""

    def __init__(self, device: "torch.device", repeats: int) -> None:
        import torch

        self.device, self.repeats = device, repeats
        self.before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self.peak_mib: float | None = None

    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        import torch

        cuda = self.device.type == "cuda"
        found, took = None, []
        for number in range(self.repeats + 1):
            found = None  # what the last call gave is no part of this one's memory
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            found = call()
            if cuda:
                torch.cuda.synchronize()
                self.peak_mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20
            if number:
                took.append((time.perf_counter() - started) * 1e3)
        return statistics.median(took), found


# -------------------------------------------------------------------------------------------------------------- tests


@part("tests")
def tests(options: argparse.Namespace) -> Answer:
    """Tests marked gpu, each with its outcome."""
    import pytest
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():  # else all would be skipped, and that be called done
        sys.exit("no CUDA device is here")
    marked = re.compile(r"^(@pytest\.mark\.gpu$|pytestmark = .*pytest\.mark\.gpu\b)", re.MULTILINE)
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if marked.search(file.read_text())]
    seen = _Outcomes()
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files], plugins=[seen])
    rows = [{"outcome": name, "tests": count} for name, count in sorted(Counter(seen.outcomes.values()).items())]
    answer = {"rows": rows, "notes": seen.reasons}
    leave(options.json, answer)
    if code not in (0, 5):  # 5: none was collected
        sys.exit(int(code))
    return answer


class _Outcomes:
    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.reasons: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.reasons.append(f"{report.nodeid}: {' '.join(lines)[:600]}")


# -------------------------------------------------------------------------------------------------------- attribution


class _Scene:
    """A ResNet50, images and baselines in the sizes that are measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from benchmarks.attribution import CLASS, network, pictures

        side, images, baselines = (32, 2, 3) if options.tiny else (224, 16, 25)
        self.device = torch.device(options.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            sys.exit("no CUDA device is here")
        self.model = network(self.device, side)
        self.x = pictures(images, 1, side).to(self.device)
        self.b = pictures(baselines, 2, side).to(self.device)
        self.target = CLASS
        self.targets = torch.full((images,), CLASS, device=self.device)
        self.pairs = images * baselines
        self.sizes = [3, 6] if options.tiny else [25, 100, 400]
        self.repeats = 1 if options.tiny else 3
        self.layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

    def clock(self) -> Clock:
        return Clock(self.device, self.repeats)

    def difference(self) -> "Tensor":
        """What the maps should add up to, (B,) float64, by the model in float32."""
        import torch

        from lvlmva_core.attribution.deep_lift import full_precision

        with torch.no_grad(), full_precision(self.device):
            return self.model(self.x).double()[:, self.target] - self.model(self.b).double()[:, self.target].mean()

    def row(self, took: float, clock: Clock, maps: "Tensor | None" = None, pairs: int | None = None) -> Row:
        """maps: (B, C, H, W), whose errors stand in the row."""
        row: Row = {"ms a pair": took / (pairs or self.pairs), "peak MiB": clock.peak_mib}
        if maps is not None:
            own = maps.double().flatten(1)
            gap = (own.sum(1) - self.difference()[: len(own)]).abs() / own.abs().sum(1)
            row |= {"completeness error": float(gap.max()), "rank correlation": self._rank_correlation(maps)}
        return row

    @functools.cached_property
    def exact(self) -> "Tensor":
        """The maps in float32, TF32 off."""
        from lvlmva_core.attribution import deep_lift_shap

        return deep_lift_shap(self.model, self.x, self.b, self.target, batch_size=max(self.sizes[:2]))

    def _rank_correlation(self, maps: "Tensor") -> float:
        """The least of the images' Spearman correlations of pixels with the exact float32 maps."""
        from scipy.stats import spearmanr

        both = (each.double().sum(1).flatten(1).cpu().numpy() for each in (self.exact[: len(maps)], maps))
        return min(float(spearmanr(one, other).statistic) for one, other in zip(*both, strict=True))


def _by_parts(scene: _Scene, model: "nn.Module", x: "Tensor", b: "Tensor", size: int) -> "Tensor":
    """What `explain` computes, of any dtype and in whatever precision is set: (B, C, H, W)."""
    import torch

    from lvlmva_core.attribution.deep_lift import attribute_pairs
    from lvlmva_core.attribution.rules import CONSTANT_OPS, RULES
    from lvlmva_core.attribution.tape import record

    at_once = max(size // len(b), 1)
    with torch.no_grad():
        baseline = record(model, b, RULES, CONSTANT_OPS)
        found = []
        for start in range(0, len(x), at_once):
            rows = slice(start, start + at_once)
            found.append(attribute_pairs(record(model, x[rows], RULES, CONSTANT_OPS), baseline, scene.targets[rows]))
        return torch.cat(found) / len(b)


@part("attribution.limit")
def attribution_limit(options: argparse.Namespace) -> Answer:
    """Plain autograd: the input-gradient backward alone, and with its forward."""
    import torch

    from lvlmva_core.attribution.deep_lift import full_precision

    scene = _Scene(options)

    def way(layout: "torch.memory_format", size: int) -> Row:
        model = scene.model.to(memory_format=layout)
        images = scene.b.repeat(math.ceil(size / len(scene.b)), 1, 1, 1)[:size]
        x = images.contiguous(memory_format=layout).requires_grad_()
        with full_precision(scene.device):
            clock = scene.clock()
            forward, output = clock.time(lambda: model(x)[:, scene.target].sum())
            took, _ = clock.time(lambda: torch.autograd.grad(output, x, retain_graph=True))
        return scene.row(took, clock, pairs=size) | {"ms with its forward": (took + forward) / size}

    ways = {
        f"limit, {name}, {size} at once": lambda layout=layout, size=size: way(layout, size)
        for name, layout in scene.layouts.items()
        for size in scene.sizes
    }
    return rows_of(ways, [], options)


@part("attribution.float32")
def attribution_float32(options: argparse.Namespace) -> Answer:
    """As the stage has it, TF32 off."""
    from lvlmva_core.attribution import explain

    scene = _Scene(options)

    def way(last: bool, size: int) -> Row:
        clock = scene.clock()
        took, found = clock.time(
            lambda: explain(scene.model, scene.x, scene.b, scene.target, batch_size=size, channels_last=last)
        )
        return scene.row(took, clock, found.attributions)

    ways = {
        f"ours, float32, {name}, {size} pairs at once": lambda name=name, size=size: way(name == "channels_last", size)
        for name in scene.layouts
        for size in scene.sizes
    }
    return rows_of(ways, [f"{len(scene.x)} images x {len(scene.b)} baselines; batch_size as named."], options)


@part("attribution.tf32")
def attribution_tf32(options: argparse.Namespace) -> Answer:
    """Convolutions and matrix products in TF32: what is refused by default, and what that costs."""
    from lvlmva_core.attribution.deep_lift import products_in

    scene = _Scene(options)

    def way(size: int) -> Row:
        clock = scene.clock()
        with products_in("tf32"):
            took, maps = clock.time(lambda: _by_parts(scene, scene.model, scene.x, scene.b, size))
        return scene.row(took, clock, maps)

    notes = [] if scene.device.type == "cuda" else ["There is no TF32 on a processor: these rows are float32."]
    return rows_of({f"ours, TF32, {size} pairs at once": lambda s=size: way(s) for size in scene.sizes}, notes, options)


@part("attribution.bfloat16")
def attribution_bfloat16(options: argparse.Namespace) -> Answer:
    """Model, activations and multipliers in bfloat16."""
    import copy

    scene = _Scene(options)
    lower = copy.deepcopy(scene.model).bfloat16()

    def way(layout: "torch.memory_format", size: int) -> Row:
        model = lower.to(memory_format=layout)
        x, b = (each.bfloat16().contiguous(memory_format=layout) for each in (scene.x, scene.b))
        clock = scene.clock()
        took, maps = clock.time(lambda: _by_parts(scene, model, x, b, size))
        return scene.row(took, clock, maps)

    ways = {
        f"ours, bfloat16, {name}, {size} pairs at once": lambda layout=layout, size=size: way(layout, size)
        for name, layout in scene.layouts.items()
        for size in scene.sizes
    }
    notes = ["In bfloat16 weights, activations, multipliers and the sum over baselines are rounded to 8 bits."]
    return rows_of(ways, notes, options)


@part("attribution.graph")
def attribution_graph(options: argparse.Namespace) -> Answer:
    """A batch of pairs, the images' forward and the whole backward sweep, captured as one CUDA graph and replayed."""
    import torch

    from lvlmva_core.attribution.deep_lift import attribute_pairs, full_precision
    from lvlmva_core.attribution.rules import CONSTANT_OPS, RULES
    from lvlmva_core.attribution.tape import record

    scene = _Scene(options)

    def way(size: int) -> Row:
        at_once = max(size // len(scene.b), 1)
        images, targets = scene.x[:at_once].clone(), scene.targets[:at_once].clone()
        with torch.no_grad(), full_precision(scene.device):
            baseline = record(scene.model, scene.b, RULES, CONSTANT_OPS)

            def batch() -> "Tensor":
                return attribute_pairs(record(scene.model, images, RULES, CONSTANT_OPS), baseline, targets)

            if scene.device.type != "cuda":
                batch()
                return {"remark": "not captured: CUDA graphs need a CUDA device; the batch itself runs"}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    batch()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    out = batch()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                return {"remark": f"not captured: {type(error).__name__}: {reason}"}

            def whole() -> "Tensor":
                found = []
                for start in range(0, len(scene.x), at_once):
                    rows = scene.x[start : start + at_once]
                    images[: len(rows)].copy_(rows)
                    graph.replay()
                    found.append(out[: len(rows)].clone())
                return torch.cat(found) / len(scene.b)

            clock = scene.clock()
            took, maps = clock.time(whole)
            return scene.row(took, clock, maps) | {"remark": "the graph's own memory is not in the peak"}

    note = "The baselines' forward is outside of the graph and of its time; an attempt that fails says why."
    sizes = scene.sizes[:1] if options.tiny else scene.sizes
    return rows_of(
        {f"ours, CUDA graph, {size} pairs at once": lambda s=size: way(s) for size in sizes}, [note], options
    )


@part("attribution.captum")
def attribution_captum(options: argparse.Namespace) -> Answer:
    """captum's DeepLiftShap on a copy in which every ReLU is a module of its own; it refuses the model else."""
    import warnings

    from captum.attr import DeepLiftShap

    from benchmarks.attribution import unshare_relus
    from lvlmva_core.attribution.deep_lift import full_precision

    warnings.simplefilter("ignore")  # captum announces its hooks
    scene = _Scene(options)
    model = unshare_relus(scene.model)

    def way(count: int) -> Row:
        clock = scene.clock()
        x = scene.x[:count]
        with full_precision(scene.device):
            took, maps = clock.time(lambda: DeepLiftShap(model).attribute(x, scene.b, target=scene.target).detach())
        return scene.row(took, clock, maps, pairs=count * len(scene.b))

    counts = [1] if options.tiny else [1, 4]
    ways = {f"captum, {count} x {len(scene.b)} pairs at once": lambda c=count: way(c) for count in counts}
    return rows_of(ways, [], options)


# ------------------------------------------------------------------------------------------------------- segmentation


@part("segmentation")
def segmentation(options: argparse.Namespace) -> Answer:
    """Maps like attributions, together on the device, and fewer on the processor."""
    import torch

    from benchmarks.segmentation import J, attribution_like
    from lvlmva_core.segmentation import fit_weighted_gmm

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is here")
    counts, few = ([2], 2) if options.tiny else ([64, 256, 1024], 32)
    maps = attribution_like(max(counts))
    if options.tiny:
        maps = maps[:, ::7, ::7].contiguous()
    cpu_clock = Clock(torch.device("cpu"), 1)
    took, reference = cpu_clock.time(lambda: fit_weighted_gmm(maps[:few], J))
    threads = torch.get_num_threads()
    cpu = {
        "way": f"cpu, {threads} threads, {few} maps",
        "ms a map": took / few,
        "log-likelihood": float(reference.log_likelihood.double().mean()),
    }

    def way(count: int) -> Row:
        clock = Clock(device, 1 if options.tiny else 3)
        some = maps[:count].to(device)
        took, fit = clock.time(lambda: fit_weighted_gmm(some, J))
        shared = fit.labels[:few].cpu() == reference.labels
        return {
            "ms a map": took / count,
            "log-likelihood": float(fit.log_likelihood[:few].double().mean()),
            "pixels in the same region": float(shared.double().mean()),
            "peak MiB": clock.peak_mib,
        }

    found = rows_of({f"{device.type}, {count} maps at once": lambda c=count: way(c) for count in counts}, [], options)
    return {"rows": [cpu, *found["rows"]], "notes": [f"Log-likelihoods and regions on the first {few} maps."]}


# ---------------------------------------------------------------------------------------------------------- alignment


@part("mlp")
def mlp(options: argparse.Namespace) -> Answer:
    """42 MLPs: 7 seeds x 6 λ."""
    from benchmarks import alignment
    from lvlmva_core.compute import set_up_compute

    device = set_up_compute(options.device, 1 if options.tiny else 8)
    steps, rounds = (2, 1) if options.tiny else (200, 3)
    name, work = alignment.digits(steps, device)
    runs = [(rrr_lambda, seed) for rrr_lambda in alignment.LAMBDAS for seed in alignment.SEEDS]
    if options.tiny:
        runs = runs[:2]
    model = alignment.trained_mlp(work)
    ways = alignment.measured(alignment.Case(), model, work, runs, rounds, together=True)
    return {"rows": [way.facts() for way in ways], "notes": [_said(name, len(runs), steps, rounds)]}


def _resnet50(case: "Case", options: argparse.Namespace) -> Answer:
    from benchmarks import alignment
    from lvlmva_core.compute import set_up_compute
    from lvlmva_core.models import ModelSpec, build_model

    device = set_up_compute(options.device, 1 if options.tiny else 8)
    steps, rounds, side = (2, 1, 32) if options.tiny else (24, 3, 224)
    model = build_model(ModelSpec("resnet50", 3, side, side, 2, 1), seed=0).to(device)
    work = alignment.pictures(steps, device, side)
    ways = alignment.measured(case, model, work, [(1.0, 0)], rounds, together=False)
    return {"rows": [way.facts() for way in ways], "notes": [_said(f"noise at {side}x{side}", 1, steps, rounds)]}


def _said(data: str, runs: int, steps: int, rounds: int) -> str:
    return (
        f"{runs} run(s) of {steps} steps on {data}, 8 alignment and 64 training samples a batch; medians over {rounds} "
        "rounds in which the ways take turns, the capture of graphs included. The plain loop's batches come from a "
        "DataLoader; in a second one they are picked on the device, where all samples lie, as ours are."
    )


@part("resnet50.float32")
def resnet50_float32(options: argparse.Namespace) -> Answer:
    """In PyTorch's float32."""
    from benchmarks.alignment import Case

    return _resnet50(Case(8, True), options)


@part("resnet50.bfloat16")
def resnet50_bfloat16(options: argparse.Namespace) -> Answer:
    """In mixed precision, ours and the plain loop."""
    from benchmarks.alignment import Case

    return _resnet50(Case(8, True, "bfloat16"), options)


# -------------------------------------------------------------------------------------------------------------- study

# As docs/data.md has it for a GPU (LVLM-VA's supplement: Adam 1e-5, 100 + 100 epochs); λ and the rest are the preset's,
# since the paper's λ = 1 belongs to a scale of inputs that it does not say.
PAPER = (
    *("prepare.image_size=224", "train.model=resnet50", "train.learning_rate=1e-5", "train.epochs=100"),
    *("align.learning_rate=1e-5", "align.epochs=100", "train.batch_size=64", "compute.threads=8"),
)
SCRATCH = ("train.learning_rate=1e-3", "train.weights=null")  # at 1e-5 nothing is learned from drawn weights
SMALLEST = (
    *("train.epochs=2", "align.epochs=1", "rank.n_samples=32", "attribute.n_baselines=4", "segment.n_starts=2"),
    *("evaluate.attribution_samples=4",),
)


@part("knee.pretrained")
@part("knee.scratch")
@part("skin.pretrained")
@part("skin.scratch")
def study(options: argparse.Namespace) -> Answer:
    """One base of a study; what is done is left after each of its stages, so that nothing is lost at the limit."""
    from benchmarks.study import write_tables

    experiment = "decoy_digits" if options.tiny else options.name.partition(".")[0]
    changes = SMALLEST if options.tiny else PAPER
    if options.weights is None and not options.tiny:
        changes = (*changes, *SCRATCH)
    command = [sys.executable, "-m", "benchmarks.study", experiment, "--work", str(options.work), "--bases", "1"]
    command += ["--seeds", "1" if options.tiny else "3", "--methods", "lambda_zero", "lvlm_va"]
    command += [] if options.tiny else ["rrr_gt"]
    command += ["--root", str(options.root)] if options.root else []
    command += ["--weights", str(options.weights)] if options.weights else []
    results = options.work / "results"
    command += ["--results", str(results)]
    for change in (f"compute.device={options.device}", *changes):
        command += ["--set", change]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if "-evaluate-" in line:  # else they are written when a whole base is done
                write_tables(options.work.resolve(), results / f"{experiment}.csv")
            leave(options.json, _study_answer(options, results, experiment, line.strip()))
    if running.returncode:
        sys.exit(running.returncode)
    return _study_answer(options, results, experiment, "all of it is done")


def _study_answer(options: argparse.Namespace, results: Path, experiment: str, last: str) -> Answer:
    """Means over the models of each method, from what is complete."""
    import pandas as pd

    rows: list[Row] = []
    table = results / f"{experiment}.csv"
    if table.exists():
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / f"{options.name}.csv").write_bytes(table.read_bytes())
        found = pd.read_csv(table)
        rows = [{"way": str(name), **_means(own)} for name, own in found.groupby("method", sort=False)]
    marks = sorted(mark.name for mark in (options.work / "done").glob("*"))
    if not rows:
        rows = [{"way": options.name, "remark": "no base is complete yet"}]
    notes = [f"{len(marks)} pieces of work are done. Last: {last}."]
    notes += ["With --tiny digits stand in for the pictures, an MLP for ResNet50."] if options.tiny else []
    return {"rows": rows, "notes": notes}


def _means(rows: Any) -> Row:
    numbers = rows.drop(columns=["base", "seed"], errors="ignore").select_dtypes("number")
    return {"models": len(rows), **{name: float(value) for name, value in numbers.mean().dropna().items()}}


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(PARTS))
    parser.add_argument("--json", type=Path, required=True, help="file of the answer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, help="folder of a study")
    parser.add_argument("--results", type=Path, help="folder that a study's rows are copied to")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    if options.tiny:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    leave(options.json, PARTS[options.name](options))


if __name__ == "__main__":
    main()
