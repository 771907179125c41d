"""Throughput of `lvlmva work` with two workers over one, for attribute and segment.

python -m benchmarks.work [--rounds 3] [--samples 256]     prints the markdown table of benchmarks/work.md

Each round fills an empty store with one worker, then another with two, on one thread each, and then asks a worker for
a share that is there already: its seconds are start-up (Python, torch, reading the model and the pictures), which is
paid once a worker, whatever the number of samples. Processor seconds are those of all processes of a command.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.machine import cpu_model
from lvlmva_core.arrays import write_arrays, write_table
from lvlmva_core.models import ModelSpec, build_model, save_checkpoint
from tests.pipeline.project import Project

STAGES = ("attribute", "segment")
MODELS = {
    "mlp, 28x28": (ModelSpec("mlp", 1, 28, 28, 10, 256), {"attribute.n_baselines": 25, "segment.n_starts": 32}),
    "small_resnet, 64x64": (ModelSpec("small_resnet", 3, 64, 64, 3, 16), {"attribute.n_baselines": 5}),
}


@dataclass(frozen=True)
class Took:
    """Seconds on the clock, and of the processor."""

    clock: float
    processor: float


def make(folder: Path, spec: ModelSpec, changes: dict[str, Any], samples: int) -> Project:
    """A project as it is before attribute: pictures drawn at random, a model that is not trained."""
    folder.mkdir()
    params = {"compute.threads": 1, "rank.n_samples": samples, "train.model": spec.name, **changes}
    project = Project(folder, params)
    draws = np.random.default_rng(0)
    shape = (samples, spec.channels, spec.height, spec.width)
    images = draws.integers(0, 256, shape, dtype=np.uint8)
    ids = np.array([f"s{n:06d}" for n in range(samples)])
    table = pd.DataFrame({"id": ids, "split": "train", "label": draws.integers(0, spec.n_classes, samples)})
    (folder / "data").mkdir()
    (folder / "models").mkdir()
    names = [str(n) for n in range(spec.n_classes)]
    write_arrays(folder / "data/images.zarr", {"images": images}, {"class_names": names})
    write_table(folder / "data/samples.parquet", table.assign(spurious=False, group="0/0", source="", sha256=""))
    write_table(folder / "data/alignment_set.parquet", pd.DataFrame({"id": ids}))
    save_checkpoint(folder / "models/base.safetensors", spec, build_model(spec, 0).eval())
    return project


def took(project: Project, store: Path, *command: str) -> Took:
    """Run a command of the project with a store."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**project.environment, "LVLMVA_STORE": str(store)}
    done = subprocess.run(
        [sys.executable, *command], cwd=project.folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(time.monotonic() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()
    write = sys.stdout.write
    write("| model | stage | start-up | one worker | two workers | throughput, two over one | processor: one | two |\n")
    write("|---|---|---|---|---|---|---|---|\n")
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as temporary:
        for title, (spec, changes) in MODELS.items():
            project = make(Path(temporary) / spec.name, spec, changes, arguments.samples)
            for stage in STAGES:
                row = _measure(project, stage, arguments.rounds, loads)
                start, one, two = ([statistics.median(each) for each in zip(*row[name], strict=True)] for name in row)
                ratio = (one[0] - start[0]) / (two[0] - start[0])
                write(
                    f"| {title} | {stage} | {start[0]:.1f} s | {one[0]:.1f} s | {two[0]:.1f} s | {ratio:.2f} | "
                    f"{one[1]:.1f} s | {two[1]:.1f} s |\n"
                )
                sys.stdout.flush()
    write(
        f"\n{arguments.samples} samples, medians of {arguments.rounds} rounds; {cpu_model()}, {os.cpu_count()} cores; "
        f"torch {torch.__version__}; load {min(loads):.1f} to {max(loads):.1f}; {datetime.now(UTC):%Y-%m-%d}.\n"
    )


def _measure(project: Project, stage: str, rounds: int, loads: list[float]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {"start": [], "one": [], "two": []}
    worker = ("-m", "lvlmva.cli", "work", "--stage", stage)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as temporary:
            stores = {"one": Path(temporary) / "one", "two": Path(temporary) / "two"}
            for name, count in (("one", "1"), ("two", "2")):
                each = took(project, stores[name], *worker, "--workers", count)
                found[name].append((each.clock, each.processor))
            again = took(project, stores["one"], *worker, "--workers", "1")
            found["start"].append((again.clock, again.processor))
            took(project, stores["one"], "-m", f"stages.{stage}")  # the next stage reads its output
            loads.append(os.getloadavg()[0])
    return found


if __name__ == "__main__":
    main()
