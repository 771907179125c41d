"""The constants of `lvlmva_core.scaling`, how far its forecasts are off, and the tables of docs/scaling.md.

python -m benchmarks.scaling --measure       the constants, into lvlmva_core/scaling.json
python -m benchmarks.scaling --check         runs that no constant was fitted to, into benchmarks/scaling_checks.json
python -m benchmarks.scaling                 the tables, from these files and benchmarks/memory.json
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import small_params
from benchmarks.stage_runs import HELD_OUT, ROOT, draw_pictures, machine, run_stage, size_of, write_params
from lvlmva_core.scaling import (
    Calls,
    Constants,
    Forecast,
    Network,
    Sizes,
    costs_of,
    forecast,
    measured_constants,
    memory_of,
    operations_of,
    total,
)

COMMAND = "python -m benchmarks.scaling"
PAGE = ROOT / "docs" / "scaling.md"
CONSTANTS = ROOT / "lvlmva_core" / "scaling.json"
CHECKS, MEMORY = ROOT / "benchmarks" / "scaling_checks.json", ROOT / "benchmarks" / "memory.json"
CHAIN = ("prepare", "settings", "train", "rank", "attribute", "segment", "exchange", "critique", "judge", "mask")
AFTER = ("align --method lvlm_va", "evaluate --method base")
FITTED = (  # model, hidden units, pixels a side, channels, R, J, starts
    ("mlp", 16, 16, 1, 2, 2, 2),
    ("mlp", 256, 32, 1, 25, 3, 32),
    ("mlp", 64, 64, 1, 8, 7, 8),
    ("small_resnet", 8, 16, 3, 4, 3, 8),
    ("small_resnet", 8, 48, 3, 8, 5, 32),
    ("torchvision:resnet18", 8, 96, 3, 4, 3, 8),
)
FITTED_SAMPLES = 64
CHECKED = (  # N, model, hidden units, pixels a side, channels, R, J, starts: none is among those above
    (128, "mlp", 32, 24, 1, 5, 2, 4),
    (128, "small_resnet", 12, 40, 3, 6, 4, 16),
    (512, "mlp", 32, 24, 1, 5, 2, 4),
    (2048, "mlp", 32, 24, 1, 5, 2, 4),
)
PAPER = {"N": 256, "R": 25, "J": 7, "starts": 32, "side": 224, "channels": 3}
COUNTS = (256, 10_000, 100_000, 1_000_000)
RESNET50 = Network(
    23_512_130, 8_174_280_704.0, 32_039_426, 158, 802_816
)  # `network_of` torchvision's, 2 classes, 224x224
ASSUMED_RATE = 20e12  # operations a second of a GPU in float32: an assumption, nothing was measured on one
PAIR_S, CUT_S = 0.120, 0.0559  # of benchmarks/attribution.md and segmentation.md, at the paper's sizes
HELD = 1.0  # copies of the activations; DeepLiftSHAP of ResNet50 held 0.61 (969 MiB at 13 pairs, attribution.md)
HEAVY = ("attribute", "segment")
INPUT_TOKENS, OUTPUT_TOKENS = {"critique": 800, "judge": 500}, {"critique": 300, "judge": 60}


def params_of(
    pictures: Path, n: int, model: str, hidden: int, side: int, r: int, j: int, starts: int
) -> dict[str, Any]:
    """Sections to change. The step of alignment and the rest are kept small: one epoch, one seed, one method."""
    return {
        **small_params(pictures, n, side),
        "train": {"model": model, "hidden": hidden, "epochs": 1},
        "attribute": {"n_baselines": r, "completeness_tolerance": 1e-3},
        "segment": {"n_regions": j, "n_starts": starts},
        "exchange": {"n_donors": 2, "n_held_out": 16},
        "critique": {"max_failed_share": 1.0},
        "judge": {"max_failed_share": 1.0},
        "mask": {"max_failed_share": 1.0},
        "align": {"epochs": 1, "seeds": [0]},
        "methods": {"lvlm_va": {}},
        "evaluate": {"robustness": False},
    }


@contextlib.contextmanager
def project_of(n: int, channels: int, *settings: Any) -> Iterator[Path]:
    """A project with n training pictures, in a folder of its own. settings: of `params_of`, from `model` on."""
    with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
        pictures, project = Path(folder) / "pictures", Path(folder) / "project"
        draw_pictures(pictures, n, settings[2], channels)
        write_params(project, params_of(pictures, n, *settings))
        yield project


@contextlib.contextmanager
def inside(project: Path) -> Iterator[None]:
    """The project as working folder, its own store, and silence."""
    before, kept = Path.cwd(), os.environ.get("LVLMVA_STORE")
    os.environ["LVLMVA_STORE"] = str(project / "store")
    os.chdir(project)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.chdir(before)
        os.environ.pop("LVLMVA_STORE")
        if kept is not None:
            os.environ["LVLMVA_STORE"] = kept


def stage_here(stage: str) -> float:
    """Processor seconds of a stage in this process, without the time that Python takes to start."""
    import inspect

    from lvlmva.pipeline import paths

    function = getattr(importlib.import_module(f"stages.{stage}"), stage)
    known = {name: Path(path) for name, path in paths().items()}
    wanted = [each.name for each in inspect.signature(function).parameters.values() if each.name in known]
    started = time.process_time()
    function(**{name: known[name] for name in wanted})
    return time.process_time() - started


def sizes_here(n: int | None = None) -> tuple[Sizes, Any]:
    """Sizes of the project in the working folder, and what was probed of its model."""
    import torch

    from lvlmva.params import load_params
    from lvlmva.pipeline import paths
    from lvlmva.probe import AT_ONCE, probe, sizes_of
    from lvlmva_core.compute import set_up_compute
    from lvlmva_core.models import load_checkpoint
    from lvlmva_core.samples import read_images, read_samples, rows_of_split
    from lvlmva_core.splits import read_split

    known = {name: Path(path) for name, path in paths().items()}
    loaded, device = load_params(known["params"]), set_up_compute("cpu", 1)
    model, _ = load_checkpoint(known["base"], torch.device("cpu"))
    table = read_samples(known["samples"])
    splits = {split: read_split(known["images"], table, split, device) for split in ("train", "val", "test")}
    pictures = read_images(known["images"], rows_of_split(table, "train")[:AT_ONCE])
    sizes = sizes_of(loaded, model, splits, False)
    return sizes, None if n is None else probe(loaded, model, splits["train"], pictures, time.process_time)


def fit(rows: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> dict[str, float]:
    """Coefficients >= 0 of each unit and of "each", by least squares of the relative errors."""
    from scipy.optimize import nnls

    names = ["each", *rows[0]]
    design = np.array([[1.0, *row.values()] for row in rows]) / np.array(seconds)[:, None]
    scale = design.max(axis=0)
    found, _ = nnls(design / scale, np.ones(len(rows)))
    return {name: float(value) for name, value in zip(names, found / scale, strict=True)}


def kept_seconds(side: int, channels: int) -> float:
    """Processor seconds of all that is done to keep a map, beside computing it: key, record, and row of the output."""
    from lvlmva_core.arrays import SHARD_ROWS, ArrayWriter
    from lvlmva_core.rows import stacked
    from lvlmva_core.store import Store, digest

    draws = np.random.default_rng(0)
    images = draws.random((SHARD_ROWS, channels, side, side), dtype=np.float32)
    maps = draws.normal(size=(SHARD_ROWS, side, side)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
        store = Store(Path(folder) / "store")
        started = time.process_time()
        keys = [digest({"common": "0", "image": image, "target": 0}) for image in images]
        for key, one in zip(keys, maps, strict=True):
            store.get_arrays("attributions", key)
            store.put_arrays("attributions", key, {"attribution": one})
        with ArrayWriter(Path(folder) / "a.zarr") as writer:
            for part in stacked(store.get_arrays("attributions", key) or {} for key in keys):
                writer.append(part)
        return (time.process_time() - started) / SHARD_ROWS


def read_seconds(images: Path, count: int) -> float:
    """Processor seconds of reading a picture and scaling it."""
    from lvlmva_core.samples import read_images, to_unit_range

    rows = np.arange(count)
    started = time.process_time()
    for _ in range(5):
        to_unit_range(read_images(images, rows))
    return (time.process_time() - started) / 5 / count


def traced(few: int, many: int) -> dict[str, float]:
    """Bytes that stay in memory for each row of the table, and for each sample of an output, by tracemalloc."""
    from lvlmva_core.arrays import ArrayWriter
    from lvlmva_core.datasets.folder import Folder

    peaks: dict[str, list[float]] = {"row": [], "sample": []}
    for count in (few, few, many):  # the first fills caches
        with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
            draw_pictures(Path(folder) / "pictures", count, 16)
            chosen = Folder(root=str(Path(folder) / "pictures"), table="table.csv", image_size=16, seed=0, workers=1)
            out = Path(folder)
            with contextlib.redirect_stderr(io.StringIO()):
                tracemalloc.start()
                chosen.write(out / "i.zarr", out / "s.parquet", out / "m.zarr")
            peaks["row"].append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            tracemalloc.start()
            ids, keys = [f"{n:07d}.png" for n in range(count)], [f"{n:064x}" for n in range(count)]
            with ArrayWriter(out / "a.zarr") as writer:
                for first in range(0, count, 64):
                    writer.append({"attributions": np.zeros((min(64, count - first), 16, 16), dtype=np.float32)})
                writer.attrs = {"ids": ids, "keys": keys, "targets": [0] * count}
            peaks["sample"].append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    return {name: (found[2] - found[1]) / (many - few) for name, found in peaks.items()}


def measure() -> Constants:
    """All constants, from small runs in this process and a few processes."""
    rows: dict[str, list[dict[str, float]]] = {}
    took: dict[str, list[float]] = {}

    def note(name: str, seconds: float, **units: float) -> None:
        rows.setdefault(name, []).append(units)
        took.setdefault(name, []).append(seconds)

    stored: dict[str, float] = {}
    for place, (model, hidden, side, channels, r, j, starts) in enumerate((FITTED[0], *FITTED)):
        with project_of(FITTED_SAMPLES, channels, model, hidden, side, r, j, starts) as project, inside(project):
            seconds = {stage: stage_here(stage) for stage in CHAIN}
            sizes, probed = sizes_here(FITTED_SAMPLES)
            reading = read_seconds(project / "data/images.zarr", FITTED_SAMPLES)
            if place == 3:
                stored = stored_here(project, sizes)
        if place == 0:
            continue  # imports and caches
        sys.stderr.write(f"{model} {side}: {seconds}\n{probed.forward} {probed.map} {probed.cut} {probed.align_step}\n")
        values = sizes.values
        note("picture", seconds["prepare"] / sizes.pictures, values=values)
        note("read", reading, values=values)
        for name, units in units_of(sizes).items():
            note(name, getattr(probed, name), **units)
        note("kept", kept_seconds(side, channels), bytes=4 * (sizes.pixels + values))
        note("criticise", seconds["critique"] / FITTED_SAMPLES, values=values)
        note("judge", seconds["judge"] / FITTED_SAMPLES)
        note("mask", seconds["mask"] / FITTED_SAMPLES, pixels=sizes.pixels)
    fitted = {name: fit(rows[name], took[name]) for name in rows}
    start, memory = process_constants()
    return Constants(machine=machine(), seconds={**fitted, **start}, bytes={**memory, **stored})


def process_constants() -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What a process takes before it does anything, and of memory what each row, sample and activation adds."""
    with project_of(FITTED_SAMPLES, 3, "small_resnet", 16, 64, 25, 2, 2) as project:
        runs = {stage: run_stage(project, stage) for stage in ("prepare", "train", "rank", "attribute")}
        with inside(project):
            sizes, _ = sizes_here()
    with project_of(FITTED_SAMPLES, 1, "mlp", 16, 16, 2, 2, 2) as project:
        tiny = {stage: run_stage(project, stage) for stage in ("prepare", "train", "rank")}
    memory = {"torch": tiny["rank"].peak * 2**20, "plain": tiny["prepare"].peak * 2**20, **traced(200, 1000)}
    bare = memory_of(sizes, {**memory, "activation_copies": 0.0, "critique": 0.0})["attribute"]
    unit = 4 * sizes.baselines * sizes.network.activations
    memory["activation_copies"] = max(runs["attribute"].peak * 2**20 - bare, 0.0) / unit
    start = {"start": {"each": tiny["rank"].processor}, "start_plain": {"each": tiny["prepare"].processor}}
    return start, memory


def units_of(sizes: Sizes) -> dict[str, dict[str, float]]:
    """What `costs_of` multiplies for the operations that are probed: its own units, read off with every constant 1."""
    found: dict[str, dict[str, float]] = {}
    model = ("layers", "flops", "activations")
    units = {"forward": model, "map": model, "cut": ("starts", "pixels")}
    units |= {"train_step": (*model, "parameters"), "align_step": (*model, "parameters")}
    zero = {name: dict.fromkeys(("each", *_ALL), 0.0) for name in _OPERATIONS}
    for name, wanted in units.items():
        for unit in wanted:
            seconds = {**zero, name: {**zero[name], unit: 1.0}}
            of_unit = costs_of(Constants(machine="", seconds=seconds, bytes={}), sizes)
            found.setdefault(name, {})[unit] = getattr(of_unit, name)
    return found


_ALL = ("values", "pixels", "bytes", "flops", "activations", "parameters", "layers", "starts")
_OPERATIONS = ("picture", "read", "forward", "train_step", "map", "cut", "align_step", "kept", "criticise", "judge")
_OPERATIONS += ("mask", "start", "start_plain")


def stored_here(project: Path, sizes: Sizes) -> dict[str, float]:
    """Bytes on disk of each value, pixel and sample of this project's outputs."""
    n, data = sizes.samples, project / "data"
    arrays = {name: size_of(data / name)[1] for name in ("images.zarr/images", "attributions.zarr/attributions")}
    record = next((project / "store/segmentations").rglob("*.arrays")).stat().st_size
    return {
        "image": arrays["images.zarr/images"] / sizes.pictures / sizes.values,
        "table_row": (data / "samples.parquet").stat().st_size / sizes.pictures,
        "map": arrays["attributions.zarr/attributions"] / n / sizes.pixels / 4,
        "segments": size_of(data / "segments.zarr/segments")[1] / n / sizes.pixels,
        "attrs": (data / "attributions.zarr/zarr.json").stat().st_size / n,
        "record": record - sizes.pixels,
        "critique": (data / "critiques.jsonl").stat().st_size / n,
        "verdict": (data / "verdicts.jsonl").stat().st_size / n,
    }


def check() -> Iterator[dict[str, Any]]:
    """Each run of CHECKED, its stages in processes of their own, and what they had to do."""
    for n, model, hidden, side, channels, r, j, starts in CHECKED:
        with project_of(n, channels, model, hidden, side, r, j, starts) as project:
            stages = {stage.split()[0]: run_stage(project, stage)._asdict() for stage in (*CHAIN, *AFTER)}
            with inside(project):
                sizes, _ = sizes_here()
            sizes = replace(sizes, models=1, evaluations=1)  # the base model's evaluation alone was run
            measured = {"prepare": 0, "attribute": 0, "segment": 0}
            data, store = project / "data", project / "store"
            measured["prepare"] = size_of(data / "images.zarr")[1] + size_of(data / "spurious_masks.zarr")[1]
            for stage, kind, out in (
                ("attribute", "attributions", "attributions.zarr"),
                ("segment", "segmentations", "segments.zarr"),
            ):
                files = [file.stat() for file in (store / kind).rglob("*.arrays")]
                measured[stage] = size_of(data / out)[1] + sum(512 * file.st_blocks for file in files)
        yield {
            "model": f"{model} of {hidden}",
            "sizes": {**asdict(sizes), "calls": {}},
            "stages": stages,
            "stored": measured,
            "machine": machine(),
        }


def checked_sizes(run: Mapping[str, Any]) -> Sizes:
    """The sizes of a run as they were kept."""
    kept = dict(run["sizes"])
    return Sizes(**{**kept, "network": Network(**kept["network"])})


def error_table(constants: Constants, runs: Sequence[Mapping[str, Any]]) -> str:
    """Forecast over measured, stage by stage: processor time, memory, and storage."""
    names = [
        f"{run['sizes']['samples']} of {run['sizes']['height']}x{run['sizes']['width']}, {run['model']}" for run in runs
    ]
    lines = [f"| stage | {' | '.join(names)} |", f"|---|{'---|' * len(runs)}"]
    foreseen = []
    for run in runs:
        sizes = checked_sizes(run)
        foreseen.append({each.stage: each for each in forecast(sizes, costs_of(constants, sizes), constants)})
    for stage in (stage for stage in foreseen[0] if any(stage in run["stages"] for run in runs)):
        cells = []
        for run, found in zip(runs, foreseen, strict=True):
            if stage not in run["stages"]:
                cells.append("")
                continue
            measured, each = run["stages"][stage], found[stage]
            assert each.seconds is not None
            assert each.megabytes is not None
            took, peak = measured["processor"], measured["peak"]
            cell = f"{each.seconds:.1f} / {took:.1f} s ({_percent(each.seconds, took)})"
            if peak is not None:
                cell += f"; {each.megabytes:.0f} / {peak:.0f} MiB ({_percent(each.megabytes, peak)})"
            if stage in run.get("stored", {}):
                stored = run["stored"][stage] / 2**20
                off = _percent(each.stored_megabytes, stored)
                cell += f"; {each.stored_megabytes:.1f} / {stored:.1f} MiB stored ({off})"
            cells.append(cell)
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(foreseen: float, measured: float) -> str:
    return f"{100 * (foreseen / measured - 1):+.0f} %"


def paper_sizes(n: int, calls: Mapping[str, Calls]) -> Sizes:
    """The paper's settings with ResNet50 at 224x224, N of as many training pictures, and a tenth of these as test."""
    side = PAPER["side"]
    steps = -(-n // 64) * 10
    return Sizes(
        pictures=n + n // 5,
        training=n,
        samples=n,
        height=side,
        width=side,
        channels=3,
        network=RESNET50,
        baselines=PAPER["R"],
        regions=PAPER["J"],
        starts=PAPER["starts"],
        align_steps=steps,
        align_runs=1,
        align_validated=10 * (n // 10),
        models=2,
        evaluations=2,
        evaluated_pictures=n // 10,
        calls=calls,
    )


def paper_forecast(n: int, constants: Constants) -> tuple[Sizes, list[Forecast]]:
    """With what was measured at these sizes in the place of the fit's: two costs, and the memory of activations."""
    sizes = paper_sizes(n, paper_calls(n))
    costs = replace(costs_of(constants, sizes), map=sizes.baselines * PAIR_S, cut=CUT_S)
    held = constants.model_copy(update={"bytes": {**constants.bytes, "activation_copies": HELD}})
    return sizes, forecast(sizes, costs, held)


def _short(number: float) -> str:
    """Two or three digits that count."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def paper_calls(n: int) -> dict[str, Calls]:
    """A question of each kind a sample, at the prices of presets/critics/gpt-4o-mini.yaml, and a second an answer."""
    from ruamel.yaml import YAML

    from lvlmva_core.lvlm.settings import Endpoint

    content = YAML(typ="safe").load((ROOT / "presets/critics/gpt-4o-mini.yaml").read_text(encoding="utf-8"))
    return {
        stage: Calls(
            Endpoint.model_validate(content[stage]["endpoint"]), n, INPUT_TOKENS[stage], OUTPUT_TOKENS[stage], 1.0
        )
        for stage in ("critique", "judge")
    }


def paper_table(constants: Constants) -> str:
    """What each stage takes at the paper's settings, up to a million pictures."""
    found: list[list[Forecast]] = []
    for n in COUNTS:
        _, stages = paper_forecast(n, constants)
        found.append([*(each for each in stages if each.stage != "train"), total(stages)])
    lines = [f"| stage | {' | '.join(f'N = {n:,}' for n in COUNTS)} |", f"|---|{'---|' * len(COUNTS)}"]
    for of_stage in zip(*found, strict=True):
        cells = []
        for each in of_stage:
            parts = [f"{_short((each.seconds or 0.0) / 3600)} h", f"{_short((each.megabytes or 0.0) / 1024)} GiB"]
            if each.stored_megabytes:
                parts.append(f"{_short(each.stored_megabytes / 1024)} GiB in {each.files:,} files")
            if each.cost_usd:
                parts.append(f"{each.cost_usd:.2f} USD")
            cells.append(", ".join(parts))
        lines.append(f"| {of_stage[0].stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machines_table(constants: Constants) -> str:
    """The same in one row a number of pictures."""
    columns = [
        "N",
        "processor hours",
        "of it attribute",
        "of it segment",
        "GPU hours at the assumed rate",
        "most memory",
    ]
    columns += ["stored", "files", "USD"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for n in COUNTS:
        sizes, found = paper_forecast(n, constants)
        stages = {each.stage: each for each in found}
        local = [each for stage, each in stages.items() if stage not in (*sizes.calls, "train")]
        hours = [sum(each.seconds or 0.0 for each in some) / 3600 for some in (local, *([stages[s]] for s in HEAVY))]
        device = sum(operations_of(sizes).values()) / ASSUMED_RATE / 3600
        whole = total(list(stages.values()))
        cells = [f"{n:,}", *(_short(each) for each in (*hours, device))]
        cells += [f"{_short((whole.megabytes or 0.0) / 1024)} GiB", f"{_short(whole.stored_megabytes / 1024)} GiB"]
        lines.append(f"| {' | '.join([*cells, f'{whole.files:,}', f'{whole.cost_usd:,.2f}'])} |")
    return "\n".join(lines) + "\n"


def elsewhere_table(constants: Constants) -> str:
    """Forecast beside figures of other benchmarks of this machine, of much larger operations than the fit saw."""
    sizes = paper_sizes(256, {})
    costs = costs_of(constants, sizes)
    rows = [
        ("DeepLiftSHAP, ResNet50 at 224x224, seconds a pair", costs.map / sizes.baselines, PAIR_S, "attribution"),
        ("PPEPS-WGM, 224x224, J = 7, 32 starts, seconds a map", costs.cut, CUT_S, "segmentation"),
    ]
    lines = ["| operation | forecast | measured | error | by |", "|---|---|---|---|---|"]
    lines += [
        f"| {what} | {foreseen:.3f} | {measured} | {_percent(foreseen, measured)} | "
        f"[benchmarks/{page}.md](../benchmarks/{page}.md) |"
        for what, foreseen, measured, page in rows
    ]
    return "\n".join(lines) + "\n"


def constants_table(constants: Constants) -> str:
    """Seconds of each unit of each operation."""
    lines = ["| operation | microseconds on one thread |", "|---|---|"]
    for name, units in constants.seconds.items():
        said = " + ".join(
            f"{1e6 * value:.3g}" + ("" if unit == "each" else f" x {unit}") for unit, value in units.items() if value
        )
        lines.append(f"| {name} | {said} |")
    lines += ["", "| of memory and storage | bytes |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in constants.bytes.items()]
    return "\n".join(lines) + "\n"


def memory_runs() -> list[dict[str, Any]]:
    """The runs of `benchmarks.memory`, with their sizes."""
    if not MEMORY.is_file():
        return []
    found = []
    for run in json.loads(MEMORY.read_text(encoding="utf-8"))["runs"]:
        n, side = run["samples"], run["side"]
        hidden = 16
        weights = side * side * hidden + hidden * 2
        network = Network(weights + hidden + 2, 2.0 * weights, 2 * hidden + side * side + 2, 4, side * side)
        sizes = Sizes(
            n + 2 * HELD_OUT,
            n,
            n,
            side,
            side,
            1,
            network,
            baselines=2,
            regions=2,
            starts=2,
            train_steps=-(-n // 64),
            train_validated=n + HELD_OUT,
        )
        found.append({**run, "model": "mlp of 16", "sizes": {**asdict(sizes), "calls": {}}})
    return found


def made() -> str:
    """All tables of the page."""
    constants = measured_constants()
    checks = json.loads(CHECKS.read_text(encoding="utf-8"))
    parts = [
        "### Constants\n",
        constants_table(constants),
        f"{constants.machine}\n",
        "### Forecast / measured\n",
        error_table(constants, checks),
        f"{checks[-1]['machine']}\n",
    ]
    if runs := memory_runs():
        parts += ["The stages up to segment, up to 20,000 pictures:\n", error_table(constants, runs)]
    parts += ["Larger operations than the fit saw:\n", elsewhere_table(constants)]
    parts += [
        "### Up to a million pictures\n",
        machines_table(constants),
        "Stage by stage: hours, memory, storage, money:\n",
        paper_table(constants),
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Measure, check, or put the tables into the page."""
    from lvlmva.tables import put_tables

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        CONSTANTS.write_text(measure().model_dump_json(indent=1) + "\n", encoding="utf-8")
    elif arguments.check:
        runs = []
        for run in check():
            runs.append(run)
            CHECKS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    else:
        put_tables(PAGE, COMMAND, made())


if __name__ == "__main__":
    main()
