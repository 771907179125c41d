"""Regions filled from what lies around them: by a blur of the rest, or by the smoothest surface, a membrane.

A membrane is the solution of Laplace's equation: each of its pixels is the mean of its neighbours, and at the region's
edge it takes up what is there. Added to one picture, the membrane of another's difference to it makes both meet
without a seam: Poisson blending (Pérez, Gangnet and Blake 2003).
"""

import numpy as np

WIDTH = 1 / 16  # of the picture's larger side: the blur's standard deviation


def fill_by_blur(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with the region replaced by a Gaussian blur of what lies outside it.

    Only pixels outside count, each by its distance, so that nothing of the region's own content is left; deep inside a
    large region it is their mean colour.

    Args:
        picture: (C, H, W) numbers. mask: bool (H, W), True in the region.

    Returns:
        float64 (C, H, W); a region that is the whole picture is filled with its mean colour.
    """
    from scipy import ndimage

    known = picture.astype(np.float64)
    outside = (~mask).astype(np.float64)
    mean = known[:, ~mask].mean(1) if (~mask).any() else known.mean((1, 2))
    sigma = WIDTH * max(mask.shape)
    weight = ndimage.gaussian_filter(outside, sigma, mode="constant")
    seen = weight > 1e-3  # less is rounding, and the mean is as good
    result = known.copy()
    for channel, colour in zip(result, mean, strict=True):
        blurred = ndimage.gaussian_filter(np.where(mask, 0.0, channel), sigma, mode="constant")
        channel[mask] = np.where(seen, blurred / np.where(seen, weight, 1.0), colour)[mask]
    return result


def fill_smoothly(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with the region replaced by a membrane (harmonic inpainting); as `fill_by_blur` otherwise."""
    if mask.all():
        return np.broadcast_to(picture.mean((1, 2), dtype=np.float64)[:, None, None], picture.shape).copy()
    result = picture.astype(np.float64)
    result[:, mask] = Membrane(mask)(result)
    return result


class Membrane:
    """The smoothest continuation into a region of what lies at its edge, prepared once for a region.

    At the picture's border it ends level. A region that is the whole picture has no edge: 0 there.

    Args:
        mask: bool (H, W).
    """

    def __init__(self, mask: np.ndarray) -> None:
        from scipy.sparse import csc_matrix
        from scipy.sparse.linalg import splu

        self.mask = mask
        number = np.cumsum(mask).reshape(mask.shape) - 1
        places = np.arange(mask.size).reshape(mask.shape)
        pairs = [(places[1:], places[:-1]), (places[:, 1:], places[:, :-1])]
        own = np.concatenate([np.concatenate([a.ravel(), b.ravel()]) for a, b in pairs])
        other = np.concatenate([np.concatenate([b.ravel(), a.ravel()]) for a, b in pairs])
        held = mask.ravel()[own]
        rows, neighbours = number.ravel()[own[held]], other[held]
        inside = mask.ravel()[neighbours]
        n = int(mask.sum())
        degree = np.bincount(rows, minlength=n).astype(np.float64)
        laplace = csc_matrix(
            (
                np.concatenate([degree, -np.ones(int(inside.sum()))]),
                (
                    np.concatenate([np.arange(n), rows[inside]]),
                    np.concatenate([np.arange(n), number.ravel()[neighbours[inside]]]),
                ),
            ),
            shape=(n, n),
        )
        self._edge = rows[~inside], neighbours[~inside]
        self._solve = splu(laplace).solve if len(self._edge[0]) else None

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values (C, H, W), of which those outside the region count, to its pixels: float64 (C, n), row by row."""
        n = int(self.mask.sum())
        if self._solve is None:
            return np.zeros((len(values), n))
        rows, neighbours = self._edge
        flat = values.reshape(len(values), -1)
        return np.stack(
            [self._solve(np.bincount(rows, channel[neighbours].astype(np.float64), minlength=n)) for channel in flat]
        )
