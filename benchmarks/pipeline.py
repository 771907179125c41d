"""The default pipeline from an empty store, stage by stage and two stages at a time, this commit beside an earlier one.

python -m benchmarks.pipeline [--against COMMIT] [--rounds 2]
"""

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEFORE = "f7fd49a"  # the last commit at which each method had a stage and settings of its own
RUNNING = re.compile(r"Running stage '([^']+)'")
DVC = "(DVC)"
COMMAND = (sys.executable, "-m", "lvlmva.cli")


def main() -> None:
    """Print the table of benchmarks/pipeline.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", default=BEFORE, help="an earlier commit")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    commits = {"before": arguments.against, "now": "HEAD"}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in commits}
    nothing: dict[str, list[float]] = {name: [] for name in commits}
    starts: dict[str, float] = {}
    two_at_a_time: list[float] = []
    for _ in range(arguments.rounds):
        for name, commit in commits.items():
            with tempfile.TemporaryDirectory() as folder:
                clone = _clone(commit, Path(folder))
                rounds[name].append(_stages(clone))
                nothing[name].append(_seconds(["dvc", "repro"], clone))
                if name == "now" and not starts:
                    starts = {stage: _start(stage, clone) for stage in rounds[name][0] if stage != DVC}
        with tempfile.TemporaryDirectory() as folder:
            clone = _clone("HEAD", Path(folder))
            two_at_a_time.append(_seconds([*COMMAND, "repro", "--jobs", "2"], clone))
    sys.stdout.write(
        f"{_table(rounds, nothing, starts, two_at_a_time)}\n\nMedians of {arguments.rounds} round(s), in turn, from an "
        f"empty store; before: {arguments.against}, by `dvc repro`; Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end; "
        f"{datetime.date.today().isoformat()}.\n"
    )


def _clone(commit: str, folder: Path) -> Path:
    clone = folder / "project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=clone, check=True)
    return clone


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("LVLMVA_STORE", "PYTHONPATH")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # an ordinary user's Python keeps what it compiled
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def _stages(clone: Path) -> dict[str, float]:
    """Seconds from the start of each stage to that of the next; DVC's own before the first."""
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=clone,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seconds: dict[str, float] = {}
    current, since = DVC, time.monotonic()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := RUNNING.match(line):
            seconds[current] = time.monotonic() - since
            current, since = found[1], time.monotonic()
    if process.wait():
        raise SystemExit("".join(lines[-20:]))
    seconds[current] = time.monotonic() - since
    return seconds


def _start(stage: str, clone: Path) -> float:
    """Seconds that a stage's process takes to import what it needs."""
    module = f"stages.{stage.partition('@')[0].replace('evaluate_base', 'evaluate')}"
    return min(_seconds([sys.executable, "-c", f"import {module}"], clone) for _ in range(3))


def _seconds(command: list[str], clone: Path) -> float:
    started = time.monotonic()
    subprocess.run(command, cwd=clone, env=_environment(), check=True, capture_output=True)
    return time.monotonic() - started


def _table(
    rounds: Mapping[str, list[dict[str, float]]],
    nothing: Mapping[str, list[float]],
    starts: Mapping[str, float],
    two_at_a_time: list[float],
) -> str:
    """Medians over rounds: a line a stage, the sums, and the time with nothing to do."""
    of_stage = {
        name: {stage: statistics.median(one[stage] for one in runs) for stage in runs[0]}
        for name, runs in rounds.items()
    }
    totals = [statistics.median(sum(one.values()) for one in rounds[name]) for name in ("before", "now")]
    together = statistics.median(two_at_a_time)
    idle = [statistics.median(nothing[name]) for name in ("before", "now")]
    lines = ["| seconds | before | now, `dvc repro` | of it start-up |", "|---|---|---|---|"]
    for stage in dict.fromkeys([*of_stage["now"], *of_stage["before"]]):
        cells = [f"{of_stage[name][stage]:.1f}" if stage in of_stage[name] else "" for name in ("before", "now")]
        lines.append(f"| {stage} | {cells[0]} | {cells[1]} | {f'{starts[stage]:.1f}' if stage in starts else ''} |")
    lines += [
        f"| **all** | **{totals[0]:.1f}** | **{totals[1]:.1f}** | **{sum(starts.values()):.1f}** |",
        f"| of before | 1.00 | {totals[1] / totals[0]:.2f} | |",
        f"| `lvlmva repro --jobs 2` (what `make demo` runs) | | {together:.1f} | |",
        f"| of before | | {together / totals[0]:.2f} | |",
        f"| nothing to do | {idle[0]:.1f} | {idle[1]:.1f} | |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
