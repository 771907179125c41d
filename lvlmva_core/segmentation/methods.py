"""One interface for every segmenter: maps and pictures in, numbered regions out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lvlmva_core.segment_settings import Segment
from lvlmva_core.segmentation.choice import fit_chosen_gmm
from lvlmva_core.segmentation.mixture import METHOD_VERSION, fit_weighted_gmm
from lvlmva_core.segmentation.superpixels import grid_regions, merge_regions, number_by_share, slic_regions

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Segmenter:
    """A way to cut attribution maps into regions.

    Attributes:
        version: raised with any change that can move a pixel to another region.
        reads_images: whether the pictures matter; only then are they part of what a segmentation is kept under.
        settings: what the result depends on beside maps, pictures, method and number of regions.
        segment: (attributions (n, H, W) float32, images (n, C, H, W) uint8 or None, ids, config, device) -> arrays:
            "segments" uint8 (n, H, W), 255 = none, regions numbered by falling share of the positive attribution;
            "weights" float64 (n, J), these shares; "status" str (n,), as in `WeightedGMM`. PPEPS-WGM also gives its
            mixtures: "means" (n, J, 2), "covariances" (n, J, 2, 2) and "log_likelihood" (n,), float64.
    """

    version: int
    reads_images: bool
    settings: Callable[[Segment], dict[str, object]]
    segment: Callable[[np.ndarray, np.ndarray | None, Sequence[str], Segment, torch.device], Arrays]


def _ppeps_wgm(
    attributions: np.ndarray, _images: np.ndarray | None, ids: Sequence[str], config: Segment, device: torch.device
) -> Arrays:
    """Gaussian mixture weighted by the positive attributions (LVLM-VA §4.1)."""
    weights = torch.from_numpy(np.maximum(attributions, 0)).to(device)
    if config.choose == "fixed":
        fit = fit_weighted_gmm(weights, config.n_regions, seed=config.seed, n_starts=config.n_starts, names=ids)
    else:
        numbers = range(1, config.n_regions + 1)
        fit, _ = fit_chosen_gmm(weights, numbers, config.choose, seed=config.seed, n_starts=config.n_starts, names=ids)
    return {
        "segments": fit.labels.cpu().numpy(),
        "weights": fit.weights.double().cpu().numpy(),
        "means": fit.means.double().cpu().numpy(),
        "covariances": fit.covariances.double().cpu().numpy(),
        "log_likelihood": fit.log_likelihood.double().cpu().numpy(),
        "status": np.array(fit.status),
    }


def _slic(
    attributions: np.ndarray, images: np.ndarray | None, ids: Sequence[str], config: Segment, _device: torch.device
) -> Arrays:
    regions = [slic_regions(image, config.n_superpixels) for image in _needed(images)]
    return _merged(regions, attributions, config)


def _grid(
    attributions: np.ndarray, _images: np.ndarray | None, ids: Sequence[str], config: Segment, _device: torch.device
) -> Arrays:
    regions = grid_regions((attributions.shape[1], attributions.shape[2]), config.n_regions)
    return _merged([regions] * len(attributions), attributions, config)


def _sam(
    attributions: np.ndarray, images: np.ndarray | None, ids: Sequence[str], config: Segment, device: torch.device
) -> Arrays:
    from lvlmva_core.segmentation.sam import load_sam, sam_regions

    model = load_sam(Path(config.sam_checkpoint or ""), device)
    return _merged([sam_regions(model, image) for image in _needed(images)], attributions, config)


def _sam_settings(config: Segment) -> dict[str, object]:
    from lvlmva_core.segmentation.sam import checkpoint_digest

    return {"checkpoint": checkpoint_digest(Path(config.sam_checkpoint or ""))}


def _needed(images: np.ndarray | None) -> np.ndarray:
    if images is None:
        raise ValueError("this segmenter reads the pictures: give images")
    return images


def _merged(regions: list[np.ndarray], attributions: np.ndarray, config: Segment) -> Arrays:
    numbered = [
        number_by_share(merge_regions(labels, attribution, config.n_regions), attribution, config.n_regions)
        for labels, attribution in zip(regions, attributions, strict=True)
    ]
    segments, shares, status = zip(*numbered, strict=True)
    return {"segments": np.stack(segments), "weights": np.stack(shares), "status": np.array(status)}


SEGMENTERS = {
    "ppeps_wgm": Segmenter(
        version=METHOD_VERSION,
        reads_images=False,
        settings=lambda config: {"seed": config.seed, "n_starts": config.n_starts, "choose": config.choose},
        segment=_ppeps_wgm,
    ),
    "sam": Segmenter(version=2, reads_images=True, settings=_sam_settings, segment=_sam),
    "slic": Segmenter(
        version=1,
        reads_images=True,
        settings=lambda config: {"n_superpixels": config.n_superpixels},
        segment=_slic,
    ),
    "grid": Segmenter(version=1, reads_images=False, settings=lambda config: {}, segment=_grid),
}
