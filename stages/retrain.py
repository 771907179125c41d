"""Stage retrain: a method of the literature, once a seed."""

import importlib
import sys
from pathlib import Path

from torch import Tensor, nn

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.alignment.selection import selection_of
from lvlmva_core.arrays import read_json, write_json
from lvlmva_core.baselines import Retrained, Task
from lvlmva_core.compute import set_up_compute
from lvlmva_core.models import build_model, load_checkpoint, load_weights, save_checkpoint
from lvlmva_core.samples import Split, read_penalised, read_samples
from lvlmva_core.splits import read_masked, read_split
from lvlmva_core.statistics import mean_and_std
from lvlmva_core.training import accuracy


def retrain(
    params: Path,
    method: str,
    settings: Path,
    images: Path,
    samples: Path,
    masks: Path,
    base: Path,
    models: Path,
    method_metrics: Path,
) -> None:
    """Train the models of one of `lvlmva_core.baselines`."""
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table = read_samples(samples)
    classifier, spec = load_checkpoint(base, device, loaded.train.model)
    training, validation = (read_split(images, table, split, device) for split in ("train", "val"))

    def fresh(seed: int) -> nn.Module:
        model = build_model(spec, seed, loaded.train.model)
        if loaded.train.weights is not None:
            load_weights(model, spec, loaded.train.weights)
        return model.to(device)

    def alignment() -> tuple[Split, Tensor]:
        return read_masked(images, table, *read_penalised(masks), device)

    module = importlib.import_module(f"lvlmva_core.baselines.{method}")
    config = module.Settings.model_validate(read_json(settings / f"{method}.json"))
    selection = selection_of(config, validation, alignment)
    task = Task(spec, classifier, fresh, training, validation, selection, alignment)
    found: Retrained = module.retrain(task, config)
    for seed, trained in found.models.items():
        save_checkpoint(models / method / f"seed={seed}.safetensors", spec, trained)
    reached = [accuracy(trained, validation.images, validation.labels) for trained in found.models.values()]
    write_json(method_metrics / f"{method}.json", {method: {"val_accuracy": mean_and_std(reached), **found.facts}})
    if note := found.facts.get("note"):
        sys.stderr.write(f"{method}: {note}\n")


if __name__ == "__main__":
    run(retrain)
