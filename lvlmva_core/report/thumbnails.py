"""Pictures of the gallery as text in a page: as good as a budget of bytes allows, the same bytes every time."""

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lvlmva_core.render import attribution_limit
from lvlmva_core.report.gallery import Gallery

LOSSLESS_UP_TO = 48  # pixels a side; smaller pictures are shown pixel by pixel
TRIED = 8  # samples that tell how many bytes a step takes


class Step(NamedTuple):
    """How pictures are kept: at most `side` pixels a side, WebP quality, characters of a critique."""

    side: int
    quality: int
    critique: int


STEPS = (
    Step(256, 80, 200_000),
    Step(224, 70, 20_000),
    Step(160, 65, 8_000),
    Step(112, 60, 4_000),
    Step(80, 50, 2_000),
    Step(56, 40, 800),
)


def kept_samples(gallery: Gallery, at_most: int) -> list[int]:
    """Places of the samples that are shown: all, or of each class in turn those of which most is masked; rising."""
    shares = np.array([gallery.share_of(n, dict.fromkeys(gallery.rejected(n), 1.0)) for n in range(len(gallery.ids))])
    order = np.argsort(-shares, kind="stable")
    turn = np.empty(len(order), dtype=np.int64)
    for label in np.unique(gallery.labels):
        of_class = order[gallery.labels[order] == label]
        turn[of_class] = np.arange(len(of_class))
    in_turn = order[np.argsort(turn[order], kind="stable")]
    return sorted(in_turn[:at_most].tolist())


def thumbnails(
    gallery: Gallery,
    places: Sequence[int],
    images: np.ndarray,
    after: Mapping[str, np.ndarray],
    at_most_bytes: int,
) -> tuple[list[int], list[dict[str, Any]]]:
    """Encode the samples in the best step of STEPS that fits, judged by a few of them; those that do not fit even in
    the smallest are left out from the end.

    Args:
        places: of the samples. images: uint8 (N, C, H, W), of the gallery. after: sample -> attribution of the aligned
            model, float (H, W). at_most_bytes: of all pictures and critiques together.

    Returns:
        The places that fit, and for each: image, before, after (data URLs; after is None where it was not made), labels
        (base64 of runs: label, length - 1) and critique.
    """
    tried = places[:: max(1, len(places) // TRIED)][:TRIED]
    chosen = STEPS[-1]
    for step in STEPS:
        sizes = [_size(_encoded(gallery, n, images[n], after.get(gallery.ids[n]), step)) for n in tried]
        if sum(sizes) / max(1, len(sizes)) * len(places) <= 0.9 * at_most_bytes:
            chosen = step
            break
    kept: list[int] = []
    found: list[dict[str, Any]] = []
    left = at_most_bytes
    for n in places:
        encoded = _encoded(gallery, n, images[n], after.get(gallery.ids[n]), chosen)
        left -= _size(encoded)
        if left < 0:
            break
        kept.append(n)
        found.append(encoded)
    return kept, found


def runs(labels: np.ndarray) -> bytes:
    """A label map, uint8 (H, W), as pairs of bytes, row by row: label, and how often it comes in a row, minus 1."""
    flat = labels.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.concatenate([starts, [flat.size]]))
    parts = -(-lengths // 256)  # a run longer than 256 is several
    values = np.repeat(flat[starts], parts)
    counts = np.full(len(values), 256)
    ends = np.cumsum(parts) - 1
    counts[ends] = lengths - 256 * (parts - 1)
    return np.stack([values, counts - 1], 1).astype(np.uint8).tobytes()


def signed_picture(attribution: np.ndarray, limit: float) -> np.ndarray:
    """Blue below, white at, red above zero: float (H, W) -> uint8 (H, W, 3); the colours end at `limit`."""
    level = np.clip(attribution / (2 * limit) + 0.5, 0, 1)
    return _colours_of("RdBu_r")[np.rint(255 * level).astype(np.uint8)]


def data_url(picture: np.ndarray, side: int, quality: int) -> str:
    """uint8 (H, W, 3), or (H, W) grey, with at most `side` pixels a side, as PNG where it is tiny, else as WebP."""
    image = Image.fromarray(picture)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BOX)
    buffer = io.BytesIO()
    if max(image.size) <= LOSSLESS_UP_TO:
        kind = "png"
        image.save(buffer, format="PNG", compress_level=6)
    else:
        kind = "webp"
        image.save(buffer, format="WEBP", quality=quality, method=2)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _colours_of(name: str) -> np.ndarray:
    """A colour map of matplotlib as a table: uint8 (256, 3)."""
    from matplotlib import colormaps

    return np.asarray(colormaps[name](np.arange(256), bytes=True)[:, :3])


def _encoded(gallery: Gallery, n: int, image: np.ndarray, after: np.ndarray | None, step: Step) -> dict[str, Any]:
    before = gallery.attributions[n]
    limit = attribution_limit(before)  # of both, so that they compare
    critique = gallery.critique(n)
    if len(critique) > step.critique:
        critique = f"{critique[: step.critique]} … (cut; whole in critiques.jsonl)"
    return {
        "image": data_url(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1), step.side, step.quality),
        "before": data_url(signed_picture(before, limit), step.side, step.quality),
        "after": None if after is None else data_url(signed_picture(after, limit), step.side, step.quality),
        "labels": base64.b64encode(runs(gallery.label_maps[n])).decode(),
        "critique": critique,
    }


def _size(encoded: Mapping[str, Any]) -> int:
    return sum(len(str(value).encode()) for value in encoded.values())


def heat_over(heat: np.ndarray, mean: np.ndarray, brightest: float) -> np.ndarray:
    """A map over a picture in grey, uint8 (H, W, 3), dark to bright, so that it reads without colour vision.

    Args:
        heat: float (H, W) >= 0. mean: float (C, H, W), 0..255. brightest: the value that is shown brightest.
    """
    level = np.sqrt(np.clip(heat / brightest, 0, 1))
    colours = _colours_of("inferno")[np.rint(255 * level).astype(np.uint8)]
    opacity = 0.35 + 0.65 * level[..., None]
    return np.asarray(np.rint((1 - opacity) * mean.mean(0)[..., None] + opacity * colours), dtype=np.uint8)
