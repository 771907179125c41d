"""Stage align: a method that fine-tunes the base model on masks, all seeds in one call."""

from pathlib import Path

import pandas as pd
import torch

from lvlmva.entry import run
from lvlmva.hydrate import open_store
from lvlmva.params import load_params
from lvlmva.pipeline import code_files
from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import align_ensemble
from lvlmva_core.alignment.selection import best_runs, selection_of, summary_of
from lvlmva_core.arrays import read_json, read_table, write_json
from lvlmva_core.compute import set_up_compute
from lvlmva_core.controls import MASK_SOURCES, Given
from lvlmva_core.models import load_checkpoint, save_checkpoint, weights_digest
from lvlmva_core.resume import Resume
from lvlmva_core.samples import read_known_masks, read_penalised, read_samples
from lvlmva_core.splits import read_sample_rows, read_split


def align(
    params: Path,
    method: str,
    settings: Path,
    images: Path,
    samples: Path,
    spurious_masks: Path,
    alignment_set: Path,
    masks: Path,
    base: Path,
    models: Path,
    curves: Path,
    method_metrics: Path,
) -> None:
    """Fine-tune the base model on the masks of a method."""
    loaded = load_params(params)
    compute = loaded.compute
    config = AlignSettings.model_validate(read_json(settings / f"{method}.json"))
    device = set_up_compute(compute.device, compute.threads)
    table = read_samples(samples)
    given = Given(
        verdicts=lambda: read_penalised(masks),
        truth=lambda: read_known_masks(spurious_masks, table, read_table(alignment_set, ["id"])["id"].tolist()),
    )
    ids, drawn = MASK_SOURCES[method](given, [seed for _, seed in config.runs()])
    training, validation = (read_split(images, table, split, device) for split in ("train", "val"))
    alignment, corrections = read_sample_rows(images, table, ids, device), torch.from_numpy(drawn).to(device)
    classifier, spec = load_checkpoint(base, device, loaded.train.model)
    selection = selection_of(config, validation, alignment, corrections)
    splits = (training, alignment, validation)
    inputs = {
        "config": config.model_dump(),
        "compute": compute.model_dump(),
        "weights": weights_digest(classifier),
        "tensors": [tensor.cpu().numpy() for split in splits for tensor in (split.images, split.labels)],
        "masks": drawn,
        "groups": None if selection is None else selection.groups.cpu().numpy(),
    }
    resume = Resume(open_store(), inputs, code_files("stages.align"), device)
    found = align_ensemble(
        classifier, training, alignment, corrections, validation, config, selection=selection, resume=resume
    )
    best = best_runs(found, config)
    for one in best:
        classifier.load_state_dict(one.weights)
        save_checkpoint(models / method / f"seed={one.seed}.safetensors", spec, classifier)
    curves.mkdir(parents=True, exist_ok=True)
    histories = [one.curve.assign(seed=one.seed) for one in best]
    pd.concat(histories, ignore_index=True).to_csv(curves / f"{method}.csv", index=False)
    write_json(method_metrics / f"{method}.json", {method: summary_of(found, config)})
    resume.clear()


if __name__ == "__main__":
    run(align)
