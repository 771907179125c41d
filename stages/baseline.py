"""Stage retrain: SUBG, DFR and JTT, once a seed."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lvlmva.entry import run
from lvlmva.params import Dfr, Jtt, Params, Subg, load_params
from lvlmva_core.arrays import write_json
from lvlmva_core.baselines.dfr import refit_last_layer
from lvlmva_core.baselines.jtt import error_rows, upweighted_rows
from lvlmva_core.baselines.subg import balanced_rows
from lvlmva_core.metrics import group_accuracies, mean_and_std
from lvlmva_core.models import (
    ModelSpec,
    build_model,
    last_linear,
    load_checkpoint,
    load_weights,
    penultimate_features,
    predict_logits,
    save_checkpoint,
)
from lvlmva_core.samples import read_samples
from lvlmva_core.training import accuracy, set_up_compute, train_classifier
from stages.data import split_tensors

Method = Literal["subg", "dfr", "jtt"]
Split = tuple[Tensor, Tensor, pd.DataFrame]


@dataclass(frozen=True)
class _Task:
    """What every method starts from."""

    params: Params
    spec: ModelSpec
    base: nn.Module
    train: Split
    val: Split
    device: torch.device

    def fresh(self, seed: int) -> nn.Module:
        """The model of `train` before training."""
        model = build_model(self.spec, seed)
        if self.params.train.weights is not None:
            load_weights(model, self.spec, self.params.train.weights)
        return model.to(self.device)

    def fit(self, config: Subg | Jtt, seed: int, epochs: int, rows: Tensor | None) -> nn.Module:
        """The model of `train`, trained from its initial weights on `rows` of the training split."""
        model = self.fresh(seed)
        train_classifier(
            model,
            *self.train[:2],
            *self.val[:2],
            learning_rate=config.learning_rate,
            weight_decay=self.params.train.weight_decay,
            batch_size=config.batch_size,
            epochs=epochs,
            seed=seed,
            rows=rows,
        )
        return model


def baseline(params: Path, method: Method, images: Path, samples: Path, model: Path, out: Path, metrics: Path) -> None:
    """Train the models of a method that needs neither masks nor attributions."""
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table = read_samples(samples)
    base, spec = load_checkpoint(model, device)
    train, val = (split_tensors(images, table, split, device) for split in ("train", "val"))
    task = _Task(loaded, spec, base, train, val, device)
    methods = {"subg": _subg, "dfr": _dfr, "jtt": _jtt}
    models, facts = methods[method](task)
    for seed, trained in models.items():
        save_checkpoint(out / f"seed={seed}.safetensors", spec, trained)
    val_accuracy = [accuracy(trained, val[0], val[1]) for trained in models.values()]
    write_json(metrics, {method: {"val_accuracy": mean_and_std(val_accuracy), **facts}})


def _subg(task: _Task) -> tuple[dict[int, nn.Module], dict[str, Any]]:
    config = task.params.baseline.subg
    groups = task.train[2]["group"].to_numpy()
    models, used = {}, 0
    for seed in config.seeds:
        rows = balanced_rows(groups, seed)
        models[seed], used = task.fit(config, seed, config.epochs, rows), len(rows)
    note = ""
    if task.train[2].groupby("label")["spurious"].nunique().max() == 1:
        note = "every class has one group in training, so that the classes are balanced and nothing more"
        sys.stderr.write(f"subg: {note}\n")
    return models, {"samples": used, "samples_in_training": len(groups), "note": note}


def _dfr(task: _Task) -> tuple[dict[int, nn.Module], dict[str, Any]]:
    config: Dfr = task.params.baseline.dfr
    images, labels, table = task.train if config.split == "train" else task.val
    features = penultimate_features(task.base, images).cpu().numpy()
    models: dict[int, nn.Module] = {}
    chosen: dict[str, float] = {}
    for seed in config.seeds:
        refitted = refit_last_layer(
            features,
            labels.cpu().numpy(),
            table["group"].to_numpy(),
            task.spec.n_classes,
            c_grid=config.c_grid,
            n_refits=config.n_refits,
            seed=seed,
        )
        model = task.fresh(0)
        model.load_state_dict(task.base.state_dict())
        layer = last_linear(model)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(refitted.weight))
            layer.bias.copy_(torch.from_numpy(refitted.bias))
        models[seed] = model.eval()
        chosen[str(seed)] = refitted.c
    return models, {"split": config.split, "smallest_group": int(table["group"].value_counts().min()), "c": chosen}


def _jtt(task: _Task) -> tuple[dict[int, nn.Module], dict[str, Any]]:
    config = task.params.baseline.jtt
    grid = [(first, up) for first in config.first_epochs for up in config.up]
    scores: dict[str, float] = {}
    models: dict[int, nn.Module] = {}
    errors = 0
    best = grid[0]
    for place, setting in enumerate(grid if len(grid) > 1 else []):
        model, _ = _fit_jtt(task, config, config.seeds[0], *setting)
        scores[f"first_epochs={setting[0]},up={setting[1]}"] = score = _score(task, model, config.rule)
        if not place or score > max(list(scores.values())[:-1]):
            best, models = setting, {config.seeds[0]: model}
    for seed in config.seeds:
        if seed not in models:
            models[seed], errors = _fit_jtt(task, config, seed, *best)
    return models, {
        "first_epochs": best[0],
        "up": best[1],
        "rule": config.rule,
        "scores": scores,
        "errors_of_last_seed": errors,
    }


def _fit_jtt(task: _Task, config: Jtt, seed: int, first_epochs: int, up: int) -> tuple[nn.Module, int]:
    images, labels, _ = task.train
    errors = error_rows(task.fit(config, seed, first_epochs, None), images, labels)
    return task.fit(config, seed, config.epochs, upweighted_rows(len(images), errors, up)), len(errors)


def _score(task: _Task, model: nn.Module, rule: str) -> float:
    images, labels, table = task.val
    if rule == "accuracy":
        return accuracy(model, images, labels)
    predictions = predict_logits(model, images).argmax(1).cpu().numpy()
    per_group = group_accuracies(predictions, labels.cpu().numpy(), table["spurious"].to_numpy())
    return float(np.min(per_group["accuracy"]))


if __name__ == "__main__":
    run(baseline)
