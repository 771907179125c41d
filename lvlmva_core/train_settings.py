"""What the base model's origin can be told: trained from scratch, from weights, or brought along."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from lvlmva_core.settings import Count, NonNegative, Positive, Seed, Settings, Share

# a model of lvlmva_core.models, torchvision:NAME, timm:NAME, or package.module:function of a file of the user's
ModelName = Annotated[
    str, Field(pattern=r"^([a-z][a-z0-9_]*|(torchvision|timm):[A-Za-z0-9_.]+|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
]
NORMALISATIONS = {  # mean and standard deviation of pixels in [0, 1]; one number stands for every channel
    "none": ((0.0,), (1.0,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,), (0.5,)),
    "bytes": ((0.0,), (1 / 255,)),
}


class Normalisation(Settings):
    """(pixel - mean) / std of pixels in [0, 1], a number for each channel that the network has."""

    mean: Annotated[list[float], Field(min_length=1)]
    std: Annotated[list[Positive], Field(min_length=1)]

    @model_validator(mode="after")
    def _as_many_of_both(self) -> "Normalisation":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} numbers, std {len(self.std)}; give one of each per channel")
        return self


class _Training(Settings):
    """Cross-entropy training of the base model. hidden: of mlp and small_resnet alone."""

    model: ModelName
    hidden: Count
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    batch_size: Count
    epochs: Count
    seed: Seed


class Scratch(_Training):
    """From initial weights that are drawn from `seed`."""

    start: Literal["scratch"] = Field(alias="from")
    weights: ClassVar[None] = None


class Weights(_Training):
    """From trained weights: a file, or the name of weights in torchvision's API."""

    start: Literal["weights"] = Field(alias="from")
    weights: str


class Checkpoint(Settings):
    """A classifier that is trained already; nothing is trained.

    checkpoint: .safetensors, or a state dict that is read as tensors only; null where the user's function returns the
    trained model. checkpoint_key: which entry holds the tensors, where there are several.
    classes: names of the classes in the order of the logits; the same names as the data's, in whatever order.
    normalisation: what the model expects of pixels in [0, 1]; null = what timm knows of its model.
    channel_order: "bgr" turns the channels round before mean and std, which are in the network's order.
    channels: of the network's input; null = as its architecture has them. input_size: height and width that it was
    made for, checked against the prepared pictures; null = not checked.
    expected_accuracy: split -> accuracy that the user knows of; `lvlmva check-model` compares.

    The others are those of a training: nothing here uses them but `retrained` methods, which inherit them.
    """

    start: Literal["checkpoint"] = Field(alias="from")
    model: ModelName
    checkpoint: str | None
    checkpoint_key: str | None = None
    classes: Annotated[list[str], Field(min_length=2)]
    normalisation: Literal["none", "imagenet", "half", "bytes"] | Normalisation | None = None
    channel_order: Literal["rgb", "bgr"] = "rgb"
    channels: Annotated[int, Field(ge=1, le=16)] | None = None
    input_size: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    expected_accuracy: dict[str, Share] = Field(default_factory=dict)
    hidden: Count = 1
    learning_rate: Positive | None = None
    weight_decay: NonNegative = 0.0
    batch_size: Count | None = None
    epochs: Count | None = None
    seed: Seed = 0
    weights: ClassVar[None] = None

    @model_validator(mode="after")
    def _says_what_a_wrong_guess_would_hide(self) -> "Checkpoint":
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: a name stands there twice; name each class once, in the order of the logits")
        if self.normalisation is None and not self.model.startswith("timm:"):
            raise ValueError(
                "normalisation is missing: say what the model was trained on (imagenet, half, none, bytes, or mean and "
                "std); a wrong one fails silently"
            )
        if self.checkpoint is None and (":" not in self.model or self.model.startswith(("timm:", "torchvision:"))):
            raise ValueError("checkpoint is null: name the file of the trained weights")
        return self


def _with_from(section: Any) -> Any:
    """Sections written before there was `from`: weights where they name some, else scratch."""
    if not isinstance(section, dict) or "from" in section:
        return section
    rest = {key: value for key, value in section.items() if (key, value) != ("weights", None)}
    return {**rest, "from": "weights" if "weights" in rest else "checkpoint" if "checkpoint" in rest else "scratch"}


Train = Annotated[
    Annotated[Scratch | Weights | Checkpoint, Field(discriminator="start")],
    BeforeValidator(_with_from),
]
