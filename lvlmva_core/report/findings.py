"""What came out, as figures with captions and as a page: from arrays, tables and metrics/evaluate.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lvlmva_core.diffuse import diffuse_share, diffuse_warning
from lvlmva_core.methods import METHODS
from lvlmva_core.outputs import SUBJECT
from lvlmva_core.report import diagnostics, figures, tables
from lvlmva_core.report.page import render_page
from lvlmva_core.report.panel import Named, panel_of
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


def figures_of(found: Findings) -> dict[str, tuple[str, Figure]]:
    """Name of each figure -> its caption, and the figure; that of the entropy where groups are known."""
    content, table, names = found.content, found.samples, found.about["class_names"]
    who, overlay = tables.judged_by(content), content["verdicts"]["critic_settings"].get("overlay", "grey")
    caption = f"{found.about['dataset']}; {who}"
    spurious = table["spurious"].to_numpy(dtype=bool) if groups_known(table) else None
    test = table[table["split"] == "test"]
    seeds = content["methods"][SUBJECT]["seeds"]
    features = {METHODS[name].label: of_method for name, of_method in found.features.items()}
    return {
        "outcome": (
            "Before and after, on the test split; bars are means over seeds, whiskers standard deviations.",
            figures.outcome_figure(tables.bars(content), caption),
        ),
        "differences": (
            "Difference to the one base model; bars are means over seeds, whiskers standard deviations.",
            figures.differences_figure(tables.differences(content), seeds, caption),
        ),
        "panel": (
            "Alignment samples, class by class in turn, most masked attribution first; red raises the logit.",
            panel_of(table, found.shown, found.pictures, names, who, *found.panel, overlay=overlay),
        ),
        "curves": (
            "Validation accuracy during alignment.",
            figures.curves_figure(found.curves, found.base_accuracy),
        ),
        **({} if spurious is None else {"entropy": _entropy(found, spurious)}),
        "embeddings": (
            "Embeddings of test samples before and after alignment.",
            diagnostics.embeddings_figure(
                features, test["label"].to_numpy(), None if spurious is None else spurious[test.index], names
            ),
        ),
    }


def _entropy(found: Findings, spurious: np.ndarray) -> tuple[str, Figure]:
    has = spurious[rows_of_ids(found.samples, found.entropies["id"].tolist())]
    entropies = found.entropies["entropy"].to_numpy()
    return (
        "Output entropy of training samples with and without the spurious feature.",
        diagnostics.entropy_figure(entropies, has, found.content["entropy"]["auroc"]),
    )


def page_of(found: Findings, pictures: Mapping[str, Path], params: str) -> str:
    """The page, in HTML. pictures: caption -> PNG. params: the text of params.yaml."""
    who = tables.judged_by(found.content)
    return render_page(
        title=f"LVLM-VA on {found.about['dataset']}",
        summary=f"Spurious feature: {found.about['spurious_feature']}. {who[0].upper()}{who[1:]}. "
        f"{tables.corrected_by(found.masked)}",
        warning=" ".join(
            filter(
                None,
                [
                    tables.warning_of(found.content["verdicts"]),
                    diffuse_warning(diffuse_share(found.panel[0]["before"][1])),
                ],
            )
        ),
        tables=tables.page_tables(found.content, found.about["class_names"]),
        figures=pictures,
        params=params,
    )
