"""Regions of a label map: which are present, what names a segmentation, and when a region counts as spurious."""

import hashlib
from typing import Literal, get_args

import numpy as np

Overlap = Literal["any", "half_of_feature", "majority_of_attribution"]
ON_OBJECT: Overlap = "majority_of_attribution"  # the rule by which a region lies on the object that a class is about
Overlay = Literal["grey", "colour"]  # how the picture under laid-over regions is drawn (`lvlmva_core.render`)
NO_REGION = 255  # label of a pixel that belongs to no region, in every label map
MAX_REGIONS = 12  # colours that a region can be named by; `lvlmva_core.render` holds them


def regions_present(segments: np.ndarray) -> list[int]:
    """Regions that own a pixel of `segments` (H, W; 255 = none), rising. Only these are shown and asked about."""
    return [int(region) for region in np.unique(segments) if region != NO_REGION]


def segmentation_digest(segments: np.ndarray) -> str:
    """sha256 (hex) of a label map, uint8 (H, W): verdicts and overrides are tied to it."""
    array = np.ascontiguousarray(segments, dtype=np.uint8)
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()


def attribution_shares(attribution: np.ndarray, segments: np.ndarray) -> dict[int, float]:
    """π_j, each present region's share of the positive attribution, in rising order of regions.

    Args:
        attribution: float (H, W). segments: uint8 (H, W); 255 = none.

    Returns:
        In [0, 1]; all 0 where there is no positive attribution. Pixels of no region count in the total.
    """
    positive = np.maximum(attribution.astype(np.float64), 0.0)
    held = np.bincount(segments.ravel(), weights=positive.ravel(), minlength=NO_REGION + 1)
    total = float(positive.sum()) or 1.0
    return {region: float(held[region]) / total for region in regions_present(segments)}


def highest_attribution(attribution: np.ndarray, segments: np.ndarray, share: float) -> np.ndarray:
    """Where each region's attribution is highest: its fewest pixels that hold a share of its positive attribution.

    An extension: a region that the mixture drew around a shortcut is larger than the shortcut.

    Args:
        attribution: float (H, W). segments: uint8 (H, W); 255 = none. share: above 0, up to 1.

    Returns:
        bool (H, W); all of a region without positive attribution; False where there is no region.
    """
    effect = np.maximum(attribution.astype(np.float64), 0.0)
    kept = np.zeros(segments.shape, dtype=bool)
    for region in regions_present(segments):
        inside = np.flatnonzero(segments.ravel() == region)
        falling = inside[np.argsort(-effect.ravel()[inside], kind="stable")]
        held = np.cumsum(effect.ravel()[falling])
        enough = np.searchsorted(held, share * held[-1] * (1 - 1e-12)) + 1 if held[-1] > 0 else len(falling)
        kept.ravel()[falling[:enough]] = True
    return kept


def overlaps(
    segments: np.ndarray, spurious_mask: np.ndarray, attribution: np.ndarray, rule: Overlap
) -> dict[int, bool]:
    """Say for each region that is present whether it counts as overlapping the spurious feature.

    Verdict accuracy hangs on this rule, which LVLM-VA §5 leaves open; a figure means something only beside its name.

    Args:
        segments: (H, W) integers, region of each pixel; 255 = none.
        spurious_mask: (H, W) bool, True where the spurious feature lies.
        attribution: (H, W) float; its positive part is what the regions were fitted to (LVLM-VA §4.1).
        rule: "any": the region holds at least one pixel of the feature. "half_of_feature": it holds at least half of
            the feature's pixels. "majority_of_attribution": more than half of its positive attribution lies on the
            feature. No rule holds where the mask is empty.

    Returns:
        region -> bool, in rising order of regions.

    Raises:
        ValueError: an unknown rule, or shapes that differ.
    """
    if rule not in get_args(Overlap):
        raise ValueError(f"unknown overlap rule '{rule}'; expected one of {', '.join(get_args(Overlap))}")
    if not segments.shape == spurious_mask.shape == attribution.shape:
        raise ValueError(
            f"segments {segments.shape}, spurious_mask {spurious_mask.shape} and attribution {attribution.shape} "
            "must have one shape (H, W)"
        )
    feature = spurious_mask.astype(bool)
    effect = np.maximum(attribution.astype(np.float64), 0.0)
    result = {}
    for region in regions_present(segments):
        inside = segments == region
        held = int((inside & feature).sum())
        if rule == "any":
            result[region] = held > 0
        elif rule == "half_of_feature":
            result[region] = held > 0 and 2 * held >= int(feature.sum())
        else:
            result[region] = bool(2 * effect[inside & feature].sum() > effect[inside].sum())
    return result
