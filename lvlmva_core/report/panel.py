"""Alignment samples in rows: image, attribution before, regions, overlay, mask, attribution after."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lvlmva_core.regions import Overlay
from lvlmva_core.render import render_image, render_overlay, render_segmentation
from lvlmva_core.report.figures import panel_figure
from lvlmva_core.samples import rows_of_ids

Named = tuple[Mapping[str, Any], np.ndarray]  # attributes with `ids`, and an array with a row for each


def panel_of(
    samples: pd.DataFrame,
    ids: Sequence[str],
    pictures: np.ndarray,
    class_names: Sequence[str],
    caption: str,
    parts: Mapping[str, Named],
    shares: np.ndarray,
    overlay: Overlay = "grey",
) -> Figure:
    """Draw the samples `ids`, in their order.

    Args:
        samples: the sample table. pictures: uint8 (n, C, H, W), of `ids`. caption: who judged.
        parts: "before" and "after" (attributions), "segments" and "masks", each of these samples at least.
        shares: (n,), of the positive attribution before, that is masked. overlay: as the critic was shown it.
    """
    found = {name: _rows(part, ids) for name, part in parts.items()}
    labels = samples["label"].to_numpy()[rows_of_ids(samples, list(ids))]
    return panel_figure(
        titles=[
            f"class {class_names[int(label)]}\n{share:.0%} masked" for label, share in zip(labels, shares, strict=True)
        ],
        images=[render_image(picture) for picture in pictures],
        before=list(found["before"]),
        regions=[render_segmentation(label_map) for label_map in found["segments"]],
        overlays=[
            render_overlay(picture, label_map, style=overlay)
            for picture, label_map in zip(pictures, found["segments"], strict=True)
        ],
        masks=list(found["masks"]),
        after=list(found["after"]),
        caption=caption,
    )


def _rows(part: Named, ids: Sequence[str]) -> np.ndarray:
    attrs, array = part
    row_of = {sample: row for row, sample in enumerate(attrs["ids"])}
    return array[[row_of[sample] for sample in ids]]
