"""Pictures of images and regions as the Critic and people see them; numpy, scipy and Pillow only."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from lvlmva_core.regions import MAX_REGIONS, NO_REGION, Overlay, regions_present

SMALLEST_SIDE = 224  # pixels; what is smaller is enlarged before it is shown


class Colour(NamedTuple):
    """A region's colour: the name that the Critic and the Judge use, and its sRGB value 0..255."""

    name: str
    rgb: tuple[int, int, int]


# The first eight differ by at least LEAST_DIFFERENCE (CIEDE2000) from one another, as most people see them and as seen
# without red, green or blue cones (protanopia, deuteranopia, tritanopia after Machado et al. 2009).
PALETTE = (
    Colour("red", (234, 0, 0)),
    Colour("blue", (14, 100, 255)),
    Colour("yellow", (255, 246, 63)),
    Colour("green", (9, 136, 70)),
    Colour("purple", (76, 27, 156)),
    Colour("cyan", (27, 252, 254)),
    Colour("brown", (85, 50, 26)),
    Colour("pink", (255, 117, 161)),
    Colour("orange", (255, 140, 0)),
    Colour("white", (255, 255, 255)),
    Colour("black", (0, 0, 0)),
    Colour("grey", (140, 140, 140)),
)
LEAST_DIFFERENCE = 14.5
COLOUR_NAMES = tuple(colour.name for colour in PALETTE)


def enlarge(image: np.ndarray, minimum: int = SMALLEST_SIDE) -> np.ndarray:
    """Repeat the pixels of an (H, W, ...) array by the least whole factor that makes its shorter side >= `minimum`."""
    factor = -(-minimum // min(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else image


def render_image(image: np.ndarray) -> np.ndarray:
    """Picture (a): the image itself, enlarged. uint8 (C, H, W) with C in {1, 3}, or (H, W) -> uint8 (H', W', 3)."""
    return enlarge(_as_rgb(image))


def render_segmentation(segments: np.ndarray, n_regions: int = MAX_REGIONS) -> np.ndarray:
    """Picture (b): the regions as flat colours with outlines. uint8 (H, W) -> uint8 (H', W', 3)."""
    large = enlarge(_checked(segments, n_regions))
    return _draw_outlines(_colours(large), large)


def render_overlay(
    image: np.ndarray,
    segments: np.ndarray,
    n_regions: int = MAX_REGIONS,
    opacity: float = 0.4,
    style: Overlay = "grey",
) -> np.ndarray:
    """Picture (c): the regions' colours over the image, enlarged: uint8 (H', W', 3).

    image: uint8 (C, H, W) with C in {1, 3}, or (H, W). segments: uint8 (H, W). opacity: of the colours, 0..1.
    style: "grey" mixes the colours into the greyed image, where the image's own colours are lost; "colour" lays
    diagonal stripes of a region's colour, `opacity` of the area, over the image as it is, so that both stay tellable.
    The pixels of a picture are part of a paid call's key: a third way to draw it needs a third name.

    Raises:
        ValueError: another style, or sizes that do not fit.
    """
    rgb = _as_rgb(image)
    if rgb.shape[:2] != segments.shape:
        raise ValueError(f"image {rgb.shape[:2]} and segments {segments.shape} must have the same height and width")
    if style == "colour":
        large = enlarge(_checked(segments, n_regions))
        striped = _stripes(large.shape, opacity) & (large != NO_REGION)
        return _draw_outlines(np.where(striped[..., None], _colours(large), enlarge(rgb)), large)
    if style != "grey":
        raise ValueError(f"style '{style}' is neither 'grey' nor 'colour'")
    grey = rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    inside = (_checked(segments, n_regions) != NO_REGION)[..., None]
    mixed = (1 - opacity) * grey[..., None] + opacity * _colours(segments)
    blended = np.rint(np.where(inside, mixed, grey[..., None])).astype(np.uint8)
    return _draw_outlines(enlarge(blended), enlarge(segments))  # blended small: the same pixels for less work


def attribution_limit(attribution: np.ndarray) -> float:
    """Where the colours of an attribution, float (H, W), end on both sides of zero: the 99.5th percentile of its
    magnitude; 1 where that is 0."""
    return float(np.percentile(np.abs(attribution), 99.5)) or 1.0


def to_png(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> PNG bytes without metadata, the same for the same picture and Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _as_rgb(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8:
        raise ValueError(f"image must be uint8, not {image.dtype}")
    channels_last = image[..., None] if image.ndim == 2 else np.moveaxis(image, 0, -1)
    if channels_last.ndim != 3 or channels_last.shape[2] not in (1, 3):
        raise ValueError(f"image must be (H, W), (1, H, W) or (3, H, W), not {image.shape}")
    return np.ascontiguousarray(np.broadcast_to(channels_last, (*channels_last.shape[:2], 3)))


def _checked(segments: np.ndarray, n_regions: int) -> np.ndarray:
    if not 1 <= n_regions <= MAX_REGIONS:
        raise ValueError(f"n_regions = {n_regions}: there are {MAX_REGIONS} colours")
    if segments.ndim != 2 or segments.dtype != np.uint8:
        raise ValueError(f"segments must be uint8 (H, W), not {segments.dtype} {segments.shape}")
    present = regions_present(segments)
    if present and present[-1] >= n_regions:
        raise ValueError(f"segments hold region {present[-1]}, but n_regions = {n_regions}")
    return segments


def _colours(segments: np.ndarray) -> np.ndarray:
    table = np.full((256, 3), 128, dtype=np.uint8)
    table[:MAX_REGIONS] = [colour.rgb for colour in PALETTE]
    colours: np.ndarray = table[segments]
    return colours


def _stripes(shape: tuple[int, ...], share: float) -> np.ndarray:
    """Diagonal stripes, about 20 over the shorter side, that fill `share` of the area: bool (H, W)."""
    period = max(5, round(min(shape) / 20))
    rows, columns = np.indices(shape)
    return np.asarray((rows + columns) % period < round(period * share))


def _draw_outlines(picture: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """White lines with black edges between regions: visible on any two colours, and after JPEG and down-scaling."""
    width = max(1, round(min(segments.shape) / 112))
    edge = np.zeros(segments.shape, dtype=bool)
    edge[:-1] |= segments[:-1] != segments[1:]
    edge[:, :-1] |= segments[:, :-1] != segments[:, 1:]
    result = picture.copy()
    result[_grown(edge, width)] = 0
    result[_grown(edge, width // 2)] = 255
    return result


def _grown(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilation of bool (H, W) by a square of 2 radius + 1 pixels a side, one axis after the other."""
    rows = mask.copy()  # by NumPy: scipy.ndimage takes 0.3 s to import
    for step in range(1, radius + 1):
        rows[step:] |= mask[:-step]
        rows[:-step] |= mask[step:]
    grown = rows.copy()
    for step in range(1, radius + 1):
        grown[:, step:] |= rows[:, :-step]
        grown[:, :-step] |= rows[:, step:]
    return grown


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], gap: int = 8) -> np.ndarray:
    """Lay pictures out in rows under column titles.

    Args:
        rows: uint8 (H, W, 3) pictures, all of one size, as many in each row as there are titles.
        titles: of the columns.
        gap: white pixels between pictures.

    Returns:
        uint8 (H', W', 3).
    """
    sizes = {picture.shape for row in rows for picture in row}
    if len(sizes) != 1 or any(len(row) != len(titles) for row in rows):
        raise ValueError(
            f"pictures must have one size and a title for each column, not {sizes} and {len(titles)} titles"
        )
    ((height, width, _),) = sizes
    band = 20 + gap
    sheet = np.full((band + len(rows) * (height + gap), gap + len(titles) * (width + gap), 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for k, picture in enumerate(row):
            top, left = band + i * (height + gap), gap + k * (width + gap)
            sheet[top : top + height, left : left + width] = picture
    canvas = Image.fromarray(sheet)
    for k, title in enumerate(titles):
        ImageDraw.Draw(canvas).text((gap + k * (width + gap), gap), title, fill=(0, 0, 0))
    return np.array(canvas)


def render_region(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """A picture with all but one region faded to pale grey, and the region outlined: uint8 (H', W', 3), enlarged.

    image: uint8 (C, H, W) with C in {1, 3}, or (H, W). inside: bool (H, W).
    """
    rgb = _as_rgb(image)
    grey = rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    faded = np.rint(0.45 * grey + 0.55 * 200)[..., None]
    shown = np.where(inside[..., None], rgb, faded).astype(np.uint8)
    return _draw_outlines(enlarge(shown), enlarge(inside.astype(np.uint8)))
