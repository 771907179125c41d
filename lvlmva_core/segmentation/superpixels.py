"""Segmenters that PPEPS-WGM is compared with: regions from the picture or from nothing, merged by attribution."""

import math

import numpy as np

from lvlmva_core.errors import InputError

COMPACTNESS = 10.0  # of SLIC: weight of nearness against likeness of colour


def slic_regions(image: np.ndarray, n_superpixels: int) -> np.ndarray:
    """SLIC superpixels (Achanta et al. 2012, as in scikit-image).

    Args:
        image: uint8 (C, H, W), C in {1, 3}.

    Returns:
        int64 (H, W), labels 0, 1, ... of about `n_superpixels` connected regions.

    Raises:
        InputError: scikit-image is not installed.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise InputError("segment.method 'slic' needs scikit-image: pip install 'lvlmva[slic]'") from error
    rgb = np.moveaxis(np.broadcast_to(image, (3, *image.shape[1:])), 0, -1)
    labels = slic(rgb, n_segments=n_superpixels, compactness=COMPACTNESS, start_label=0, channel_axis=-1)
    return np.asarray(labels, dtype=np.int64)


def grid_regions(shape: tuple[int, int], n_regions: int) -> np.ndarray:
    """Tiles of nearly equal area, in about sqrt(n) rows: int64 (H, W), labels 0..n-1."""
    height, width = shape
    n_rows = round(math.sqrt(n_regions))
    tiles = [n_regions // n_rows + (row >= n_rows - n_regions % n_rows) for row in range(n_rows)]
    row_of = np.searchsorted(np.cumsum(tiles) / n_regions, (np.arange(height) + 0.5) / height, side="right")
    labels = np.empty(shape, dtype=np.int64)
    for row, n_tiles in enumerate(tiles):
        labels[row_of == row] = sum(tiles[:row]) + np.arange(width) * n_tiles // width
    return labels


def merge_regions(labels: np.ndarray, attribution: np.ndarray, n_regions: int) -> np.ndarray:
    """Merge regions until at most `n_regions` are left.

    In turn the region with the least positive attribution joins the neighbour whose mean positive attribution per pixel
    is nearest to its own; regions touch where two of their pixels share a side. Ties go to the lower label.

    Args:
        labels: int64 (H, W), any labels >= 0.
        attribution: float (H, W).

    Returns:
        int64 (H, W), labels 0, 1, ....
    """
    _, flat = np.unique(labels, return_inverse=True)
    current = flat.reshape(labels.shape)
    n = int(current.max()) + 1
    effect = np.bincount(current.ravel(), np.maximum(attribution, 0).ravel().astype(np.float64), n)
    area = np.bincount(current.ravel(), minlength=n).astype(np.float64)
    neighbours: list[set[int]] = [set() for _ in range(n)]
    for one, other in ((current[1:], current[:-1]), (current[:, 1:], current[:, :-1])):
        edge = one != other
        for a, b in np.unique(np.stack([one[edge], other[edge]], axis=1), axis=0).tolist():
            neighbours[a].add(b)
            neighbours[b].add(a)
    alive = set(range(n))
    joined = np.arange(n)
    while len(alive) > n_regions:
        least = min(alive, key=lambda region: (effect[region], region))
        density = effect[least] / area[least]
        host = min(neighbours[least], key=lambda region: (abs(effect[region] / area[region] - density), region))
        effect[host] += effect[least]
        area[host] += area[least]
        joined[joined == least] = host
        alive.remove(least)
        for region in neighbours[least]:
            neighbours[region].discard(least)
            if region != host:
                neighbours[region].add(host)
                neighbours[host].add(region)
    _, flat = np.unique(joined[current], return_inverse=True)
    return flat.reshape(labels.shape)


def number_by_share(labels: np.ndarray, attribution: np.ndarray, n_regions: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Number regions by falling share of the positive attribution; ties keep the order of the labels.

    Args:
        labels: int64 (H, W), at most `n_regions` labels 0, 1, ....
        attribution: float (H, W).

    Returns:
        segments uint8 (H, W), shares float64 (n_regions,), and the status as in `WeightedGMM`: "ok",
        "no_positive_effect" (segments 255, shares 0), or "collapsed" (fewer regions than asked for).
    """
    effect = np.maximum(attribution, 0).astype(np.float64)
    if not effect.any():
        return np.full(labels.shape, 255, dtype=np.uint8), np.zeros(n_regions), "no_positive_effect"
    held = np.bincount(labels.ravel(), (effect / effect.max()).ravel(), n_regions)
    order = np.argsort(-held, kind="stable")
    number = np.empty(n_regions, dtype=np.uint8)
    number[order] = np.arange(n_regions)
    status = "ok" if len(np.unique(labels)) == n_regions else "collapsed"
    return number[labels], held[order] / held.sum(), status
