"""What is measured: group accuracies, alignment of attributions, quality of verdicts (LVLM-VA §5)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


def group_accuracies(predictions: ArrayLike, labels: ArrayLike, spurious: ArrayLike) -> pd.DataFrame:
    """Accuracy of each group, a group being a class with or without the spurious feature (LVLM-VA §5).

    AGA is the plain mean of `accuracy` over the rows, WGA the minimum.

    Args:
        predictions, labels: (N,) int. spurious: (N,) bool.

    Returns:
        One row a group that occurs, sorted: label, spurious, count (int64), accuracy (float64, 0..1).

    Raises:
        ValueError: lengths differ, or there is no sample.
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


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (n - 1; 0 for a single value) over seeds."""
    array = np.asarray(values, dtype=np.float64)
    return {"mean": float(array.mean()), "std": float(array.std(ddof=1)) if array.size > 1 else 0.0}


def wilcoxon_test(differences: Sequence[float]) -> dict[str, float | int]:
    """Exact Wilcoxon signed-rank test of paired differences (LVLM-VA §5.2; scipy).

    All 2^n signs are enumerated, so that ties are exact too; zero differences are left out. Above 16 differences
    scipy's own choice of method is taken. With n = 7 the least two-sided p is 2 / 128 = 0.0156.

    Returns:
        n (differences that are not zero), p_two_sided, p_greater (one-sided: the differences lie above zero).
    """
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]
    n = len(values)
    if n == 0:
        return {"n": 0, "p_two_sided": 1.0, "p_greater": 1.0}
    method = stats.PermutationMethod(n_resamples=2**n) if 1 < n <= 16 else "auto"
    tests = {side: stats.wilcoxon(values, alternative=side, method=method).pvalue for side in ("two-sided", "greater")}
    return {
        "n": n,
        "p_two_sided": min(1.0, float(tests["two-sided"])),
        "p_greater": float(tests["greater"]),
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


def _columns(**columns: ArrayLike) -> pd.DataFrame:
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    lengths = {array.shape for array in arrays.values()}
    if len(lengths) != 1 or next(iter(lengths)) == (0,):
        raise ValueError(f"expected arrays of one equal length above 0, not {[a.shape for a in arrays.values()]}")
    return pd.DataFrame(arrays)
