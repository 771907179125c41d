"""Stage train: the base model, trained here or brought along."""

import sys
from pathlib import Path

import pandas as pd

from lvlmva.entry import run
from lvlmva.hydrate import open_store
from lvlmva.params import load_params
from lvlmva.pipeline import code_files
from lvlmva_core.arrays import write_json
from lvlmva_core.compute import set_up_compute
from lvlmva_core.data_parallel import number
from lvlmva_core.errors import InputError
from lvlmva_core.foreign import initial_spec, load_foreign
from lvlmva_core.models import build_model, load_weights, save_checkpoint, users_file, weights_digest
from lvlmva_core.resume import Resume
from lvlmva_core.samples import read_class_names, read_samples
from lvlmva_core.splits import arrays_of, read_split
from lvlmva_core.train_settings import Checkpoint
from lvlmva_core.training import curve_row, train_classifier

PROBE = 64  # pictures that a model from elsewhere is tried on


def train(
    params: Path, images: Path, samples: Path, own: Path, base: Path, train_metrics: Path, train_curve: Path
) -> None:
    """Train the base model with cross-entropy, or take the one that was brought along (`from: checkpoint`)."""
    loaded = load_params(params)
    config = loaded.train
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table, classes = read_samples(samples), read_class_names(images)
    training, validation = (read_split(images, table, split, device) for split in ("train", "val"))
    code = users_file(config.model, Path.cwd())
    if code is not None and not code.resolve().is_relative_to(own.resolve()):
        raise InputError(f"train.model: {code} lies outside {own}/; move it there, so that DVC notices its changes")
    resume = None
    if isinstance(config, Checkpoint):
        found = load_foreign(config, training.images[:PROBE].cpu(), classes)
        model, spec, notes = found.model.to(device), found.spec, found.notes
        history = pd.DataFrame([curve_row(model, training, validation)])
        if config.checkpoint and not Path(config.checkpoint).resolve().is_relative_to(own.resolve()):
            sys.stderr.write(f"note: DVC notices no change of {config.checkpoint}; it would in {own}/\n")
    else:
        spec, notes = initial_spec(config.model, training.images.shape[1:], len(classes), config.hidden), []
        model = build_model(spec, config.seed, config.model)
        if config.weights is not None:
            load_weights(model, spec, config.weights)
        model.to(device)
        inputs = {
            "train": config.model_dump(),
            "compute": loaded.compute.model_dump(),
            "weights": weights_digest(model),
            "tensors": arrays_of(training, validation),
        }
        resume = Resume(open_store(), inputs, code_files("stages.train"), device)
        settings = config.model_dump(include={"learning_rate", "weight_decay", "batch_size", "epochs", "seed"})
        history = train_classifier(model, training, validation, **settings, checkpoint=resume.part("base"))
    if number():  # the first of several processes writes
        return
    save_checkpoint(base, spec, model)
    train_curve.parent.mkdir(parents=True, exist_ok=True)
    history.to_csv(train_curve, index=False)
    for note in notes:
        sys.stderr.write(f"note: {config.model}: {note}\n")
    reached = history.iloc[-1].drop("epoch").to_dict()
    write_json(train_metrics, {"train": {**reached, **({"notes": notes} if notes else {})}})
    if resume is not None:
        resume.clear()


if __name__ == "__main__":
    run(train, in_processes=True)
