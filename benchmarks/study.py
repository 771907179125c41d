"""A study over several base models: every method on each, once a seed; goes on where it was killed.

    python -m benchmarks.study knee --work <folder> --root <archive> --weights <file> [--bases 5] [--seeds 3]
    lvlmva tables docs/results/knee.csv --page docs/study.md

What is compared, by which measure and how was declared before the first run: docs/study.md. It is `lvlmva experiments`
on a preset with a few changes, with a store of its own in the work folder. The same command goes on after a kill, and
takes in more bases, seeds or methods. After each base, and with --tables alone, docs/results/<experiment>.csv and
<experiment>_compared.csv are written from what is complete.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlmva import experiments_folder
from lvlmva.changes import read_content
from lvlmva.engines import Execution
from lvlmva.experiments import run_study, write_tables
from lvlmva.experiments_folder import Study
from lvlmva.preset import preset
from lvlmva_core import methods
from lvlmva_core.errors import InputError

METHODS = (
    *("lambda_zero", "lvlm_va_counterexamples", "counterexamples_random_masks", "counterexamples_class_matched"),
    *("lvlm_va", "random_masks", "class_matched", "flagged_pictures"),
    *("lvlm_va_both", "both_random_masks", "both_class_matched"),
)
CHANGES: dict[str, tuple[str, ...]] = {  # laid over the preset; why: docs/study.md
    "decoy_digits": (
        *("critique.critic=oracle", "critique.false_negative_rate=0.13", "critique.false_positive_rate=0.05"),
    ),
    "decoy_mnist": (
        *("critique.critic=oracle", "critique.false_negative_rate=0.13", "critique.false_positive_rate=0.05"),
        "retrained={}",
    ),
    "knee": ("critique.false_negative_rate=0.13", "critique.false_positive_rate=0.0045"),
    "skin": (
        "critique.false_negative_rate=0.13",
        "critique.false_positive_rate=0.01",
        "align.selection=null",
        "retrained={}",
    ),
}
# for every experiment: what a study does not report is not measured at length
BRIEF = ("exchange.n_held_out=1", "exchange.n_donors=1", "evaluate.robustness=false")
RESULTS = Path("docs/results")


def changes_of(experiment: str, seeds: int) -> list[str]:
    """What is laid over the preset, for every base alike; every method is there, so that more can be run later."""
    every = [name for name, method in methods.METHODS.items() if method.kind == "penalty"]
    listed = f"methods={{{', '.join(f'{name}: {{}}' for name in every)}}}"
    return [*CHANGES[experiment], *BRIEF, f"align.seeds={list(range(seeds))}", listed]


def preset_content(experiment: str, changes: Sequence[str]) -> Any:
    """The params of a preset with changes laid over it."""
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder) / "params.yaml"
        shutil.copy("params.yaml", params)
        with contextlib.redirect_stdout(io.StringIO()):  # the change is no news here
            preset(experiment, list(changes), False, params, Path("presets"))
        return read_content(params)


def main() -> None:
    """Parse the command line, set up the folder, do the work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=list(CHANGES))
    parser.add_argument("--work", type=Path, required=True, help="folder of the study")
    parser.add_argument("--root", default="", help="prepare.root")
    parser.add_argument("--weights", default="", help="train.weights")
    parser.add_argument("--bases", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="any; retrained ones need -S retrained=...")
    parser.add_argument("--set", "-S", action="append", default=[], help="section.key=value, laid over it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the rows are written")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args()
    folder = options.work.resolve()
    rows = options.results / f"{options.experiment}.csv"
    os.environ["LVLMVA_STORE"] = str(folder / "store")
    if options.tables:
        write_tables(folder, rows)
        return
    changes = changes_of(options.experiment, options.seeds)
    changes += [f"prepare.root={options.root}"] if options.root else []
    changes += [f"train.weights={options.weights}"] if options.weights else []
    study = Study(folder, tuple(range(options.bases)), tuple(options.methods))
    experiments_folder.set_up(study, preset_content(options.experiment, [*changes, *options.set]))
    failed = run_study(study, Execution(workers=1), rows_each_base=rows)
    if failed:
        raise InputError(f"not done: {', '.join(failed)}; what they said lies in {folder / 'logs'}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
