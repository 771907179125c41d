"""Stage report: figures and one page that show what came out, from files alone."""

from pathlib import Path

import pandas as pd

from lvlmva.entry import run
from lvlmva.page import FOLDER
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, read_json, read_table
from lvlmva_core.outputs import BASE, SUBJECT, read_outputs
from lvlmva_core.overrides import read_reviews, resolve
from lvlmva_core.pattern_names import read_names
from lvlmva_core.report.costs import endpoints_of
from lvlmva_core.report.findings import Findings, Shown, page_of, save_figures
from lvlmva_core.report.gallery import read_gallery, with_masks, with_truth
from lvlmva_core.samples import read_images, read_penalised, read_samples, rows_of_ids


def report(
    params: Path,
    images: Path,
    samples: Path,
    spurious_masks: Path,
    entropies: Path,
    attributions: Path,
    segments: Path,
    reliance: Path,
    critiques: Path,
    verdicts: Path,
    overrides: Path,
    masks: Path,
    mask_metrics: Path,
    explanations: Path,
    evaluations: Path,
    evaluation: Path,
    train_metrics: Path,
    curves: Path,
    reports: Path,
) -> None:
    """Draw the figures and write the page."""
    loaded = load_params(params)
    about, explained, table = read_attrs(images), read_attrs(explanations), read_samples(samples)
    after, said = read_array(explanations, "attributions"), resolve(read_reviews(overrides).events)
    gallery = read_gallery(images, samples, segments, attributions, entropies, reliance, critiques, verdicts)
    gallery = with_truth(with_masks(gallery, masks, said[0]), spurious_masks, loaded.compare.overlap)
    shown = list(explained["ids"])[: explained["panel"]]
    parts = {**gallery.named(), "masks": (read_attrs(masks), read_penalised(masks)[1]), "after": (explained, after)}
    found = Findings(
        content=read_json(evaluation),
        about=about,
        samples=table,
        curves={name: pd.read_csv(curves / f"{name}.csv") for name in loaded.methods},
        base_accuracy=read_json(train_metrics)["train"]["val_accuracy"],
        entropies=read_table(entropies, ["id", "entropy"]),
        features={name: read_outputs(evaluations / f"{name}.safetensors").features for name in (BASE, SUBJECT)},
        masked=read_json(mask_metrics)["mask"],
        shown=shown,
        pictures=read_images(images, rows_of_ids(table, shown)),
        panel=(parts, read_array(explanations, "masked_share")[: len(shown)]),
    )
    of_page = Shown(
        gallery=gallery,
        images=read_images(images, gallery.rows),
        after=dict(zip(explained["ids"], after, strict=True)),
        said=said,
        names=read_names(overrides),
        endpoints=endpoints_of([*loaded.critique.all_critics(), loaded.judge]),
        at_most=loaded.report.limits(),
    )
    page = page_of(found, of_page, save_figures(found, reports), params.read_text(encoding="utf-8"), FOLDER)
    (reports / "report.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run(report)
