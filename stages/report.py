"""Stage report: figures and one page that show what came out."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from lvlmva.entry import run
from lvlmva.params import Params, load_params
from lvlmva.results import STAND_INS, before_and_after, judged_by
from lvlmva_core.arrays import read_array, read_attrs, read_json
from lvlmva_core.attribution import deep_lift_shap
from lvlmva_core.models import load_checkpoint
from lvlmva_core.render import render_image, render_overlay, render_segmentation
from lvlmva_core.report.figures import curves_figure, differences_figure, outcome_figure, panel_figure, save_figure
from lvlmva_core.report.page import Table, render_page
from lvlmva_core.samples import read_class_names, read_images, read_samples, rows_of_ids
from lvlmva_core.training import set_up_compute
from stages.data import sample_tensors


def report(
    params: Path,
    images: Path,
    samples: Path,
    attributions: Path,
    segments: Path,
    masks: Path,
    aligned: Path,
    evaluation: Path,
    train_metrics: Path,
    curves: list[str],
    diagnostics: Path,
    out: Path,
) -> None:
    """Draw the figures and write the page. `curves` names each method and its curve: `lvlm_va=metrics/x.csv`."""
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    content = read_json(evaluation)
    who = judged_by(content)
    dataset = read_attrs(images)["dataset"]

    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Path] = {}

    def keep(name: str, caption: str, figure: Figure) -> None:
        save_figure(figure, out / f"{name}.png")
        figures[caption] = out / f"{name}.png"

    bars = {
        "test accuracy": _bars(content["methods"], "accuracy"),
        "worst-group accuracy (WGA)": _bars(content["methods"], "wga"),
        "alignment of attributions (μ_align)": _bars(content["methods"], "mu_align"),
    }
    bars = {metric: methods for metric, methods in bars.items() if methods}
    keep(
        "outcome",
        "Before and after, on the test split; bars are means over seeds, whiskers standard deviations.",
        outcome_figure(bars, f"{dataset}; {who}"),
    )
    differences = {
        "accuracy": _differences(content["tests"], "accuracy"),
        "WGA": _differences(content["tests"], "wga"),
        "μ_align": _differences(content["tests"], "mu_align"),
    }
    keep(
        "differences",
        "Difference to the one base model; bars are means over seeds, whiskers standard deviations.",
        differences_figure(
            {metric: methods for metric, methods in differences.items() if methods},
            content["methods"]["lvlm_va"]["seeds"],
            f"{dataset}; {who}",
        ),
    )
    keep(
        "panel",
        "Alignment samples, class by class in turn, most masked attribution first; red raises the logit.",
        _panel(loaded, device, who, images, samples, attributions, segments, masks, aligned),
    )
    tables_of_curves = {name: pd.read_csv(path) for name, _, path in (entry.partition("=") for entry in curves)}
    keep(
        "curves",
        "Validation accuracy during alignment.",
        curves_figure(tables_of_curves, read_json(train_metrics)["train"]["val_accuracy"]),
    )
    figures["Output entropy of training samples with and without the spurious feature."] = diagnostics / "entropy.png"
    figures["Embeddings of test samples before and after alignment."] = diagnostics / "embeddings.png"
    page = render_page(
        title=f"LVLM-VA on {dataset}",
        summary=f"Spurious feature: {read_attrs(images)['spurious_feature']}. {who[0].upper()}{who[1:]}.",
        warning=_warning(content["verdicts"]),
        tables=_tables(content),
        figures=figures,
        params=params.read_text(encoding="utf-8"),
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def _panel(
    loaded: Params,
    device: torch.device,
    who: str,
    images: Path,
    samples: Path,
    attributions: Path,
    segments: Path,
    masks: Path,
    aligned: Path,
) -> Figure:
    table = read_samples(samples)
    map_attrs, masked_ids = read_attrs(attributions), list(read_attrs(masks)["ids"])
    row_of = {sample: row for row, sample in enumerate(map_attrs["ids"])}
    maps = read_array(attributions, "attributions")[[row_of[sample] for sample in masked_ids]]
    label_maps = read_array(segments, "segments")[[row_of[sample] for sample in masked_ids]]
    corrections = read_array(masks, "masks")
    positive = np.maximum(maps, 0)
    masked_share = (positive * corrections).sum(axis=(1, 2)) / positive.sum(axis=(1, 2))
    chosen = _most_masked_of_each_class(masked_share, table["label"].to_numpy()[rows_of_ids(table, masked_ids)])
    chosen = chosen[: loaded.report.panel_samples]
    ids = [masked_ids[row] for row in chosen]
    pixels, labels, _ = sample_tensors(images, table, ids, device)
    baselines, _, _ = sample_tensors(images, table, list(map_attrs["baseline_ids"]), device)
    after_model, _ = load_checkpoint(sorted(aligned.glob("seed=*.safetensors"))[0], device)
    after = deep_lift_shap(after_model, pixels, baselines, labels, batch_size=loaded.attribute.batch_size)
    pictures = read_images(images, rows_of_ids(table, ids))
    class_names = read_class_names(images)
    return panel_figure(
        titles=[
            f"class {class_names[int(label)]}\n{share:.0%} masked"
            for label, share in zip(labels, masked_share[chosen], strict=True)
        ],
        images=[render_image(picture) for picture in pictures],
        before=list(maps[chosen]),
        regions=[render_segmentation(label_map) for label_map in label_maps[chosen]],
        overlays=[
            render_overlay(picture, label_map) for picture, label_map in zip(pictures, label_maps[chosen], strict=True)
        ],
        masks=list(corrections[chosen]),
        after=list(after.sum(1).cpu().numpy()),
        caption=who,
    )


def _most_masked_of_each_class(masked_share: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows by falling masked share, class by class in turn, so that a panel shows many classes."""
    order = pd.DataFrame({"share": masked_share, "label": labels}).sort_values("share", ascending=False, kind="stable")
    order["turn"] = order.groupby("label").cumcount()
    return order.sort_values(["turn", "share"], ascending=[True, False], kind="stable").index.to_numpy()


def _bars(methods: dict[str, Any], metric: str) -> dict[str, tuple[float, float]]:
    values = {name: measured["test"][metric] for name, measured in methods.items() if metric in measured["test"]}
    return {
        name: (value["mean"], value["std"]) if isinstance(value, dict) else (value, 0.0)
        for name, value in values.items()
    }


def _differences(tests: dict[str, Any], metric: str) -> dict[str, tuple[float, float, float]]:
    """Method -> (mean, standard deviation, two-sided p) of its difference to the base model."""
    found = {name: metrics[metric]["base"] for name, metrics in tests.items() if metric in metrics}
    return {
        name: (test["difference"]["mean"], test["difference"]["std"], test["p_two_sided"])
        for name, test in found.items()
    }


def _warning(verdicts: dict[str, Any]) -> str:
    stand_ins = [name for name in (*verdicts["critic"], *verdicts["judge"]) if name in STAND_INS]
    if not stand_ins:
        return ""
    return (
        f"No vision-language model was asked. The verdicts come from the stand-in {', '.join(sorted(set(stand_ins)))}: "
        "the figures show what the pipeline does with such verdicts, not how well a model judges."
    )


def _tables(content: dict[str, Any]) -> list[Table]:
    columns, rows = before_and_after(content)
    verdicts, chosen = content["verdicts"], content["alignment_set"]
    quality = [
        [
            rule.removeprefix("overlap_").replace("_", " "),
            _share(measured["precision"]),
            _share(measured["recall"]),
            str(measured["regions_judged_spurious"]),
            str(measured["regions_overlapping"]),
            str(measured["regions"]),
        ]
        for rule, measured in verdicts.items()
        if rule.startswith("overlap_") and isinstance(measured, dict)
    ]
    return [
        Table(
            "Before and after",
            "Test split; mean ± standard deviation over seeds. AGA is the plain mean over groups, WGA the worst group, "
            "μ_align one minus the share of attribution on the spurious feature. RRR with true masks knows what "
            "LVLM-VA does not: it is the bound. The controls know less (docs/alignment.md).",
            columns,
            rows,
        ),
        Table(
            "Verdicts against the true masks",
            "Precision: of the regions judged spurious, the share that overlaps the spurious feature. Recall: of the "
            "regions that overlap it, the share judged spurious. What counts as overlap is the first column.",
            ["overlap", "precision", "recall", "judged spurious", "overlapping", "regions"],
            quality,
        ),
        Table(
            "Alignment set",
            f"The {chosen['samples']} training samples chosen by {chosen['strategy'].replace('_', ' ')}; "
            f"{_share(chosen['share_with_spurious_feature'])} of them carry the spurious feature, "
            f"{_share(chosen['share_with_spurious_feature_in_training'])} of the training set do.",
            ["group", "samples"],
            [[group, str(count)] for group, count in chosen["samples_per_group"].items()],
        ),
    ]


def _share(value: float | None) -> str:
    return "no such region" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    run(report)
