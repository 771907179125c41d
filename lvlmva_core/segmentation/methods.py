"""One interface for every segmenter: maps and pictures in, numbered regions out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lvlmva_core.config import Segment
from lvlmva_core.segmentation.mixture import METHOD_VERSION, fit_weighted_gmm

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Segmenter:
    """A way to cut attribution maps into regions.

    Attributes:
        version: raised with any change that can move a pixel to another region.
        reads_images: whether the pictures matter; only then are they part of what a segmentation is keyed by.
        settings: the keys of `Segment` that the result depends on, beside `method` and `n_regions`.
        segment: (attributions (n, H, W) float32, images (n, C, H, W) uint8 or None, ids, config) -> arrays per sample:
            "segments" uint8 (n, H, W), 255 = none, regions numbered by falling share of the positive attribution;
            "weights" float64 (n, J), these shares; "status" str (n,). PPEPS-WGM also gives the mixture: "means"
            (n, J, 2), "covariances" (n, J, 2, 2) and "log_likelihood" (n,), all float64.
    """

    version: int
    reads_images: bool
    settings: tuple[str, ...]
    segment: Callable[[np.ndarray, np.ndarray | None, Sequence[str], Segment], Arrays]


def ppeps_wgm(attributions: np.ndarray, images: np.ndarray | None, ids: Sequence[str], config: Segment) -> Arrays:
    """Weighted Gaussian mixture over the positive attributions (LVLM-VA §4.2)."""
    fit = fit_weighted_gmm(
        np.maximum(attributions, 0), config.n_regions, seed=config.seed, n_starts=config.n_starts, names=ids
    )
    return {
        "segments": fit.labels.cpu().numpy(),
        "weights": fit.weights.double().cpu().numpy(),
        "means": fit.means.double().cpu().numpy(),
        "covariances": fit.covariances.double().cpu().numpy(),
        "log_likelihood": fit.log_likelihood.double().cpu().numpy(),
        "status": np.array(fit.status),
    }


SEGMENTERS = {
    "ppeps_wgm": Segmenter(METHOD_VERSION, reads_images=False, settings=("seed", "n_starts"), segment=ppeps_wgm),
}
