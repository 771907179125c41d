"""Stages align, baseline and control: RRR fine-tuning of the base model on one set of masks, all seeds in one call."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lvlmva.entry import run
from lvlmva.hydrate import open_store
from lvlmva.params import Align, load_params
from lvlmva_core import alignment, models, selection, stacked_mlp, training
from lvlmva_core.alignment import AlignedRun, align_ensemble
from lvlmva_core.arrays import read_array, read_attrs, read_table, write_json
from lvlmva_core.errors import InputError
from lvlmva_core.masks import masks_on_random_pictures, random_masks_like
from lvlmva_core.metrics import mean_and_std
from lvlmva_core.models import load_checkpoint, save_checkpoint, weights_digest
from lvlmva_core.resume import Resume
from lvlmva_core.samples import read_samples, read_spurious_masks, rows_of_ids
from lvlmva_core.selection import SUPERVISION, best_lambda, by_accuracy, by_pseudo_group, by_worst_group
from lvlmva_core.training import set_up_compute
from stages.data import sample_tensors, split_tensors

Method = Literal["lvlm_va", "rrr_gt", "lambda_zero", "random_masks", "random_pictures"]

RANDOM = {"random_masks": random_masks_like, "random_pictures": masks_on_random_pictures}


def align(
    params: Path,
    method: Method,
    images: Path,
    samples: Path,
    model: Path,
    out: Path,
    metrics: Path,
    curves: Path,
    masks: Path | None = None,
    alignment_set: Path | None = None,
    spurious_masks: Path | None = None,
) -> None:
    """Fine-tune the base model: on LVLM-VA's masks, on the true ones, on random ones, or with λ = 0."""
    loaded = load_params(params)
    configs = {
        "lvlm_va": loaded.align,
        "rrr_gt": loaded.baseline.rrr_gt,
        "lambda_zero": loaded.control.lambda_zero,
        "random_masks": loaded.control.random_masks,
        "random_pictures": loaded.control.random_pictures,
    }
    config = configs[method]
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table = read_samples(samples)
    if masks is not None:
        ids, corrections = list(read_attrs(masks)["ids"]), read_array(masks, "masks")
    elif alignment_set is not None and spurious_masks is not None:
        ids, corrections = _true_masks(table, read_table(alignment_set, ["id"])["id"].tolist(), spurious_masks)
    else:
        raise InputError("give --masks, or --alignment-set and --spurious-masks")
    pixels, labels, _ = split_tensors(images, table, "train", device)
    val_pixels, val_labels, val_rows = split_tensors(images, table, "val", device)
    alignment_pixels, alignment_labels, _ = sample_tensors(images, table, ids, device)
    classifier, spec = load_checkpoint(model, device)
    runs = [(rrr_lambda, seed) for rrr_lambda in _candidates(config) for seed in config.seeds]
    if method in RANDOM:  # another draw for each seed
        corrections = np.stack([RANDOM[method](corrections, seed) for _, seed in runs])
    tensors = [pixels, labels, alignment_pixels, alignment_labels, torch.from_numpy(corrections).to(device)]
    tensors += [val_pixels, val_labels]
    chosen_by = None
    if config.selection is not None:
        has_spurious = torch.from_numpy(val_rows["spurious"].to_numpy(copy=True)).to(device)
        chosen_by = _selection(config.selection.rule, config.selection.seed, tensors, has_spurious)
    inputs = {
        "method": method,
        "config": config.model_dump(),
        "compute": loaded.compute.model_dump(),
        "weights": weights_digest(classifier),
        "tensors": [tensor.cpu().numpy() for tensor in tensors],
        "groups": None if chosen_by is None else chosen_by.groups.cpu().numpy(),
    }
    resume = Resume(open_store(), inputs, [alignment, models, selection, stacked_mlp, training], device)
    found = align_ensemble(
        classifier,
        *tensors,
        runs=runs,
        gamma=config.gamma,
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        alignment_batch=config.alignment_batch,
        training_batch=config.training_batch,
        selection=chosen_by,
        patience=None if config.selection is None else config.selection.patience,
        resume=resume,
        precision=config.precision,
        batch_norm=config.batch_norm,
        max_gradient_norm=config.max_gradient_norm,
        learning_rate_schedule=config.learning_rate_schedule,
        penalty=config.penalty,
    )
    by_lambda = {value: [one for one in found if one.rrr_lambda == value] for value in _candidates(config)}
    best = config.rrr_lambda
    if chosen_by is not None:
        best = best_lambda({value: [one.score or 0.0 for one in those] for value, those in by_lambda.items()})
    for one in by_lambda[best]:
        classifier.load_state_dict(one.weights)
        save_checkpoint(out / f"seed={one.seed}.safetensors", spec, classifier)
    curves.parent.mkdir(parents=True, exist_ok=True)
    histories = [one.curve.assign(seed=one.seed) for one in by_lambda[best]]
    pd.concat(histories, ignore_index=True).to_csv(curves, index=False)
    write_json(metrics, {method: _summary(config, best, by_lambda)})
    resume.clear()


def _candidates(config: Align) -> list[float]:
    grid = [] if config.selection is None else config.selection.rrr_lambdas
    return sorted(set(grid)) or [config.rrr_lambda]


def _selection(rule: str, seed: int, tensors: list[Tensor], has_spurious: Tensor) -> selection.Selection:
    """What the candidates are judged by. Where each run has masks of its own, the first run's make the groups."""
    _, _, alignment_pixels, alignment_labels, masks, val_pixels, val_labels = tensors
    if rule == "accuracy":
        return by_accuracy(val_pixels, val_labels)
    if rule == "worst_group":
        return by_worst_group(val_pixels, val_labels, has_spurious)
    donors = masks if masks.ndim == 3 else masks[0]
    return by_pseudo_group(val_pixels, val_labels, alignment_pixels, alignment_labels, donors, seed)


def _summary(config: Align, best: float, by_lambda: dict[float, list[AlignedRun]]) -> dict[str, Any]:
    """λ on two scales of its inputs: the squared gradient for pixels in 0..255 is smaller by 255²."""
    summary: dict[str, Any] = {
        "val_accuracy": _over_seeds(by_lambda[best])["val_accuracy"],
        "rrr_lambda": {"inputs_0_to_1": best, "inputs_0_to_255": best * 255**2},
        "penalty": config.penalty,
    }
    if config.selection is not None:
        summary["selection"] = {
            "rule": config.selection.rule,
            "supervision": SUPERVISION[config.selection.rule],
            "epoch": mean_and_std([one.epoch for one in by_lambda[best]]),
            "candidates": {f"lambda={value:g}": _over_seeds(those) for value, those in by_lambda.items()},
        }
    return summary


def _over_seeds(runs: list[AlignedRun]) -> dict[str, dict[str, float]]:
    """Validation accuracy, and score where there is one, of the weights that are kept."""
    rows = [one.curve.loc[one.curve["epoch"] == one.epoch].iloc[0] for one in runs]
    return {
        name: mean_and_std([float(row[name]) for row in rows])
        for name in ("val_accuracy", "score")
        if name in runs[0].curve
    }


def _true_masks(table: pd.DataFrame, ids: list[str], spurious_masks: Path) -> tuple[list[str], np.ndarray]:
    """Samples of the alignment set whose true mask is known, and these masks."""
    masks, known = read_spurious_masks(spurious_masks, rows_of_ids(table, ids))
    if not known.any():
        raise InputError(f"{spurious_masks}: no true mask is known for the alignment set, so rrr_gt cannot be trained")
    return [sample for sample, is_known in zip(ids, known, strict=True) if is_known], masks[known]


if __name__ == "__main__":
    run(align)
