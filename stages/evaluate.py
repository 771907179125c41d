"""Stage evaluate: every model on the test split, and the verdicts against the true masks."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn

from lvlmva_core.arrays import read_array, read_attrs, read_json, write_json
from lvlmva_core.attribution import deep_lift_shap
from lvlmva_core.config import Params, load_params
from lvlmva_core.metrics import alignment_score, group_accuracies, mean_and_std, verdict_quality
from lvlmva_core.models import load_checkpoint, predict_logits
from lvlmva_core.overlap import Overlap, overlaps
from lvlmva_core.samples import read_samples, read_spurious_masks, rows_of_ids
from lvlmva_core.training import set_up_compute
from stages.data import sample_tensors, split_tensors
from stages.entry import run

BASE = "base"


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
) -> None:
    """Measure accuracy per group, alignment of attributions, and the verdicts.

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
    results: dict[str, Any] = {}
    group_tables = []
    for entry in models:
        method, _, location = entry.partition("=")
        checkpoints = sorted(Path(location).glob("seed=*.safetensors")) or [Path(location)]
        runs = []
        for checkpoint in checkpoints:
            model, _ = load_checkpoint(checkpoint, device)
            measured: dict[str, float] = {}
            for split, (pixels, labels, rows) in tensors.items():
                predictions = predict_logits(model, pixels).argmax(1).cpu().numpy()
                per_group = group_accuracies(predictions, labels.cpu().numpy(), rows["spurious"].to_numpy())
                correct = predictions == labels.cpu().numpy()
                measured[f"{split}.accuracy"] = float(correct.mean())
                if split == "test":
                    measured["test.aga"] = float(per_group["accuracy"].mean())
                    measured["test.wga"] = float(per_group["accuracy"].min())
                    by_group = pd.Series(correct).groupby(rows["group"].to_numpy()).mean()
                    shares = training_share.reindex(by_group.index).fillna(0.0)
                    measured["test.accuracy_weighted_by_training_groups"] = float(
                        (by_group * shares).sum() / shares.sum()
                    )
                    seed = checkpoint.stem.removeprefix("seed=") if method != BASE else ""
                    group_tables.append(per_group.assign(method=method, seed=seed))
            measured["test.mu_align"] = probe.score(model)
            runs.append(measured)
        results[method] = _over_seeds(runs, method)
    content = {
        "methods": results,
        "alignment_set": read_json(rank_metrics)["rank"],
        "verdicts": _verdicts(table, spurious_masks, attributions, segments, verdicts),
    }
    content["verdicts"]["overlap_of_record"] = loaded.evaluate.overlap
    write_json(out, content)
    groups.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(group_tables, ignore_index=True).to_csv(groups, index=False)


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
        drawn = np.random.default_rng(config.seed).permutation(usable)[: config.attribution_samples]
        chosen = np.sort(drawn)
        self.masks = masks[chosen]
        ids = table["id"].iloc[test[chosen]].tolist()
        self.pixels, self.labels, _ = sample_tensors(images, table, ids, device)
        self.baselines, _, _ = sample_tensors(images, table, baseline_ids, device)
        self.batch_size = loaded.attribute.batch_size

    def score(self, model: nn.Module) -> float:
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
    records = [json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()]
    ids = list(read_attrs(segments)["ids"])
    place = {sample: row for row, sample in enumerate(ids)}
    label_maps, maps = read_array(segments, "segments"), read_array(attributions, "attributions")
    masks, known = read_spurious_masks(spurious_masks, rows_of_ids(table, ids))
    summary: dict[str, Any] = {
        "critic": sorted({record["critic"] for record in records}),
        "judge": sorted({record["judge"] for record in records}),
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
    return summary


if __name__ == "__main__":
    run(evaluate)
