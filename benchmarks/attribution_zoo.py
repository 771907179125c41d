"""DeepLiftSHAP of vision models at their own sizes: exact or refused, and what a pair costs against plain autograd.

    python -m benchmarks.attribution_zoo [--out benchmarks/attribution_zoo.md] [--only swin]

The limit is one input-gradient backward pass a pair of image and baseline, without its forward. Our backward sweep and
the limit are taken in turns in one process; memory is that of a process of its own for each, forked from one that holds
the model. Pictures are smooth noise.
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

from benchmarks.attribution import Meter, processor
from benchmarks.zoo import ZOO, build, pictures
from lvlmva_core.attribution import UnsupportedOperationError, explain
from lvlmva_core.attribution.deep_lift import attribute_pairs
from lvlmva_core.attribution.rules import CONSTANT_OPS, RULES
from lvlmva_core.attribution.tape import record

CLASS, BASELINES, TURNS = 1, 4, 2
CPU = torch.device("cpu")


Row = dict[str, float | str]
MODEL: list[nn.Module] = []  # what a forked process finds


def ours(side: int) -> Row:
    """Errors, memory, and processor seconds a pair; or where the model is refused."""
    model, x, b = MODEL[0], pictures(1, side, 1), pictures(BASELINES, side, 2)
    meter = Meter(CPU)
    try:
        _, cpu, found = meter.time(lambda: explain(model, x, b, CLASS, batch_size=BASELINES), 1)
    except UnsupportedOperationError as error:
        return {"refused": str(error).partition("; ")[0]}
    gap = (found.attributions.double().flatten(1).sum(1) - (found.output - found.expected).double()).abs()
    row: Row = {
        "error": float(found.completeness_error().max()),
        "of_logit": float((gap / found.output.double().abs()).max()),
        "cpu": cpu / BASELINES,
        "peak": meter.peak_mib(),
    }
    leaf = b.clone().requires_grad_()
    output = model(leaf)[:, CLASS].sum()
    ratios, plains = [], []
    with torch.no_grad():
        baseline = record(model, b, RULES, CONSTANT_OPS)
        tape = record(model, x, RULES, CONSTANT_OPS)
        for _ in range(TURNS):
            _, plain, _ = meter.time(lambda: torch.autograd.grad(output, leaf, retain_graph=True), 1)
            _, mine, _ = meter.time(lambda: attribute_pairs(tape, baseline, torch.tensor([CLASS])), 1)
            ratios.append(mine / plain)
            plains.append(plain / BASELINES)
    return {**row, "ratio": statistics.median(ratios), "limit": statistics.median(plains)}


def limit(side: int) -> Row:
    """Peak memory of plain autograd for as many pairs as we hold."""
    model, leaf = MODEL[0], pictures(BASELINES, side, 2).requires_grad_()
    meter = Meter(CPU)
    meter.time(lambda: torch.autograd.grad(model(leaf)[:, CLASS].sum(), leaf), 1)
    return {"peak": meter.peak_mib()}


def apart(worker: Callable[[int], Row], side: int) -> Row:
    """A worker in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(worker, side).result()


def line(name: str) -> str:
    """A row of the table."""
    MODEL[:] = [build(name, small=False)]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else a fork counts what earlier models left as free
    side = ZOO[name].side
    row = apart(ours, side)
    sys.stderr.write(f"{name}: {row}\n")
    if "refused" in row:
        return f"| {name} | refused: `{row['refused']}` | | | | | |"
    plain = apart(limit, side)
    return (
        f"| {name}, {side} | {row['error']:.0e} | {row['of_logit']:.0e} | {row['limit']:.3f} | {row['cpu']:.3f} "
        f"| {row['ratio']:.2f} | {row['peak']:.0f} / {plain['peak']:.0f} |"
    )


def exactness(name: str) -> str:
    """A row of the table of errors, at the small size of the tests; or where the model is refused."""
    entry, errors = ZOO[name], []
    model = build(name, small=True)
    for dtype in (torch.float32, torch.float64) if entry.float64 else (torch.float32,):
        x, b = (pictures(count, entry.small_side, count, dtype) for count in (2, 3))
        try:
            errors.append(f"{float(explain(model.to(dtype), x, b, CLASS).completeness_error().max()):.0e}")
        except UnsupportedOperationError as error:
            return f"| {name} | refused: `{str(error).partition('; ')[0]}` | |"
    return f"| {name} | {' | '.join(errors)} |" + " |" * (not entry.float64)


def table(only: str, cost: str, note: str) -> str:
    """All models as markdown, with what they were measured on."""
    errors = [exactness(name) for name in ZOO if only in name]
    costs = [line(name) for name in ZOO if only in name and any(each in name for each in cost.split(","))]
    packages = ("torch", "torchvision", "timm", "transformers")
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in packages)
    head = [
        "# DeepLiftSHAP of vision models",
        "",
        "`python -m benchmarks.attribution_zoo`; random weights. The completeness error as a share of Σ|Φ|, the",
        "worst of two images against three baselines, of each model made small (`benchmarks/zoo.py` says how), or the",
        "place where it is refused:",
        "",
        "| model | float32 | float64 |",
        "|---|---|---|",
        *errors,
        "",
        "At the size that its library builds, in float32 on one thread. The limit is an input-gradient backward pass",
        "a pair, without its forward, in processor seconds; the whole is ours with all forwards",
        f"({1 + BASELINES} or {2 + BASELINES} for {BASELINES} pairs: an image that torch would run otherwise alone",
        "runs twice); the sweep is our backward alone, as a multiple of the limit, the median of",
        f"{TURNS} turns in one process. Memory is ours for {BASELINES} pairs held at once, beside plain autograd's for",
        f"a batch of {BASELINES}, above a process that holds the model. The error as above,",
        "and as a share of the logit, each of whose operations rounds by 6e-8.",
        "",
        "| model, side | error | of the logit | limit, s | whole, s | sweep, x limit | MiB, ours / plain |",
        "|---|---|---|---|---|---|---|",
        *costs,
        "",
        f"{datetime.datetime.now(datetime.UTC).date()}, 1 of {processor('cpu')}; {versions}, Python "
        f"{platform.python_version()}.",
        note,
    ]
    return "\n".join(head).rstrip() + "\n"


def main() -> None:
    """Measure every model, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/attribution_zoo.md"))
    parser.add_argument("--only", default="", help="a part of the names of models")
    parser.add_argument("--cost", default="", help="parts of the names of models whose cost is measured, with commas")
    parser.add_argument("--note", default="", help="a remark on the machine's state for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.write_text(table(arguments.only, arguments.cost, arguments.note), encoding="utf-8")


if __name__ == "__main__":
    main()
