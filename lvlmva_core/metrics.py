"""What is measured: group accuracies, alignment of attributions, quality of verdicts (LVLM-VA §5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lvlmva_core.independence import typical_size

if TYPE_CHECKING:
    import pandas as pd


def group_accuracies(predictions: ArrayLike, labels: ArrayLike, spurious: ArrayLike) -> "pd.DataFrame":
    """Accuracy of each group, a group being a class with or without the spurious feature (LVLM-VA §5).

    AGA is the plain mean of `accuracy` over the rows, WGA the minimum.

    Args:
        predictions, labels: (N,) int. spurious: (N,) bool.

    Returns:
        One row a group that occurs, sorted: label, spurious, count (int64), accuracy (float64, 0..1).

    Raises:
        ValueError: lengths differ, or there is no sample.

    Examples:
        Class 1 is never recognised without its shortcut: the mean hides what the worst group shows.

        >>> table = group_accuracies(
        ...     predictions=[0, 0, 0, 0, 1, 1, 0, 0],
        ...     labels=[0, 0, 0, 0, 1, 1, 1, 1],
        ...     spurious=[True, True, False, False, True, True, False, False],
        ... )
        >>> print(table.to_string(index=False))
         label  spurious  count  accuracy
             0     False      2       1.0
             0      True      2       1.0
             1     False      2       0.0
             1      True      2       1.0
        >>> print(f"AGA {table['accuracy'].mean()}, WGA {table['accuracy'].min()}")
        AGA 0.75, WGA 0.0
    """
    table = _columns(label=labels, spurious=spurious, correct=np.asarray(predictions) == np.asarray(labels))
    groups = table.groupby(["label", "spurious"], sort=True)["correct"]
    return groups.agg(count="size", accuracy="mean").reset_index()


def alignment_score(attributions: ArrayLike, spurious_masks: ArrayLike) -> float:
    """μ_align: one minus the mean share of absolute attribution that lies on the spurious feature (LVLM-VA §5).

    Args:
        attributions: float (N, H, W). spurious_masks: bool (N, H, W).

    Returns:
        0..1, 1 = nothing on the feature; over the samples whose mask and attribution are not empty, since the others
        would score 1 for nothing.

    Raises:
        ValueError: shapes differ, an attribution is not finite, or no sample has both.

    Examples:
        A quarter of the first map's magnitude lies on the feature; the second sample has no feature and does not count.

        >>> import numpy as np
        >>> maps = np.array([[[3.0, -1.0]], [[1.0, 1.0]]])
        >>> alignment_score(maps, [[[False, True]], [[False, False]]])
        0.75
    """
    magnitude = np.abs(np.asarray(attributions, dtype=np.float64))
    masks = np.asarray(spurious_masks, dtype=bool)
    if magnitude.shape != masks.shape or magnitude.ndim != 3:
        raise ValueError(f"attributions {magnitude.shape} and masks {masks.shape} must both be (N, H, W)")
    if not np.isfinite(magnitude).all():
        sample = int(np.flatnonzero(~np.isfinite(magnitude).all(axis=(1, 2)))[0])
        raise ValueError(f"the attribution of sample {sample} is not finite")
    total = magnitude.sum(axis=(1, 2))
    counted = (total > 0) & masks.any(axis=(1, 2))
    if not counted.any():
        raise ValueError("no sample has both a spurious feature and an attribution that is not zero")
    return float(1 - np.mean((magnitude * masks).sum(axis=(1, 2))[counted] / total[counted]))


def reliance_on_rejected(exchanged: ArrayLike) -> float:
    """How much a model relies on what was rejected (an extension): 0 = not at all; scale-free.

    The fall of the true class's logit when rejected content of other classes is put into a picture, less the fall when
    the same places are filled from its own class, as a share of the logit's typical size (root mean square).

    Args:
        exchanged: (n, 3), of each held-out picture the centred logit of its class: as it is, with rejected content, and
            filled from its own class (`lvlmva_core.exchange.run_trial`).
    """
    before, rejected, filled = np.asarray(exchanged, dtype=np.float64).T
    scale = typical_size(before)
    return float((filled - rejected).mean() / scale) if scale > 0 else 0.0


def shortcut_effect(contrasts: ArrayLike) -> float:
    """How much a model relies on the spurious feature itself (an extension): 0 = not at all; scale-free.

    The mean change of the contrast of the class that the feature speaks for, when the feature comes into a picture, as
    a share of the contrast's standard deviation over the pictures without it. Below 0 where the feature speaks against
    that class.

    Args:
        contrasts: (n, 2), of each picture the logit of that class less the mean of the others': with the feature, and
            without.

    Examples:
        The feature moves the contrast by 3 where it spreads by 2 without.

        >>> shortcut_effect([[1.0, -2.0], [5.0, 2.0]])
        1.5
    """
    shown, without = np.asarray(contrasts, dtype=np.float64).T
    return float((shown - without).mean() / max(without.std(), np.finfo(np.float64).tiny))


def contrast(logits: ArrayLike, classes: ArrayLike) -> np.ndarray:
    """The logit of a class less the mean of the others': (n, K), (n,) -> float64 (n,)."""
    values, chosen = np.asarray(logits, dtype=np.float64), np.asarray(classes)
    own = values[np.arange(len(values)), chosen]
    found: np.ndarray = own - (values.sum(axis=1) - own) / (values.shape[1] - 1)
    return found


def best_worst_group(scores: ArrayLike, labels: ArrayLike, spurious: ArrayLike) -> float:
    """The highest worst-group accuracy that any threshold on a score reaches, of two classes (a diagnostic).

    It is chosen on the very labels that it is measured on: an upper bound, which tells a model that orders the pictures
    wrongly from one whose threshold is off.

    Args:
        scores: (n,), higher for class 1. labels: 0 | 1. spurious: bool (n,).
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    levels = np.unique(values)
    cuts = np.concatenate([levels, [np.inf]])  # class 1 from the cut on
    accuracies = []
    for with_feature in (False, True):
        for of_class in (False, True):
            group = np.sort(values[(positive == of_class) & (np.asarray(spurious, dtype=bool) == with_feature)])
            if len(group):
                below = np.searchsorted(group, cuts, side="left") / len(group)
                accuracies.append(1 - below if of_class else below)
    return float(np.min(accuracies, axis=0).max())


def verdict_quality(judged_spurious: Sequence[bool], overlapping: Sequence[bool]) -> dict[str, float | int | None]:
    """Precision and recall of verdicts over regions (LVLM-VA §5.4 calls both "verdict accuracy").

    Args:
        judged_spurious: per region, whether the verdict is "no".
        overlapping: per region, whether it overlaps the true spurious feature, by a stated rule.

    Returns:
        precision: of the regions judged spurious, the share that overlaps the feature; recall: of the regions that
        overlap it, the share judged spurious; None where there is no such region. Counts beside them.
    """
    judged, truth = np.asarray(judged_spurious, dtype=bool), np.asarray(overlapping, dtype=bool)
    if judged.shape != truth.shape:
        raise ValueError(f"{judged.size} verdicts for {truth.size} regions")
    both = int((judged & truth).sum())
    return {
        "precision": both / int(judged.sum()) if judged.any() else None,
        "recall": both / int(truth.sum()) if truth.any() else None,
        "regions": int(judged.size),
        "regions_judged_spurious": int(judged.sum()),
        "regions_overlapping": int(truth.sum()),
    }


def entropy_auroc(entropies: ArrayLike, spurious: ArrayLike) -> float | None:
    """How well low entropy marks the samples with the spurious feature (LVLM-VA §4.1): area under the ROC curve.

    Args:
        entropies: (N,) in nats. spurious: (N,) bool.

    Returns:
        0..1, 0.5 = not at all, 1 = every sample with the feature has less entropy than every sample without; None where
        all samples have it, or none.
    """
    from sklearn.metrics import roc_auc_score

    has = np.asarray(spurious, dtype=bool)
    return float(roc_auc_score(has, -np.asarray(entropies))) if 0 < has.sum() < has.size else None


def _columns(**columns: ArrayLike) -> "pd.DataFrame":
    import pandas as pd

    arrays = {name: np.asarray(values) for name, values in columns.items()}
    lengths = {array.shape for array in arrays.values()}
    if len(lengths) != 1 or next(iter(lengths)) == (0,):
        raise ValueError(f"expected arrays of one equal length above 0, not {[a.shape for a in arrays.values()]}")
    return pd.DataFrame(arrays)


@dataclass(frozen=True)
class Measured:
    """What one model said of one split, and what is true of it.

    predictions, labels: int (N,). spurious: bool (N,), None where groups are not known. groups: (N,) names.
    training_shares: a group's name -> its share of the training split.
    maps, masks: attributions float (n, H, W) and true spurious masks bool (n, H, W) of some of the samples, or None.
    exchanged: float (n, 3) as `reliance_on_rejected` takes it, or None.
    logits: float (N, K), or None. contrasts: float (n, 2) as `shortcut_effect` takes it, or None.
    """

    predictions: np.ndarray
    labels: np.ndarray
    spurious: np.ndarray | None
    groups: np.ndarray
    training_shares: "pd.Series"
    maps: np.ndarray | None
    masks: np.ndarray | None
    exchanged: np.ndarray | None = None
    logits: np.ndarray | None = None
    contrasts: np.ndarray | None = None


class Metric(NamedTuple):
    """A number that is taken of each model.

    heading: of its column in tables, None for metrics that stand in the metrics file alone. tested: whether differences
    between methods are tested. every_split: whether it is taken on every test split, or on `test` alone.
    """

    measure: Callable[[Measured], float | None]
    heading: str | None
    tested: bool
    every_split: bool


METRICS: dict[str, Metric] = {}


def metric(
    heading: str | None = None, *, tested: bool = False, every_split: bool = False
) -> Callable[[Callable[[Measured], float | None]], Callable[[Measured], float | None]]:
    """Enter a function as a metric under its own name; it gives None where the metric is not known."""

    def enter(measure: Callable[[Measured], float | None]) -> Callable[[Measured], float | None]:
        METRICS[measure.__name__] = Metric(measure, heading, tested, every_split)
        return measure

    return enter


@metric("accuracy", tested=True, every_split=True)
def accuracy(of: Measured) -> float:
    """Share of samples that are right."""
    return float((of.predictions == of.labels).mean())


@metric("AGA", tested=True)
def aga(of: Measured) -> float | None:
    """Plain mean of the groups' accuracies (LVLM-VA §5); None where groups are not known."""
    if of.spurious is None:
        return None
    return float(group_accuracies(of.predictions, of.labels, of.spurious)["accuracy"].mean())


@metric("WGA", tested=True)
def wga(of: Measured) -> float | None:
    """Accuracy of the worst group (LVLM-VA §5); None where groups are not known."""
    if of.spurious is None:
        return None
    return float(group_accuracies(of.predictions, of.labels, of.spurious)["accuracy"].min())


@metric()
def accuracy_weighted_by_training_groups(of: Measured) -> float | None:
    """Mean of the groups' accuracies, each weighted by the group's share of the training split."""
    import pandas as pd

    if of.spurious is None:
        return None
    by_group = pd.Series(of.predictions == of.labels).groupby(of.groups).mean()
    shares = of.training_shares.reindex(by_group.index).fillna(0.0)
    return float((by_group * shares).sum() / shares.sum())


@metric("μ_align", tested=True)
def mu_align(of: Measured) -> float | None:
    """`alignment_score`; None where no true mask is known."""
    return None if of.maps is None or of.masks is None else alignment_score(of.maps, of.masks)


@metric("reliance", tested=True)
def reliance(of: Measured) -> float | None:
    """`reliance_on_rejected`; None where nothing was rejected. An extension; needs no label for the shortcut."""
    return None if of.exchanged is None else reliance_on_rejected(of.exchanged)


@metric("reliance, true", tested=True)
def reliance_true(of: Measured) -> float | None:
    """`shortcut_effect`; None where no picture is there with and without the feature. An extension."""
    return None if of.contrasts is None else shortcut_effect(of.contrasts)


@metric()
def wga_best_threshold(of: Measured) -> float | None:
    """`best_worst_group`; None where groups are not known, or there are not two classes. An extension."""
    if of.spurious is None or of.logits is None or of.logits.shape[1] != 2:
        return None
    return best_worst_group(of.logits[:, 1] - of.logits[:, 0], of.labels, of.spurious)


def _auc(of: Measured, chosen: np.ndarray) -> float | None:
    """Area under the ROC curve of the second class's contrast among the chosen samples, of two classes."""
    from sklearn.metrics import roc_auc_score

    if of.logits is None or of.logits.shape[1] != 2 or len(np.unique(of.labels[chosen])) < 2:
        return None
    return float(roc_auc_score(of.labels[chosen] == 1, (of.logits[:, 1] - of.logits[:, 0])[chosen]))


@metric()
def auc_plain(of: Measured) -> float | None:
    """How well two classes are told apart at any threshold, among pictures without the feature. An extension."""
    return None if of.spurious is None else _auc(of, ~of.spurious)


@metric()
def auc_spurious(of: Measured) -> float | None:
    """The same among pictures with the feature. An extension."""
    return None if of.spurious is None else _auc(of, of.spurious)
