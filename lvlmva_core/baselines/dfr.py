"""DFR: keep the features, refit the last layer on group-balanced samples (Kirichenko et al. 2023; LVLM-VA §5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lvlmva_core.baselines.subg import balanced_rows
from lvlmva_core.errors import InputError


@dataclass(frozen=True)
class LastLayer:
    """weight float64 (K, D) and bias (K,) for features as they are; the C used; held-out WGA of each C."""

    weight: np.ndarray
    bias: np.ndarray
    c: float
    worst_group_accuracy: dict[float, float]


def refit_last_layer(
    features: np.ndarray,
    labels: ArrayLike,
    groups: ArrayLike,
    n_classes: int,
    *,
    c_grid: Sequence[float],
    n_refits: int,
    seed: int,
) -> LastLayer:
    """L1 logistic regression on standardised features of group-balanced sub-samples, averaged over `n_refits` of them.

    C is the one of `c_grid` with the highest worst-group accuracy on one half of the samples after a fit on a balanced
    sub-sample of the other half (the first of equals); where `c_grid` has one value, nothing is held out. More than
    two classes are fitted one against the rest.

    Args:
        features: float (N, D). labels: int (N,), 0..K-1. groups: (N,), class and spurious feature.
        seed: of the halves and sub-samples.

    Raises:
        InputError: a group has fewer than two samples, or a class has none.
    """
    label, group = np.asarray(labels), np.unique(np.asarray(groups), return_inverse=True)[1]
    sizes = np.bincount(group)
    if sizes.min() < 2 or len(np.unique(label)) < n_classes:
        raise InputError(
            f"baseline.dfr: the smallest group of the split has {sizes.min()} samples, and it has "
            f"{len(np.unique(label))} of {n_classes} classes; two samples and all classes are needed; use another split"
        )
    scores: dict[float, float] = {}
    if len(c_grid) > 1:
        held_out = _halves(group, np.random.default_rng([seed, 1]))
        for c in c_grid:
            rows = np.flatnonzero(~held_out)[balanced_rows(group[~held_out], seed).numpy()]
            weight, bias = _fit(features[rows], label[rows], c, seed)
            correct = (features[held_out] @ weight.T + bias).argmax(1) == label[held_out]
            scores[float(c)] = min(float(correct[group[held_out] == g].mean()) for g in np.unique(group[held_out]))
    best = max(scores, key=lambda c: scores[c]) if scores else float(c_grid[0])
    fits = []
    for refit in range(n_refits):
        rows = balanced_rows(group, seed * 1_000_003 + 1 + refit).numpy()
        fits.append(_fit(features[rows], label[rows], best, seed))
    return LastLayer(
        np.mean([weight for weight, _ in fits], axis=0), np.mean([bias for _, bias in fits], axis=0), best, scores
    )


def _halves(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool (N,): half of each group, the smaller half where its size is odd."""
    chosen = np.zeros(len(group), dtype=bool)
    for g in np.unique(group):
        rows = rng.permutation(np.flatnonzero(group == g))
        chosen[rows[: len(rows) // 2]] = True
    return chosen


def _fit(features: np.ndarray, label: np.ndarray, c: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, D) and bias (K,) on the features as they are: the standardisation is folded in."""
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-12, std, 1.0)  # a dead feature stays zero
    standard = (features - mean) / std
    n_classes = int(label.max()) + 1
    weight, bias = np.zeros((n_classes, features.shape[1])), np.zeros(n_classes)
    for k in range(n_classes) if n_classes > 2 else [1]:
        regression = LogisticRegression(l1_ratio=1.0, C=c, solver="liblinear", max_iter=1000, random_state=seed)
        regression.fit(standard, label == k)
        weight[k], bias[k] = regression.coef_[0] / std, float(regression.intercept_[0])
        bias[k] -= float(weight[k] @ mean)
    if n_classes == 2:  # the log-odds, shared between both logits
        weight, bias = np.stack([-weight[1], weight[1]]) / 2, np.array([-bias[1], bias[1]]) / 2
    return weight, bias
