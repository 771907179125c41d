"""Shortcuts that are planted into pictures, so that it is known where they lie: what a critic can be tested on.

An extension: LVLM-VA knows its shortcuts from the data sets. Three kinds have a place: a flat patch, a letter and a
strip like a bandage. Two change the whole picture and have none: blur and a colour cast. numpy, scipy and Pillow only.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LocalKind = Literal["patch", "letter", "strip"]
GlobalKind = Literal["blur", "colour_cast"]
Size = Literal["small", "medium", "large"]
Place = Literal["on", "off"]

SHARES: dict[Size, tuple[float, float]] = {"small": (0.01, 0.02), "medium": (0.03, 0.05), "large": (0.08, 0.12)}
LEAST_PIXELS: dict[LocalKind, int] = {"patch": 9, "letter": 35, "strip": 24}  # below, tiny pictures show no such thing
BLUR: dict[Size, float] = {"small": 0.008, "medium": 0.016, "large": 0.024}  # sigma, of the shorter side
CAST: dict[Size, float] = {"small": 0.4, "medium": 0.7, "large": 1.1}  # exponent of the gains
GAINS = ((1.2, 1.0, 0.78), (0.8, 0.98, 1.2), (0.85, 1.12, 0.88), (1.15, 0.85, 1.12))  # warm, cool, green, magenta
BANDAGES = ((222, 180, 145), (240, 234, 222), (70, 120, 190), (232, 140, 60), (110, 170, 95), (200, 70, 80))
LETTERS = "ABEFHKLRSX"
VISIBLE = 60.0  # levels, in the channel that differs most, by which a shortcut differs from what it covers
CENTRE = 0.35  # of the picture's sides: what is taken for the object where nobody drew it
OVERSAMPLING = 8
ROUND = 0.4  # radius of a strip's corners, of its width
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True)
class Planted:
    """A picture with a shortcut.

    picture: uint8 (C, H, W). mask: bool (H, W), True where the shortcut lies; nothing else was changed. place: "on" or
    "off" the object.
    """

    picture: np.ndarray
    mask: np.ndarray
    place: Place


def centre_of(height: int, width: int) -> np.ndarray:
    """What is taken for the object where nobody drew it: bool (H, W), True within 0.35 of the sides of the centre."""
    rows, columns = np.indices((height, width))
    inside: np.ndarray = np.hypot((rows + 0.5) / height - 0.5, (columns + 0.5) / width - 0.5) <= CENTRE
    return inside


def plant(
    picture: np.ndarray,
    kind: LocalKind,
    size: Size,
    place: Place,
    object_mask: np.ndarray,
    rng: np.random.Generator,
    avoid: np.ndarray | None = None,
) -> Planted:
    """Lay a shortcut over a picture; its exact size, its looks and its place are drawn.

    Args:
        picture: uint8 (C, H, W), C in {1, 3}. size: the range of SHARES that its share of the picture is drawn from; in
            tiny pictures at least LEAST_PIXELS.
        place: "off": where it touches the object least; "on": where it covers the object about as far as it can.
        object_mask: bool (H, W), somewhere True. avoid: bool (H, W), what it does not touch if there is another place.

    Raises:
        ValueError: an unknown kind, size or place, or an object mask without a pixel.
    """
    _check(kind, get_args(LocalKind))
    _check(size, get_args(Size))
    _check(place, get_args(Place))
    if not object_mask.any():
        raise ValueError("the object mask is empty; take centre_of()")
    height, width = picture.shape[1:]
    area = max(rng.uniform(*SHARES[size]) * height * width, LEAST_PIXELS[kind])
    outline, alpha = _OUTLINES[kind](area, height, width, rng)
    top, left = _choose_place(outline, object_mask, avoid, place, rng)
    rows, columns = slice(top, top + outline.shape[0]), slice(left, left + outline.shape[1])
    below = picture[:, rows, columns].astype(np.float64)
    colour = _colour(kind, below, outline, alpha, rng)
    mixed = np.rint(below + alpha * (colour - below)).clip(0, 255).astype(np.uint8)
    result, mask = picture.copy(), np.zeros((height, width), dtype=bool)
    result[:, rows, columns] = np.where(outline, mixed, picture[:, rows, columns])
    mask[rows, columns] = outline
    covered = (mask & object_mask).sum()
    return Planted(result, mask, "on" if place == "off" and 2 * covered > mask.sum() else place)


def distort(picture: np.ndarray, kind: GlobalKind, size: Size, rng: np.random.Generator) -> np.ndarray:
    """Change a whole picture: uint8 (C, H, W) -> the same shape. size: how strongly.

    Raises:
        ValueError: an unknown kind or size, or a colour cast on a grey picture.
    """
    from scipy.ndimage import gaussian_filter

    _check(kind, get_args(GlobalKind))
    _check(size, get_args(Size))
    if kind == "blur":
        sigma = max(BLUR[size] * min(picture.shape[1:]), 0.5)
        blurred = gaussian_filter(picture.astype(np.float64), (0, sigma, sigma), mode="reflect")
        smooth: np.ndarray = np.rint(blurred).astype(np.uint8)
        return smooth
    if len(picture) != 3:
        raise ValueError("a grey picture has no colour cast")
    gains = np.array(GAINS[rng.integers(len(GAINS))]) ** CAST[size]
    cast: np.ndarray = np.rint(picture * gains[:, None, None]).clip(0, 255).astype(np.uint8)
    return cast


def kinds_for(channels: int) -> tuple[str, ...]:
    """The kinds that pictures with so many channels can show: a colour cast needs colours."""
    every = (*get_args(LocalKind), *get_args(GlobalKind))
    return every if channels == 3 else tuple(kind for kind in every if kind != "colour_cast")


def _check(value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"'{value}': expected one of {', '.join(known)}")


def _box(area: float, aspect: float, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a box of about this area and aspect (rows to columns) that fits into a picture."""
    rows = int(np.clip(round(math.sqrt(area * aspect)), 1, height))
    return rows, int(np.clip(round(area / rows), 1, width))


def _patch(area: float, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = _box(area, math.exp(rng.uniform(-0.35, 0.35)), height, width)
    return np.ones(shape, dtype=bool), np.ones(shape)


def _letter(area: float, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A letter fills its box, which counts as its place: strokes alone would make a region in the form of a letter."""
    rows, columns = _box(area, rng.uniform(1.2, 1.5), height, width)
    font = ImageFont.load_default(size=rows * OVERSAMPLING)
    letter = LETTERS[rng.integers(len(LETTERS))]
    canvas = Image.new("L", (2 * rows * OVERSAMPLING, 2 * rows * OVERSAMPLING))
    # strokes as wide as those of lead letters on radiographs
    ImageDraw.Draw(canvas).text((8, 8), letter, fill=255, font=font, stroke_width=max(1, rows * OVERSAMPLING // 24))
    glyph = canvas.crop(canvas.getbbox()).resize((columns, rows), Image.Resampling.BOX)
    return np.ones((rows, columns), dtype=bool), np.asarray(glyph) / 255


def _strip(area: float, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A rounded strip at any angle. Pixels that it covers by less than half are left out."""
    aspect, angle = rng.uniform(2.5, 4.5), rng.uniform(0, math.pi)
    across = math.sqrt(area / (aspect - (4 - math.pi) * ROUND**2))  # the rounded corners are missing
    along = min(aspect * across, 0.9 * min(height, width))
    across = area / along if along < aspect * across else across
    radius = ROUND * across
    reach_rows = abs(math.sin(angle)) * along + abs(math.cos(angle)) * across
    reach_columns = abs(math.cos(angle)) * along + abs(math.sin(angle)) * across
    rows, columns = (
        int(min(math.ceil(reach), limit)) for reach, limit in ((reach_rows, height), (reach_columns, width))
    )
    below, right = np.indices((rows * OVERSAMPLING, columns * OVERSAMPLING))
    y, x = (below + 0.5) / OVERSAMPLING - rows / 2, (right + 0.5) / OVERSAMPLING - columns / 2
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    beyond_u, beyond_v = np.abs(u) - along / 2 + radius, np.abs(v) - across / 2 + radius
    inside = np.hypot(np.maximum(beyond_u, 0), np.maximum(beyond_v, 0)) <= radius
    covered = inside.reshape(rows, OVERSAMPLING, columns, OVERSAMPLING).mean(axis=(1, 3))
    outline = covered >= 0.5
    return outline, np.where(outline, covered, 0.0)


_OUTLINES = {"patch": _patch, "letter": _letter, "strip": _strip}


def _choose_place(
    outline: np.ndarray, object_mask: np.ndarray, avoid: np.ndarray | None, place: Place, rng: np.random.Generator
) -> tuple[int, int]:
    """Top and left of a stamp, drawn from all places that suit."""
    on_object = _covered(object_mask, outline)
    suits = np.ones(on_object.shape, dtype=bool)
    if avoid is not None:
        on_avoided = _covered(avoid, outline)
        suits = on_avoided == on_avoided.min()
    if place == "off":
        suits &= on_object == on_object[suits].min()
    else:
        suits &= on_object >= 0.8 * on_object[suits].max()
    places = np.argwhere(suits)
    top, left = places[rng.integers(len(places))]
    return int(top), int(left)


def _covered(mask: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """How many pixels of a mask (H, W) an outline (h, w) covers at each place inside: int (H - h + 1, W - w + 1)."""
    from scipy.signal import fftconvolve

    found = fftconvolve(mask.astype(np.float64), outline[::-1, ::-1].astype(np.float64), mode="valid")
    counts: np.ndarray = np.rint(found).astype(np.int64)
    return counts


def _colour(
    kind: LocalKind, below: np.ndarray, outline: np.ndarray, alpha: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Colours (C, h, w) or (C, 1, 1) that can be told from what lies below, float (C, h, w)."""
    channels = len(below)
    covered = np.average(below.reshape(channels, -1), axis=1, weights=alpha.ravel())
    if kind == "letter":  # bright or dark, whichever can be read
        choices = np.array([[238.0] * 3, [18.0] * 3])
    elif kind == "patch":
        choices = 0.4 * rng.uniform(0, 255, (16, 3)) + 0.6 * rng.uniform(20, 245, (16, 1))  # muted, from dark to bright
    else:
        choices = rng.permutation(np.array(BANDAGES, dtype=np.float64))
    colours = np.stack([_in_channels(choice, channels) for choice in choices])
    differs = np.abs(colours - covered).max(axis=1)
    plain = kind != "letter" and (differs >= VISIBLE).any()
    chosen: np.ndarray = np.rint(colours[np.argmax(differs >= VISIBLE) if plain else np.argmax(differs)])[:, None, None]
    if kind != "strip":
        return chosen
    # a weave, and a shade towards the edges, as of a fabric
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(outline, 1))[1:-1, 1:-1]
    shade = 0.86 + 0.14 * np.minimum(depth / max(depth.max() / 2, 1), 1)
    woven: np.ndarray = chosen * shade + rng.normal(0, 4, outline.shape)
    return woven


def _in_channels(colour: np.ndarray, channels: int) -> np.ndarray:
    return colour if channels == 3 else np.array([colour @ np.array(LUMINANCE)])
