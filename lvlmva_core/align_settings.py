"""What an alignment can be told."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

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


Correction = Literal["rrr", "counterexamples", "both"]

# what a correction has no use for
UNUSED: dict[str, tuple[str, ...]] = {
    "rrr": ("counterexamples",),
    "counterexamples": ("rrr_lambda", "alignment_batch", "penalty"),
    "both": (),
}


class CounterexampleSettings(Settings):
    """Counterexamples of a step (`lvlmva_core.counterexamples`; an extension).

    swapped, erased: pictures of either kind, beside the training batch. pair_weight: of the squared change of the
    logits' contrasts between the swapped pictures and their twins, mean over these; 0 = no pairing.
    edges: "hard"; "feathered": the donor's content fades out over `feather` pixels around its region; or "blended": it
    is shifted to what it meets at the region's edge (Poisson blending).
    fill: of erased regions: "same_class", another picture of the class; "blur" or "inpaint", what lies around them.
    """

    swapped: Annotated[int, Field(ge=0)] = 12
    erased: Annotated[int, Field(ge=0)] = 12
    pair_weight: NonNegative = 0.3
    edges: Literal["hard", "feathered", "blended"] = "hard"
    feather: Positive | None = None
    fill: Literal["same_class", "blur", "inpaint"] = "same_class"

    @model_validator(mode="after")
    def _all_is_used(self) -> "CounterexampleSettings":
        if not self.swapped and not self.erased:
            raise ValueError("swapped and erased are both 0: no counterexample is made; take correction: rrr")
        if self.pair_weight and not self.swapped:
            raise ValueError("pair_weight compares swapped pictures with their twins, and swapped is 0; set it to 0")
        if self.fill != "same_class" and not self.erased:
            raise ValueError("fill is of erased pictures, and erased is 0; remove it")
        if (self.edges == "feathered") != (self.feather is not None):
            raise ValueError("feather says over how many pixels feathered edges fade; give it with these and only then")
        return self


class AlignSettings(Settings):
    """Fine-tuning that corrects what was rejected (`lvlmva_core.alignment.align_ensemble`).

    correction: "rrr", the paper's penalty on input gradients; "counterexamples", pictures that contradict the shortcut
    (an extension), for which there is no λ: rrr_lambda is 0; "both" in one step (an extension).
    counterexamples: what these are made like; null = the defaults.

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
    correction: Correction = "rrr"
    counterexamples: CounterexampleSettings | None = None

    @model_validator(mode="after")
    def _all_is_used(self) -> "AlignSettings":
        if self.correction == "rrr" and self.counterexamples is not None:
            raise ValueError("counterexamples are not made with correction: rrr; remove them, or take another")
        if self.correction == "counterexamples" and self.candidates() != [0.0]:
            raise ValueError("correction: counterexamples has no penalty; set rrr_lambda to 0, or take both")
        if self.correction != "rrr" and self.selection is not None and self.selection.rule == "pseudo_group":
            raise ValueError(
                "selection.rule pseudo_group swaps regions as counterexamples do, and would choose by what was trained "
                "on; set selection to null for this method, or take another rule"
            )
        return self

    def made_like(self) -> CounterexampleSettings | None:
        """How counterexamples are made; None where none are."""
        return None if self.correction == "rrr" else self.counterexamples or CounterexampleSettings()

    def batch(self) -> tuple[int, int]:
        """Samples of a step: drawn from the alignment set for the penalty, and all together (I)."""
        masked = 0 if self.correction == "counterexamples" else self.alignment_batch
        made = self.made_like()
        return masked, masked + self.training_batch + (made.swapped + made.erased if made else 0)

    def candidates(self) -> list[float]:
        """Every λ that is tried, rising."""
        grid = [] if self.selection is None else self.selection.rrr_lambdas
        return sorted(set(grid)) or [self.rrr_lambda]

    def runs(self) -> list[tuple[float, int]]:
        """Every (λ, seed) that is trained."""
        return [(rrr_lambda, seed) for rrr_lambda in self.candidates() for seed in self.seeds]


class SharedAlignSettings(AlignSettings):
    """The section `align`: what every method starts from. Each says its own correction, and passes over the rest."""

    @model_validator(mode="after")
    def _all_is_used(self) -> "SharedAlignSettings":
        if self.correction != "rrr":
            raise ValueError(
                "a method says its own correction, and lvlm_va is the paper's; remove it here and add "
                f"lvlm_va_{self.correction}: {{}} to methods"
            )
        return self
