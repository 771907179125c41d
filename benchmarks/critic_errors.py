"""How wrong may the critic be? Both corrections over a grid of wrong verdicts; goes on where it was killed.

    python -m benchmarks.critic_errors --work <folder> [--bases 3] [--errors by_class]
    python -m benchmarks.critic_errors --report      # figures and the page's tables anew, from the committed rows

What is measured, and how, was declared before the first run: docs/critic_errors.md.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.trials import CORRECTIONS, LAMBDA_ZERO, Trial, differences, values_of, write_table
from lvlmva.tables import put_tables
from lvlmva_core.errors import InputError
from lvlmva_core.methods import METHODS
from lvlmva_core.outputs import BASE, Outputs
from lvlmva_core.report.tables import markdown_table

MISSED = (0.0, 0.12, 0.24, 0.36, 0.48, 0.6)  # false negatives
FALSE_ALARMS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # false positives
ERRORS = {
    "independent": "independent errors",
    "by_class": "all errors in some classes",
    "small_regions": "errors on the smallest regions",
}
MEASURES = {"reliance": "reliance", "wga": "WGA", "accuracy": "accuracy"}
ROWS, COMPARED = Path("docs/results/critic_errors.csv"), Path("docs/results/critic_errors_differences.csv")
PAGE, IMAGES = Path("docs/critic_errors.md"), Path("docs/images")
COMMAND = "python -m benchmarks.critic_errors --report"
# LVLM-VA's critics on knee (its recall) and USD per million input tokens, as the paper gives them
CRITICS = {
    "GPT-5": (1.0, 1.25),
    "Llama-4-Scout": (0.88, None),
    "GPT-4o": (0.87, 2.5),
    "Qwen3-VL-235B": (0.46, None),
    "GPT-4o-mini": (0.42, 0.15),
}
CALLS, TOKENS = 256, 1700  # of an alignment set; in, a sample, Critic and Judge together (docs/critics.md)

Cell = tuple[str, float, float]  # errors, false negatives, false positives


def cells() -> list[Cell]:
    """All cells, the most wanted first; what all kinds of errors have in common, no error at all, is there once."""
    found: list[Cell] = [("independent", missed, alarms) for missed in MISSED for alarms in FALSE_ALARMS]
    for errors in list(ERRORS)[1:]:
        found += [
            (errors, missed, alarms) for missed in MISSED[::2] for alarms in FALSE_ALARMS[::2] if missed or alarms
        ]
    return found


def measure(folder: Path, bases: int, train: bool, kinds: Sequence[str]) -> None:
    """Train what is not there, and write the rows and comparisons of what is complete, after each kind of errors."""
    trials = [Trial(folder / f"base={base}", "decoy_digits", [f"train.seed={base}"]) for base in range(bases)]
    if not train:
        write_rows(trials, kinds)
        return
    wanted = [cell for cell in cells() if cell[0] in kinds]
    started, trained = time.monotonic(), 0
    for base, trial in enumerate(trials):
        trial.train(LAMBDA_ZERO, base, {LAMBDA_ZERO: {}})
    for errors in kinds:
        chosen = [cell for cell in wanted if cell[0] == errors]
        for base, trial in enumerate(trials):
            trial.train("lvlm_va", base, {_name("lvlm_va", cell): _critic(cell) for cell in chosen})
        for cell in chosen:
            for base, trial in enumerate(trials):
                name = _name("lvlm_va_counterexamples", cell)
                trained += not trial.file(name).exists()
                trial.train("lvlm_va_counterexamples", base, {name: _critic(cell)})
            if trained:
                place = wanted.index(cell) + 1
                minutes = (time.monotonic() - started) / trained * (len(wanted) - place) * len(trials) / 60
                sys.stdout.write(f"{cell}: {place} of {len(wanted)}, about {minutes:.0f} min left\n")
                sys.stdout.flush()
        write_rows(trials, kinds)


def _critic(cell: Cell) -> dict[str, str | float]:
    return {"errors": cell[0], "false_negative_rate": cell[1], "false_positive_rate": cell[2]}


def _name(method: str, cell: Cell) -> str:
    return f"{method}-{cell[0]}-{cell[1]}-{cell[2]}"


def write_rows(trials: Sequence[Trial], kinds: Sequence[str]) -> None:
    """Of every complete cell a row a model, and a row for each difference to the base and to λ = 0.

    Rows of other kinds of errors stay as they are in the files.
    """
    wanted = {cell: [_name(method, cell) for method in CORRECTIONS] for cell in cells() if cell[0] in kinds}
    done = [
        cell for cell, names in wanted.items() if all(trial.file(name).exists() for trial in trials for name in names)
    ]
    rows, compared = [], []
    plain: dict[str, list[Outputs]] = {}
    for method in (BASE, LAMBDA_ZERO):
        plain[method] = [trial.kept(method) for trial in trials]
        for base, (trial, outputs) in enumerate(zip(trials, plain[method], strict=True)):
            rows.append({"errors": "", "method": method, "base": base, **values_of(trial, outputs)})
    for cell in done:
        told = {"errors": cell[0], "false_negatives": cell[1], "false_positives": cell[2]}
        quality = [trial.verdicts(_critic(cell))[2] for trial in trials]
        for method in CORRECTIONS:
            found = [trial.kept(_name(method, cell)) for trial in trials]
            for base, (trial, outputs) in enumerate(zip(trials, found, strict=True)):
                said = {key: quality[base][key] for key in ("recall", "precision", "masked_area")}
                rows.append({**told, "method": method, "base": base, **said, **values_of(trial, outputs)})
            for against, others in plain.items():
                for name, (value, low, high) in differences(trials[0], found, others).items():
                    of = {"method": method, "against": against, "measure": name}
                    compared.append({**told, **of, "difference": value, "low": low, "high": high})
    for file, made in ((ROWS, rows), (COMPARED, compared)):
        write_table(file, made, ["errors"], ["", *ERRORS])


def grid_of(compared: pd.DataFrame, errors: str, method: str, measure: str, column: str, against: str) -> np.ndarray:
    """A column of the comparisons as a grid, (false positives, false negatives) rising; NaN where it was not run."""
    chosen = compared[
        (compared["method"] == method) & (compared["measure"] == measure) & (compared["against"] == against)
    ]
    without = (chosen["false_negatives"] == 0) & (chosen["false_positives"] == 0)  # the same for all kinds of errors
    chosen = chosen[(chosen["errors"] == errors) | without]
    table = chosen.pivot(index="false_positives", columns="false_negatives", values=column)
    return np.asarray(table.reindex(index=FALSE_ALARMS, columns=MISSED), dtype=float)


def heat_maps(compared: pd.DataFrame, errors: str) -> Figure:
    """Of each correction the change of reliance and of WGA against the base, with the lines where it is none."""
    figure = Figure(figsize=(9.4, 9.2), layout="constrained")
    grid = figure.subplots(2, 2)
    for row, method in enumerate(CORRECTIONS):
        for axes, (measure, good) in zip(grid[row], (("reliance", -1), ("wga", 1)), strict=True):
            _heat_map(axes, compared, errors, method, measure, good)
    figure.suptitle(f"decoy_digits, critic: oracle (a stand-in), {ERRORS[errors]}", fontsize=11)
    return figure


def _heat_map(axes: Axes, compared: pd.DataFrame, errors: str, method: str, measure: str, good: int) -> None:
    """One map; of errors with a system only every other rate is there. "?" where the interval holds 0."""
    every = grid_of(compared, errors, method, measure, "difference", BASE)
    there = np.ix_(np.isfinite(every).any(axis=1), np.isfinite(every).any(axis=0))
    missed, alarms = np.array(MISSED)[there[1][0]], np.array(FALSE_ALARMS)[there[0][:, 0]]
    values = every[there]
    sure = grid_of(compared, errors, method, measure, "high" if good < 0 else "low", BASE)[there] * good > 0
    sure |= grid_of(compared, errors, method, measure, "low" if good < 0 else "high", BASE)[there] * good < 0
    largest = float(np.nanmax(np.abs(values)))
    colours = {"cmap": "RdBu_r" if good < 0 else "RdBu", "vmin": -largest, "vmax": largest, "shading": "nearest"}
    shown = axes.pcolormesh(missed, alarms, values, **colours)
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:+.2f}{'' if sure[row, column] else ' ?'}"
            ink = "white" if abs(value) > 0.65 * largest else "black"
            axes.text(missed[column], alarms[row], text, ha="center", va="center", fontsize=7, color=ink)
    for against, style in ((BASE, "solid"), (LAMBDA_ZERO, "dashed")):
        level = grid_of(compared, errors, method, measure, "difference", against)[there]
        if np.nanmin(level) < 0 < np.nanmax(level):
            axes.contour(missed, alarms, level, levels=[0.0], colors="black", linestyles=style, linewidths=1.5)
    top = axes.get_ylim()[1]
    names: dict[float, list[str]] = {}
    for name, (recall, _) in CRITICS.items():
        near = next((place for place in names if abs(place - (1 - recall)) < 0.02), 1 - recall)
        names.setdefault(near, []).append(name)
    for place, of in names.items():
        axes.plot(place, top, marker="v", color="black", clip_on=False, markersize=6)
        axes.annotate(", ".join(of), (place, top), (1, 6), textcoords="offset points", fontsize=6, rotation=25)
    axes.set_xlabel("false negatives: spurious regions accepted", fontsize=8)
    axes.set_ylabel("false positives: relevant regions rejected", fontsize=8)
    axes.set_title(f"{METHODS[method].label}: Δ {MEASURES[measure]} to the base", fontsize=9, pad=40)


def _of_critics(compared: pd.DataFrame, method: str, measure: str) -> list[float]:
    """The difference at each critic's recall, without false alarms, linear between cells."""
    along = grid_of(compared, "independent", method, measure, "difference", BASE)[0]
    return [float(np.interp(1 - recall, MISSED, along)) for recall, _ in CRITICS.values()]


def report() -> None:
    """Write the figures, and the tables into the page."""
    compared = pd.read_csv(COMPARED)
    for errors in compared["errors"].unique():
        heat_maps(compared, errors).savefig(
            IMAGES / f"critic_errors_{errors}.png", dpi=110, metadata={"Software": None}
        )
    put_tables(PAGE, COMMAND, tables(pd.read_csv(ROWS), compared))


def tables(rows: pd.DataFrame, compared: pd.DataFrame) -> str:
    """The page's tables: the models that start, where alignment harms, slopes, and the paper's critics."""
    started = (
        rows[rows["method"].isin([BASE, LAMBDA_ZERO])]
        .groupby("method", sort=False)[list(MEASURES)]
        .agg(["mean", "std"])
    )
    lines = [
        [METHODS[name].label, *(f"{of[m, 'mean']:.3f} ± {of[m, 'std']:.3f}" for m in MEASURES)]
        for name, of in started.iterrows()
    ]
    parts = [markdown_table(["", *MEASURES.values()], lines)]
    lines = []
    for errors in compared["errors"].unique():
        for method in CORRECTIONS:
            for measure, good in (("reliance", -1), ("wga", 1)):
                line = [ERRORS[errors], METHODS[method].label, MEASURES[measure]]
                for against in (BASE, LAMBDA_ZERO):
                    low, high = (grid_of(compared, errors, method, measure, end, against) for end in ("low", "high"))
                    better, worse = (high < 0, low > 0) if good < 0 else (low > 0, high < 0)
                    line += [str(int(each.sum())) for each in (better, worse, np.isfinite(low) & ~better & ~worse)]
                lines.append(line)
    heads = [
        f"{kind}, {'base' if against == BASE else 'λ = 0'}"
        for against in (BASE, LAMBDA_ZERO)
        for kind in ("better than", "worse than", "not told from")
    ]
    parts.append(markdown_table(["errors", "method", "measure", *heads], lines))
    parts.append(
        markdown_table(
            [
                "errors",
                "method",
                "measure",
                "no error",
                "for 0.1 more missed",
                "for 0.1 more false alarms",
                "one false alarm weighs as many misses",
            ],
            _slopes(rows),
        )
    )
    values = {(m, x): _of_critics(compared, m, x) for m in CORRECTIONS for x in ("reliance", "wga")}
    lines = []
    for place, (name, (recall, usd)) in enumerate(CRITICS.items()):
        cost = "not given" if usd is None else f"{usd * CALLS * TOKENS / 1e6:.2f}"
        lines.append([name, f"{recall:.2f}", cost, *(f"{of[place]:+.3f}" for of in values.values())])
    heads = [f"{METHODS[m].label}: Δ {MEASURES[x]}" for m, x in values]
    parts.append(markdown_table(["critic", "recall in the paper (knee)", "USD for 256 samples, input", *heads], lines))
    return "\n".join(parts)


def _slopes(rows: pd.DataFrame) -> list[list[str]]:
    """A plane through all models of a kind of errors by least squares, with 95 % intervals by drawing models."""
    lines = []
    for errors in ERRORS:
        for method in CORRECTIONS:
            of = rows[(rows["errors"] == errors) & (rows["method"] == method)]
            if of.empty:
                continue
            design = np.stack([np.ones(len(of)), of["false_negatives"], of["false_positives"]], axis=1)
            for measure in ("reliance", "wga"):
                values = of[measure].to_numpy()
                found = np.linalg.lstsq(design, values, rcond=None)[0]
                rng = np.random.default_rng(0)
                drawn = []
                for _ in range(1000):
                    picked = rng.integers(len(of), size=len(of))
                    drawn.append(np.linalg.lstsq(design[picked], values[picked], rcond=None)[0])
                planes = np.array(drawn)
                low, high = np.quantile(planes, [0.025, 0.975], axis=0)
                ends = np.quantile(planes[:, 2] / planes[:, 1], [0.025, 0.975])
                said = [f"{0.1 * found[n]:+.3f} ({0.1 * low[n]:+.3f} to {0.1 * high[n]:+.3f})" for n in (1, 2)]
                weigh = f"{found[2] / found[1]:.1f} ({ends[0]:.1f} to {ends[1]:.1f})"
                weigh = weigh if low[1] * high[1] > 0 else "not told: misses may cost nothing"
                lines.append(
                    [ERRORS[errors], METHODS[method].label, MEASURES[measure], f"{found[0]:.3f}", *said, weigh]
                )
    return lines


def main() -> None:
    """Parse the command line, do the work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the trial")
    parser.add_argument("--bases", type=int, default=3)
    parser.add_argument("--errors", nargs="+", choices=list(ERRORS), default=list(ERRORS), help="kinds of errors")
    parser.add_argument("--tables", action="store_true", help="train nothing, write the rows of what is there")
    parser.add_argument("--report", action="store_true", help="only figures and tables, from the committed rows")
    options = parser.parse_args()
    if not options.report:
        if options.work is None:
            raise InputError("--work is missing: name a folder for the trial, or say --report")
        measure(options.work.resolve(), options.bases, not options.tables, options.errors)
    report()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
