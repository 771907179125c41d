"""SUBG: sub-sample every group to the size of the smallest, and train anew (Idrissi et al. 2022; LVLM-VA §5)."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def balanced_rows(groups: ArrayLike, seed: int) -> Tensor:
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
    return torch.from_numpy(np.sort(np.concatenate(rows)))
