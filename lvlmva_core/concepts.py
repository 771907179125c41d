"""How much of a named thing an ImageNet classifier sees in each region of a picture: by taking the region away."""

import functools
from typing import TYPE_CHECKING

import numpy as np

from lvlmva_core.errors import InputError
from lvlmva_core.fills import fill_by_blur
from lvlmva_core.regions import regions_present

if TYPE_CHECKING:
    from torch import nn

SIDE = 224  # what the classifier was trained on


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


def concept_falls(
    picture: np.ndarray, segments: np.ndarray, concepts: tuple[str, ...], weights: str
) -> tuple[float, dict[int, float]]:
    """Probability that the picture shows one of the concepts, and how far its log-odds fall without each region.

    Each region is filled by a blur of what lies outside it, and the picture looked at again.

    Args:
        picture: uint8 (C, H, W). segments: uint8 (H, W); 255 = none. concepts: names of ImageNet classes.
        weights: file of EfficientNet-Lite0's published weights (docs/data.md).

    Returns:
        (0..1, region -> fall of the log-odds in nats; positive = the region showed the concept).

    Raises:
        InputError: no such class, or no such weights.
    """
    import torch

    regions = regions_present(segments)
    numbers = class_numbers(concepts)
    shown = [picture.astype(np.float64), *(fill_by_blur(picture, segments == region) for region in regions)]
    images = torch.from_numpy(np.stack(shown) / 255).float()
    images = torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    with torch.no_grad():
        log_p = torch.log_softmax(classifier(weights)(images).double(), 1)
    others = [number for number in range(log_p.shape[1]) if number not in numbers]
    odds = (log_p[:, numbers].logsumexp(1) - log_p[:, others].logsumexp(1)).numpy()
    falls = {region: float(odds[0] - odds[1 + n]) for n, region in enumerate(regions)}
    return float(1 / (1 + np.exp(-odds[0]))), falls


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
