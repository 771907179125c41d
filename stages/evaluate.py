"""Stage evaluate: every model on the test split, and the verdicts against the true masks."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lvlmva.entry import run
from lvlmva.params import Params, load_params
from lvlmva_core.arrays import read_array, read_attrs, read_json, write_json
from lvlmva_core.attribution import deep_lift_shap
from lvlmva_core.baselines import SUPERVISION
from lvlmva_core.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from lvlmva_core.lvlm.records import VERDICT_FIELDS, read_rows
from lvlmva_core.metrics import (
    alignment_score,
    entropy_auroc,
    group_accuracies,
    mean_and_std,
    verdict_quality,
    wilcoxon_test,
)
from lvlmva_core.models import load_checkpoint, penultimate_features, predict_logits
from lvlmva_core.ranking import output_entropy
from lvlmva_core.regions import ON_OBJECT, Overlap, overlaps
from lvlmva_core.report.diagnostics import embeddings_figure, entropy_figure
from lvlmva_core.report.figures import save_figure
from lvlmva_core.samples import read_class_names, read_object_masks, read_samples, read_spurious_masks, rows_of_ids
from lvlmva_core.training import set_up_compute
from stages.data import sample_tensors, split_tensors

BASE = "base"
TESTED = ("accuracy", "aga", "wga", "mu_align")


def evaluate(
    params: Path,
    images: Path,
    samples: Path,
    spurious_masks: Path,
    attributions: Path,
    segments: Path,
    verdicts: Path,
    rank_metrics: Path,
    models: list[str],
    out: Path,
    groups: Path,
    runs: Path,
    figures: Path,
) -> None:
    """Measure accuracy per group, robustness, alignment of attributions, significance, and the verdicts.

    `models` names each method and its checkpoints: `base=models/base.safetensors`, `lvlm_va=models/aligned`.
    """
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table = read_samples(samples)
    probe = _AttributionProbe(
        loaded, images, table, spurious_masks, list(read_attrs(attributions)["baseline_ids"]), device
    )
    splits = [split for split in sorted(table["split"].unique()) if split.startswith("test")]
    tensors = {split: split_tensors(images, table, split, device) for split in splits}
    training_share = table[table["split"] == "train"]["group"].value_counts(normalize=True)
    corrupted = _corrupted(tensors["test"][0]) if loaded.evaluate.robustness else {}
    measured: dict[str, dict[str, dict[str, float]]] = {}
    group_tables = []
    first: dict[str, nn.Module] = {}
    for entry in models:
        method, _, location = entry.partition("=")
        checkpoints = sorted(Path(location).glob("seed=*.safetensors")) or [Path(location)]
        measured[method] = {}
        for checkpoint in checkpoints:
            model, _ = load_checkpoint(checkpoint, device)
            first.setdefault(method, model)
            seed = checkpoint.stem.removeprefix("seed=") if method != BASE else ""
            values: dict[str, float] = {}
            for split, (pixels, labels, rows) in tensors.items():
                correct, per_group = _accuracies(model, pixels, labels, rows)
                values[f"{split}.accuracy"] = float(correct.mean())
                if split == "test":
                    values |= _group_averages(correct, per_group, rows, training_share)
                    group_tables.append(per_group.assign(method=method, seed=seed))
                    for name, severities in corrupted.items():
                        under = [_accuracies(model, changed, labels, rows)[0].mean() for changed in severities]
                        values[f"robustness.{name}"] = float(np.mean(under))
                        values[f"robustness.{name}_drop"] = values["test.accuracy"] - float(np.mean(under))
            if (score := probe.score(model)) is not None:
                values["test.mu_align"] = score
            measured[method][seed] = values
    content = {
        "methods": {method: _over_seeds(list(by_seed.values()), method) for method, by_seed in measured.items()},
        "tests": _tests(measured),
        "supervision": {method: SUPERVISION[method] for method in measured},
        "alignment_set": read_json(rank_metrics)["rank"],
        "verdicts": _verdicts(table, spurious_masks, attributions, segments, verdicts),
    }
    content["verdicts"]["overlap_of_record"] = loaded.evaluate.overlap
    figures.mkdir(parents=True, exist_ok=True)
    content["entropy"] = _entropy(first[BASE], *split_tensors(images, table, "train", device), figures)
    pixels, labels, rows = tensors["test"]
    embedded = {method: penultimate_features(first[method], pixels) for method in (BASE, "lvlm_va") if method in first}
    figure = embeddings_figure(
        {method: features.cpu().numpy() for method, features in embedded.items()},
        labels.cpu().numpy(),
        rows["spurious"].to_numpy(),
        read_class_names(images),
    )
    save_figure(figure, figures / "embeddings.png")
    write_json(out, content)
    groups.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(group_tables, ignore_index=True).to_csv(groups, index=False)
    flat = [
        {"method": method, "seed": seed, **values}
        for method, by_seed in measured.items()
        for seed, values in by_seed.items()
    ]
    pd.DataFrame(flat).to_csv(runs, index=False)


def _accuracies(
    model: nn.Module, pixels: Tensor, labels: Tensor, rows: pd.DataFrame
) -> tuple[np.ndarray, pd.DataFrame]:
    """Which samples are right (bool), and the accuracy of each group."""
    predictions = predict_logits(model, pixels).argmax(1).cpu().numpy()
    truth = labels.cpu().numpy()
    return predictions == truth, group_accuracies(predictions, truth, rows["spurious"].to_numpy())


def _group_averages(
    correct: np.ndarray, per_group: pd.DataFrame, rows: pd.DataFrame, training_share: "pd.Series[float]"
) -> dict[str, float]:
    by_group = pd.Series(correct).groupby(rows["group"].to_numpy()).mean()
    shares = training_share.reindex(by_group.index).fillna(0.0)
    return {
        "test.aga": float(per_group["accuracy"].mean()),
        "test.wga": float(per_group["accuracy"].min()),
        "test.accuracy_weighted_by_training_groups": float((by_group * shares).sum() / shares.sum()),
    }


def _corrupted(pixels: Tensor) -> dict[str, list[Tensor]]:
    return {name: [corrupt(pixels, name, severity) for severity in range(1, SEVERITIES + 1)] for name in CORRUPTIONS}


def _tests(measured: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Wilcoxon tests over seeds: every method against the base model, LVLM-VA against every other, by paired seeds."""
    tests: dict[str, Any] = {}
    for method, by_seed in measured.items():
        others = [BASE] if method != "lvlm_va" else [other for other in measured if other != method]
        for other in others if method != BASE else []:
            paired = sorted(seed for seed in by_seed if other == BASE or seed in measured[other])
            for metric in TESTED:
                key = f"test.{metric}"
                if key not in measured[BASE][""] or not paired:
                    continue
                differences = [
                    by_seed[seed][key] - measured[other]["" if other == BASE else seed][key] for seed in paired
                ]
                found = {**wilcoxon_test(differences), "difference": mean_and_std(differences)}
                tests.setdefault(method, {}).setdefault(metric, {})[other] = found
    return tests


def _entropy(base: nn.Module, pixels: Tensor, labels: Tensor, rows: pd.DataFrame, figures: Path) -> dict[str, Any]:
    """How well the base model's entropy on the training split marks the spurious feature, overall and per class."""
    entropies = output_entropy(predict_logits(base, pixels)).cpu().numpy()
    spurious, label = rows["spurious"].to_numpy(), labels.cpu().numpy()
    auroc = entropy_auroc(entropies, spurious)
    save_figure(entropy_figure(entropies, spurious, auroc), figures / "entropy.png")
    return {
        "auroc": auroc,
        "auroc_per_class": {
            str(k): entropy_auroc(entropies[label == k], spurious[label == k]) for k in np.unique(label)
        },
    }


class _AttributionProbe:
    """The test samples on which μ_align is taken, the same for every model."""

    def __init__(
        self,
        loaded: Params,
        images: Path,
        table: pd.DataFrame,
        spurious_masks: Path,
        baseline_ids: list[str],
        device: torch.device,
    ) -> None:
        config = loaded.evaluate
        test = table.index[table["split"] == "test"].to_numpy()
        masks, known = read_spurious_masks(spurious_masks, test)
        usable = np.flatnonzero(known & masks.any(axis=(1, 2)))
        self.empty = not len(usable)
        drawn = np.random.default_rng(config.seed).permutation(usable)[: config.attribution_samples]
        chosen = np.sort(drawn)
        self.masks = masks[chosen]
        if self.empty:
            return
        ids = table["id"].iloc[test[chosen]].tolist()
        self.pixels, self.labels, _ = sample_tensors(images, table, ids, device)
        self.baselines, _, _ = sample_tensors(images, table, baseline_ids, device)
        self.batch_size = loaded.attribute.batch_size

    def score(self, model: nn.Module) -> float | None:
        """μ_align; None where no test sample's true mask is known."""
        if self.empty:
            return None
        maps = deep_lift_shap(model, self.pixels, self.baselines, self.labels, batch_size=self.batch_size)
        return alignment_score(maps.sum(1).cpu().numpy(), self.masks)


def _over_seeds(runs: list[dict[str, float]], method: str) -> dict[str, Any]:
    """One number a metric for the one base model; mean and std over seeds for the others."""
    nested: dict[str, Any] = {}
    for name in runs[0]:
        split, metric = name.split(".")
        values = [measured[name] for measured in runs]
        nested.setdefault(split, {})[metric] = values[0] if method == BASE else mean_and_std(values)
    if method != BASE:
        nested["seeds"] = len(runs)
    return nested


def _verdicts(
    table: pd.DataFrame, spurious_masks: Path, attributions: Path, segments: Path, verdicts: Path
) -> dict[str, Any]:
    """Precision and recall of the verdicts under each overlap rule, over samples whose true mask is known."""
    records = read_rows(verdicts, VERDICT_FIELDS)
    ids = list(read_attrs(segments)["ids"])
    place = {sample: row for row, sample in enumerate(ids)}
    label_maps, maps = read_array(segments, "segments"), read_array(attributions, "attributions")
    masks, known = read_spurious_masks(spurious_masks, rows_of_ids(table, ids))
    summary: dict[str, Any] = {
        "critic": sorted({record["critic"] for record in records}),
        "judge": sorted({record["judge"] for record in records}),
        "critic_settings": next((record["settings"] for record in records if record["settings"]), {}),
        "samples": len(records),
        "samples_failed": sum(record["failure"] is not None for record in records),
        "samples_with_true_mask": int(known.sum()),
    }
    for rule in get_args(Overlap):
        judged, truth = [], []
        for record in records:
            row = place[record["sample"]]
            if record["failure"] is not None or not known[row]:
                continue
            overlapping = overlaps(label_maps[row], masks[row], maps[row], rule)
            for entry in record["verdicts"]:
                judged.append(entry["verdict"] == "no")
                truth.append(overlapping[entry["region"]])
        summary[f"overlap_{rule}"] = verdict_quality(judged, truth)
    objects = read_object_masks(spurious_masks, rows_of_ids(table, ids))
    if objects is not None:  # the other question that a critic may have been asked: what lies on the object?
        judged, truth = [], []
        for record in records:
            row = place[record["sample"]]
            on_object = overlaps(label_maps[row], objects[row], maps[row], ON_OBJECT)
            for entry in record["verdicts"] if record["failure"] is None else []:
                judged.append(entry["verdict"] == "no")
                truth.append(not on_object[entry["region"]])
        summary["off_object"] = verdict_quality(judged, truth)
    return summary


if __name__ == "__main__":
    run(evaluate)
