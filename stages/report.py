"""Stage report: figures and one page that show what came out, from files alone."""

from pathlib import Path

import pandas as pd

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, read_json, read_table
from lvlmva_core.outputs import BASE, SUBJECT, read_outputs
from lvlmva_core.report.figures import save_figure
from lvlmva_core.report.findings import Findings, figures_of, page_of
from lvlmva_core.samples import read_images, read_penalised, read_samples, rows_of_ids


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
    loaded = load_params(params)
    shown, table = list(read_attrs(explanations)["ids"]), read_samples(samples)
    arrays = (
        ("before", attributions, "attributions"),
        ("segments", segments, "segments"),
        ("after", explanations, "attributions"),
    )
    parts = {name: (read_attrs(path), read_array(path, array)) for name, path, array in arrays}
    parts["masks"] = (read_attrs(masks), read_penalised(masks)[1])
    found = Findings(
        content=read_json(evaluation),
        about=read_attrs(images),
        samples=table,
        curves={name: pd.read_csv(curves / f"{name}.csv") for name in loaded.methods},
        base_accuracy=read_json(train_metrics)["train"]["val_accuracy"],
        entropies=read_table(entropies, ["id", "entropy"]),
        features={name: read_outputs(evaluations / f"{name}.safetensors").features for name in (BASE, SUBJECT)},
        shown=shown,
        pictures=read_images(images, rows_of_ids(table, shown)),
        panel=(parts, read_array(explanations, "masked_share")),
    )
    drawn = figures_of(found)
    for name, (_, figure) in drawn.items():
        save_figure(figure, reports / f"{name}.png")
    pictures = {caption: reports / f"{name}.png" for name, (caption, _) in drawn.items()}
    page = page_of(found, pictures, params.read_text(encoding="utf-8"))
    (reports / "report.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run(report)
