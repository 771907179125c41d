"""How much of a named thing an ImageNet classifier sees in each region of a picture."""

import functools
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from lvlmva_core.errors import InputError
from lvlmva_core.fills import fill_by_blur
from lvlmva_core.regions import regions_present

if TYPE_CHECKING:
    from torch import nn

Look = Literal["alone", "without"]
SIDE = 128  # what regions and pictures are enlarged to; it was trained on 224, at three times the price


def class_numbers(concepts: tuple[str, ...]) -> list[int]:
    """Numbers of ImageNet classes by the names that torchvision lists.

    Raises:
        InputError: there is no class of that name; the closest ones are told.
    """
    import difflib

    from torchvision.models import EfficientNet_B0_Weights

    known = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    lower = [name.lower() for name in known]
    for concept in concepts:
        if concept.lower() not in lower:
            close = difflib.get_close_matches(concept.lower(), lower, n=3)
            hint = f"; did you mean {' or '.join(known[lower.index(name)] for name in close)}?" if close else ""
            raise InputError(f"critique.concepts: ImageNet has no class '{concept}'{hint}")
    return [lower.index(concept.lower()) for concept in concepts]


def concept_evidence(
    picture: np.ndarray, segments: np.ndarray, concepts: tuple[str, ...], weights: str, look: Look
) -> dict[int, float]:
    """How much each region shows one of the concepts: region -> nats, in rising order of regions.

    Args:
        picture: uint8 (C, H, W). segments: uint8 (H, W); 255 = none. concepts: names of ImageNet classes.
        weights: file of EfficientNet-Lite0's published weights (docs/data.md).
        look: "alone": the log-odds of the concepts in the square around the region, looked at by itself; "without":
            how far the log-odds of the whole picture fall when the region is filled by a blur of what lies around it.

    Raises:
        InputError: no such class, or no such weights. ValueError: an unknown way to look.
    """
    if look not in get_args(Look):
        raise ValueError(f"look '{look}': expected one of {', '.join(get_args(Look))}")
    regions = regions_present(segments)
    if look == "alone":
        odds = _log_odds([square_around(picture, segments == region) for region in regions], concepts, weights)
        return dict(zip(regions, odds, strict=True))
    filled = [fill_by_blur(picture, segments == region) for region in regions]
    whole, *rest = _log_odds([picture, *filled], concepts, weights)
    return {region: whole - without for region, without in zip(regions, rest, strict=True)}


def square_around(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The part of a picture (C, H, W) in the smallest square around a region, at least a quarter of the sides wide.

    Where the square would leave the picture it is moved inside; where it cannot, it is as large as the picture.
    """
    size, cut = mask.shape, []
    ranges = [np.flatnonzero(mask.any(axis=1 - axis)) for axis in (0, 1)]
    side = max(*(int(places[-1] - places[0]) + 1 for places in ranges), max(size) // 4)
    for places, n in zip(ranges, size, strict=True):
        start = max(0, min(n - side, (int(places[0]) + int(places[-1]) + 1 - side) // 2))
        cut.append(slice(start, start + min(side, n)))
    return picture[:, cut[0], cut[1]]


def _log_odds(pictures: list[np.ndarray], concepts: tuple[str, ...], weights: str) -> list[float]:
    """Of each picture, grey levels (C, h, w), the log-odds that it shows one of the concepts."""
    import torch

    numbers = class_numbers(concepts)
    others = sorted(set(range(1000)) - set(numbers))
    shown = [torch.from_numpy(np.ascontiguousarray(each, dtype=np.float32))[None] / 255 for each in pictures]
    enlarged = [
        torch.nn.functional.interpolate(each, (SIDE, SIDE), mode="bicubic", align_corners=False) for each in shown
    ]
    with torch.no_grad():
        log_p = torch.log_softmax(classifier(weights)(torch.cat(enlarged).clamp(0, 1)).double(), 1)
    odds = log_p[:, numbers].logsumexp(1) - log_p[:, others].logsumexp(1)
    return [float(each) for each in odds]


@functools.cache
def classifier(weights: str) -> "nn.Module":
    """EfficientNet-Lite0 with its published weights: pictures (B, C, H, W) in [0, 1] to ImageNet's 1,000 logits."""
    from lvlmva_core.models import ModelSpec, build_model, load_weights

    spec = ModelSpec("efficientnet_lite0", 3, SIDE, SIDE, 1000, 1)
    model = build_model(spec, 0)
    try:
        load_weights(model, spec, weights)
    except InputError as error:
        reason = str(error).removeprefix("train.weights: ")
        raise InputError(f"critique.weights: {reason.partition(';')[0]}; docs/data.md says how to get them") from error
    return model.eval()
