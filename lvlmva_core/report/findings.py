"""What came out, as figures with captions and as a page: from arrays, tables and metrics/evaluate.json."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lvlmva_core.diffuse import diffuse_share, diffuse_warning
from lvlmva_core.methods import METHODS
from lvlmva_core.outputs import SUBJECT
from lvlmva_core.overrides import Key, Override, Tie
from lvlmva_core.pattern_names import with_names
from lvlmva_core.report import diagnostics, figures, tables
from lvlmva_core.report.captions import CAPTIONS
from lvlmva_core.report.changes import change_tables
from lvlmva_core.report.costs import Endpoints, costs_of
from lvlmva_core.report.gallery import Gallery
from lvlmva_core.report.headline import headline_of
from lvlmva_core.report.page import Page, drawn_of, render_page
from lvlmva_core.report.panel import Named, panel_of
from lvlmva_core.report.patterns_shown import cards, pattern_data
from lvlmva_core.report.thumbnails import kept_samples, thumbnails
from lvlmva_core.samples import groups_known, rows_of_ids


@dataclass(frozen=True)
class Findings:
    """All that is shown.

    content: of metrics/evaluate.json. about: of the data set: dataset, class_names, spurious_feature.
    samples: the sample table. curves: method -> curve of alignment (`figures.curves_figure`).
    base_accuracy: of the base model, on the validation split. entropies: id and entropy of training samples, by it.
    features: method -> float (N_test, D) of the split `test`.
    masked: `mask` of metrics/mask.json.
    shown: the panel's samples. pictures: uint8 (n, C, H, W), of these. panel: `panel_of`'s parts and shares.
    """

    content: Mapping[str, Any]
    about: Mapping[str, Any]
    samples: pd.DataFrame
    curves: Mapping[str, pd.DataFrame]
    base_accuracy: float
    entropies: pd.DataFrame
    features: Mapping[str, np.ndarray]
    masked: Mapping[str, Any]
    shown: list[str]
    pictures: np.ndarray
    panel: tuple[Mapping[str, Named], np.ndarray]


@dataclass(frozen=True)
class Shown:
    """What the page shows of the alignment set.

    gallery: with its masks. images: uint8 (N, C, H, W), of it. after: sample -> attribution of the aligned model.
    said: what all reviewers said, by `overrides.resolve`. names: (sample, segmentation, region) -> what an expert calls
    the pattern that holds this region. endpoints: of the models that were asked. at_most: samples, bytes of the page.
    """

    gallery: Gallery
    images: np.ndarray
    after: Mapping[str, np.ndarray]
    said: tuple[Sequence[Override], Sequence[Tie]]
    names: Mapping[Key, str]
    endpoints: Endpoints
    at_most: tuple[int, int]


def figures_of(found: Findings) -> dict[str, tuple[str, Figure]]:
    """Name of each figure -> its caption, and the figure; that of the entropy where groups are known."""
    content, table, names = found.content, found.samples, found.about["class_names"]
    who, overlay = tables.judged_by(content), content["verdicts"]["critic_settings"].get("overlay", "grey")
    caption = f"{found.about['dataset']}; {who}"
    spurious = table["spurious"].to_numpy(dtype=bool) if groups_known(table) else None
    test = table[table["split"] == "test"]
    seeds = content["methods"][SUBJECT]["seeds"]
    features = {METHODS[name].label: of_method for name, of_method in found.features.items()}
    drawn = {
        "outcome": figures.outcome_figure(tables.bars(content), caption),
        "differences": figures.differences_figure(tables.differences(content), seeds, caption),
        "panel": panel_of(table, found.shown, found.pictures, names, who, *found.panel, overlay=overlay),
        "curves": figures.curves_figure(found.curves, found.base_accuracy),
        **({} if spurious is None else {"entropy": _entropy(found, spurious)}),
        "embeddings": diagnostics.embeddings_figure(
            features, test["label"].to_numpy(), None if spurious is None else spurious[test.index], names
        ),
    }
    return {name: (CAPTIONS[name], figure) for name, figure in drawn.items()}


def save_figures(found: Findings, folder: Path) -> dict[str, Path]:
    """Write the figures into a folder as PNG; returns caption -> file."""
    drawn = figures_of(found)
    for name, (_, figure) in drawn.items():
        figures.save_figure(figure, folder / f"{name}.png")
    return {caption: folder / f"{name}.png" for name, (caption, _) in drawn.items()}


def _entropy(found: Findings, spurious: np.ndarray) -> Figure:
    has = spurious[rows_of_ids(found.samples, found.entropies["id"].tolist())]
    entropies = found.entropies["entropy"].to_numpy()
    return diagnostics.entropy_figure(entropies, has, found.content["entropy"]["auroc"])


def page_of(found: Findings, shown: Shown, pictures: Mapping[str, Path], params: str, folder: Path) -> str:
    """The page, in HTML, one file.

    Args:
        pictures: caption -> PNG. params: the text of params.yaml. folder: of `page.render_page`.
    """
    gallery, feature = shown.gallery, found.about["spurious_feature"]
    patterns, rare = gallery.patterns(shown.images)
    patterns = with_names(patterns, gallery, shown.names)
    kept = kept_samples(gallery, shown.at_most[0])
    who = tables.judged_by(found.content)
    drawn = [drawn_of(caption, path) for caption, path in pictures.items()]
    spread = diffuse_share(found.panel[0]["before"][1])
    page = Page(
        title=f"LVLM-VA on {found.about['dataset']}",
        warning=" ".join(filter(None, [tables.warning_of(found.content["verdicts"]), diffuse_warning(spread)])),
        headline=headline_of(found.content, feature),
        facts=[
            f"{who[0].upper()}{who[1:]}.",
            costs_of(gallery, shown.endpoints),
            tables.corrected_by(found.masked),
        ],
        patterns=cards(gallery, patterns, shown.images),
        rare=rare,
        tables=[*change_tables(gallery, *shown.said), *tables.page_tables(found.content, found.about["class_names"])],
        figures=drawn,
        params=params,
    )
    left = shown.at_most[1] - len(render_page(page, folder, {}).encode()) - len(json.dumps(gallery.page))
    kept, encoded = thumbnails(gallery, kept, shown.images, shown.after, left)
    return render_page(
        replace(page, left_out_of_gallery=_shown_of(len(kept), len(gallery.ids))),
        folder,
        page_data(gallery, kept, encoded, pattern_data(gallery, patterns)),
    )


def page_data(
    gallery: Gallery, kept: Sequence[int], encoded: Sequence[Mapping[str, Any]], patterns: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the scripts of a file show: the samples that are kept, their pictures, and patterns by their new places."""
    place_of = {n: place for place, n in enumerate(kept)}
    digest = hashlib.sha256("\n".join([*gallery.ids, *gallery.digests]).encode()).hexdigest()
    samples = [
        {**gallery.page["samples"][n], "digest": gallery.digests[n], "after": picture["after"] is not None}
        for n, picture in zip(kept, encoded, strict=True)
    ]
    moved = [
        {**pattern, "members": [[place_of[n], region] for n, region in pattern["members"] if n in place_of]}
        for pattern in patterns
    ]
    of_page = {name: gallery.page[name] for name in ("critics", "judges", "height", "width")}
    return {**of_page, "digest": digest, "samples": samples, "pictures": list(encoded), "patterns": moved}


def _shown_of(kept: int, all_samples: int) -> str:
    if kept == all_samples:
        return ""
    limits = "report.gallery_samples, report.max_megabytes"
    return f"Shown: {kept} of {all_samples}, most masked first in each class ({limits})."
