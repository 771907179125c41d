"""One sample's chain from image to mask as a picture."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lvlmva_core.regions import Overlay
from lvlmva_core.render import (
    COLOUR_NAMES,
    PALETTE,
    attribution_limit,
    render_image,
    render_overlay,
    render_segmentation,
)

LINES = 40  # of the critique that are drawn


def chain_figure(
    heading: str,
    picture: np.ndarray,
    parts: Mapping[str, np.ndarray | None],
    regions: Sequence[Mapping[str, Any]],
    critique: str | None,
    who: str,
    overlay: Overlay = "grey",
) -> Figure:
    """Draw the image, attribution before, regions, overlay, mask and attribution after, and the verdicts below.

    Args:
        picture: uint8 (C, H, W). parts: "before", "after": float (H, W); "segments": uint8 (H, W); "mask": bool (H, W);
            None = not made, which is said in its place. regions: dicts with colour, attribution, area and verdict.
        critique: the critic's text. who: critic and judge by name. overlay: as the critic was shown it.
    """
    before, after, segments, mask = (parts[name] for name in ("before", "after", "segments", "mask"))
    scale = 1.0 if before is None else attribution_limit(before)
    signed = {"cmap": "RdBu_r", "vmin": -scale, "vmax": scale, "interpolation": "nearest"}
    drawn: list[tuple[str, np.ndarray | None, dict[str, Any]]] = [
        ("image", render_image(picture), {}),
        ("attribution before", before, signed),
        ("regions", None if segments is None else render_segmentation(segments), {}),
        ("overlay", None if segments is None else render_overlay(picture, segments, style=overlay), {}),
        ("mask (suppressed)", mask, {"cmap": "gray_r", "vmin": 0, "vmax": 1, "interpolation": "nearest"}),
        ("attribution after", after, signed),
    ]
    words = [] if critique is None else _wrapped(critique)
    height = max(len(words), len(regions) + 1, 3) * 0.15 + 0.4
    figure = Figure(figsize=(12, 2.6 + height), layout="constrained")
    figure.suptitle(_plain(heading), fontsize=10)
    halves: Any = figure.subfigures(2, 1, height_ratios=[2.4, height])
    top, bottom = halves
    for axes, (title, image, how) in zip(top.subplots(1, len(drawn)), drawn, strict=True):
        axes.set_title(title, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        if image is None:
            axes.set_box_aspect(picture.shape[1] / picture.shape[2])
            axes.text(0.5, 0.5, "not made", ha="center", va="center", fontsize=8, transform=axes.transAxes)
        else:
            axes.imshow(image, **how)
    left, right = bottom.subplots(1, 2, width_ratios=[4, 8])
    for axes in (left, right):
        axes.axis("off")
    step = 0.15 / height
    for place, each in enumerate(regions):
        rgb = np.array(PALETTE[COLOUR_NAMES.index(each["colour"])].rgb) / 255
        y = 1 - (place + 1) * step
        left.scatter([0.02], [y], color=[rgb], edgecolors="black", s=40, marker="s", transform=left.transAxes)
        said = f"{each['colour']}: {each['attribution']:.0%} of positive attribution, {each['area']:.0%} of pixels"
        left.text(
            0.06, y, f"{said}: {each['verdict'] or 'no verdict'}", fontsize=7.5, va="center", transform=left.transAxes
        )
    right.text(0, 1, "\n".join([_plain(who), *words]), fontsize=7.5, va="top", transform=right.transAxes)
    return figure


def _wrapped(text: str) -> list[str]:
    lines = [piece for line in text.splitlines() for piece in textwrap.wrap(_plain(line), 120) or [""]]
    return lines if len(lines) <= LINES else [*lines[:LINES], f"... {len(lines) - LINES} more lines"]


def _plain(text: str) -> str:
    """Without what matplotlib reads as mathematics."""
    return "".join(each if each.isprintable() else " " for each in text).replace("$", r"\$")
