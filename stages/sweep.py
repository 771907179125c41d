"""A sweep of experiments as a table and a figure: `python -m stages.sweep --experiments sweep.csv ...`."""

import sys
from itertools import product
from pathlib import Path

import pandas as pd

from lvlmva_core.errors import InputError
from lvlmva_core.report.figures import save_figure, sweep_figure
from stages.entry import run
from stages.results import HEADINGS

METHODS = ("lvlm_va", "rrr_gt")


def sweep(experiments: Path, setting: str, out: Path = Path("reports/sweep.png")) -> None:
    """Print and draw accuracy, WGA and μ_align of the experiments over a setting of params.yaml.

    `experiments` is what `dvc exp show --csv` wrote, `setting` a key such as align.rrr_lambda. The workspace is passed
    over, and so are experiments without metrics.
    """
    table = read_experiments(experiments, setting)
    wide = table.assign(value=[f"{m:.3f} ± {s:.3f}" for m, s in zip(table["mean"], table["std"], strict=True)])
    wide = wide.pivot_table(index="x", columns=["method", "metric"], values="value", aggfunc="first", sort=False)
    sys.stdout.write(f"{wide.to_string()}\n")
    save_figure(sweep_figure(table, setting), out)


def read_experiments(path: Path, setting: str) -> pd.DataFrame:
    """Columns x, method, metric, mean, std of all experiments that have them, the first of equal x.

    Raises:
        InputError: the file is not there, the setting is no column of it, or no experiment has metrics.
    """
    try:
        shown = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable; write it with `dvc exp show --csv > {path}`") from error
    key = _column(shown, "params.yaml", setting)
    if key is None:
        raise InputError(f"{path}: no column '{setting}'; name a key of params.yaml, such as align.rrr_lambda")
    shown = shown[shown["rev"] != "workspace"]  # it repeats the last experiment that was applied
    rows = []
    for method, metric in product(METHODS, ("accuracy", "wga", "mu_align")):
        name = f"methods.{method}.test.{metric}"
        mean, std = (_column(shown, "metrics/evaluate.json", f"{name}.{part}") for part in ("mean", "std"))
        if mean is not None and std is not None:
            rows += [
                (x, method, HEADINGS[metric], *values) for x, *values in shown[[key, mean, std]].itertuples(index=False)
            ]
    found = pd.DataFrame(rows, columns=["x", "method", "metric", "mean", "std"]).dropna()
    if found.empty:
        raise InputError(f"{path}: no experiment has metrics of {', '.join(METHODS)}; run them with `dvc exp run`")
    return found.drop_duplicates(["x", "method", "metric"], ignore_index=True)


def _column(shown: pd.DataFrame, file: str, key: str) -> str | None:
    """DVC names a column by its file only where several files have the key."""
    return next((name for name in (f"{file}:{key}", key) if name in shown), None)


if __name__ == "__main__":
    run(sweep)
