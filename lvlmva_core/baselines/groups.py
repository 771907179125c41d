"""Groups: sub-samples in which all are equal, and those that verdicts give (an extension)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from lvlmva_core.baselines import Task


def balanced_rows(groups: ArrayLike, seed: int) -> np.ndarray:
    """Rows of a sub-sample in which every group that occurs has as many samples as the smallest.

    Args:
        groups: (N,) group of each sample: class and spurious feature.
        seed: of the draw.

    Returns:
        int64, rising.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    smallest = int(np.bincount(group).min())
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(group == g))[:smallest] for g in range(len(names))]
    return np.sort(np.concatenate(rows))


def evenly_drawn(groups: ArrayLike, seed: int, epoch: int) -> np.ndarray:
    """Rows of an epoch of N in which every group stands equally often, to one; within a group every row does.

    With one group these are all rows, once. A sampler with replacement, as Sagawa et al. 2020 use, has the same shares
    in expectation.

    Args:
        groups: (N,). seed, epoch: of the draw.

    Returns:
        int64 (N,), rising.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng([seed, epoch, 23])
    slots = rng.permutation(np.arange(len(group)) % len(names))
    drawn = []
    for g, wanted in enumerate(np.bincount(slots, minlength=len(names))):
        own = np.flatnonzero(group == g)
        passes = [rng.permutation(own) for _ in range(-(-int(wanted) // len(own)))]
        drawn.append(np.concatenate([np.zeros(0, np.int64), *passes])[:wanted])
    return np.sort(np.concatenate(drawn))


@dataclass(frozen=True)
class PseudoGroups:
    """Class x flagged, a picture being flagged where a region of it was rejected.

    rows: int64 (n,), places in the training split. groups: int64 (n,), 2 · class + flagged. facts: for the metrics.
    """

    rows: np.ndarray
    groups: np.ndarray
    facts: dict[str, Any]


def pseudo_groups_of_alignment(task: "Task") -> PseudoGroups:
    """The alignment samples' pseudo-groups, by their places in the training split: no group label is read."""
    assert task.alignment is not None
    alignment, masks = task.alignment()
    flagged = (masks > 0.5).flatten(1).any(1).cpu().numpy()
    rows = task.training.table.index.get_indexer(alignment.table.index)
    groups = alignment.labels.cpu().numpy() * 2 + flagged
    return PseudoGroups(rows, groups, {"flagged": int(flagged.sum()), "alignment_samples": len(flagged)})


def pseudo_groups_of_training(task: "Task", features: np.ndarray) -> PseudoGroups:
    """All training pictures' pseudo-groups: verdicts where there are any, else a regression on the base's features.

    An L2 logistic regression (C = 1, standardised features) tells flagged alignment samples from the others, and says
    of every other training picture which it is. How well it does so on samples that it has not seen (AUC, five folds)
    is among the facts. Where all or none are flagged there is nothing to carry, and the groups are the classes.

    Args:
        features: float (N, D), of the base model, of the training split.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = pseudo_groups_of_alignment(task)
    flagged = known.groups % 2
    every = np.full(len(features), int(flagged.all()))
    facts = {**known.facts, "flags_carried_auc": None}
    fewest = int(min(flagged.sum(), (1 - flagged).sum()))
    if fewest:
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        if fewest >= 5:
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            scores = cross_val_predict(regression, features[known.rows], flagged, cv=folds, method="decision_function")
            facts["flags_carried_auc"] = float(roc_auc_score(flagged, scores))
        every = regression.fit(features[known.rows], flagged).predict(features)
    every[known.rows] = flagged
    facts["flagged_in_training"] = int(every.sum())
    groups = task.training.labels.cpu().numpy() * 2 + every
    return PseudoGroups(np.arange(len(features)), groups, facts)
