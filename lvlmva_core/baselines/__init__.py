"""Methods that LVLM-VA is compared with (LVLM-VA §5, and more), each a module: train anew, or refit a part of the base.

A module holds `Settings` and `retrain(task, settings) -> Retrained`, and is named as its method. It does not import
torch before `retrain` is called, since params.yaml is read by stages that do without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lvlmva_core.baselines.settings import Retraining, RetrainSettings
from lvlmva_core.statistics import mean_and_std

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lvlmva_core.alignment.selection import Selection
    from lvlmva_core.models import ModelSpec
    from lvlmva_core.samples import Split
    from lvlmva_core.training import Objective

AnyRetraining = TypeVar("AnyRetraining", bound=Retraining)
Made = TypeVar("Made")


@dataclass(frozen=True)
class Fitted:
    """A trained model in eval mode. epoch: whose weights these are. score: on the selection; 0 where there is none."""

    model: "nn.Module"
    epoch: int
    score: float


@dataclass(frozen=True)
class Task:
    """What every method starts from.

    fresh: a seed -> the base model as it was before training, on its device.
    selection: what candidates and epochs are judged by, the same for every method; None = nothing is chosen.
    alignment: gives the alignment samples with verdicts, and what was rejected in them, bool (n, H, W).
    """

    spec: "ModelSpec"
    base: "nn.Module"
    fresh: "Callable[[int], nn.Module]"
    training: "Split"
    validation: "Split"
    selection: "Selection | None" = None
    alignment: "Callable[[], tuple[Split, Tensor]] | None" = None

    def fit(
        self,
        settings: RetrainSettings,
        seed: int,
        *,
        epochs: int | None = None,
        rows: "Tensor | None" = None,
        epoch_rows: "Callable[[int], Tensor] | None" = None,
        objective: "Objective | None" = None,
        choose_epoch: bool = True,
    ) -> Fitted:
        """The model, trained from its initial weights on `rows` of the training split (None = all).

        Args:
            epochs: in the place of `settings.epochs`. epoch_rows, objective: of `train_classifier`.
            choose_epoch: whether the selection's patience ends it, and keeps the epoch of the best score.
        """
        from lvlmva_core.training import Stopping, train_classifier

        model = self.fresh(seed)
        patience = settings.selection.patience if choose_epoch and settings.selection else None
        curve = train_classifier(
            model,
            self.training,
            self.validation,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            batch_size=settings.batch_size,
            epochs=epochs or settings.epochs,
            seed=seed,
            rows=rows,
            epoch_rows=epoch_rows,
            objective=objective,
            stopping=Stopping(self.score, patience) if patience else None,
        )
        epoch = int(curve["epoch"].iloc[curve["score"].argmax() if patience else -1])
        return Fitted(model, epoch, self.score(model))

    def score(self, model: "nn.Module") -> float:
        """Accuracy of the worst group of the selection; 0 where there is none."""
        from lvlmva_core.models import predict_logits

        if self.selection is None:
            return 0.0
        return self.selection.score(predict_logits(model, self.selection.images))


@dataclass(frozen=True)
class Retrained:
    """seed -> model in eval mode; facts: for the metrics file."""

    models: "dict[int, nn.Module]"
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Best(Generic[AnyRetraining, Made]):
    """What was chosen: its settings, what was made with them, and `selection` for the metrics file (or nothing)."""

    settings: AnyRetraining
    made: Made
    facts: dict[str, Any]


def best_of(
    settings: AnyRetraining, tried: Callable[[AnyRetraining], tuple[Sequence[float], Made]]
) -> Best[AnyRetraining, Made]:
    """Try every candidate of the grid with every seed; the highest mean score over seeds wins, the first of equals.

    Args:
        tried: the settings of a candidate -> its scores, one a seed, and what was made.
    """
    from lvlmva_core.alignment.selection import SUPERVISION, at_edge

    best: tuple[float, dict[str, Any], Best[AnyRetraining, Made]] | None = None
    scores: dict[str, dict[str, float]] = {}
    for values, candidate in settings.candidates():
        found, made = tried(candidate)
        scores[",".join(f"{key}={value}" for key, value in values.items()) or "as set"] = mean_and_std(found)
        mean = sum(found) / len(found)
        if best is None or mean > best[0]:
            best = (mean, values, Best(candidate, made, {}))
    assert best is not None
    if settings.selection is None:
        return best[2]
    selection = {
        "rule": settings.selection.rule,
        "supervision": SUPERVISION[settings.selection.rule],
        "chosen": best[1],
        "at_edge": at_edge(best[1], settings.grid),
        "candidates": {name: {"score": of} for name, of in scores.items()},
    }
    return Best(best[2].settings, best[2].made, {"selection": selection})


def train_each(task: Task, settings: AnyRetraining, fit: Callable[[AnyRetraining, int], Fitted]) -> Retrained:
    """Train with the best candidate, once a seed (`best_of`)."""

    def tried(candidate: AnyRetraining) -> tuple[list[float], dict[int, Fitted]]:
        fitted = {seed: fit(candidate, seed) for seed in candidate.seeds}
        return [one.score for one in fitted.values()], fitted

    best = best_of(settings, tried)
    if selection := best.facts.get("selection"):
        selection["epoch"] = mean_and_std([one.epoch for one in best.made.values()])
    return Retrained({seed: one.model for seed, one in best.made.items()}, best.facts)
