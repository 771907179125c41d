"""Verdicts and segments to correction masks, with an expert's overrides (LVLM-VA §4.3, supplement A)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.errors import InputError
from lvlmva_core.overrides import VERDICTS, Override, Tie
from lvlmva_core.regions import NO_REGION, highest_attribution, segmentation_digest

if TYPE_CHECKING:
    from torch import Tensor

SAID = 20  # ties and stale overrides that are named; metrics count them all


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


def notes_on(folder: Path, ties: Iterable[Tie], stale: Iterable[Override], digests: Mapping[str, str]) -> list[str]:
    """Lines that tell reviewers what does not count; at most 20 of each kind, since a retraining makes all stale.

    Args:
        folder: of the reviewers' files. digests: as of `why_stale`.
    """
    tied = [
        f"tie: {folder}: region {tie.region} of '{tie.sample}': yes by {', '.join(tie.yes)}, no by "
        f"{', '.join(tie.no)}; the critic's verdict stands"
        for tie in ties
    ]
    left_out = [
        f"stale override: {folder}: region {each.region} of '{each.sample}' by {', '.join(each.reviewers)}: "
        f"{why_stale(each, digests)}; it is left out, review it again"
        for each in stale
    ]
    return [*tied[:SAID], *left_out[:SAID]]


@dataclass(frozen=True)
class MaskSet:
    """Masks of the samples that can be used.

    ids: samples, in the order of masks. masks: bool (n, H, W). left_out: sample -> reason. overridden: verdicts that
    an expert changed. stale: overrides whose sample, segmentation or region is not there any more. weights: float32
    (n, H, W) in [0, 1], the share of votes that reject a pixel's region, where shares were given (an extension).
    """

    ids: list[str]
    masks: np.ndarray
    left_out: dict[str, str]
    overridden: int
    stale: list[Override]
    weights: np.ndarray | None = None

    def summary(self) -> dict[str, Any]:
        """Counts for the metrics file."""
        found: dict[str, Any] = {
            "samples": len(self.ids),
            "samples_left_out": len(self.left_out),
            "samples_masked": int(self.masks.any(axis=(1, 2)).sum()),
            "mean_masked_area": float(self.masks.mean()),
            "verdicts_overridden": self.overridden,
            "stale_overrides": len(self.stale),
        }
        if self.weights is not None:
            split = (self.weights > 0) & (self.weights < 1)
            found |= {
                "weights": "share of votes (an extension)",
                "mean_weight": float(self.weights.mean(dtype=np.float64)),
                "samples_split": int(split.any(axis=(1, 2)).sum()),
            }
        return found


def assemble_masks(
    ids: list[str],
    segments: np.ndarray,
    verdicts: Mapping[str, Mapping[int, str]],
    failures: Mapping[str, str],
    overrides: list[Override],
    shares: Mapping[str, Mapping[int, float]] | None = None,
    kept: np.ndarray | None = None,
) -> MaskSet:
    """Masks of all samples, after overrides; a sample whose verdicts failed is left out with its reason.

    Args:
        ids: N samples. segments: uint8 (N, H, W).
        verdicts: sample -> region -> "yes" | "no". failures: sample -> why it has no verdict.
        overrides: at most one a region, as `overrides.resolve` gives them.
        shares: sample -> region -> share of votes that reject it, 0..1, then there are weights (an extension); an
            expert's verdict counts as all votes.
        kept: bool (N, H, W), what of each region is masked where it was rejected; None = all of it.

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
    usable, masks, weights, left_out, overridden = [], [], [], dict(failures), 0
    for place, (sample, label_map) in enumerate(zip(ids, segments, strict=True)):
        regions = set(np.unique(label_map).tolist()) - {NO_REGION}
        if not regions:
            left_out.setdefault(sample, "no_region")
        corrected = {**verdicts.get(sample, {}), **given.get(sample, {})}
        if sample in left_out and not (regions and regions <= corrected.keys()):
            continue
        left_out.pop(sample, None)  # an expert may have judged what the model could not
        if sample not in verdicts and sample not in given:
            raise InputError(f"sample '{sample}' has neither verdicts nor a failure; rerun `dvc repro judge`")
        here = True if kept is None else kept[place]
        try:
            masks.append(np.isin(label_map, _rejected(regions, corrected)) & here)
        except ValueError as error:
            raise InputError(f"sample '{sample}': {error}; rerun `dvc repro judge`") from error
        usable.append(sample)
        if shares is not None:
            of_expert = {region: float(verdict == "no") for region, verdict in given.get(sample, {}).items()}
            weights.append(_weights(label_map, {**shares.get(sample, {}), **of_expert}) * here)
        overridden += sum(verdicts.get(sample, {}).get(r) != v for r, v in given.get(sample, {}).items())
    if not usable:
        reasons = ", ".join(sorted(set(left_out.values())))
        raise InputError(
            f"no sample of the alignment set has verdicts ({reasons}); look at the segment and judge stages"
        )
    weighed = None if shares is None else np.stack(weights)
    return MaskSet(usable, np.stack(masks), left_out, overridden, stale, weighed)


def highest_attributions(attributions: Path, ids: list[str], segments: np.ndarray, share: float) -> np.ndarray:
    """`lvlmva_core.regions.highest_attribution` of each sample, bool (N, H, W), by what the stage `attribute` wrote.

    Raises:
        InputError: the attributions are of other samples.
    """
    if read_attrs(attributions)["ids"] != ids:
        raise InputError(f"{attributions}: other samples than the segmentations; rerun `dvc repro segment`")
    maps = read_array(attributions, "attributions")
    return np.stack([highest_attribution(*pair, share) for pair in zip(maps, segments, strict=True)])


def _weights(segments: np.ndarray, shares: Mapping[int, float]) -> np.ndarray:
    """float32 (H, W): of each pixel, the share of votes that reject its region; 0 where it has none."""
    of_region = np.zeros(NO_REGION + 1, dtype=np.float32)
    for region, share in shares.items():
        of_region[region] = share
    of_region[NO_REGION] = 0.0
    return np.asarray(of_region[segments])
