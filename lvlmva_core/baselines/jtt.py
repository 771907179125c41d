"""JTT: train briefly, up-weight the training errors, train anew (Liu et al. 2021; LVLM-VA §5)."""

from itertools import product
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lvlmva_core.baselines import Retrained, Task
from lvlmva_core.baselines.settings import RetrainSettings
from lvlmva_core.metrics import group_accuracies
from lvlmva_core.settings import Count

if TYPE_CHECKING:
    from torch import Tensor, nn


class Settings(RetrainSettings):
    """JTT: first_epochs: of the first training. up: how often its errors stand in an epoch of the second.

    rule: of the validation split, by which the first seed chooses among all pairs of both.
    """

    first_epochs: Annotated[list[Count], Field(min_length=1)]
    up: Annotated[list[Count], Field(min_length=1)]
    rule: Literal["accuracy", "worst_group"] = "accuracy"


def retrain(task: Task, settings: Settings) -> Retrained:
    """Train every seed with the pair of settings that the first seed found best; of equal ones the first."""
    grid = list(product(settings.first_epochs, settings.up))
    scores: dict[str, float] = {}
    models: dict[int, nn.Module] = {}
    errors = 0
    best = grid[0]
    for first_epochs, up in grid if len(grid) > 1 else []:
        model, _ = _fit(task, settings, settings.seeds[0], first_epochs, up)
        score = _score(task, model, settings.rule)
        if not scores or score > max(scores.values()):
            best, models = (first_epochs, up), {settings.seeds[0]: model}
        scores[f"first_epochs={first_epochs},up={up}"] = score
    for seed in settings.seeds:
        if seed not in models:
            models[seed], errors = _fit(task, settings, seed, *best)
    facts = {"first_epochs": best[0], "up": best[1], "rule": settings.rule, "scores": scores}
    return Retrained(models, {**facts, "errors_of_last_seed": errors})


def error_rows(model: "nn.Module", images: "Tensor", labels: "Tensor") -> "Tensor":
    """Rows (int64, rising, on the CPU) that the model gets wrong in eval mode; its mode is restored.

    Eval mode is what the method means: with BatchNorm in train mode the errors would depend on the batches.

    Args:
        images: float32 (N, C, H, W) in [0, 1]. labels: int64 (N,).
    """
    import torch

    from lvlmva_core.compute import eval_mode
    from lvlmva_core.models import predict_logits

    with eval_mode(model):
        wrong = predict_logits(model, images).argmax(1) != labels
    return torch.nonzero(wrong).flatten().cpu()


def upweighted_rows(n_samples: int, errors: "Tensor", up: int) -> "Tensor":
    """All rows 0..n-1 once and those in `errors` `up` times, int64: what an epoch of the second training holds."""
    import torch

    return torch.cat([torch.arange(n_samples), errors.repeat(up - 1)])


def _fit(task: Task, settings: Settings, seed: int, first_epochs: int, up: int) -> "tuple[nn.Module, int]":
    images, labels = task.training.images, task.training.labels
    errors = error_rows(task.fit(settings, seed, first_epochs, None), images, labels)
    return task.fit(settings, seed, settings.epochs, upweighted_rows(len(images), errors, up)), len(errors)


def _score(task: Task, model: "nn.Module", rule: str) -> float:
    from lvlmva_core.models import predict_logits
    from lvlmva_core.training import accuracy

    split = task.validation
    if rule == "accuracy":
        return accuracy(model, split.images, split.labels)
    predictions = predict_logits(model, split.images).argmax(1).cpu().numpy()
    groups = group_accuracies(predictions, split.labels.cpu().numpy(), split.table["spurious"].to_numpy())
    return float(groups["accuracy"].min())
