"""params.yaml as typed sections, one per stage; the only place that reads the file."""

import difflib
import importlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.attribute_settings import Attribute
from lvlmva_core.comparison import SUBJECT
from lvlmva_core.datasets.settings import Prepare
from lvlmva_core.errors import InputError
from lvlmva_core.exchange_settings import Exchange
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.methods import METHODS
from lvlmva_core.regions import Overlap
from lvlmva_core.segment_settings import Segment
from lvlmva_core.settings import Count, Seed, Settings, Share
from lvlmva_core.train_settings import Train

AnySettings = TypeVar("AnySettings", bound=Settings)


class Compute(Settings):
    """Where tensors live, and on how many CPU threads: both change the last bits of results."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
    threads: Count


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


class Explain(Settings):
    """What is explained anew after alignment, for the report."""

    panel_samples: Annotated[int, Field(ge=8, le=64)]


class Evaluate(Settings):
    """What is asked of each method's models."""

    attribution_samples: Count
    robustness: bool = True
    seed: Seed


class Compare(Settings):
    """What the metrics count."""

    overlap: Overlap


class Params(Settings):
    """The whole of params.yaml.

    methods: those that fine-tune the base model on masks, and what differs from `align` in each. retrained: those of
    the literature, and what differs from `train` (and from `align.seeds`).
    """

    compute: Compute
    prepare: Prepare
    train: Train
    rank: Rank
    attribute: Attribute
    segment: Segment
    exchange: Exchange
    critique: Critique
    judge: Judge
    mask: Mask
    align: AlignSettings
    methods: dict[str, dict[str, Any]]
    retrained: dict[str, dict[str, Any]]
    explain: Explain
    evaluate: Evaluate
    compare: Compare

    def chosen_methods(self) -> dict[str, Settings]:
        """Settings of each method after inheritance; a method that states rrr_lambda takes over no grid of them.

        Raises:
            InputError: a method that does not exist or stands in the wrong mapping, or a key that is wrong in it.
        """
        chosen: dict[str, Settings] = {}
        inherited = self.align.model_dump()
        for name, own in self.methods.items():
            _check_method("methods", name, "penalty")
            merged = {**inherited, **METHODS[name].fixed, **own}
            if "rrr_lambda" in {**METHODS[name].fixed, **own} and "selection" not in own and merged["selection"]:
                merged["selection"] = {**merged["selection"], "rrr_lambdas": []}
            settings = _validated(AlignSettings, merged, f"methods.{name}")
            if METHODS[name].fixed and settings.candidates() != [METHODS[name].fixed["rrr_lambda"]]:
                raise InputError(f"methods.{name}: rrr_lambda must be {METHODS[name].fixed['rrr_lambda']:g}; remove it")
            if settings.alignment_batch > self.rank.n_samples:
                raise InputError(
                    f"methods.{name}: alignment_batch = {settings.alignment_batch} is larger than the alignment set "
                    f"(rank.n_samples = {self.rank.n_samples}); lower it in align"
                )
            chosen[name] = settings
        trained = self.train.model_dump()
        known = {**{key: value for key, value in trained.items() if value is not None}, "seeds": self.align.seeds}
        for name, own in self.retrained.items():
            _check_method("retrained", name, "retrained")
            section: type[Settings] = importlib.import_module(f"lvlmva_core.baselines.{name}").Settings
            merged = {key: value for key, value in known.items() if key in section.model_fields}
            chosen[name] = _validated(section, {**merged, **own}, f"retrained.{name}")
        if SUBJECT not in self.methods:
            raise InputError(
                f"methods: '{SUBJECT}', which all others are compared with, is missing; add '{SUBJECT}: {{}}'"
            )
        return chosen


def _check_method(section: str, name: str, kind: str) -> None:
    known = [each for each, method in METHODS.items() if method.kind == kind]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        raise InputError(f"unknown key '{section}.{name}'; {remedy}")


def _validated(section: type[AnySettings], content: dict[str, Any], place: str) -> AnySettings:
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise InputError(_explain(error, section, f"{place}." if place else "")) from None


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
        params = _validated(Params, content, "")
        params.chosen_methods()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return params


def _explain(error: ValidationError, section: type[Settings], place: str) -> str:
    """Say what the first error of a validation is, in one line that names the key and the remedy."""
    first = error.errors(include_url=False, include_context=True)[0]
    unknown = first["type"] == "extra_forbidden"
    keys, sections = _walk(section, first["loc"][:-1] if unknown else first["loc"])
    keys += [str(first["loc"][-1])] if unknown else []
    key = place + ".".join(keys) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if unknown:
        known = sorted({field.alias or name for each in sections for name, field in each.model_fields.items()})
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {remedy}{more}"
    if first["type"] == "missing":
        return f"key '{key}' is missing; add it (see presets/ for a complete file){more}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):  # a whole section: what is wrong comes first, its content would bury it
        return f"'{key}': {message}{more}"
    return f"'{key}' = {first['input']!r}: {message[0].lower()}{message[1:]}{more}"


def _walk(section: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys of an error's place as they stand in the file, and the sections there: pydantic puts the names of a
    union's members between them, which nobody has written."""
    keys, sections = [], [section]
    for part in location:
        if len(sections) > 1 and any(_is_member(each, part) for each in sections):
            sections = [each for each in sections if _is_member(each, part)]
            continue
        fields = [
            field for each in sections for name, field in each.model_fields.items() if part in (name, field.alias)
        ]
        if fields:
            sections = [inner for field in fields for inner in _sections_in(field.annotation)]
        elif sections and isinstance(part, str):
            continue
        keys.append(str(part))
    return keys, sections


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for each in get_args(annotation) for inner in _sections_in(each)]


def _is_member(section: type[BaseModel], tag: Any) -> bool:
    return any(tag in get_args(field.annotation) for field in section.model_fields.values())
