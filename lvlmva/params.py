"""params.yaml as typed sections, one per stage; the only place that reads the file."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from lvlmva_core.attribution.settings import Attribute
from lvlmva_core.datasets.settings import Prepare
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.segmentation.settings import Segment
from lvlmva_core.settings import Count, NonNegative, Positive, Seed, Settings, Share


class Compute(Settings):
    """Where tensors live, and on how many CPU threads: both change the last bits of results."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
    threads: Count


class Train(Settings):
    """Cross-entropy training of the base model."""

    model: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    weights: str | None = None
    hidden: Count
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    batch_size: Count
    epochs: Count
    seed: Seed


class Rank(Settings):
    """Which training samples are explained and corrected."""

    strategy: Literal["low_entropy", "high_entropy", "random"]
    n_samples: Count
    stratify: bool
    seed: Seed


class Critique(Settings):
    """Who criticises the regions."""

    critic: Literal["rules", "oracle", "model", "replay"]
    prompts: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    name_spurious_feature: bool
    max_failed_share: Share
    oracle_rejects: Literal["spurious_feature", "off_object"] = "spurious_feature"
    overlap: Annotated[str, Field(pattern=r"^(any|half_of_feature|majority_of_attribution)$")]
    false_positive_rate: Share
    false_negative_rate: Share
    seed: Seed
    endpoint: Endpoint | None

    @model_validator(mode="after")
    def _model_has_an_endpoint(self) -> "Critique":
        if self.critic in ("model", "replay") and self.endpoint is None:
            raise ValueError(f"critic '{self.critic}' needs critique.endpoint; take one from presets/critics")
        return self


class Judge(Settings):
    """Who turns critiques into verdicts."""

    judge: Literal["rules", "model", "replay"]
    prompts: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    answer_format: Literal["json_schema", "prompt"]
    max_attempts: Annotated[int, Field(ge=1, le=10)]
    max_failed_share: Share
    endpoint: Endpoint | None

    @model_validator(mode="after")
    def _model_has_an_endpoint(self) -> "Judge":
        if self.judge in ("model", "replay") and self.endpoint is None:
            raise ValueError(f"judge '{self.judge}' needs judge.endpoint; take one from presets/critics")
        return self


class Mask(Settings):
    """How verdicts become masks."""

    max_failed_share: Share


class Selection(Settings):
    """Choice of λ, and of the epoch, on the validation split. rrr_lambdas replaces rrr_lambda; [] keeps it.

    patience: epochs without a better score after which a run ends with its best epoch's weights; null = the last epoch.
    seed: of the draw of donors (pseudo_group).
    """

    rule: Literal["pseudo_group", "worst_group", "accuracy"]
    rrr_lambdas: list[NonNegative]
    patience: Count | None
    seed: Seed


class Align(Settings):
    """RRR fine-tuning: λ belongs to inputs in [0, 1]. precision: of the steps; ReLU MLPs have only float32.

    batch_norm: train, or frozen: BatchNorm keeps the base model's statistics (`lvlmva_core.alignment`).
    max_gradient_norm: longer gradients are scaled down to it. learning_rate_schedule: linear falls to 0.
    penalty: what is differentiated in the pixels, the summed log-probabilities (the paper's) or contrast, which a model
    cannot meet by being unsure (`lvlmva_core.alignment.contrast_penalty`).
    """

    rrr_lambda: NonNegative
    gamma: NonNegative
    learning_rate: Positive
    epochs: Count
    alignment_batch: Count
    training_batch: Count
    seeds: Annotated[list[Seed], Field(min_length=1)]
    selection: Selection | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_norm: Literal["train", "frozen"] = "train"
    max_gradient_norm: Positive | None = None
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    penalty: Literal["log_probabilities", "contrast"] = "log_probabilities"


class Subg(Settings):
    """SUBG: groups sub-sampled to the smallest, the model of `train` trained anew."""

    learning_rate: Positive
    batch_size: Count
    epochs: Count
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Dfr(Settings):
    """DFR: the base model's last layer refitted on group-balanced samples of a split."""

    split: Literal["train", "val"]
    c_grid: Annotated[list[Positive], Field(min_length=1)]
    n_refits: Count
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Jtt(Settings):
    """JTT: a short training, its errors up-weighted, the model of `train` trained anew."""

    first_epochs: Annotated[list[Count], Field(min_length=1)]
    up: Annotated[list[Count], Field(min_length=1)]
    rule: Literal["accuracy", "worst_group"]
    learning_rate: Positive
    batch_size: Count
    epochs: Count
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Baseline(Settings):
    """The methods that LVLM-VA is compared with; all but jtt know what it does not: true masks or groups."""

    rrr_gt: Align
    subg: Subg
    dfr: Dfr
    jtt: Jtt


class Control(Settings):
    """What LVLM-VA must beat to mean anything: more training without a penalty, and masks that know less.

    random_masks: in random places of the pictures that the critic masked. random_pictures: of any pictures.
    """

    lambda_zero: Align
    random_masks: Align
    random_pictures: Align

    @model_validator(mode="after")
    def _lambda_zero_is_zero(self) -> "Control":
        selection = self.lambda_zero.selection
        if self.lambda_zero.rrr_lambda != 0 or (selection is not None and any(selection.rrr_lambdas)):
            raise ValueError("lambda_zero.rrr_lambda must be 0: it is the control without a penalty")
        return self


class Evaluate(Settings):
    """What the metrics count."""

    overlap: Annotated[str, Field(pattern=r"^(any|half_of_feature|majority_of_attribution)$")]
    attribution_samples: Count
    robustness: bool = True
    seed: Seed


class Report(Settings):
    """What the figures show."""

    panel_samples: Annotated[int, Field(ge=8, le=64)]


class Params(Settings):
    """The whole of params.yaml."""

    compute: Compute
    prepare: Prepare
    train: Train
    rank: Rank
    attribute: Attribute
    segment: Segment
    critique: Critique
    judge: Judge
    mask: Mask
    align: Align
    baseline: Baseline
    control: Control
    evaluate: Evaluate
    report: Report


def load_params(path: Path) -> Params:
    """Read and check the whole of params.yaml, so that a mistake in any section is found by the first stage that runs.

    YAML 1.2 as DVC reads it (there `1e-4` is a number).

    Raises:
        InputError: naming the first key that is unknown, missing or of the wrong type or range, and the remedy.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it with `git checkout {path}`") from error
    except YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """Say what the first error of a validation is, in one line that names the key and the remedy."""
    first = error.errors(include_url=False, include_context=True)[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_fields_at(first["loc"][:-1]))
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {remedy}{more}"
    if first["type"] == "missing":
        return f"key '{key}' is missing; add it (see presets/ for a complete file){more}"
    message = first["msg"].removeprefix("Value error, ")
    return f"'{key}' = {first['input']!r}: {message[0].lower()}{message[1:]}{more}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = Params
    for part in location:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
