"""Stage report: figures and one page that show what came out, from files alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, read_json, read_table
from lvlmva_core.comparison import SUBJECT
from lvlmva_core.methods import METHODS
from lvlmva_core.outputs import BASE, read_outputs
from lvlmva_core.report import diagnostics, figures, tables
from lvlmva_core.report.page import render_page
from lvlmva_core.report.panel import panel_of
from lvlmva_core.samples import groups_known, read_images, read_samples, rows_of_ids


def report(
    params: Path,
    images: Path,
    samples: Path,
    entropies: Path,
    attributions: Path,
    segments: Path,
    masks: Path,
    explanations: Path,
    evaluations: Path,
    evaluation: Path,
    train_metrics: Path,
    curves: Path,
    reports: Path,
) -> None:
    """Draw the figures and write the page."""
    loaded, content = load_params(params), read_json(evaluation)
    table, about = read_samples(samples), read_attrs(images)
    who = tables.judged_by(content)
    aligned = {name: pd.read_csv(curves / f"{name}.csv") for name in loaded.methods}
    shown = list(read_attrs(explanations)["ids"])
    test = table[table["split"] == "test"]
    spurious = table["spurious"].to_numpy(dtype=bool) if groups_known(table) else None
    features = {name: read_outputs(evaluations / f"{name}.safetensors").features for name in (BASE, SUBJECT)}
    drawn: dict[str, tuple[str, Figure]] = {
        "outcome": (
            "Before and after, on the test split; bars are means over seeds, whiskers standard deviations.",
            figures.outcome_figure(tables.bars(content), f"{about['dataset']}; {who}"),
        ),
        "differences": (
            "Difference to the one base model; bars are means over seeds, whiskers standard deviations.",
            figures.differences_figure(
                tables.differences(content), content["methods"][SUBJECT]["seeds"], f"{about['dataset']}; {who}"
            ),
        ),
        "panel": (
            "Alignment samples, class by class in turn, most masked attribution first; red raises the logit.",
            panel_of(
                table,
                shown,
                read_images(images, rows_of_ids(table, shown)),
                about["class_names"],
                who,
                {
                    name: (read_attrs(path), read_array(path, array))
                    for name, path, array in (
                        ("before", attributions, "attributions"),
                        ("segments", segments, "segments"),
                        ("masks", masks, "masks"),
                        ("after", explanations, "attributions"),
                    )
                },
                read_array(explanations, "masked_share"),
            ),
        ),
        "curves": (
            "Validation accuracy during alignment.",
            figures.curves_figure(aligned, read_json(train_metrics)["train"]["val_accuracy"]),
        ),
        **_entropy(entropies, table, spurious, content),
        "embeddings": (
            "Embeddings of test samples before and after alignment.",
            diagnostics.embeddings_figure(
                {METHODS[name].label: found for name, found in features.items()},
                test["label"].to_numpy(),
                None if spurious is None else spurious[test.index],
                about["class_names"],
            ),
        ),
    }
    reports.mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in drawn.items():
        figures.save_figure(figure, reports / f"{name}.png")
    page = render_page(
        title=f"LVLM-VA on {about['dataset']}",
        summary=f"Spurious feature: {about['spurious_feature']}. {who[0].upper()}{who[1:]}.",
        warning=tables.warning_of(content["verdicts"]),
        tables=tables.page_tables(content, about["class_names"]),
        figures={caption: reports / f"{name}.png" for name, (caption, _) in drawn.items()},
        params=params.read_text(encoding="utf-8"),
    )
    (reports / "report.html").write_text(page, encoding="utf-8")


def _entropy(
    entropies: Path, table: pd.DataFrame, spurious: np.ndarray | None, content: dict[str, Any]
) -> dict[str, tuple[str, Figure]]:
    if spurious is None:
        return {}
    of_training = read_table(entropies, ["id", "entropy"])
    has = spurious[rows_of_ids(table, of_training["id"].tolist())]
    figure = diagnostics.entropy_figure(of_training["entropy"].to_numpy(), has, content["entropy"]["auroc"])
    return {"entropy": ("Output entropy of training samples with and without the spurious feature.", figure)}


if __name__ == "__main__":
    run(report)
