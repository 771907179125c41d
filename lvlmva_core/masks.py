"""Verdicts and segments to correction masks, with an expert's overrides (LVLM-VA §4.3, supplement A)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lvlmva_core.errors import InputError
from lvlmva_core.overrides import VERDICTS, Override
from lvlmva_core.regions import NO_REGION, segmentation_digest

if TYPE_CHECKING:
    from torch import Tensor


def assemble_mask(segments: "Tensor", verdicts: Mapping[int, str]) -> "Tensor":
    """Mask of the regions that were judged "no": where the model's gradient is to vanish (LVLM-VA §4.3).

    Args:
        segments: (H, W) int, region of each pixel, 0..J-1; 255 = none.
        verdicts: region -> "yes" (relevant) | "no" (spurious or irrelevant) | "unsure" (an expert's: masks nothing).

    Returns:
        (H, W) bool, True exactly on the pixels of regions judged "no".

    Raises:
        ValueError: a region that is present lacks a verdict, or a verdict is none of the three words.

    Examples:
        Region 1 was rejected; pixels of no region (255) are never masked.

        >>> import torch
        >>> segments = torch.tensor([[0, 0, 1], [0, 255, 1]])
        >>> assemble_mask(segments, {0: "yes", 1: "no"})
        tensor([[False, False,  True],
                [False, False,  True]])
    """
    import torch  # here, so that the stage `mask` starts without it

    if segments.ndim != 2 or segments.is_floating_point():
        raise ValueError(f"segments must be (H, W) of integers, not {tuple(segments.shape)} {segments.dtype}")
    rejected = _rejected(torch.unique(segments).tolist(), verdicts)
    return torch.isin(segments, torch.tensor(rejected, dtype=segments.dtype, device=segments.device))


def _rejected(regions: Iterable[int], verdicts: Mapping[int, str]) -> list[int]:
    """Those of the regions that are present which were judged "no". Raises ValueError as `assemble_mask` does."""
    rejected = []
    for region in sorted(set(regions) - {NO_REGION}):
        verdict = verdicts.get(region)
        if verdict not in VERDICTS:
            found = "no verdict" if verdict is None else f"verdict {verdict!r}"
            raise ValueError(f"region {region} has {found}; expected one of {', '.join(VERDICTS)}")
        if verdict == "no":
            rejected.append(region)
    return rejected


def why_stale(override: Override, digests: Mapping[str, str]) -> str:
    """What an override does not fit, in words.

    Args:
        digests: sample -> digest of its segmentation, of all samples that can be masked.
    """
    if override.sample not in digests:
        return "the alignment set has no such sample"
    if digests[override.sample] != override.segmentation:
        return "it is of another segmentation"
    return "the segmentation has no such region"


@dataclass(frozen=True)
class MaskSet:
    """Masks of the samples that can be used.

    ids: samples, in the order of masks. masks: bool (n, H, W). left_out: sample -> reason. overridden: verdicts that
    an expert changed. stale: overrides whose sample, segmentation or region is not there any more.
    """

    ids: list[str]
    masks: np.ndarray
    left_out: dict[str, str]
    overridden: int
    stale: list[Override]


def assemble_masks(
    ids: list[str],
    segments: np.ndarray,
    verdicts: Mapping[str, Mapping[int, str]],
    failures: Mapping[str, str],
    overrides: list[Override],
) -> MaskSet:
    """Masks of all samples, after overrides; a sample whose verdicts failed is left out with its reason.

    Args:
        ids: N samples. segments: uint8 (N, H, W).
        verdicts: sample -> region -> "yes" | "no". failures: sample -> why it has no verdict.
        overrides: at most one a region, as `overrides.resolve` gives them.

    Raises:
        InputError: a sample has neither verdicts nor a failure, a region lacks a verdict, or no sample is left.
    """
    digests = {sample: segmentation_digest(label_map) for sample, label_map in zip(ids, segments, strict=True)}
    stale = []
    given: dict[str, dict[int, str]] = {}
    for override in overrides:
        fits = digests.get(override.sample) == override.segmentation
        if fits and override.region in segments[ids.index(override.sample)]:
            given.setdefault(override.sample, {})[override.region] = override.verdict
        else:
            stale.append(override)
    usable, masks, left_out, overridden = [], [], dict(failures), 0
    for sample, label_map in zip(ids, segments, strict=True):
        regions = set(np.unique(label_map).tolist()) - {NO_REGION}
        if not regions:
            left_out.setdefault(sample, "no_region")
        corrected = {**verdicts.get(sample, {}), **given.get(sample, {})}
        if sample in left_out and not (regions and regions <= corrected.keys()):
            continue
        left_out.pop(sample, None)  # an expert may have judged what the model could not
        if sample not in verdicts and sample not in given:
            raise InputError(f"sample '{sample}' has neither verdicts nor a failure; rerun `dvc repro judge`")
        try:
            masks.append(np.isin(label_map, _rejected(regions, corrected)))
        except ValueError as error:
            raise InputError(f"sample '{sample}': {error}; rerun `dvc repro judge`") from error
        usable.append(sample)
        overridden += sum(verdicts.get(sample, {}).get(r) != v for r, v in given.get(sample, {}).items())
    if not usable:
        reasons = ", ".join(sorted(set(left_out.values())))
        raise InputError(
            f"no sample of the alignment set has verdicts ({reasons}); look at the segment and judge stages"
        )
    return MaskSet(usable, np.stack(masks), left_out, overridden, stale)
