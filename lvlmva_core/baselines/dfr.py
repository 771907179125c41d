"""DFR: keep the features, refit the last layer on group-balanced samples (Kirichenko et al. 2023; LVLM-VA §5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from lvlmva_core.align_settings import Seeds
from lvlmva_core.baselines import Retrained, Task
from lvlmva_core.baselines.groups import balanced_rows
from lvlmva_core.errors import InputError
from lvlmva_core.settings import Count, Positive
from lvlmva_core.settings import Settings as BaseSettings


class Settings(BaseSettings):
    """DFR: split: whose groups are known and balanced. c_grid: of the L1 penalty. n_refits: that are averaged."""

    seeds: Seeds
    split: Literal["train", "val"]
    c_grid: Annotated[list[Positive], Field(min_length=1)]
    n_refits: Count = 20


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
            f"dfr: the smallest group of the split has {sizes.min()} samples, and it has "
            f"{len(np.unique(label))} of {n_classes} classes; two samples and all classes are needed; use another split"
        )
    scores: dict[float, float] = {}
    if len(c_grid) > 1:
        held_out = _halves(group, np.random.default_rng([seed, 1]))
        for c in c_grid:
            rows = np.flatnonzero(~held_out)[balanced_rows(group[~held_out], seed)]
            weight, bias = _fit(features[rows], label[rows], c, seed)
            correct = (features[held_out] @ weight.T + bias).argmax(1) == label[held_out]
            scores[float(c)] = min(float(correct[group[held_out] == g].mean()) for g in np.unique(group[held_out]))
    best = max(scores, key=lambda c: scores[c]) if scores else float(c_grid[0])
    fits = []
    for refit in range(n_refits):
        rows = balanced_rows(group, seed * 1_000_003 + 1 + refit)
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


def retrain(task: Task, settings: Settings) -> Retrained:
    """The base model with its last layer refitted, for each seed."""
    import torch

    from lvlmva_core.models import last_linear, penultimate_features

    split = task.training if settings.split == "train" else task.validation
    groups = split.table["group"]
    features = penultimate_features(task.base, split.images).cpu().numpy()
    models, chosen = {}, {}
    for seed in settings.seeds:
        refitted = refit_last_layer(
            features,
            split.labels.cpu().numpy(),
            groups.to_numpy(),
            task.spec.n_classes,
            c_grid=settings.c_grid,
            n_refits=settings.n_refits,
            seed=seed,
        )
        model = task.fresh(0)
        model.load_state_dict(task.base.state_dict())
        layer = last_linear(model)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(refitted.weight))
            layer.bias.copy_(torch.from_numpy(refitted.bias))
        models[seed] = model.eval()
        chosen[str(seed)] = refitted.c
    return Retrained(models, {"split": settings.split, "smallest_group": int(groups.value_counts().min()), "c": chosen})
