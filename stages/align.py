"""Stages align, baseline and control: RRR fine-tuning of the base model on one set of masks, once a seed."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from lvlmva_core.alignment import align_classifier
from lvlmva_core.arrays import read_array, read_attrs, read_table, write_json
from lvlmva_core.config import load_params
from lvlmva_core.errors import InputError
from lvlmva_core.masks import random_masks_like
from lvlmva_core.metrics import mean_and_std
from lvlmva_core.models import load_checkpoint, save_checkpoint
from lvlmva_core.samples import read_samples, read_spurious_masks, rows_of_ids
from lvlmva_core.training import set_up_compute
from stages.data import sample_tensors, split_tensors
from stages.entry import run

Method = Literal["lvlm_va", "rrr_gt", "lambda_zero", "random_masks"]


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
    """Fine-tune the base model: on LVLM-VA's masks, on the true ones, on shifted ones, or with λ = 0."""
    loaded = load_params(params)
    configs = {
        "lvlm_va": loaded.align,
        "rrr_gt": loaded.baseline.rrr_gt,
        "lambda_zero": loaded.control.lambda_zero,
        "random_masks": loaded.control.random_masks,
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
    val_pixels, val_labels, _ = split_tensors(images, table, "val", device)
    alignment_pixels, alignment_labels, _ = sample_tensors(images, table, ids, device)
    histories = []
    for seed in config.seeds:
        drawn = random_masks_like(corrections, seed) if method == "random_masks" else corrections
        classifier, spec = load_checkpoint(model, device)
        history = align_classifier(
            classifier,
            pixels,
            labels,
            alignment_pixels,
            alignment_labels,
            torch.from_numpy(drawn).to(device),
            val_pixels,
            val_labels,
            rrr_lambda=config.rrr_lambda,
            gamma=config.gamma,
            learning_rate=config.learning_rate,
            epochs=config.epochs,
            alignment_batch=config.alignment_batch,
            training_batch=config.training_batch,
            seed=seed,
        )
        save_checkpoint(out / f"seed={seed}.safetensors", spec, classifier)
        histories.append(history.assign(seed=seed))
    curve = pd.concat(histories, ignore_index=True)
    curves.parent.mkdir(parents=True, exist_ok=True)
    curve.to_csv(curves, index=False)
    last = curve.groupby("seed", sort=False).last()
    write_json(metrics, {method: {"val_accuracy": mean_and_std(last["val_accuracy"].tolist())}})


def _true_masks(table: pd.DataFrame, ids: list[str], spurious_masks: Path) -> tuple[list[str], np.ndarray]:
    """Samples of the alignment set whose true mask is known, and these masks."""
    masks, known = read_spurious_masks(spurious_masks, rows_of_ids(table, ids))
    if not known.any():
        raise InputError(f"{spurious_masks}: no true mask is known for the alignment set, so rrr_gt cannot be trained")
    return [sample for sample, is_known in zip(ids, known, strict=True) if is_known], masks[known]


if __name__ == "__main__":
    run(align)
