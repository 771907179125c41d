"""Where each method's masks come from: verdicts, the truth, or, for controls, what knows less (docs/alignment.md)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MaskSet = tuple[list[str], np.ndarray]


@dataclass(frozen=True)
class Given:
    """What masks can be made of, each read only by a method that asks for it.

    verdicts, truth: give sample ids and their masks, bool (n, H, W); verdicts may be weights in [0, 1], float32, which
        are moved as masks are.
    """

    verdicts: Callable[[], MaskSet]
    truth: Callable[[], MaskSet]


# (given, seeds) -> sample ids, and masks bool (or weights) (n, H, W) for all seeds or (len(seeds), n, H, W)
MaskSource = Callable[[Given, Sequence[int]], MaskSet]
MASK_SOURCES: dict[str, MaskSource] = {}


def masks_of(*methods: str) -> Callable[[MaskSource], MaskSource]:
    """Enter a function as the source of masks of these methods (names of `lvlmva_core.methods`)."""

    def enter(source: MaskSource) -> MaskSource:
        MASK_SOURCES.update(dict.fromkeys(methods, source))
        return source

    return enter


@masks_of("lvlm_va", "lambda_zero")
def verdict_masks(given: Given, _seeds: Sequence[int]) -> MaskSet:
    """Regions that were judged "no"."""
    return given.verdicts()


@masks_of("rrr_gt")
def true_masks(given: Given, _seeds: Sequence[int]) -> MaskSet:
    """The true spurious masks of the alignment set."""
    return given.truth()


@masks_of("random_masks")
def random_places(given: Given, seeds: Sequence[int]) -> MaskSet:
    """The verdicts' masks in other places of their own pictures, drawn for each seed (`random_masks_like`)."""
    ids, masks = given.verdicts()
    return ids, np.stack([random_masks_like(masks, seed) for seed in seeds])


@masks_of("random_pictures")
def random_pictures(given: Given, seeds: Sequence[int]) -> MaskSet:
    """The verdicts' masks on other pictures, drawn for each seed (`masks_on_random_pictures`)."""
    ids, masks = given.verdicts()
    return ids, np.stack([masks_on_random_pictures(masks, seed) for seed in seeds])


def random_masks_like(masks: np.ndarray, seed: int) -> np.ndarray:
    """Control: each mask shifted by a random offset, wrapping at the edges: the same area and form, another place.

    They still lie on the pictures in which the critic rejected a region: see `masks_on_random_pictures`.

    Args:
        masks: bool (N, H, W).
    """
    rng = np.random.default_rng(seed)
    height, width = masks.shape[1:]
    offsets = zip(rng.integers(0, height, len(masks)), rng.integers(0, width, len(masks)), strict=True)
    return np.stack([np.roll(mask, offset, axis=(0, 1)) for mask, offset in zip(masks, offsets, strict=True)])


def masks_on_random_pictures(masks: np.ndarray, seed: int) -> np.ndarray:
    """Control: `random_masks_like`, dealt to the samples at random, so that nothing is left of what the critic said.

    Args:
        masks: bool (N, H, W), empty ones among them; they are dealt as well.
    """
    return random_masks_like(masks, seed)[np.random.default_rng([seed, 1]).permutation(len(masks))]
