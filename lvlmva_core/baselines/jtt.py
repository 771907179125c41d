"""JTT: train briefly, up-weight the training errors, train anew (Liu et al. 2021; LVLM-VA §5)."""

from typing import TYPE_CHECKING

from lvlmva_core.baselines import Fitted, Retrained, Task, train_each
from lvlmva_core.baselines.settings import RetrainSettings
from lvlmva_core.settings import Count

if TYPE_CHECKING:
    from torch import Tensor, nn


class Settings(RetrainSettings):
    """JTT: first_epochs: of the first training. up: how often its errors stand in an epoch of the second.

    Its authors try both, with up-weights to 100.
    """

    first_epochs: Count
    up: Count


def retrain(task: Task, settings: Settings) -> Retrained:
    """Train every seed twice; the first training runs as long as it is told, whatever the selection."""
    images, labels = task.training.images, task.training.labels
    errors: dict[tuple[int, int], Tensor] = {}  # of a first training, which several up-weights share

    def fit(candidate: Settings, seed: int) -> Fitted:
        key = (candidate.first_epochs, seed)
        if key not in errors:
            first = task.fit(candidate, seed, epochs=candidate.first_epochs, choose_epoch=False)
            errors[key] = error_rows(first.model, images, labels)
        return task.fit(candidate, seed, rows=upweighted_rows(len(images), errors[key], candidate.up))

    found = train_each(task, settings, fit)
    chosen = {**settings.model_dump(), **found.facts.get("selection", {}).get("chosen", {})}
    of_first = {seed: len(errors[chosen["first_epochs"], seed]) for seed in settings.seeds}
    facts = {"first_epochs": chosen["first_epochs"], "up": chosen["up"], "errors": of_first}
    return Retrained(found.models, {**found.facts, **facts})


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
