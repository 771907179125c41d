"""Whether attribution is too spread out for a place to be wrong: a shortcut without a place (an extension).

Both corrections act on regions. Where a model relies on the whole picture (brightness, texture, blur), a critic that is
shown regions can only accept what misleads, or reject what matters with it.
"""

import numpy as np
from numpy.typing import ArrayLike

HELD = 0.9  # of the positive attribution, which regions are cut from
DIFFUSE_FROM = 0.34  # median share of pixels from which a set of maps is diffuse; its error rates: docs/supports.md


def shares_of_pixels(attributions: ArrayLike, held: float = HELD) -> np.ndarray:
    """The least share of pixels that hold `held` of each map's positive attribution.

    Negative attribution does not count: a convolutional network's maps change sign from pixel to pixel everywhere.

    Args:
        attributions: float (N, H, W). held: 0..1.

    Returns:
        float64 (n,), in (0, 1], of the maps that have any.

    Examples:
        Half of the pixels share the attribution; nine tenths of it lie on 45 % of all, so on 2 of 4.

        >>> shares_of_pixels([[[1.0, 1.0], [0.0, -3.0]]])
        array([0.5])
    """
    maps = np.maximum(np.asarray(attributions, dtype=np.float64), 0)
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)[:, ::-1]
    flat = flat[flat[:, 0] > 0]
    summed = np.cumsum(flat, axis=1)
    # a share of the total that is reached but for rounding counts as reached
    least = (summed < held * summed[:, -1:] * (1 - 1e-12)).sum(axis=1) + 1
    return np.asarray(least / flat.shape[1], dtype=np.float64)


def diffuse_share(attributions: ArrayLike) -> float | None:
    """The median of `shares_of_pixels`; None where no map has positive attribution."""
    shares = shares_of_pixels(attributions)
    return float(np.median(shares)) if len(shares) else None


def diffuse_warning(share: float | None) -> str:
    """What is said where attribution is diffuse, from its `diffuse_share`; "" where it is not."""
    if share is None or share < DIFFUSE_FROM:
        return ""
    return (
        f"Attribution is diffuse: {HELD:.0%} of what is positive takes {share:.0%} of the pixels (median; said from "
        f"{DIFFUSE_FROM:.0%} on). The model may rely on something without a place, such as brightness, texture or "
        "blur. Verdicts on regions cannot point at that, and alignment on them may do harm."
    )
