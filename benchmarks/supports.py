"""Shortcuts that are not local: both corrections by the size and kind of the shortcut; goes on where it was killed.

    python -m benchmarks.supports --work <folder> [--bases 3]
    python -m benchmarks.supports --maps knee=<folder> 'skin with brightness=<folder>'   # the warning on other networks
    python -m benchmarks.supports --report      # figure and the page's tables anew, from the committed rows

What is measured, and how, was declared before the first run: docs/supports.md.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.trials import CORRECTIONS, LAMBDA_ZERO, Trial, differences, values_of, write_table
from lvlmva.pipeline import paths
from lvlmva.tables import put_tables
from lvlmva_core.arrays import read_array
from lvlmva_core.diffuse import diffuse_share
from lvlmva_core.errors import InputError
from lvlmva_core.methods import METHODS
from lvlmva_core.outputs import BASE
from lvlmva_core.report.tables import markdown_table

# kind, and pixels of 28 a side; the decoy is the data set's own 4x4 square
SHORTCUTS: tuple[tuple[str, int], ...] = (
    ("decoy", 4),
    *(("brightness", side) for side in (4, 8, 12, 16, 20, 24, 28)),
    *(("texture", side) for side in (8, 16, 28)),
    ("blur", 28),
    ("vignette", 28),
)
LOCAL_NETWORKS = ("skin", "knee")  # studies (benchmarks/study.py) of a convolutional network, whose shortcut is local
NETWORKS = (*LOCAL_NETWORKS, "skin with a colour cast", "skin with brightness")  # the latter two on whole pictures
SET_ON = ("decoy", "brightness", "skin")  # kinds that the threshold is set on; its errors are counted on the others
LOCAL, GLOBAL = 0.125, 0.5  # of the picture: a support up to the one has a place, from the other on it has none
MEASURES = {"reliance": "reliance", "wga": "WGA", "accuracy": "accuracy"}
DIFFUSE = Path("docs/results/diffuse.csv")
ROWS, COMPARED = Path("docs/results/supports.csv"), Path("docs/results/supports_differences.csv")
PAGE, FIGURE = Path("docs/supports.md"), Path("docs/images/supports.png")
COMMAND = "python -m benchmarks.supports --report"


def trials_of(folder: Path, kind: str, side: int, bases: int) -> list[Trial]:
    """A trial for each base of a shortcut."""
    changes = ["critique.overlap=majority_of_attribution"]
    if kind != "decoy":
        changes.append(f"prepare.shortcut={{kind: {kind}, side: {side / 28!r}}}")
    where = folder / f"{kind}-{side}"
    return [Trial(where / f"base={base}", "decoy_digits", [*changes, f"train.seed={base}"]) for base in range(bases)]


def train(folder: Path, shortcuts: Sequence[tuple[str, int]], bases: int) -> None:
    """Train what is not there; a shortcut that is complete leaves a mark."""
    started = time.monotonic()
    for place, (kind, side) in enumerate(shortcuts):
        mark = folder / f"{kind}-{side}" / "complete"
        if not mark.exists():
            for base, trial in enumerate(trials_of(folder, kind, side, bases)):
                for method in (LAMBDA_ZERO, *CORRECTIONS):
                    try:
                        trial.train(method, base, {method: {}})
                    except InputError as error:  # nothing can be swapped or erased: no correction is possible
                        sys.stdout.write(f"{kind} {side}, {method}: {error}\n")
            mark.touch()
        left = (time.monotonic() - started) / (place + 1) * (len(shortcuts) - place - 1) / 60
        sys.stdout.write(f"{kind} {side}: {place + 1} of {len(shortcuts)}, about {left:.0f} min left\n")
        sys.stdout.flush()


def write_rows(folder: Path, bases: int) -> None:
    """Of every complete shortcut a row a model, and a row for each difference to the base and to λ = 0.

    A correction that one of the bases does not allow is left out. Rows of other shortcuts stay as they are in the file.
    """
    rows: list[dict[str, object]] = []
    compared: list[dict[str, object]] = []
    for kind, side in SHORTCUTS:
        if not (folder / f"{kind}-{side}" / "complete").exists():
            continue
        trials = trials_of(folder, kind, side, bases)
        told: dict[str, object] = {"kind": kind, "side": side, "support": (side / 28) ** 2}
        made = [method for method in CORRECTIONS if all(trial.file(method).exists() for trial in trials)]
        outputs = {m: [trial.kept(m) for trial in trials] for m in (BASE, LAMBDA_ZERO, *made)}
        for base, trial in enumerate(trials):
            maps = read_array(trial.path("attributions"), "attributions")
            quality = trial.verdicts({})[2]
            said = {key: quality[key] for key in ("recall", "precision", "masked_area")}
            for method, of_bases in outputs.items():
                diffuse = {"diffuse_share": diffuse_share(maps)} if method == BASE else said
                rows.append({**told, "method": method, "base": base, **diffuse, **values_of(trial, of_bases[base])})
        for method in made:
            for against in (BASE, LAMBDA_ZERO):
                for name, (value, low, high) in differences(trials[0], outputs[method], outputs[against]).items():
                    of = {"method": method, "against": against, "measure": name}
                    compared.append({**told, **of, "difference": value, "low": low, "high": high})
    for file, made in ((ROWS, rows), (COMPARED, compared)):
        write_table(file, made, ["kind", "side"], SHORTCUTS)


def write_shares(named: Sequence[str]) -> None:
    """What the warning looks at, of each base of some studies. named: each one of NETWORKS, "=", the work folder."""
    rows = []
    for name, _, folder in (each.partition("=") for each in named):
        if name not in NETWORKS:
            raise InputError(f"--maps {name}=...: expected one of: {', '.join(NETWORKS)}")
        masks = read_array(Path(folder) / Path(paths()["spurious_masks"]).name, "spurious_masks")
        support = float(masks.mean(axis=(1, 2))[masks.any(axis=(1, 2))].mean())
        for here in sorted(Path(folder).glob("base=*")):
            if (maps := here / paths()["attributions"]).exists():
                share = diffuse_share(read_array(maps, "attributions"))
                base = here.name.partition("=")[2]
                rows.append({"kind": name, "base": base, "method": BASE, "support": support, "diffuse_share": share})
    write_table(DIFFUSE, rows, ["kind"], NETWORKS)


def threshold_of(rows: pd.DataFrame) -> float:
    """Half-way between the largest share of local shortcuts' bases and the smallest of global ones', on SET_ON.

    Where they overlap, the cut with the fewest errors, the lowest of equals.
    """
    found = rows[(rows["method"] == BASE) & rows["kind"].isin(SET_ON)]
    local = found["diffuse_share"][_has_a_place(found)].to_numpy()
    diffuse = found["diffuse_share"][found["support"] >= GLOBAL].to_numpy()
    if local.max() < diffuse.min():
        return float((local.max() + diffuse.min()) / 2)
    cuts = np.unique(np.concatenate([local, diffuse]))
    return float(min(cuts, key=lambda cut: ((local >= cut).mean() + (diffuse < cut).mean(), cut)))


def _has_a_place(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Whose shortcut is local: small, or a thing that was pasted."""
    return (rows["support"] <= LOCAL) | rows["kind"].isin(LOCAL_NETWORKS)


def by_support(rows: pd.DataFrame, compared: pd.DataFrame) -> Figure:
    """Reliance and WGA of base, λ = 0 and both corrections over the support, brightness as lines, the others beside."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    shown = [BASE, LAMBDA_ZERO, *CORRECTIONS]
    for axes, measure_ in zip(figure.subplots(1, 2), ("reliance", "wga"), strict=True):
        for method in shown:
            of = rows[(rows["method"] == method) & (rows["kind"] == "brightness")].groupby("support")[measure_]
            axes.errorbar(
                of.mean().index,
                of.mean(),
                of.std(),
                color=METHODS[method].color,
                marker="o",
                markersize=3,
                capsize=2,
                label=METHODS[method].label,
            )
        others = [each for each in SHORTCUTS if each[1] == 28 and each[0] != "brightness"]
        for place, (kind, side) in enumerate(others):
            for method in shown:
                of_kind = rows[(rows["method"] == method) & (rows["kind"] == kind) & (rows["side"] == side)]
                axes.plot(1.12 + 0.12 * place, of_kind[measure_].mean(), "s", color=METHODS[method].color, markersize=5)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0, *(1.12 + 0.12 * n for n in range(len(others)))])
        axes.set_xticklabels(["0", "0.25", "0.5", "0.75", "1", *(kind for kind, _ in others)], fontsize=7, rotation=40)
        axes.set_xlabel("support of the brightness, share of the picture; other kinds, whole picture", fontsize=8)
        axes.set_title(MEASURES[measure_], fontsize=10)
        axes.set_yscale("log" if measure_ == "reliance" else "linear")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    figure.suptitle("decoy_digits with other shortcuts; critic: oracle (a stand-in), no errors", fontsize=10)
    return figure


def tables(rows: pd.DataFrame, compared: pd.DataFrame) -> str:
    """The page's tables: by shortcut, and the warning's errors, with what `write_shares` wrote."""
    lines = []
    for kind, side in SHORTCUTS:
        of = rows[(rows["kind"] == kind) & (rows["side"] == side)]
        if of.empty:
            continue
        means = of.groupby("method")[["reliance", "wga", "masked_area", "recall", "precision", "diffuse_share"]].mean()
        line = [kind, f"{(side / 28) ** 2:.2f}", f"{means.loc[BASE, 'diffuse_share']:.2f}"]
        line += [f"{means.loc[LAMBDA_ZERO, name]:.2f}" for name in ("recall", "precision", "masked_area")]
        line += [f"{means.loc[method, name]:.2f}" for name in ("reliance", "wga") for method in (BASE, LAMBDA_ZERO)]
        lines.append(line)
    heads = ["shortcut", "support", "pixels for 90 %", "recall", "precision", "masked area"]
    heads += [
        f"{MEASURES[name]}, {'base' if m == BASE else 'λ = 0'}"
        for name in ("reliance", "wga")
        for m in (BASE, LAMBDA_ZERO)
    ]
    parts = [markdown_table(heads, lines)]
    lines = []
    for kind, side in SHORTCUTS:
        for method in CORRECTIONS:
            of = compared[(compared["kind"] == kind) & (compared["side"] == side) & (compared["method"] == method)]
            if of.empty:
                continue
            line = [kind, f"{(side / 28) ** 2:.2f}", METHODS[method].label]
            for name, good in (("reliance", -1), ("wga", 1), ("accuracy", 1)):
                for against in (BASE, LAMBDA_ZERO):
                    one = of[(of["measure"] == name) & (of["against"] == against)].iloc[0]
                    better, worse = (one.high < 0, one.low > 0) if good < 0 else (one.low > 0, one.high < 0)
                    word = "better" if better else "worse" if worse else "not told"
                    line.append(f"{one.difference:+.2f} ({one.low:+.2f} to {one.high:+.2f}), {word}")
            lines.append(line)
    heads = [
        f"Δ {MEASURES[name]} to {'base' if m == BASE else 'λ = 0'}" for name in MEASURES for m in (BASE, LAMBDA_ZERO)
    ]
    parts.append(markdown_table(["shortcut", "support", "method", *heads], lines))
    bases = pd.concat([rows[rows["method"] == BASE], pd.read_csv(DIFFUSE)])
    cut, lines = threshold_of(bases), []
    for name, chosen in (("set on", bases["kind"].isin(SET_ON)), ("others", ~bases["kind"].isin(SET_ON))):
        of = bases[chosen]
        local, diffuse = of[_has_a_place(of)], of[of["support"] >= GLOBAL]
        lines.append(
            [
                f"{name}: {', '.join(of['kind'].unique())}",
                f"{(local['diffuse_share'] >= cut).sum()} of {len(local)}",
                f"{(diffuse['diffuse_share'] < cut).sum()} of {len(diffuse)}",
                f"{local['diffuse_share'].min():.2f} to {local['diffuse_share'].max():.2f}",
                f"{diffuse['diffuse_share'].min():.2f} to {diffuse['diffuse_share'].max():.2f}",
            ]
        )
    heads = [f"threshold {cut:.2f}", "local, warned", "global, not warned", "shares, local", "shares, global"]
    parts.append(markdown_table(heads, lines))
    return "\n".join(parts)


def report() -> None:
    """Write the figure, and the tables into the page."""
    rows, compared = pd.read_csv(ROWS), pd.read_csv(COMPARED)
    by_support(rows, compared).savefig(FIGURE, dpi=110, metadata={"Software": None})
    put_tables(PAGE, COMMAND, tables(rows, compared))


def main() -> None:
    """Parse the command line, do the work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the trial")
    parser.add_argument("--bases", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="shortcuts to train, such as blur-28")
    parser.add_argument("--maps", nargs="+", default=[], help="name=folder: only the warning, on these studies")
    parser.add_argument("--tables", action="store_true", help="train nothing, write the rows of what is complete")
    parser.add_argument("--report", action="store_true", help="only figure and tables, from the committed rows")
    options = parser.parse_args()
    if options.maps:
        write_shares(options.maps)
    elif options.work is None and not options.report:
        raise InputError("--work is missing: name a folder for the trial, or say --report")
    elif not options.report:
        folder = options.work.resolve()
        if not options.tables:
            chosen = [each for each in SHORTCUTS if not options.only or f"{each[0]}-{each[1]}" in options.only]
            train(folder, chosen, options.bases)
        write_rows(folder, options.bases)
    report()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
