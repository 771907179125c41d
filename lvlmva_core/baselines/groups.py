"""Sub-samples in which all groups are equal."""

import numpy as np
from numpy.typing import ArrayLike


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
