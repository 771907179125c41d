"""Most memory of the stages up to segment at 1,000, 5,000 and 20,000 pictures, all of them explained.

python -m benchmarks.memory [--counts 1000 5000 20000] [--side 32]     prints the table of benchmarks/memory.md
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.machine import cpu_model
from benchmarks.stage_runs import Run, draw_pictures, run_stage, size_of, write_params

STAGES = ("prepare", "train", "rank", "attribute", "segment")


def small_params(pictures: Path, count: int, side: int) -> dict[str, dict[str, object]]:
    """Settings at which a sample takes as little time as it can."""
    return {
        "prepare": {"dataset": "folder", "root": str(pictures), "table": "table.csv", "image_size": side, "seed": 0},
        "train": {"hidden": 16, "epochs": 1},
        "rank": {"n_samples": count},
        "attribute": {"n_baselines": 2},
        "segment": {"n_regions": 2, "n_starts": 2},
    }


def measure(count: int, side: int) -> tuple[dict[str, Run], int, int]:
    """What each stage took, and the files and bytes of the store."""
    with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
        pictures, project = Path(folder) / "pictures", Path(folder) / "project"
        draw_pictures(pictures, count, side)
        write_params(project, small_params(pictures, count, side))
        return {stage: run_stage(project, stage) for stage in STAGES}, *size_of(project / "store")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 5000, 20_000])
    parser.add_argument("--side", type=int, default=32)
    arguments = parser.parse_args()
    columns = ["samples", *(f"{stage}, MiB" for stage in STAGES), *(f"{stage}, ms a sample" for stage in STAGES[-2:])]
    rows = []
    for count in arguments.counts:
        found, files, size = measure(count, arguments.side)
        cells = [f"{found[stage].peak:.0f}" for stage in STAGES]
        cells += [f"{1000 * found[stage].processor / count:.1f}" for stage in STAGES[-2:]]
        rows.append(f"| {count} | {' | '.join(cells)} | {files} | {size / 2**20:.0f} |")
        sys.stderr.write(f"{rows[-1]}\n")
    columns += ["files in the store", "their MiB"]
    sys.stdout.write(
        f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n" + "\n".join(rows) + "\n\n"
        f"Pictures of {arguments.side}x{arguments.side}, one channel. {cpu_model()}, {os.cpu_count()} CPUs, load "
        f"average {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {version('torch')}, zarr "
        f"{version('zarr')}; {datetime.date.today().isoformat()}.\n"
    )


if __name__ == "__main__":
    main()
