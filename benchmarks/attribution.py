"""DeepLiftSHAP of ResNet50 at 224x224: ours, captum, and the limit, in one run.

    python -m benchmarks.attribution [--out benchmarks/attribution.md]

The limit is one input-gradient backward pass a pair of image and baseline, without its forward, at the best batch size
and memory layout. captum runs on a copy in which every ReLU is a module of its own, without which it refuses the model.
Each row is a process of its own, so that its peak memory is its own.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.machine import cpu_model
from lvlmva_core.attribution import explain
from lvlmva_core.attribution.deep_lift import attribute_pairs
from lvlmva_core.attribution.rules import CONSTANT_OPS, RULES
from lvlmva_core.attribution.tape import record

IMAGES = 16  # that share the baselines' activations in our row, as in stage attribute
CLASS = 3
SIDE = 224


def network(device: torch.device, side: int = SIDE) -> nn.Module:
    """ResNet50 with drawn weights, and BatchNorm statistics of noise images, so that activations keep their sizes."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(pictures(4, 9, side))
    return model.eval().requires_grad_(False).to(device)


def pictures(count: int, seed: int, side: int = SIDE) -> Tensor:
    """Smooth noise in [0, 1], (count, 3, side, side) float32."""
    coarse = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").contiguous()


class Meter:
    """Wall and processor seconds, and peak memory above what stood before, of one call."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if self.cuda else _peak()

    def time(self, call: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
        best, cpu, found = float("inf"), float("inf"), None
        for _ in range(repeats):
            self._wait()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            found = call()
            self._wait()
            best = min(best, time.perf_counter() - wall_start)
            cpu = min(cpu, time.process_time() - cpu_start)
        return best, cpu, found

    def peak_mib(self) -> float:
        return ((torch.cuda.max_memory_allocated() if self.cuda else _peak()) - self.before) / 2**20

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(device: torch.device, n_baselines: int, batch_size: int) -> dict[str, float]:
    """Several images against all baselines."""
    model, x, b = network(device), pictures(IMAGES, 1).to(device), pictures(n_baselines, 2).to(device)
    meter = Meter(device)
    wall, cpu, found = meter.time(lambda: explain(model, x, b, CLASS, batch_size=batch_size), 1)
    pairs = IMAGES * n_baselines
    return _row(wall / pairs, cpu / pairs, meter.peak_mib(), float(found.completeness_error().max()))


def captum(device: torch.device, n_baselines: int, batch_size: int) -> dict[str, float]:
    """One image against all baselines, in one call, as DeepLiftShap has it."""
    from captum.attr import DeepLiftShap

    model, x, b = unshare_relus(network(device)), pictures(1, 1).to(device), pictures(n_baselines, 2).to(device)
    with torch.no_grad():
        difference = (model(x)[0, CLASS].double() - model(b).double().mean(0)[CLASS]).item()
    meter = Meter(device)
    wall, cpu, found = meter.time(lambda: DeepLiftShap(model).attribute(x, b, target=CLASS).detach(), 1)
    maps = found.double()
    error = abs(float(maps.sum()) - difference) / float(maps.abs().sum())
    return _row(wall / n_baselines, cpu / n_baselines, meter.peak_mib(), error)


def limit(device: torch.device, n_baselines: int, batch_size: int, *, channels_last: bool) -> dict[str, float]:
    """Plain autograd: the backward alone, and with the forward that it needs."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = network(device).to(memory_format=layout)
    x = pictures(batch_size, 1).to(device).contiguous(memory_format=layout).requires_grad_()
    meter = Meter(device)
    forward, forward_cpu, output = meter.time(lambda: model(x)[:, CLASS].sum(), 1)
    wall, cpu, _ = meter.time(lambda: torch.autograd.grad(output, x, retain_graph=True), 3)
    row = _row(wall / batch_size, cpu / batch_size, meter.peak_mib(), float("nan"))
    return {**row, "forward": forward / batch_size, "forward_cpu": forward_cpu / batch_size}


def paired(device: torch.device, n_baselines: int, batch_size: int) -> dict[str, float]:
    """Our backward sweep and the limit, in turns in one process: the median of the ratios of their processor times."""
    model, x, b = network(device), pictures(1, 1).to(device), pictures(batch_size, 2).to(device)
    layout = torch.channels_last
    model = model.to(memory_format=layout)
    leaf = b.contiguous(memory_format=layout).requires_grad_()
    output = model(leaf)[:, CLASS].sum()
    target = torch.tensor([CLASS], device=device)
    meter, ratios = Meter(device), []
    with torch.no_grad():
        tapes = [record(model, t.contiguous(memory_format=layout), RULES, CONSTANT_OPS) for t in (x, b)]
        for _ in range(7):
            _, plain, _ = meter.time(lambda: torch.autograd.grad(output, leaf, retain_graph=True), 1)
            _, mine, _ = meter.time(lambda: attribute_pairs(tapes[0], tapes[1], target), 1)
            ratios.append(mine / plain)
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def _row(wall: float, cpu: float, peak: float, error: float) -> dict[str, float]:
    return {"wall": wall, "cpu": cpu, "peak": peak, "error": error}


def unshare_relus(model: nn.Module) -> nn.Module:
    """The same model with a module of its own for every call of a ReLU."""
    traced = torch.fx.symbolic_trace(model)
    for place, node in enumerate(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.ReLU):
            traced.add_submodule(f"relu_{place}", nn.ReLU())
            node.target = f"relu_{place}"
    traced.recompile()
    return traced


WORKERS: dict[str, Callable[[torch.device, int, int], dict[str, float]]] = {
    "ours": ours,
    "captum": captum,
    "paired": paired,
    "limit_contiguous": lambda device, r, n: limit(device, r, n, channels_last=False),
    "limit_channels_last": lambda device, r, n: limit(device, r, n, channels_last=True),
}


def measure(name: str, batch_size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one worker in a process of its own."""
    options = ["--baselines", arguments.captum_baselines if name == "captum" else arguments.baselines]
    options += ["--threads", arguments.threads, "--device", arguments.device, "--batch-size", batch_size]
    command = [sys.executable, "-m", "benchmarks.attribution", "--worker", name, *map(str, options)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{name} {batch_size}: {row}\n")
    return row


def table(arguments: argparse.Namespace) -> str:
    """All rows as markdown, with what they were measured on."""
    sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    limits = {
        (layout, size): measure(f"limit_{layout}", size, arguments)
        for layout in ("contiguous", "channels_last")
        for size in sizes
    }
    mine = {size: measure("ours", size, arguments) for size in sizes}
    turns = measure("paired", sizes[-1], arguments)
    peer = measure("captum", arguments.captum_baselines, arguments)
    (layout, size), best = min(limits.items(), key=lambda item: item[1]["cpu"])
    both = best["cpu"] + best["forward_cpu"]
    lines = [
        f"| plain input-gradient backward alone, the limit ({layout}, {size} at once) | {best['wall']:.3f} "
        f"| {best['cpu']:.3f} | 1.00 | {best['peak']:.0f} | |",
        f"| the same with its forward | {best['wall'] + best['forward']:.3f} | {both:.3f} | {both / best['cpu']:.2f} "
        f"| {best['peak']:.0f} | |",
    ]
    for size, row in mine.items():
        lines.append(_line(f"ours, {IMAGES} images x {arguments.baselines} baselines, batch_size {size}", row, best))
    name = f"captum {importlib.metadata.version('captum')}, 1 image x {arguments.captum_baselines} baselines"
    lines.append(_line(name, peer, best))
    fastest = min(mine.values(), key=lambda row: row["cpu"])
    smallest = min(mine.values(), key=lambda row: row["peak"])
    head = [
        "# DeepLiftSHAP of ResNet50 at 224x224",
        "",
        "`python -m benchmarks.attribution`; float32, random weights, BatchNorm statistics of noise images. Wall and",
        "processor seconds a pair of image and baseline, all forward passes included; ratios are of processor",
        "seconds, which others on the machine disturb less. Peak memory in MiB above a process with the model loaded.",
        "captum holds all its pairs at once, so that its memory grows with their number.",
        "",
        "| | s a pair | CPU s a pair | x limit | peak MiB | completeness error |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
        f"Our fastest row is {peer['cpu'] / fastest['cpu']:.1f}x as fast as captum; our smallest peak is "
        f"{smallest['peak'] / peer['peak']:.2f} of captum's.",
        "The rows are measured one after another. Our backward sweep and the limit, taken in turns in one process",
        f"({sizes[-1]} pairs, 7 turns): {turns['ratio']:.2f}x the limit in the median ({turns['lowest']:.2f} to "
        f"{turns['highest']:.2f}). That is without forward passes, of which {IMAGES} images against "
        f"{arguments.baselines} baselines",
        f"need {IMAGES + arguments.baselines} or more for {IMAGES * arguments.baselines} pairs.",
        "",
        f"{datetime.datetime.now(datetime.UTC).date()}, {arguments.threads} of {processor(arguments.device)}; torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}.",
        arguments.note,
    ]
    return "\n".join(head).rstrip() + "\n"


def _line(name: str, row: dict[str, float], best: dict[str, float]) -> str:
    ratio = row["cpu"] / best["cpu"]
    return f"| {name} | {row['wall']:.3f} | {row['cpu']:.3f} | {ratio:.2f} | {row['peak']:.0f} | {row['error']:.1e} |"


def processor(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(torch.device(device))
    return f"{os.cpu_count()} cores of {cpu_model()}"


def main() -> None:
    """Measure every row, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/attribution.md"))
    parser.add_argument("--baselines", type=int, default=25)
    parser.add_argument("--captum-baselines", type=int, default=25, help="fewer where memory is short")
    parser.add_argument("--batch-sizes", default="9,13", help="pairs at once, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", default="", help="a remark on the machine's state for the table")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=8, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is None:
        arguments.out.write_text(table(arguments), encoding="utf-8")
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # captum announces its hooks
    row = WORKERS[arguments.worker](torch.device(arguments.device), arguments.baselines, arguments.batch_size)
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
