"""Stage align: a method that fine-tunes the base model on masks, all seeds in one call."""

from pathlib import Path

import pandas as pd

from lvlmva.entry import run
from lvlmva.hydrate import open_store
from lvlmva.params import load_params
from lvlmva.pipeline import code_files
from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import align_ensemble
from lvlmva_core.alignment.selection import best_runs, selection_of, summary_of
from lvlmva_core.arrays import read_json, read_table, write_json
from lvlmva_core.compute import set_up_compute
from lvlmva_core.controls import MASK_SOURCES, Given, shares_per_class
from lvlmva_core.data_parallel import number
from lvlmva_core.models import load_checkpoint, save_checkpoint, weights_digest
from lvlmva_core.resume import Resume
from lvlmva_core.samples import read_class_names, read_known_masks, read_penalised, read_samples, rows_of_ids
from lvlmva_core.splits import arrays_of, read_masked, read_split


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
    config = AlignSettings.model_validate(read_json(settings / f"{method}.json"))
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table = read_samples(samples)
    given = Given(
        verdicts=lambda: read_penalised(masks),
        truth=lambda: read_known_masks(spurious_masks, table, read_table(alignment_set, ["id"])["id"].tolist()),
        labels=lambda ids: table["label"].to_numpy()[rows_of_ids(table, ids)],
    )
    ids, drawn = MASK_SOURCES[method](given, [seed for _, seed in config.runs()])
    training, validation = (read_split(images, table, split, device) for split in ("train", "val"))
    alignment, corrections = read_masked(images, table, ids, drawn, device)
    classifier, spec = load_checkpoint(base, device, loaded.train.model)
    selection = selection_of(config, validation, lambda: read_masked(images, table, *given.verdicts(), device))
    inputs = {
        "config": config.model_dump(),
        "compute": loaded.compute.model_dump(),
        "weights": weights_digest(classifier),
        "tensors": arrays_of(training, alignment, validation),
        "masks": drawn,
        "selection": None if selection is None else [selection.images.cpu().numpy(), selection.groups.cpu().numpy()],
    }
    resume = Resume(open_store(), inputs, code_files("stages.align"), device)
    data = (training, alignment, corrections, validation)
    found = align_ensemble(classifier, *data, config, selection=selection, resume=resume)
    if number():  # the first of several processes writes
        return
    for one in (best := best_runs(found, config)):
        classifier.load_state_dict(one.weights)
        save_checkpoint(models / method / f"seed={one.seed}.safetensors", spec, classifier)
    curves.mkdir(parents=True, exist_ok=True)
    history = pd.concat([one.curve.assign(seed=one.seed) for one in best], ignore_index=True)
    history.to_csv(curves / f"{method}.csv", index=False)
    counted = shares_per_class(drawn, alignment.table["label"].to_numpy(), read_class_names(images))
    write_json(method_metrics / f"{method}.json", {method: {**summary_of(found, config), "masks": counted}})
    resume.clear()


if __name__ == "__main__":
    run(align, in_processes=True)
