"""A study over several base models: every method on each, once a seed; goes on where it was killed.

    python -m benchmarks.study knee --work <folder> --root <archive> --weights <file> [--bases 5] [--seeds 3]
    lvlmva tables docs/results/knee.csv --page docs/study.md

What is compared, by which measure and how was declared before the first run: docs/study.md. A work folder holds the
prepared data once, and for each base model what the stages of dvc.yaml write. Each piece of work leaves a file in
`done/` when it has come to its end; trainings keep their state inside (`lvlmva_core.resume`). What is there already is
skipped, so that the same command goes on after a kill, and takes in more bases or methods. After each base, and with
--tables alone, docs/results/<experiment>.csv and <experiment>_compared.csv are written from what is complete.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lvlmva.params import load_params
from lvlmva.pipeline import paths
from lvlmva.preset import preset
from lvlmva_core import methods
from lvlmva_core.arrays import read_json, write_json
from lvlmva_core.comparison import Runs, measure
from lvlmva_core.errors import InputError
from lvlmva_core.outputs import BASE, Outputs, read_outputs
from lvlmva_core.samples import read_samples, read_spurious_masks, rows_of_ids
from lvlmva_core.study import compared, rows_of

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
SHARED = ("images", "samples", "spurious_masks")
CHAIN = ("train", "rank", "attribute", "segment", "critique", "judge", "mask", "settings")
RESULTS = Path("docs/results")


def work_of(folder: Path, bases: int, chosen: list[str]) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Every piece of work in order: the base's folder, the stage, and its options beside paths."""
    yield folder / "base=0", "prepare", {}
    for base in range(bases):
        here = folder / f"base={base}"
        for stage in CHAIN:
            yield here, stage, {}
        yield here, "evaluate", {"method": BASE}
        for method in chosen:
            yield here, "align" if methods.METHODS[method].kind == "penalty" else "retrain", {"method": method}
            yield here, "evaluate", {"method": method}


def changes_of(experiment: str, seeds: int) -> list[str]:
    """What is laid over the preset, for every base alike; every method is there, so that more can be run later."""
    every = [name for name, method in methods.METHODS.items() if method.kind == "penalty"]
    listed = f"methods={{{', '.join(f'{name}: {{}}' for name in every)}}}"
    return [*CHANGES[experiment], *BRIEF, f"align.seeds={list(range(seeds))}", listed]


def set_up(here: Path, experiment: str, changes: list[str]) -> None:
    """Write params.yaml of a base. Raises InputError where another study lies there."""
    here.mkdir(parents=True, exist_ok=True)
    params, wanted = here / "params.yaml", here / "wanted.yaml"
    shutil.copy("params.yaml", wanted)
    with contextlib.redirect_stdout(io.StringIO()):  # the change is no news here
        preset(experiment, changes, False, wanted, Path("presets"))
    if params.exists() and load_params(params) != load_params(wanted):
        raise InputError(f"{params}: of another study (it differs from {wanted}); take another --work")
    wanted.replace(params)


def run(folder: Path, here: Path, stage: str, options: dict[str, str]) -> None:
    """Run a stage in this process, on the paths of dvc.yaml below `here`; what all bases share lies in `folder`."""
    function = getattr(importlib.import_module(f"stages.{stage}"), stage)
    known = {name: here / path for name, path in paths().items()}
    known |= {name: folder / Path(paths()[name]).name for name in SHARED}
    known |= {name: Path(paths()[name]) for name in ("own", "prompts", "overrides")}
    function(**{name: known[name] for name in inspect.signature(function).parameters if name in known}, **options)


def study(folder: Path, work: list[tuple[Path, str, dict[str, str]]], rows: Path) -> None:
    """Do what is not done, and say how long the rest will take, from how long each stage took here before."""
    took: dict[str, list[float]] = read_json(folder / "took.json") if (folder / "took.json").exists() else {}
    marks = [folder / "done" / "-".join([here.name, stage, *options.values()]) for here, stage, options in work]
    for place, ((here, stage, options), mark) in enumerate(zip(work, marks, strict=True)):
        if mark.exists():
            continue
        started = time.monotonic()
        run(folder, here, stage, options)
        took.setdefault(stage, []).append(time.monotonic() - started)
        write_json(folder / "took.json", took)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        every = [seconds for those in took.values() for seconds in those]
        left = sum(
            statistics.mean(took.get(work[at][1], every))
            for at in range(place + 1, len(work))
            if not marks[at].exists()
        )
        sys.stdout.write(
            f"{mark.name}: {took[stage][-1]:.0f} s; {place + 1} of {len(work)}, about {left / 60:.0f} min left\n"
        )
        sys.stdout.flush()
        if place + 1 == len(work) or work[place + 1][0] != here:
            write_tables(folder, rows)


def write_tables(folder: Path, rows: Path) -> None:
    """Write the rows, and beside them the comparisons, of what is complete."""
    samples = read_samples(folder / Path(paths()["samples"]).name)
    models: dict[str, dict[str, Outputs]] = {}
    values: dict[str, Runs] = {}
    for here in sorted(folder.glob("base=*")):
        done = {mark.name.rpartition("-")[2] for mark in (folder / "done").glob(f"{here.name}-evaluate-*")}
        files = {method: here / paths()["evaluations"] / f"{method}.safetensors" for method in done}
        outputs = {method: read_outputs(file) for method, file in files.items()}
        if BASE in outputs:
            base = here.name.partition("=")[2]
            explained = rows_of_ids(samples, outputs[BASE].map_ids)
            masks = read_spurious_masks(folder / Path(paths()["spurious_masks"]).name, explained)[0]
            models[base], values[base] = outputs, measure(outputs, samples, masks)[0]
    if values:
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows_of(values).to_csv(rows, index=False, float_format="%.6f")
        beside = rows.with_name(f"{rows.stem}_compared.csv")
        compared(models, samples).to_csv(beside, index=False, float_format="%.6f")


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
    changes += options.set
    for base in range(options.bases):
        set_up(folder / f"base={base}", options.experiment, [*changes, f"train.seed={base}"])
    study(folder, list(work_of(folder, options.bases, options.methods)), rows)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
