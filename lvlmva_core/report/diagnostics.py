"""Figures that show why: entropy with and without the spurious feature, features before and after alignment."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

WITH, WITHOUT = "#d62728", "#7f7f7f"
FLOOR = 1e-12  # nats; below it a bar of its own would say nothing


def entropy_figure(entropies: np.ndarray, spurious: np.ndarray, auroc: float | None) -> Figure:
    """Histograms of output entropy of the samples with and without the spurious feature, on a logarithmic axis.

    Args:
        entropies: float (N,), nats, of the training samples. spurious: bool (N,). auroc: as `entropy_auroc` gave it.
    """
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    values = np.maximum(entropies, FLOOR)
    bins = np.geomspace(values.min(), max(values.max(), 2 * values.min()), 41).tolist()
    for has, color, name in ((False, WITHOUT, "without"), (True, WITH, "with")):
        chosen = values[spurious == has]
        if len(chosen):
            axes.hist(chosen, bins, color=color, alpha=0.6, label=f"{name} the spurious feature ({len(chosen)})")
    axes.set_xscale("log")
    axes.set_xlabel("output entropy of the base model (nats)")
    axes.set_ylabel("training samples")
    axes.set_title("AUROC: not defined, one kind only" if auroc is None else f"AUROC {auroc:.3f}", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def embeddings_figure(
    features: Mapping[str, np.ndarray], labels: np.ndarray, spurious: np.ndarray | None, class_names: Sequence[str]
) -> Figure:
    """Features of the test samples before the last layer, on their own first two principal components, per model.

    Colour is the class; a cross is a sample with the spurious feature, a dot one without, or any where nobody knows.

    Args:
        features: model's name -> float (N, D). labels: int (N,). spurious: bool (N,), or None.
    """
    from sklearn.decomposition import PCA

    crossed = np.zeros(len(labels), dtype=bool) if spurious is None else spurious
    figure = Figure(figsize=(4.6 * len(features), 4.2), layout="constrained")
    for axes, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(features))), features.items(), strict=True):
        components = PCA(2, svd_solver="covariance_eigh")  # of each, the largest entry is made positive
        places = components.fit_transform(values.astype(np.float64))
        for k, class_name in enumerate(class_names):
            for has, marker in ((False, "."), (True, "x")):
                chosen = (labels == k) & (crossed == has)
                axes.scatter(
                    *places[chosen].T, s=14, marker=marker, color=f"C{k}", alpha=0.6, label="" if has else class_name
                )
        axes.set_title(f"{name}\n{components.explained_variance_ratio_.sum():.0%} of the variance", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    if spurious is not None:
        figure.axes[0].scatter([], [], s=14, marker="x", color=WITHOUT, label="with the spurious feature")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure
