"""params.yaml as typed sections, one per stage; the only place that reads the file."""

import difflib
import importlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from lvlmva.engines import Execution
from lvlmva_core.align_settings import UNUSED, AlignSettings, SharedAlignSettings
from lvlmva_core.attribution_methods import AttributionMethod
from lvlmva_core.datasets.registry import Prepare
from lvlmva_core.errors import InputError
from lvlmva_core.exchange_settings import Exchange
from lvlmva_core.lvlm.settings import Critique, Judge
from lvlmva_core.methods import METHODS
from lvlmva_core.outputs import SUBJECT
from lvlmva_core.regions import Overlap
from lvlmva_core.segmenters import Segmenter
from lvlmva_core.settings import Choice, Count, Seed, Settings, Share
from lvlmva_core.train_settings import Train

EXECUTION = "execution"  # the section that belongs to a machine, not to an experiment
AnySettings = TypeVar("AnySettings", bound=Settings)


class Compute(Settings):
    """Where tensors live, on how many CPU threads, in how many processes a model is trained (`lvlmva.torchrun`): all of
    it changes the last bits of results. Each process has the threads, and a CUDA device, for itself."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
    threads: Count
    processes: Count = 1


class Rank(Settings):
    """Which training samples are explained and corrected; the strategy "mixed" is an extension."""

    strategy: Literal["low_entropy", "high_entropy", "random", "mixed"]
    n_samples: Count
    stratify: bool
    seed: Seed


class Mask(Settings):
    """How verdicts become masks.

    weights: "verdicts": a region that was judged "no" is masked whole; "votes": each region by the share of several
    answers that reject it (an extension). attribution_kept: share of a region's positive attribution that its mask
    holds, in the pixels where it is highest (an extension); null: the whole region.
    """

    max_failed_share: Share
    weights: Literal["verdicts", "votes"] = "verdicts"
    attribution_kept: Annotated[float, Field(gt=0, le=1)] | None = None


class Explain(Settings):
    """What is explained anew after alignment, for the report.

    panel_samples: in the figure, those of which most is masked. gallery_samples: further ones, for the page's gallery.
    """

    panel_samples: Annotated[int, Field(ge=8, le=64)]
    gallery_samples: Annotated[int, Field(ge=0)] = 0


class Report(Settings):
    """How large the page is.

    gallery_samples: of the alignment set, that it shows at most. max_megabytes: of the file; pictures become smaller
    until it holds.
    """

    gallery_samples: Count = 1000
    max_megabytes: Annotated[float, Field(ge=2.0, le=200.0)] = 20.0

    def limits(self) -> tuple[int, int]:
        """Samples, and bytes of the page."""
        return self.gallery_samples, int(self.max_megabytes * 1e6)


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
    attribute: AttributionMethod
    segment: Segmenter
    exchange: Exchange = Exchange()
    critique: Critique
    judge: Judge
    mask: Mask
    align: SharedAlignSettings
    methods: dict[str, dict[str, Any]]
    retrained: dict[str, dict[str, Any]]
    explain: Explain
    evaluate: Evaluate
    compare: Compare
    report: Report = Report()
    execution: Execution = Execution()

    def chosen_methods(self) -> dict[str, Settings]:
        """Settings of each method after inheritance; a method that states rrr_lambda takes over no grid of them.

        Raises:
            InputError: a method that does not exist or stands in the wrong mapping, or a key that is wrong in it.
        """
        chosen: dict[str, Settings] = {}
        inherited = self.align.model_dump()
        for name, own in self.methods.items():
            _check_method("methods", name, "penalty")
            settings = _align_settings(name, inherited, own)
            if settings.batch()[0] > self.rank.n_samples:
                raise InputError(
                    f"methods.{name}: alignment_batch = {settings.alignment_batch} is larger than the alignment set "
                    f"(rank.n_samples = {self.rank.n_samples}); lower it in align"
                )
            chosen[name] = settings
        if self.align.counterexamples and all(METHODS[name].correction == "rrr" for name in self.methods):
            raise InputError(
                "align.counterexamples: no method makes them; remove it, or add lvlm_va_counterexamples: {} to methods"
            )
        trained = self.train.model_dump()
        known = {**{key: value for key, value in trained.items() if value is not None}, "seeds": self.align.seeds}
        if self.align.selection:
            known["selection"] = {**self.align.selection.model_dump(), "rrr_lambdas": []}  # there is no λ here
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

    def check_weights(self) -> None:
        """Refuse masks weighed by votes where none are cast, or where all shares are 0 or 1.

        Raises:
            InputError: naming what to change.
        """
        if self.mask.weights == "verdicts":
            return
        key, critics, cascade = "mask.weights = 'votes'", self.critique.all_critics(), self.critique.cascade
        if self.critique.one_answer():
            raise InputError(f"{key} needs several answers; set critique.samples or critique.critics, or remove it")
        if self.judge.votes == "unanimous":
            raise InputError(f"{key}: what is rejected by judge.votes 'unanimous' has all votes; set it to majority")
        if cascade is not None and cascade.disagreement and critics[-1].answers() == 1:
            raise InputError(
                f"{key}: in this cascade no vote is split, since its last critic alone decides where others disagree; "
                "give it samples: 2 or more, or remove cascade"
            )

    def check_supervision(self, *, groups: bool, true_masks: bool) -> None:
        """Refuse what needs labels that the data set does not have, before anything is trained for it.

        Args:
            groups: whether it is known which pictures hold the spurious feature. true_masks: whether its mask is known
                in any training picture.

        Raises:
            InputError: naming the method or rule, and what to remove.
        """
        lacking = {
            "groups": None if groups else "group labels (which pictures hold the spurious feature)",
            "true_masks": None if true_masks else "true masks of the spurious feature",
        }
        for name, settings in self.chosen_methods().items():
            section = "methods" if name in self.methods else "retrained"
            if (need := METHODS[name].needs) and lacking[need]:
                raise InputError(
                    f"{section}.{name} needs {lacking[need]}, and the data set has none; "
                    f"remove '{name}' from `{section}`"
                )
            rule = getattr(getattr(settings, "selection", None), "rule", None)
            if rule == "worst_group" and lacking["groups"]:
                raise InputError(
                    f"{section}.{name}: the rule worst_group needs {lacking['groups']}, and the data set has none; "
                    "set it to pseudo_group, which needs none"
                )

    def check_batches(self, n_train: int) -> None:
        """Refuse batches of training pictures that the split train cannot fill, before anybody is paid for masks.

        Raises:
            InputError: naming the key, and the method where it is one's own.
        """
        for name, settings in self.chosen_methods().items():
            batch = getattr(settings, "training_batch", 0)
            if batch > n_train:
                own = "training_batch" in self.methods.get(name, {})
                place = f"methods.{name}.training_batch" if own else "align.training_batch"
                raise InputError(f"{place} = {batch}, the split train has {n_train} pictures; lower it")


def _align_settings(name: str, inherited: dict[str, Any], own: dict[str, Any]) -> AlignSettings:
    """Settings of a method that fine-tunes the base model: what it states, over what it is, over the section `align`.

    Raises:
        InputError: it states what makes it another method, or what its correction has no use for.
    """
    method = METHODS[name]
    if stated := [key for key in UNUSED[method.correction] if key in own]:
        raise InputError(f"methods.{name}: {stated[0]} has no use with correction: {method.correction}; remove it")
    merged = {key: value for key, value in inherited.items() if key not in UNUSED[method.correction]}
    fixed = {**method.fixed, "correction": method.correction}
    if method.correction == "counterexamples":
        fixed["rrr_lambda"] = 0.0
    merged = {**merged, **fixed, **own}
    if "rrr_lambda" in {**fixed, **own} and "selection" not in own and merged["selection"]:
        merged["selection"] = {**merged["selection"], "rrr_lambdas": []}
    settings = _validated(AlignSettings, merged, f"methods.{name}")
    if "rrr_lambda" in fixed and settings.candidates() != [fixed["rrr_lambda"]]:
        raise InputError(f"methods.{name}: rrr_lambda must be {fixed['rrr_lambda']:g}; remove it")
    if settings.correction != method.correction:
        raise InputError(f"methods.{name}: correction must be {method.correction}; remove it")
    return settings


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
    return params_of(content, path)


def params_of(content: Any, path: Path) -> Params:
    """What `load_params` makes of the content of a file. path: what messages begin with."""
    try:
        params = _validated(Params, content, "")
        params.chosen_methods()
        params.check_weights()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return params


def sections_lacking(path: Path) -> list[str]:
    """Sections that have defaults and do not stand in params.yaml: the stages could go on, but DVC, which follows them,
    refuses. `execution` is followed by nobody."""
    from ruamel.yaml import YAML

    content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return [name for name in Params.model_fields if name not in {*content, EXECUTION}]


def prompts_folder(prompts: Path, key: str, name: str) -> Path:
    """The folder of prompts that a key of params names. Raises InputError where there is none."""
    folder = prompts / name
    if not folder.is_dir():
        known = ", ".join(sorted(each.name for each in prompts.glob("*/"))) or "none"
        raise InputError(
            f"{key} = '{name}': no folder {folder} (there: {known}); name one of these, or copy prompts/generic to it"
        )
    return folder


def _explain(error: ValidationError, section: type[Settings], place: str) -> str:
    """Say what the first error of a validation is, in one line that names the key and the remedy."""
    first = error.errors(include_url=False, include_context=True)[0]
    path, known = _place_of(section, first["loc"])
    key = (place + ".".join(path)).rstrip(".") or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], known, n=1)
        remedy = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {remedy}{more}"
    if first["type"] == "union_tag_invalid":  # the key that says which of several kinds of section this is
        tag = first["ctx"]["discriminator"].split(" | ")[-1].strip("'")  # an alias comes last
        tags = [name.strip("'") for name in first["ctx"]["expected_tags"].split(", ")]
        return f"'{key}.{tag}' = {first['ctx']['tag']!r}: expected one of {', '.join(tags)}{more}"
    if first["type"] == "union_tag_not_found":
        tag = first["ctx"]["discriminator"].split(" | ")[-1].strip("'")  # an alias comes last
        return f"key '{key}.{tag}' is missing; add it (see presets/ for a complete file){more}"
    if first["type"] == "missing":
        return f"key '{key}' is missing; add it (see presets/ for a complete file){more}"
    message = first["msg"].removeprefix("Value error, ")
    # a whole section: its content would bury what is wrong; what stands in an endpoint may hold a secret
    if isinstance(first["input"], dict) or not _NOT_SHOWN.isdisjoint(path):
        return f"'{key}': {message}{more}"
    return f"'{key}' = {first['input']!r}: {message[0].lower()}{message[1:]}{more}"


_NOT_SHOWN = {"base_url", "api_key_variable", "extra_body"}


def _place_of(section: type[Settings], location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The keys that lead to a place, without the tag of a section that comes in kinds, and the keys known beside it."""
    path: list[str] = []
    beside: list[str] = []
    kinds: list[Any] = [section]
    tagged = False
    for part in location:
        if tagged:
            tagged = False
            kinds = [kind for kind in kinds if part in _names_of(kind)] or kinds
            continue
        path.append(str(part))
        beside = sorted({name for kind in kinds for name in _keys_of(kind)})
        found = [kind.model_fields[part].annotation for kind in kinds if part in kind.model_fields]
        members = [inner for each in found for inner in _models_in(each)]
        tagged = len(found) == 1 and len(members) > 1
        kinds = members
    return path, beside


def _names_of(model: Any) -> list[Any]:
    """Values of the key that tells which kind of section this is, e.g. `prepare.dataset`."""
    return [value for field in model.model_fields.values() for value in get_args(field.annotation)]


def _keys_of(model: Any) -> list[str]:
    if issubclass(model, Choice):
        return list(model.known_keys())
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
