"""Figures: what changed, on how many, and why (matplotlib, drawn without a display)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

METHOD_NAMES = {
    "base": "base",
    "lambda_zero": "λ = 0\n(control)",
    "random_masks": "random masks\n(control)",
    "jtt": "JTT",
    "subg": "SUBG\n(groups)",
    "dfr": "DFR\n(groups)",
    "lvlm_va": "LVLM-VA",
    "rrr_gt": "RRR, true masks\n(bound)",
}
METHOD_COLORS = {
    "base": "#7f7f7f",
    "lambda_zero": "#bdbdbd",
    "random_masks": "#d9b38c",
    "jtt": "#9edae5",
    "subg": "#c5b0d5",
    "dfr": "#9467bd",
    "lvlm_va": "#1f77b4",
    "rrr_gt": "#2ca02c",
}


def outcome_figure(bars: Mapping[str, Mapping[str, tuple[float, float]]], caption: str) -> Figure:
    """One panel a metric, one bar a method, with the standard deviation over seeds.

    Args:
        bars: metric -> method -> (mean, standard deviation); metrics in 0..1.
        caption: who judged, and on what; stands above the panels.
    """
    panel = max(4.6, 0.85 * max(len(methods) for methods in bars.values()))  # inches, so that the names have room
    figure = Figure(figsize=(panel * len(bars), 3.8), layout="constrained")
    figure.suptitle(caption, fontsize=10)
    for axes, (metric, methods) in zip(np.atleast_1d(figure.subplots(1, len(bars))), bars.items(), strict=True):
        names = [name for name in METHOD_NAMES if name in methods]
        heights = [methods[name][0] for name in names]
        deviations = [methods[name][1] for name in names]
        axes.bar(range(len(names)), heights, yerr=deviations, capsize=3, color=[METHOD_COLORS[name] for name in names])
        for place, (height, deviation) in enumerate(zip(heights, deviations, strict=True)):
            axes.annotate(f"{height:.3f}", (place, height + deviation), (0, 3), textcoords="offset points", ha="center")
        low = min(height - deviation for height, deviation in zip(heights, deviations, strict=True))
        axes.set_ylim(max(0.0, np.floor((low - 0.1) * 10) / 10), 1.04)
        axes.set_xticks(range(len(names)), [METHOD_NAMES[name] for name in names], fontsize=8)
        axes.set_title(metric, fontsize=10)
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
    figure.suptitle(caption, fontsize=10)
    grid = figure.subplots(len(titles), len(columns), squeeze=False)
    for row, title in enumerate(titles):
        scale = float(np.percentile(np.abs(before[row]), 99.5)) or 1.0
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
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(base_accuracy, color=METHOD_COLORS["base"], linestyle="--", label="base")
    for method, curve in curves.items():
        over_seeds = curve.groupby("epoch")["val_accuracy"].agg(["mean", "min", "max"])
        label = METHOD_NAMES[method].replace("\n", " ")
        axes.plot(over_seeds.index, over_seeds["mean"], color=METHOD_COLORS[method], label=label)
        axes.fill_between(
            over_seeds.index, over_seeds["min"], over_seeds["max"], color=METHOD_COLORS[method], alpha=0.2, linewidth=0
        )
    axes.set_xlabel("epoch of alignment")
    axes.set_ylabel("validation accuracy")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG at 150 dots per inch, without a date or a version, so that the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(path, metadata={"Software": None})
