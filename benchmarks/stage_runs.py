"""Pictures that are drawn, a project around them, and its stages run each in a process of its own: time and memory."""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.machine import cpu_model
from benchmarks.pipeline import ROOT

LAUNCH = """
import json, os, sys, time
started = time.perf_counter()
child = os.spawnv(os.P_NOWAIT, sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(child, 0)
took = [used.ru_utime + used.ru_stime, time.perf_counter() - started, used.ru_maxrss / 1024]
open(sys.argv[1], "w").write(json.dumps(took))
sys.exit(os.waitstatus_to_exitcode(status))
"""
HELD_OUT = 64  # pictures of the splits val and test


class Run(NamedTuple):
    """Of one process: seconds of the processor (user and system), seconds on the clock, most memory, MiB."""

    processor: float
    clock: float
    peak: float


def draw_pictures(folder: Path, count: int, side: int, channels: int = 1) -> None:
    """`count` PNGs of the split train and HELD_OUT of val and of test: noise with a blob whose place is the class."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["path,label,split"]
    splits = ["train"] * count + ["val"] * HELD_OUT + ["test"] * HELD_OUT
    for place, split in enumerate(splits):
        pixels = rng.integers(0, 128, (side, side, channels), dtype=np.uint8)
        corner = side // 8 if place % 2 else side // 2
        pixels[corner : corner + side // 3, corner : corner + side // 3] += 100
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(folder / f"{place:07d}.png", compress_level=1)
        lines.append(f"{place:07d}.png,{'ab'[place % 2]},{split}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_params(project: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """The params that the repository is delivered with, and dvc.yaml and prompts, with sections changed."""
    from ruamel.yaml import YAML

    yaml = YAML()
    content = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, values in changes.items():
        if "dataset" in values or section == "methods":  # another data set has other keys
            content[section] = {}
        content[section].update(values)
    project.mkdir(parents=True, exist_ok=True)
    with (project / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(content, file)
    for name in ("dvc.yaml", "prompts", "overrides", "own"):
        link = project / name
        if not link.exists():
            link.symlink_to(ROOT / name)


def run_stage(project: Path, stage: str, code: Path = ROOT) -> Run:
    """`python -m stages.<stage>` in the project, with the store `store` there; what it took.

    stage: with its options. code: the repository.
    """
    environment = {**os.environ, "LVLMVA_STORE": str(project / "store"), "PYTHONPATH": str(code)}
    found = project / "took.json"
    with (project / "said.txt").open("ab") as said:
        # by a process between, since Linux counts the memory of whoever forks as its child's
        command = [sys.executable, "-S", "-c", LAUNCH, str(found), sys.executable, "-m", *f"stages.{stage}".split()]
        code_of = subprocess.run(
            command, cwd=project, env=environment, stdout=said, stderr=said, check=False
        ).returncode
    if code_of:
        raise SystemExit(f"{stage}: exit code {code_of}\n{(project / 'said.txt').read_text()[-2000:]}")
    return Run(*json.loads(found.read_text(encoding="utf-8")))


def size_of(folder: Path) -> tuple[int, int]:
    """Files below a folder, and their bytes."""
    files = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return len(files), sum(files)


def machine() -> str:
    """Processor, versions, date and load, in a line."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "zarr"))
    return (
        f"{cpu_model()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, {versions}; {datetime.date.today().isoformat()}."
    )
