"""DeepLiftSHAP of vision models at their own sizes: exact or refused, and what a pair costs against plain autograd.

    python -m benchmarks.attribution_zoo [--out benchmarks/attribution_zoo.md] [--only swin]

The limit is one input-gradient backward pass a pair of image and baseline, without its forward. Our backward sweep and
the limit are taken in turns in one process; memory is that of a process of its own for each. Pictures are smooth noise.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.attribution import Meter, processor
from benchmarks.zoo import ZOO, build, pictures
from lvlmva_core.attribution import UnsupportedOperationError, explain
from lvlmva_core.attribution.deep_lift import attribute_pairs
from lvlmva_core.attribution.rules import CONSTANT_OPS, RULES
from lvlmva_core.attribution.tape import record

CLASS, IMAGES, BASELINES, TURNS = 1, 2, 4, 3
CPU = torch.device("cpu")


def ours(name: str) -> dict[str, float | str]:
    """Errors, memory, and processor seconds a pair; or where the model is refused."""
    model, side = build(name, small=False), ZOO[name].side
    x, b = pictures(IMAGES, side, 1), pictures(BASELINES, side, 2)
    meter = Meter(CPU)
    try:
        _, cpu, found = meter.time(lambda: explain(model, x, b, CLASS, batch_size=BASELINES), 1)
    except UnsupportedOperationError as error:
        return {"refused": str(error).partition("; ")[0]}
    gap = (found.attributions.double().flatten(1).sum(1) - (found.output - found.expected).double()).abs()
    row: dict[str, float | str] = {
        "error": float(found.completeness_error().max()),
        "of_logit": float((gap / found.output.double().abs()).max()),
        "cpu": cpu / (IMAGES * BASELINES),
        "peak": meter.peak_mib(),
    }
    leaf = b.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(leaf)[:, CLASS].sum()
    ratios, plains = [], []
    with torch.no_grad():
        baseline = record(model, b, RULES, CONSTANT_OPS)
        tape = record(model, x[:1], RULES, CONSTANT_OPS)
        for _ in range(TURNS):
            _, plain, _ = meter.time(lambda: torch.autograd.grad(output, leaf, retain_graph=True), 1)
            _, mine, _ = meter.time(lambda: attribute_pairs(tape, baseline, torch.tensor([CLASS])), 1)
            ratios.append(mine / plain)
            plains.append(plain / BASELINES)
    return {**row, "ratio": statistics.median(ratios), "limit": statistics.median(plains)}


def limit(name: str) -> dict[str, float | str]:
    """Peak memory of plain autograd for as many pairs as we hold."""
    model, side = build(name, small=False), ZOO[name].side
    leaf = pictures(BASELINES, side, 2).requires_grad_()
    meter = Meter(CPU)
    meter.time(lambda: torch.autograd.grad(model(leaf)[:, CLASS].sum(), leaf), 1)
    return {"peak": meter.peak_mib()}


WORKERS = {"ours": ours, "limit": limit}


def measure(worker: str, name: str) -> dict[str, float | str]:
    """Run one worker in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.attribution_zoo", "--worker", worker, "--model", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    row: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{name} {worker}: {row}\n")
    return row


def line(name: str) -> str:
    """A row of the table."""
    row = measure("ours", name)
    if "refused" in row:
        return f"| {name} | refused: `{row['refused']}` | | | | | |"
    plain = measure("limit", name)
    return (
        f"| {name}, {ZOO[name].side} | {row['error']:.0e} | {row['of_logit']:.0e} | {row['limit']:.3f} "
        f"| {row['cpu']:.3f} | {row['ratio']:.2f} | {row['peak']:.0f} / {plain['peak']:.0f} |"
    )


def table(only: str, note: str) -> str:
    """All models as markdown, with what they were measured on."""
    rows = [line(name) for name in ZOO if only in name]
    versions = ", ".join(
        f"{library} {importlib.metadata.version(library)}"
        for library in ("torch", "torchvision", "timm", "transformers")
    )
    head = [
        "# DeepLiftSHAP of vision models at their own sizes",
        "",
        "`python -m benchmarks.attribution_zoo`; float32, random weights, one thread. Models and sizes of their pictures",
        "as their libraries build them. The completeness error is a share of Σ|Φ|, and of the logit, whose own rounding",
        "is 6e-8 of it. The limit is an input-gradient backward pass a pair, without its forward, in processor seconds;",
        f"the whole is ours with all forwards ({IMAGES + BASELINES} for {IMAGES * BASELINES} pairs); the sweep is our",
        f"backward without them as a multiple of the limit, the median of {TURNS} turns in one process. Memory is ours",
        f"for {BASELINES} pairs held at once, beside plain autograd's for a batch of {BASELINES}, above the loaded model.",
        "",
        "| model, side | error | of the logit | limit, s | whole, s | sweep, x limit | MiB, ours / plain |",
        "|---|---|---|---|---|---|---|",
        *rows,
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
    parser.add_argument("--note", default="", help="a remark on the machine's state for the table")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is None:
        arguments.out.write_text(table(arguments.only, arguments.note), encoding="utf-8")
        return
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(WORKERS[arguments.worker](arguments.model)) + "\n")


if __name__ == "__main__":
    main()
