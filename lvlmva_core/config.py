"""params.yaml as typed sections, one per stage; the only place that reads the file."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lvlmva_core.errors import InputError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]

PALETTE_SIZE = 12  # colours that a region can be named by; lvlmva_core.render holds them


class Section(BaseModel):
    """A section of params.yaml: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Compute(Section):
    """Where tensors live, and on how many CPU threads: both change the last bits of results."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
    threads: Count


class Knee(Section):
    """How many knees a class, and on which share of the training knees a lead marker stands.

    val_groups: balanced, or as_training: with the shares of the training split.
    """

    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    tag_share_healthy: Share
    tag_share_arthritic: Share
    val_groups: Literal["balanced", "as_training"] = "balanced"
    negatives: Literal["leave_out", "invert"]


class Skin(Section):
    """How many lesions a class, which bandages, and on which share of the training pictures they lie.

    val_groups: balanced, or as_training: with the shares of the training split.
    """

    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    bandages: Literal["real", "pasted"]
    bandage_share_benign: Share
    bandage_share_malignant: Share
    val_groups: Literal["balanced", "as_training"] = "balanced"

    @model_validator(mode="after")
    def _real_bandages_are_on_benign_lesions(self) -> "Skin":
        if self.bandages == "real" and self.bandage_share_malignant > 0:
            raise ValueError("bandage_share_malignant must be 0 with bandages 'real': no malignant lesion has one")
        return self


class Prepare(Section):
    """Which dataset, and how it is split and decoyed. image_size and the own section are for knee and skin alone."""

    dataset: Literal["decoy_digits", "decoy_mnist", "knee", "skin"]
    root: str | None
    seed: Seed
    image_size: Annotated[int, Field(ge=32, le=1024)] | None = None
    knee: Knee | None = None
    skin: Skin | None = None

    @model_validator(mode="after")
    def _settings_fit_the_dataset(self) -> "Prepare":
        own = {"knee": self.knee, "skin": self.skin}
        for name, section in own.items():
            if (section is None) == (self.dataset == name):
                raise ValueError(f"dataset '{self.dataset}' needs its own section alone; see prepare.{name} in presets")
        if (self.image_size is None) == (self.dataset in own):
            raise ValueError("image_size must be set for knee and skin, and for no other dataset")
        return self


class Train(Section):
    """Cross-entropy training of the base model."""

    model: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    weights: str | None = None
    hidden: Count
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    batch_size: Count
    epochs: Count
    seed: Seed


class Rank(Section):
    """Which training samples are explained and corrected."""

    strategy: Literal["low_entropy", "high_entropy", "random"]
    n_samples: Count
    stratify: bool
    seed: Seed


class Attribute(Section):
    """Explanation maps of the alignment samples."""

    method: Literal["deep_lift_shap", "gradient", "gradient_x_input", "integrated_gradients"]
    n_baselines: Count
    batch_size: Count
    completeness_tolerance: Positive
    integration_steps: Count
    seed: Seed


class Segment(Section):
    """Regions of each explanation map."""

    method: Literal["ppeps_wgm", "sam", "slic", "grid"]
    n_regions: Annotated[int, Field(ge=1, le=PALETTE_SIZE)]
    choose: Literal["fixed", "bic", "held_out"]
    n_starts: Count
    n_superpixels: Count
    sam_checkpoint: str | None
    seed: Seed

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> "Segment":
        if self.method == "sam" and self.sam_checkpoint is None:
            raise ValueError("segment.method 'sam' needs sam_checkpoint: a folder with a SAM in transformers' format")
        if self.method != "ppeps_wgm" and self.choose != "fixed":
            raise ValueError("segment.choose must be fixed: only ppeps_wgm has a likelihood to choose by")
        return self


_CREDENTIALS = ("api_key", "apikey", "api-key", "authorization", "secret", "password")


def _keys_within(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(key) for key in value] + [key for inner in value.values() for key in _keys_within(inner)]
    return [key for inner in value for key in _keys_within(inner)] if isinstance(value, list) else []


class Endpoint(Section):
    """A model behind an OpenAI-compatible server. What is sent is part of a call's key; the rest is not."""

    base_url: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+(:\d+)?(/[^\s?#]*)?(\?\S*)?$")]
    model: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(min_length=1)]
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*_API_KEY$")] | None
    token_limit_name: Literal["max_tokens", "max_completion_tokens"]
    token_limit: Count
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None
    seed: Seed | None
    image_detail: Literal["auto", "low", "high"] | None
    extra_body: dict[str, Any]
    concurrency: Annotated[int, Field(ge=1, le=256)]
    timeout_s: Positive
    retries: Annotated[int, Field(ge=0, le=20)]
    max_wait_s: Positive
    usd_per_million_input_tokens: NonNegative
    usd_per_million_output_tokens: NonNegative
    max_calls: Annotated[int, Field(ge=0)]
    max_cost_usd: NonNegative
    allow_upload: bool
    allow_unhydrated: bool

    @model_validator(mode="after")
    def _extra_body_is_plain(self) -> "Endpoint":
        own = {"model", "messages", "response_format", "stream", "n", self.token_limit_name, "temperature", "seed"}
        for key in self.extra_body:
            if key in own:
                raise ValueError(f"extra_body.{key} has a key of its own or is set by the stage; remove it there")
        for key in _keys_within(self.extra_body):
            if any(word in key.lower() for word in _CREDENTIALS):
                raise ValueError(f"extra_body: {key} looks like a credential; name its variable in api_key_variable")
        return self


class Critique(Section):
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


class Judge(Section):
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


class Mask(Section):
    """How verdicts become masks."""

    max_failed_share: Share


class Selection(Section):
    """Choice of λ, and of the epoch, on the validation split. rrr_lambdas replaces rrr_lambda; [] keeps it.

    patience: epochs without a better score after which a run ends with its best epoch's weights; null = the last epoch.
    seed: of the draw of donors (pseudo_group).
    """

    rule: Literal["pseudo_group", "worst_group", "accuracy"]
    rrr_lambdas: list[NonNegative]
    patience: Count | None
    seed: Seed


class Align(Section):
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


class Subg(Section):
    """SUBG: groups sub-sampled to the smallest, the model of `train` trained anew."""

    learning_rate: Positive
    batch_size: Count
    epochs: Count
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Dfr(Section):
    """DFR: the base model's last layer refitted on group-balanced samples of a split."""

    split: Literal["train", "val"]
    c_grid: Annotated[list[Positive], Field(min_length=1)]
    n_refits: Count
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Jtt(Section):
    """JTT: a short training, its errors up-weighted, the model of `train` trained anew."""

    first_epochs: Annotated[list[Count], Field(min_length=1)]
    up: Annotated[list[Count], Field(min_length=1)]
    rule: Literal["accuracy", "worst_group"]
    learning_rate: Positive
    batch_size: Count
    epochs: Count
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Baseline(Section):
    """The methods that LVLM-VA is compared with; all but jtt know what it does not: true masks or groups."""

    rrr_gt: Align
    subg: Subg
    dfr: Dfr
    jtt: Jtt


class Control(Section):
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


class Evaluate(Section):
    """What the metrics count."""

    overlap: Annotated[str, Field(pattern=r"^(any|half_of_feature|majority_of_attribution)$")]
    attribution_samples: Count
    robustness: bool = True
    seed: Seed


class Report(Section):
    """What the figures show."""

    panel_samples: Annotated[int, Field(ge=8, le=64)]


class Params(Section):
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
