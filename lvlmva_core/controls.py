"""Where each method's masks come from: verdicts, the truth, or, for controls, what knows less (docs/alignment.md)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MaskSet = tuple[list[str], np.ndarray]


@dataclass(frozen=True)
class Given:
    """What masks can be made of, each read only by a method that asks for it.

    verdicts, truth: give sample ids and their masks, bool (n, H, W); verdicts may be weights in [0, 1], float32, which
        are moved as masks are. labels: gives the classes of sample ids, int (n,).
    """

    verdicts: Callable[[], MaskSet]
    truth: Callable[[], MaskSet]
    labels: Callable[[list[str]], np.ndarray]


# (given, seeds) -> sample ids, and masks bool (or weights) (n, H, W) for all seeds or (len(seeds), n, H, W)
MaskSource = Callable[[Given, Sequence[int]], MaskSet]
MASK_SOURCES: dict[str, MaskSource] = {}


def masks_of(*methods: str) -> Callable[[MaskSource], MaskSource]:
    """Enter a function as the source of masks of these methods (names of `lvlmva_core.methods`)."""

    def enter(source: MaskSource) -> MaskSource:
        MASK_SOURCES.update(dict.fromkeys(methods, source))
        return source

    return enter


@masks_of("lvlm_va", "lambda_zero", "lvlm_va_counterexamples", "lvlm_va_both")
def verdict_masks(given: Given, _seeds: Sequence[int]) -> MaskSet:
    """Regions that were judged "no"."""
    return given.verdicts()


@masks_of("rrr_gt")
def true_masks(given: Given, _seeds: Sequence[int]) -> MaskSet:
    """The true spurious masks of the alignment set."""
    return given.truth()


@masks_of("random_masks", "counterexamples_random_masks", "both_random_masks")
def random_places(given: Given, seeds: Sequence[int]) -> MaskSet:
    """The verdicts' masks in other places of their own pictures, drawn for each seed (`random_masks_like`)."""
    ids, masks = given.verdicts()
    return ids, np.stack([random_masks_like(masks, seed) for seed in seeds])


@masks_of("random_pictures")
def random_pictures(given: Given, seeds: Sequence[int]) -> MaskSet:
    """The verdicts' masks on other pictures, drawn for each seed (`masks_on_random_pictures`)."""
    ids, masks = given.verdicts()
    return ids, np.stack([masks_on_random_pictures(masks, seed) for seed in seeds])


@masks_of("class_matched", "counterexamples_class_matched", "both_class_matched")
def class_matched(given: Given, seeds: Sequence[int]) -> MaskSet:
    """The verdicts' masks on other pictures of the same classes, drawn for each seed (`masks_on_random_pictures`)."""
    ids, masks = given.verdicts()
    labels = given.labels(ids)
    return ids, np.stack([masks_on_random_pictures(masks, seed, labels) for seed in seeds])


@masks_of("flagged_pictures")
def flagged_pictures(given: Given, _seeds: Sequence[int]) -> MaskSet:
    """The whole of each picture in which a region was judged "no": which pictures, and no place."""
    ids, masks = given.verdicts()
    return ids, np.broadcast_to((masks > 0.5).any(axis=(1, 2), keepdims=True), masks.shape).copy()


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


def masks_on_random_pictures(masks: np.ndarray, seed: int, labels: np.ndarray | None = None) -> np.ndarray:
    """Control: `random_masks_like`, dealt to the samples at random, so that nothing is left of what the critic said.

    Args:
        masks: bool (N, H, W), empty ones among them; they are dealt as well.
        labels: (N,); then each mask stays in its class, so that the classes' shares of the masks are left too.
    """
    shifted, rng = random_masks_like(masks, seed), np.random.default_rng([seed, 1])
    dealt = np.empty_like(shifted)
    for label in [None] if labels is None else np.unique(labels):
        places = np.arange(len(masks)) if labels is None else np.flatnonzero(labels == label)
        dealt[places] = shifted[rng.permutation(places)]
    return dealt


def shares_per_class(masks: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """What masks lie on, counted: how many pictures, which share of these each class has, and the area.

    Args:
        masks: bool (n, H, W), or (R, n, H, W) for runs with masks of their own, over which means are taken; of weights,
            what is above 0.5 counts. labels: (n,).
    """
    of_runs = (masks if masks.ndim == 4 else masks[None]) > 0.5
    masked = np.asarray(of_runs.any(axis=(2, 3)))
    pictures = masked.sum(axis=1)
    shares = {
        name: float(np.mean(masked[:, labels == k].sum(axis=1) / np.maximum(pictures, 1)))
        for k, name in enumerate(class_names)
    }
    return {"pictures": float(pictures.mean()), "class_shares": shares, "mean_area": float(of_runs.mean())}
