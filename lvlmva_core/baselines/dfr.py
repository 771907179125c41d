"""DFR: keep the features, refit the last layer on group-balanced samples (Kirichenko et al. 2023; LVLM-VA §5)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lvlmva_core.baselines import Retrained, Task, best_of
from lvlmva_core.baselines.groups import balanced_rows
from lvlmva_core.baselines.settings import Retraining
from lvlmva_core.errors import InputError
from lvlmva_core.settings import Count, Positive


class AnyDfr(Retraining):
    """DFR: c: of the L1 penalty; its authors try 1, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01. n_refits: that are averaged."""

    c: Positive
    n_refits: Count = 20


class Settings(AnyDfr):
    """split: whose groups are known and balanced. Of `val`, C is chosen on the half that it was not fitted on."""

    split: Literal["train", "val"]


@dataclass(frozen=True)
class LastLayer:
    """weight float64 (K, D) and bias (K,), for features as they are."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Samples:
    """What is refitted on. features: float (N, D). labels: int (N,), 0..K-1. groups: (N,), of any names."""

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def of(self, rows: np.ndarray) -> "Samples":
        """Some of them: rows int64 or bool (N,)."""
        return Samples(self.features[rows], self.labels[rows], self.groups[rows])


def refit_last_layer(
    samples: Samples, n_classes: int, *, c: float, n_refits: int, seed: int, scaled_as: np.ndarray
) -> LastLayer:
    """L1 logistic regression on standardised features of group-balanced sub-samples, averaged over `n_refits` of them.

    More than two classes are fitted one against the rest.

    Args:
        seed: of the sub-samples. scaled_as: float (M, D), features whose mean and spread standardise all fits alike;
            without that, averaging would mix coefficients of different scales.

    Raises:
        InputError: a group has fewer than two samples, or a class has none.
    """
    group = np.unique(samples.groups, return_inverse=True)[1]
    smallest, classes = int(np.bincount(group).min()), len(np.unique(samples.labels))
    if smallest < 2 or classes < n_classes:
        raise InputError(
            f"dfr: the smallest group that it is refitted on has {smallest} samples, and there are {classes} of "
            f"{n_classes} classes; two samples and all classes are needed; use another split, or a larger alignment set"
        )
    mean = scaled_as.mean(axis=0, dtype=np.float64)
    std = scaled_as.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-12, std, 1.0)  # a dead feature stays zero
    standard = (samples.features - mean) / std
    fits = []
    for refit in range(n_refits):
        rows = balanced_rows(group, seed * 1_000_003 + 1 + refit)
        fits.append(_fit(standard[rows], samples.labels[rows], n_classes, c, seed))
    weight = np.mean([each for each, _ in fits], axis=0) / std
    bias: np.ndarray = np.mean([each for _, each in fits], axis=0) - weight @ mean
    return LastLayer(weight, bias)


def halves(groups: ArrayLike, seed: int) -> np.ndarray:
    """bool (N,): half of each group, the smaller half where its size is odd."""
    group, rng = np.unique(np.asarray(groups), return_inverse=True)[1], np.random.default_rng([seed, 1])
    chosen = np.zeros(len(group), dtype=bool)
    for g in np.unique(group):
        rows = rng.permutation(np.flatnonzero(group == g))
        chosen[rows[: len(rows) // 2]] = True
    return chosen


def _fit(standard: np.ndarray, label: np.ndarray, n_classes: int, c: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, D) and bias (K,) on standardised features."""
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((n_classes, standard.shape[1])), np.zeros(n_classes)
    for k in range(n_classes) if n_classes > 2 else [1]:
        regression = LogisticRegression(l1_ratio=1.0, C=c, solver="liblinear", max_iter=1000, random_state=seed)
        regression.fit(standard, label == k)
        weight[k], bias[k] = regression.coef_[0], float(regression.intercept_[0])
    if n_classes == 2:  # the log-odds, shared between both logits
        weight, bias = np.stack([-weight[1], weight[1]]) / 2, np.array([-bias[1], bias[1]]) / 2
    return weight, bias


def refit(task: Task, settings: AnyDfr, samples: Samples, scaled_as: np.ndarray, of_validation: bool) -> Retrained:
    """The base model with its last layer refitted, for each seed; C by the selection that all methods share.

    A candidate is scored after one refit. Args: of_validation: whether the samples are the validation split, in its
    order; then a candidate is fitted on half of each group and scored on the pictures made of the other half.
    """
    import torch

    from lvlmva_core.models import last_linear, penultimate_features

    judged = task.selection
    features = None if judged is None else penultimate_features(task.base, judged.images).cpu().numpy()

    def tried(candidate: AnyDfr) -> tuple[list[float], None]:
        if judged is None or features is None:  # the one candidate; nothing is chosen
            return [0.0], None
        scores = []
        for seed in candidate.seeds:
            held_out = halves(samples.groups, seed) if of_validation else np.zeros(len(samples.labels), dtype=bool)
            own, classes = samples.of(~held_out), task.spec.n_classes
            layer = refit_last_layer(own, classes, c=candidate.c, n_refits=1, seed=seed, scaled_as=scaled_as)
            logits = torch.from_numpy(features @ layer.weight.T + layer.bias).to(judged.labels.device)
            unseen = torch.from_numpy(held_out).to(judged.rows.device)[judged.rows] if of_validation else None
            scores.append(judged.score(logits, unseen))
        return scores, None

    best = best_of(settings, tried)
    models = {}
    for seed in settings.seeds:
        layer = refit_last_layer(
            samples,
            task.spec.n_classes,
            c=best.settings.c,
            n_refits=settings.n_refits,
            seed=seed,
            scaled_as=scaled_as,
        )
        model = task.fresh(0)
        model.load_state_dict(task.base.state_dict())
        last = last_linear(model)
        with torch.no_grad():
            last.weight.copy_(torch.from_numpy(layer.weight))
            last.bias.copy_(torch.from_numpy(layer.bias))
        models[seed] = model.eval()
    smallest = int(np.unique(samples.groups, return_counts=True)[1].min())
    return Retrained(models, {**best.facts, "c": best.settings.c, "smallest_group": smallest})


def retrain(task: Task, settings: Settings) -> Retrained:
    """DFR on the true groups of a split."""
    from lvlmva_core.models import penultimate_features

    scaled_as = penultimate_features(task.base, task.training.images).cpu().numpy()
    split, of_validation = task.training, settings.split == "val"
    features = scaled_as
    if of_validation:
        split = task.validation
        features = penultimate_features(task.base, split.images).cpu().numpy()
    samples = Samples(features, split.labels.cpu().numpy(), split.table["group"].to_numpy())
    found = refit(task, settings, samples, scaled_as, of_validation)
    return Retrained(found.models, {**found.facts, "split": settings.split})
