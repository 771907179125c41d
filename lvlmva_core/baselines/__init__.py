"""Methods that LVLM-VA is compared with (LVLM-VA §5), each a module: train anew, or refit a part of the base model.

A module holds `Settings` and `retrain(task, settings) -> Retrained`, and is named as its method. It does not import
torch before `retrain` is called, since params.yaml is read by stages that do without.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lvlmva_core.baselines.settings import RetrainSettings
    from lvlmva_core.models import ModelSpec
    from lvlmva_core.samples import Split


@dataclass(frozen=True)
class Task:
    """What every method starts from.

    fresh: a seed -> the base model as it was before training, on its device.
    """

    spec: "ModelSpec"
    base: "nn.Module"
    fresh: "Callable[[int], nn.Module]"
    training: "Split"
    validation: "Split"

    def fit(self, settings: "RetrainSettings", seed: int, epochs: int, rows: "Tensor | None") -> "nn.Module":
        """The model, trained from its initial weights on `rows` of the training split (None = all)."""
        from lvlmva_core.training import train_classifier

        model = self.fresh(seed)
        train_classifier(
            model,
            self.training,
            self.validation,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            batch_size=settings.batch_size,
            epochs=epochs,
            seed=seed,
            rows=rows,
        )
        return model


@dataclass(frozen=True)
class Retrained:
    """seed -> model in eval mode; facts: for the metrics file."""

    models: "dict[int, nn.Module]"
    facts: dict[str, Any] = field(default_factory=dict)
