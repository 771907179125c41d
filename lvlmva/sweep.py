"""A sweep of experiments as a table and a figure: `lvlmva sweep --experiments sweep.csv --setting ...`."""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlmva_core.errors import InputError
from lvlmva_core.methods import METHODS
from lvlmva_core.metrics import METRICS
from lvlmva_core.report.tables import markdown_table

if TYPE_CHECKING:
    import pandas as pd


SWEPT = ("lvlm_va", "random_masks", "rrr_gt")


def sweep(
    experiments: Annotated[Path, typer.Option(help="what `dvc exp show --csv` wrote")],
    setting: Annotated[str, typer.Option(help="a key of params.yaml, such as align.rrr_lambda")],
    also: Annotated[str, typer.Option(help="further columns of that file, separated by commas")] = "",
    out: Annotated[Path, typer.Option(help="the figure")] = Path("reports/sweep.png"),
) -> None:
    """Print (as Markdown) and draw accuracy, WGA and μ_align of the experiments over a setting of params.yaml.

    `experiments` is what `dvc exp show --csv` wrote, `setting` a key such as align.rrr_lambda, `also` further columns
    of that file for the table, separated by commas. The workspace is passed over, and so are experiments without
    metrics.
    """
    import pandas as pd

    from lvlmva_core.report.figures import save_figure, sweep_figure  # matplotlib: no other command should wait for it

    table, columns = read_experiments(experiments, setting, [name for name in also.split(",") if name])
    values = {
        (x, f"{METHODS[method].label}: {metric}"): f"{mean:.3f} ± {std:.3f}"
        for x, method, metric, mean, std in table.itertuples(index=False)
    }
    found = pd.Series(values).unstack(sort=False)
    found = pd.concat([columns.reindex(found.index), found], axis=1)
    if pd.api.types.is_numeric_dtype(table["x"]):
        found = found.sort_index()
    cells = [[_cell(x), *map(_cell, row)] for x, row in zip(found.index, found.to_numpy(), strict=True)]
    sys.stdout.write(markdown_table([setting, *found.columns], cells))
    save_figure(sweep_figure(table, setting), out)


def read_experiments(path: Path, setting: str, also: Sequence[str] = ()) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Metrics with columns x, method, metric, mean, std; and the columns named in `also`, by x. Of equal x the first.

    Raises:
        InputError: the file is not there, a name is no column of it, or no experiment has metrics.
    """
    import pandas as pd

    try:
        shown = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable; write it with `dvc exp show --csv > {path}`") from error
    key = _column(shown, "params.yaml", setting)
    if key is None:
        raise InputError(f"{path}: no column '{setting}'; name a key of params.yaml, such as align.rrr_lambda")
    for name in also:
        if name not in shown:
            raise InputError(f"{path}: no column '{name}'; its first line names them all")
    shown = shown[shown["rev"] != "workspace"]  # the workspace repeats the last experiment that was applied
    rows = []
    for method, metric in product(SWEPT, ("accuracy", "wga", "mu_align")):
        name = f"methods.{method}.test.{metric}"
        mean, std = (_column(shown, "metrics/evaluate.json", f"{name}.{part}") for part in ("mean", "std"))
        if mean is not None and std is not None:
            rows += [
                (x, method, METRICS[metric].heading, *values)
                for x, *values in shown[[key, mean, std]].itertuples(index=False)
            ]
    found = pd.DataFrame(rows, columns=["x", "method", "metric", "mean", "std"]).dropna()
    if found.empty:
        raise InputError(f"{path}: no experiment has metrics of {', '.join(SWEPT)}; run them with `dvc exp run`")
    columns = {name: shown[[key, name]].dropna().drop_duplicates(key).set_index(key)[name] for name in also}
    return found.drop_duplicates(["x", "method", "metric"], ignore_index=True), pd.DataFrame(columns)


def _cell(value: Any) -> str:
    import pandas as pd

    if pd.isna(value):
        return "not known"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _column(shown: "pd.DataFrame", file: str, key: str) -> str | None:
    """DVC names a column by its file only where several files have the key."""
    return next((name for name in (f"{file}:{key}", key) if name in shown), None)
