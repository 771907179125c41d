"""Shortcuts that change what is there instead of covering it, on a square of any size up to the whole picture.

An extension, for the paper's open question of shortcuts that are not local: brightness, a texture, blur, a vignette or
a colour cast whose strength goes with the class. numpy and scipy only.
"""

from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field

from lvlmva_core.errors import InputError
from lvlmva_core.settings import Settings

Kind = Literal["brightness", "texture", "blur", "vignette", "colour_cast"]

LIGHTER = 0.5  # share of the way to white, at full strength
GRATING = 80.0  # levels from crest to trough
PERIODS = (3.0, 8.0)  # pixels of 28 a side: at full strength, and at none
SIGMA = 2.5  # pixels of 28 a side
FADED = 0.7  # share of the way to black (one channel: to white) in the corners
CAST = 0.3  # change of red and blue


class Shortcut(Settings):
    """What changes with the class, and where: a square at a corner.

    side: of the square, as a share of the picture's; 1 = the whole picture, the only one for a vignette.
    """

    kind: Kind
    side: Annotated[float, Field(gt=0.0, le=1.0)]


def support_of(height: int, width: int, side: float, corner: int) -> np.ndarray:
    """The square at a corner, bool (H, W). corner: 0..3 = top left, top right, bottom left, bottom right."""
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    inside = np.zeros((height, width), dtype=bool)
    inside[
        height - rows if corner >= 2 else 0 : height if corner >= 2 else rows,
        width - columns if corner % 2 else 0 : width if corner % 2 else columns,
    ] = True
    return inside


def lay_shortcut(
    picture: np.ndarray, shortcut: Shortcut, strength: float, corner: int
) -> tuple[np.ndarray, np.ndarray]:
    """Change a picture on the shortcut's square.

    Args:
        picture: uint8 (C, H, W), C 1 or 3. strength: 0..1; of a texture it is the fineness, of anything else how much
            is changed, and 0 changes nothing. corner: of `support_of`.

    Returns:
        (picture, mask): uint8 (C, H, W); bool (H, W), the square, where anything may have changed.

    Raises:
        InputError: a vignette on less than the whole picture, or a colour cast on a grey one.
        ValueError: an unknown kind.
    """
    kind, (channels, height, width) = shortcut.kind, picture.shape
    if kind not in get_args(Kind):
        raise ValueError(f"'{kind}': expected one of {', '.join(get_args(Kind))}")
    if kind == "vignette" and shortcut.side < 1:
        raise InputError("shortcut.side: a vignette is on the whole picture; set it to 1.0")
    if kind == "colour_cast" and channels != 3:
        raise InputError("shortcut.kind 'colour_cast' needs pictures in colour; take another kind")
    below, inside = picture.astype(np.float64), support_of(height, width, shortcut.side, corner)
    changed = _CHANGES[kind](below, strength)
    laid = np.where(inside, np.rint(changed).clip(0, 255), below).astype(np.uint8)
    return laid, inside


def _brightness(below: np.ndarray, strength: float) -> np.ndarray:
    lighter: np.ndarray = below + strength * LIGHTER * (255 - below)
    return lighter


def _texture(below: np.ndarray, strength: float) -> np.ndarray:
    scale = below.shape[1] / 28
    period = scale * (PERIODS[1] + strength * (PERIODS[0] - PERIODS[1]))
    rows, columns = np.indices(below.shape[1:])
    wave: np.ndarray = GRATING / 2 * (1 + np.sin(2 * np.pi * (rows + columns) / period))
    woven: np.ndarray = below + wave * (255 - below) / 255
    return woven


def _blur(below: np.ndarray, strength: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    sigma = strength * SIGMA * below.shape[1] / 28
    blurred: np.ndarray = gaussian_filter(below, (0, sigma, sigma), mode="reflect")
    return blurred


def _vignette(below: np.ndarray, strength: float) -> np.ndarray:
    """Towards black at the corners; pictures of one channel, whose edges may be black already, towards white."""
    height, width = below.shape[1:]
    rows, columns = np.indices((height, width))
    away = np.hypot((rows + 0.5) / height - 0.5, (columns + 0.5) / width - 0.5) / np.hypot(0.5, 0.5)
    faded = strength * FADED * away**2
    darker: np.ndarray = below + faded * ((255 if len(below) == 1 else 0) - below)
    return darker


def _colour_cast(below: np.ndarray, strength: float) -> np.ndarray:
    cast: np.ndarray = below * np.array([1 + strength * CAST, 1.0, 1 - strength * CAST])[:, None, None]
    return cast


_CHANGES = {
    "brightness": _brightness,
    "texture": _texture,
    "blur": _blur,
    "vignette": _vignette,
    "colour_cast": _colour_cast,
}
