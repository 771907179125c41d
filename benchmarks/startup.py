"""What a stage costs before it computes anything: its start, and the whole of it where the store holds its records.

python -m benchmarks.startup [--against COMMIT] [--rounds 3]

The records are computed by the earlier commit; that this one computes none shows that it finds them by the same keys.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.pipeline import ROOT
from benchmarks.stage_runs import Run, machine, run_stage, write_params

BEFORE = "150dac6"  # the last commit at which every stage read the sample table by pandas
FILLING = ("prepare", "train", "rank", "attribute", "segment", "exchange", "settings", "critique", "judge")
STARTED = (*FILLING, "mask", "align", "retrain", "explain", "evaluate", "compare", "report")
KEPT = ("attribute", "segment")  # whose records are in the store
QUICK = ("critique", "judge", "mask", "settings")  # which have little to compute, here by stand-ins


def main() -> None:
    """Print the tables of benchmarks/startup.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", default=BEFORE, help="an earlier commit")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    whole, started = (*KEPT, *QUICK), tuple(f"{stage} --help" for stage in STARTED)
    with tempfile.TemporaryDirectory() as folder:
        earlier, project = Path(folder) / "earlier", Path(folder) / "project"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(earlier)], check=True)
        subprocess.run(["git", "checkout", "--quiet", arguments.against], cwd=earlier, check=True)
        write_params(project, {"methods": {"lvlm_va": {}}})
        for stage in FILLING:
            run_stage(project, stage, earlier)
        (project / "said.txt").unlink()
        runs: dict[tuple[str, Path], list[Run]] = {}
        for _ in range(arguments.rounds):
            for stage in (*whole, *started):
                for code in (earlier, ROOT):
                    runs.setdefault((stage, code), []).append(run_stage(project, stage, code))
        said = (project / "said.txt").read_text(encoding="utf-8")
        if said.count(" are there, 0 to compute") != 2 * len(KEPT) * arguments.rounds:
            raise SystemExit(f"records were computed anew:\n{said}")

        def row(stage: str) -> str:
            cells = [
                f"{statistics.median(getattr(run, name) for run in runs[stage, code]):.2f}"
                for name in ("processor", "clock")
                for code in (earlier, ROOT)
            ]
            return f"| {stage.removesuffix(' --help')} | {' | '.join(cells)} |\n"

        head = "| {} | processor: before | now | clock: before | now |\n|---|---|---|---|---|\n"
        sys.stdout.write(head.format("the whole stage, records kept") + "".join(row(stage) for stage in whole))
        sys.stdout.write("\n" + head.format("start (`--help`)") + "".join(row(stage) for stage in started))
    sys.stdout.write(
        f"\nSeconds, medians of {arguments.rounds} rounds in turn; before: {arguments.against}; {machine()}\n"
    )


if __name__ == "__main__":
    main()
