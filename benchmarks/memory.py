"""Most memory of the stages up to segment at 1,000, 5,000 and 20,000 pictures, all of them explained.

python -m benchmarks.memory [--counts 1000 5000 20000] [--side 32]     prints the table of benchmarks/memory.md
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.stage_runs import draw_pictures, machine, run_stage, size_of, write_params

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


def measure(count: int, side: int) -> dict[str, Any]:
    """What each stage took, and the files and bytes of the store."""
    with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
        pictures, project = Path(folder) / "pictures", Path(folder) / "project"
        draw_pictures(pictures, count, side)
        write_params(project, small_params(pictures, count, side))
        stages = {stage: run_stage(project, stage)._asdict() for stage in STAGES}
        files, size = size_of(project / "store")
    return {"samples": count, "side": side, "stages": stages, "store_files": files, "store_bytes": size}


def table_of(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a run."""
    columns = ["samples", "pixels a side", *(f"{stage}, MiB" for stage in STAGES)]
    columns += [*(f"{stage}, ms a sample" for stage in STAGES[-2:]), "files in the store", "their MiB"]
    rows = []
    for run in runs:
        stages = run["stages"]
        cells = [f"{run['samples']}", f"{run['side']}", *(f"{stages[stage]['peak']:.0f}" for stage in STAGES)]
        cells += [f"{1000 * stages[stage]['processor'] / run['samples']:.1f}" for stage in STAGES[-2:]]
        cells += [f"{run['store_files']}", f"{run['store_bytes'] / 2**20:.0f}"]
        rows.append(f"| {' | '.join(cells)} |\n")
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n{''.join(rows)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 5000, 20_000])
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--json", type=Path, help="also write what was measured, after each run")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for count in arguments.counts:
        runs.append(measure(count, arguments.side))
        sys.stderr.write(f"{runs[-1]}\n")
        if arguments.json is not None:
            arguments.json.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1), encoding="utf-8")
    sys.stdout.write(f"{table_of(runs)}\n{machine()}\n")


if __name__ == "__main__":
    main()
