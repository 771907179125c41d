"""What an alignment can be told."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lvlmva_core.penalties import penalty_of
from lvlmva_core.settings import Count, NonNegative, Positive, Seed, Settings


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("each seed must stand there once: copies of a run would pass for spread over seeds")
    return seeds


def _known_penalty(name: str) -> str:
    penalty_of(name)
    return name


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]


class SelectionSettings(Settings):
    """Choice of λ, and of the epoch, on the validation split. rrr_lambdas replaces rrr_lambda; [] keeps it.

    patience: epochs without a better score after which a run ends with its best epoch's weights; null = the last epoch.
    seed: of the draw of donors (pseudo_group).
    """

    rule: Literal["pseudo_group", "worst_group", "accuracy"]
    rrr_lambdas: list[NonNegative] = Field(default_factory=list)
    patience: Count | None = None
    seed: Seed = 0


class AlignSettings(Settings):
    """Fine-tuning with a penalty on input gradients (`lvlmva_core.alignment.align_ensemble`).

    rrr_lambda: belongs to inputs in [0, 1]. gamma: weight of the squared parameters. alignment_batch, training_batch:
    masked and unmasked samples of a batch.

    seeds: one run each. selection: how λ and the epoch are chosen; null = rrr_lambda, the last epoch.

    precision: "float32", or "bfloat16" for mixed precision (torch.autocast) in the steps of models that are no ReLU
    MLPs; weights, optimiser and validation stay as they are.

    batch_norm: "train", or "frozen": BatchNorm layers keep the base model's running statistics and use them in the
    cross-entropy's forward too. With "train" the penalty may be lowered by moving the weights away from the running
    statistics, which the cross-entropy does not see: the model in eval mode then is another one.

    max_gradient_norm: the gradient of the whole loss in all parameters of a run is scaled down to this norm where it is
    longer. A pretrained network may begin with penalties in the hundreds; unclipped, these set Adam's scale for the
    hundreds of steps that its second moment remembers, and the cross-entropy is drowned.

    learning_rate_schedule: "constant", or "linear": falls from learning_rate to 0, step by step.

    penalty: a name of `lvlmva_core.penalties`: "log_probabilities" (the paper's), or "contrast", which a model cannot
    meet by being unsure (an extension).
    """

    rrr_lambda: NonNegative
    gamma: NonNegative = 0.0
    learning_rate: Positive
    epochs: Count
    alignment_batch: Count = 8
    training_batch: Count = 64
    seeds: Seeds
    selection: SelectionSettings | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_norm: Literal["train", "frozen"] = "train"
    max_gradient_norm: Positive | None = None
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    penalty: Annotated[str, AfterValidator(_known_penalty)] = "log_probabilities"

    def candidates(self) -> list[float]:
        """Every λ that is tried, rising."""
        grid = [] if self.selection is None else self.selection.rrr_lambdas
        return sorted(set(grid)) or [self.rrr_lambda]

    def runs(self) -> list[tuple[float, int]]:
        """Every (λ, seed) that is trained."""
        return [(rrr_lambda, seed) for rrr_lambda in self.candidates() for seed in self.seeds]
