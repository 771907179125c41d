"""Figures: what changed, on how many, and why (matplotlib, drawn without a display)."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvlmva_core.methods import in_order, method
from lvlmva_core.outputs import BASE
from lvlmva_core.render import attribution_limit


@dataclass(frozen=True)
class Compared:
    """A difference of `group` to `label`, with its interval. different: whether a test calls it one."""

    group: str
    label: str
    color: str
    difference: float
    low: float
    high: float
    different: bool


def outcome_figure(bars: Mapping[str, Mapping[str, tuple[float, float]]], caption: str) -> Figure:
    """One panel a metric, one bar a method from 0, with the standard deviation over seeds.

    Args:
        bars: metric -> method -> (mean, standard deviation); metrics in 0..1; the same methods in each.
        caption: who judged, and on what; stands above the panels.
    """
    figure, panels, methods = _method_bars(bars, 1.2, caption)
    for axes, (metric, values) in zip(panels, bars.items(), strict=True):
        for place, name in enumerate(methods):
            mean, deviation = values[name]
            _label(axes, f"{mean:.3f}", mean + deviation, place)
        axes.set_xlim(0, 1.22)
        axes.set_xticks([0, 0.5, 1])
        axes.set_title(metric, fontsize=9)
    return figure


def differences_figure(
    differences: Mapping[str, Mapping[str, tuple[float, float, float]]], seeds: int, caption: str
) -> Figure:
    """One panel a metric, one bar a method: its difference to the base model, as in LVLM-VA's figures of ΔWGA.

    A star marks a difference whose exact two-sided Wilcoxon test over seeds has p < 0.05.

    Args:
        differences: metric -> method -> (mean difference, standard deviation over seeds, two-sided p).
        seeds: how many there are; with fewer than six no difference can be significant, which is then said.
        caption: who judged, and on what.
    """
    figure, panels, methods = _method_bars(differences, 1.4, caption)
    for axes, (metric, values) in zip(panels, differences.items(), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        means, deviations, _ = np.transpose([values[name] for name in methods])
        lowest = 1.1 * (means - deviations).min()
        reach = 1.1 * (abs(means) + deviations).max() or 1.0
        axes.set_xlim(min(lowest, -0.1 * reach), 1.6 * reach)
        axes.locator_params(axis="x", nbins=5)
        for place, name in enumerate(methods):
            mean, deviation, p = values[name]
            _label(axes, f"{mean:+.3f}{' *' if p < 0.05 else ''}", max(mean + deviation, 0.0), place)
        axes.set_title(f"Δ {metric}", fontsize=9)
    enough = "* two-sided p < 0.05" if seeds >= 6 else "too few for a significant difference"
    figure.supxlabel(f"difference to the base model, {seeds} seed{'' if seeds == 1 else 's'}; {enough}", fontsize=8)
    return figure


def sweep_figure(sweep: pd.DataFrame, setting: str) -> Figure:
    """What a swept setting does: one panel a metric, one line a method, whiskers over seeds (LVLM-VA, Fig. 5).

    Args:
        sweep: columns x (the setting's values, numbers or words), method, metric, mean, std.
        setting: name of the setting. A numeric axis is logarithmic where all values are positive and span a decade.
    """
    metrics = list(dict.fromkeys(sweep["metric"]))
    numeric = pd.api.types.is_numeric_dtype(sweep["x"])
    figure = Figure(figsize=(4 * len(metrics) + 1.5, 3.2), layout="constrained")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
        for name, rows in sweep[sweep["metric"] == metric].groupby("method", sort=False):
            if numeric:
                rows = rows.sort_values("x")
            style = {"color": method(str(name)).color, "label": method(str(name)).label}
            axes.errorbar(rows["x"], rows["mean"], rows["std"], marker="o", markersize=4, capsize=3, **style)
        if numeric and 0 < 10 * sweep["x"].min() <= sweep["x"].max():
            axes.set_xscale("log")
        axes.set_xlabel(setting)
        axes.set_title(metric, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right center")
    return figure


def study_figure(panels: Mapping[str, Sequence[Compared]], caption: str) -> Figure:
    """Differences of a study with their intervals, one panel a measure, from top to bottom.

    A filled point is a difference that the study's test calls one, a hollow one is not.

    Args:
        panels: title -> what was compared. caption: who judged, and on what.
    """
    # a line for each group, and its rows below it
    lines = {
        title: [
            line
            for group, own in itertools.groupby(rows, key=lambda row: row.group)
            for line in (f"{group}, minus", *own)
        ]
        for title, rows in panels.items()
    }
    heights = [len(of) + 1.6 for of in lines.values()]
    figure = Figure(figsize=(9, 0.26 * sum(heights) + 0.7), layout="constrained")
    _say(figure, caption, 9)
    grid = figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, of) in zip(grid, lines.items(), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, row in enumerate(of):
            if isinstance(row, Compared):
                whiskers = [[row.difference - row.low], [row.high - row.difference]]
                style = {"color": row.color, "markerfacecolor": row.color if row.different else "white"}
                axes.errorbar(row.difference, place, xerr=whiskers, fmt="o", markersize=5, capsize=3, **style)
        names = [row.label if isinstance(row, Compared) else row for row in of]
        axes.set_yticks(range(len(of)), names, fontsize=8)
        for row, tick in zip(of, axes.yaxis.get_major_ticks(), strict=True):
            tick.label1.set_fontweight("normal" if isinstance(row, Compared) else "bold")
            tick.tick1line.set_visible(isinstance(row, Compared))
        axes.set_ylim(len(of) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def panel_figure(
    titles: Sequence[str],
    images: Sequence[np.ndarray],
    before: Sequence[np.ndarray],
    regions: Sequence[np.ndarray],
    overlays: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    caption: str,
) -> Figure:
    """One row a sample: image, attribution before, regions, overlay, mask, attribution after.

    Both attributions of a row share one colour scale, symmetric about zero, clipped at the 99.5th percentile of the
    magnitude before alignment.

    Args:
        images, regions, overlays: uint8 (H', W', 3). before, after: float (H, W). masks: bool (H, W).
    """
    columns = ["image", "attribution before", "regions", "overlay", "mask (suppressed)", "attribution after"]
    figure = Figure(figsize=(1.7 * len(columns), 1.75 * len(titles) + 0.6), layout="constrained")
    _say(figure, caption, 10)
    grid = figure.subplots(len(titles), len(columns), squeeze=False)
    for row, title in enumerate(titles):
        scale = attribution_limit(before[row])
        grid[row, 0].imshow(images[row])
        grid[row, 2].imshow(regions[row])
        grid[row, 3].imshow(overlays[row])
        for column, map_ in ((1, before[row]), (5, after[row])):
            grid[row, column].imshow(map_, cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest")
        grid[row, 4].imshow(masks[row], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        grid[row, 0].set_ylabel(title, fontsize=7)
    for column, name in enumerate(columns):
        grid[0, column].set_title(name, fontsize=8)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def curves_figure(curves: Mapping[str, pd.DataFrame], base_accuracy: float) -> Figure:
    """Validation accuracy over the epochs of alignment: mean over seeds as a line, their range as a band.

    Args:
        curves: method -> table with the columns seed, epoch, val_accuracy. base_accuracy: the base model's, 0..1.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(base_accuracy, color=method(BASE).color, linestyle="--", label=method(BASE).label)
    for name in in_order(curves):
        curve, color = curves[name], method(name).color
        over_seeds = curve.groupby("epoch")["val_accuracy"].agg(["mean", "min", "max"])
        axes.plot(over_seeds.index, over_seeds["mean"], color=color, label=method(name).label)
        axes.fill_between(over_seeds.index, over_seeds["min"], over_seeds["max"], color=color, alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch of alignment")
    axes.set_ylabel("validation accuracy")
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _method_bars(
    bars: Mapping[str, Mapping[str, tuple[float, ...]]], margin: float, caption: str
) -> tuple[Figure, list[Axes], list[str]]:
    """One panel a metric, one bar a method with its whisker; the methods from top to bottom. `margin`: inches."""
    methods = in_order(next(iter(bars.values())))
    places = range(len(methods))
    figure = Figure(figsize=(10, 0.42 * len(methods) + margin), layout="constrained")
    _say(figure, caption, 9)
    panels = list(figure.subplots(1, len(bars), sharey=True, squeeze=False)[0])
    for axes, values in zip(panels, bars.values(), strict=True):
        means, deviations = zip(*(values[name][:2] for name in methods), strict=True)
        axes.barh(places, means, xerr=deviations, capsize=3, color=[method(name).color for name in methods])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, [method(name).label for name in methods], fontsize=9)
    panels[0].invert_yaxis()
    return figure, panels, methods


def _label(axes: Axes, text: str, edge: float, place: int) -> None:
    axes.annotate(text, (edge, place), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _say(figure: Figure, caption: str, size: float) -> None:
    """Write a caption above the panels, in as many lines as it takes: a stand-in's name must not be cut off."""
    characters = int(figure.get_figwidth() * 72 / (0.6 * size))  # a letter is 0.6 of the size wide at most on average
    figure.suptitle(textwrap.fill(caption, characters), fontsize=size)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG at 150 dots per inch, without a date or a version, so that the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(path, metadata={"Software": None})
