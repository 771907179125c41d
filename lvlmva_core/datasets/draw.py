"""Drawn splits: by class, and never parting what belongs together."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np


def draw_splits(labels: np.ndarray, units: np.ndarray, shares: Mapping[str, float], seed: int) -> np.ndarray:
    """Draw a split for each sample, so that every class is spread by the shares as evenly as the units allow.

    Units (a patient's pictures) are taken from the largest to the smallest, in random order where they are equal, and
    each goes where most is lacking of its classes. Each split aims at one sample of a class at least.

    Args:
        labels: int (N,), 0..K-1. units: (N,), what must stay together. shares: split -> share, adding up to 1; in a
            tie the first is taken. seed: of the order.

    Returns:
        Split names (N,).
    """
    _, unit = np.unique(units, return_inverse=True)
    n_units, n_classes = int(unit.max()) + 1, int(labels.max()) + 1
    counts = np.zeros((n_units, n_classes))
    np.add.at(counts, (unit, labels), 1)
    names = list(shares)
    totals = np.bincount(labels, minlength=n_classes)
    wanted = np.array([shares[name] for name in names])[:, None] * totals
    wanted[1:] = np.maximum(wanted[1:], np.array([shares[name] > 0 for name in names[1:]])[:, None])
    wanted[0] = totals - wanted[1:].sum(axis=0)
    order = np.random.default_rng(seed).permutation(n_units)
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    lacking = wanted.copy()
    chosen = np.zeros(n_units, dtype=np.int64)
    for one in order:
        chosen[one] = int(np.argmax(np.round(lacking @ counts[one], 9)))
        lacking[chosen[one]] -= counts[one]
    return np.array(names)[chosen[unit]]


def joined_units(*keys: Sequence[Hashable]) -> np.ndarray:
    """Units of samples that share any key, directly or through others, int64 (N,): numbered by their first sample.

    Args:
        keys: for each sample one key (a patient, the digest of its pixels); None joins nothing.
    """
    parent = list(range(len(keys[0])))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for key in keys:
        first: dict[Hashable, int] = {}
        for place, value in enumerate(key):
            if value is not None:
                one, other = root(place), root(first.setdefault(value, place))
                parent[max(one, other)] = min(one, other)
    return np.array([root(place) for place in range(len(parent))], dtype=np.int64)
