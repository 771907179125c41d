"""Sections critique and judge of params, and what is said there of a model behind a server."""

import ipaddress
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from lvlmva_core.regions import Overlap, Overlay
from lvlmva_core.settings import Count, NonNegative, Positive, Seed, Settings, Share

_CREDENTIALS = ("api_key", "apikey", "api-key", "authorization", "secret", "password")
_CREDENTIALS_OF_ADDRESSES = ("key", "token", "sig", "signature", "code")  # of a query; in a body they mean other things

# What changes the price, the transport or the bookkeeping of an answer, but not what is asked: outside a call's key.
TRANSPORT = (
    "service_tier",
    "user",
    "safety_identifier",
    "metadata",
    "store",
    "prompt_cache_key",
    "prompt_cache_retention",
)
TIERS = ("auto", "default", "flex", "priority", "scale")  # values of service_tier that records may have been asked with


def _is_credential(name: str) -> bool:
    return any(word in name.lower() for word in _CREDENTIALS)


def _keys_within(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(key) for key in value] + [key for inner in value.values() for key in _keys_within(inner)]
    return [key for inner in value for key in _keys_within(inner)] if isinstance(value, list) else []


def is_loopback_url(url: str) -> bool:
    """Whether an address is this machine's, by name or number."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_credentials(url: str) -> str:
    names = [name for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)]
    bad = [name for name in names if _is_credential(name) or name.lower() in _CREDENTIALS_OF_ADDRESSES]
    if bad:
        raise ValueError(f"base_url: {bad[0]} looks like a credential; name its variable in api_key_variable")
    return url


class Endpoint(Settings):
    """A model behind an OpenAI-compatible server. What is sent is part of a call's key; the rest is not.

    Only base_url and model have to be said, and the variable with the API key (or null) of a host that is not this
    machine. Prices that are null are unknown: free on this machine; elsewhere only max_calls can hold.
    """

    base_url: Annotated[
        str, Field(pattern=r"^https?://[^\s/?#@]+(:\d+)?(/[^\s?#]*)?(\?\S*)?$"), AfterValidator(_without_credentials)
    ]
    model: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(min_length=1)] = "1"
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*_API_KEY$")] | None = None
    token_limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    token_limit: Count = 1200
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = 0.0
    seed: Seed | None = None
    image_detail: Literal["auto", "low", "high"] | None = None
    extra_body: dict[str, Any] = Field(default_factory=dict)
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    without_capacity: Literal["wait", "standard"] = "wait"
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    timeout_s: Positive = 180.0
    retries: Annotated[int, Field(ge=0, le=20)] = 6
    max_wait_s: Positive = 900.0
    usd_per_million_input_tokens: NonNegative | None = None
    usd_per_million_output_tokens: NonNegative | None = None
    tier_usd_per_million_input_tokens: NonNegative | None = None
    tier_usd_per_million_output_tokens: NonNegative | None = None
    batch_usd_per_million_input_tokens: NonNegative | None = None
    batch_usd_per_million_output_tokens: NonNegative | None = None
    max_calls: Annotated[int, Field(ge=0)] = 1000
    max_cost_usd: NonNegative = 5.0
    allow_upload: bool = False
    allow_unhydrated: bool = False

    @model_validator(mode="after")
    def _extra_body_is_plain(self) -> "Endpoint":
        own = {"model", "messages", "response_format", "stream", "n", self.token_limit_name, "temperature", "seed"}
        for key in self.extra_body:
            if key in own:
                raise ValueError(f"extra_body.{key} has a key of its own or is set by the stage; remove it there")
        dearer = self.service_tier == "priority" and self.tier_usd_per_million_input_tokens is None
        if dearer and self.usd_per_million_input_tokens:
            raise ValueError("service_tier 'priority' costs more: say what, in tier_usd_per_million_input_tokens")
        if self.service_tier is not None and "service_tier" in self.extra_body:
            raise ValueError("extra_body.service_tier and service_tier are both there; remove it from extra_body")
        for key in _keys_within(self.extra_body):
            if _is_credential(key):
                raise ValueError(f"extra_body: {key} looks like a credential; name its variable in api_key_variable")
        return self

    @model_validator(mode="after")
    def _other_hosts_say_their_key(self) -> "Endpoint":
        if not is_loopback_url(self.base_url) and "api_key_variable" not in self.model_fields_set:
            raise ValueError(
                "endpoint.api_key_variable is missing: name the environment variable with the API key "
                "(e.g. OPENAI_API_KEY), or null if this host needs none"
            )
        return self


Folder = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class Cascade(Settings):
    """Which samples the last of several critics, the expensive one, is asked about; its answers alone decide there.

    disagreement: those whose other answers give a region different verdicts, or of which one is missing.
    reliance_above: those with a region that holds more than this share of the positive attribution; null: not asked.
    """

    disagreement: bool = True
    reliance_above: Share | None = None


class Several(Settings):
    """More than one answer (an extension).

    critics: further critics, each a section like this one, with the prompts of this one. least_answers: usable answers
    that a sample needs; null: all that it was asked for.

    independent_at_most: regions whose exchange (stage exchange) moves the true class's logit by at most this share of
    its typical size get no critic and are not rejected; null: all are asked about.
    """

    prompts: Folder
    critics: list["Critique"] = Field(default_factory=list)
    least_answers: Count | None = None
    cascade: Cascade | None = None
    independent_at_most: NonNegative | None = None

    @model_validator(mode="before")
    @classmethod
    def _further_critics_share_the_prompts(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("critics"), list):
            return content
        for number, each in enumerate(content["critics"]):
            for key in ("prompts", "critics", "least_answers", "cascade", "independent_at_most"):
                if isinstance(each, dict) and key in each:
                    raise ValueError(f"critics[{number}].{key} belongs to the section critique itself; remove it there")
        shared = {"prompts": content.get("prompts")}
        critics = [{**each, **shared} if isinstance(each, dict) else each for each in content["critics"]]
        return {**content, "critics": critics}

    @model_validator(mode="after")
    def _answers_are_enough(self) -> "Several":
        asked = [each.answers() for each in self.all_critics()]
        if self.least_answers is not None and self.least_answers > sum(asked):
            raise ValueError(f"least_answers = {self.least_answers}, but {sum(asked)} answers are asked for")
        if self.cascade is None:
            return self
        if not self.critics:
            raise ValueError("cascade needs a further critic in `critics`, the expensive one, which comes last")
        if self.cascade.disagreement and sum(asked[:-1]) < 2 and self.cascade.reliance_above is None:
            raise ValueError("cascade: one answer cannot disagree; set samples: 2 or more, or cascade.reliance_above")
        if not self.cascade.disagreement and self.cascade.reliance_above is None:
            raise ValueError("cascade asks about no sample; set disagreement or reliance_above")
        return self

    def answers(self) -> int:
        """How many answers this critic gives to a sample."""
        return getattr(self, "samples", 1)

    def all_critics(self) -> list[Any]:
        """This critic and the further ones, in order."""
        return [self, *self.critics]

    def first_calls(self) -> int:
        """Calls to critics that every sample gets, a cascade's last critic left out."""
        critics = self.all_critics() if self.cascade is None else self.all_critics()[:-1]
        return sum(each.answers() for each in critics)

    def one_answer(self) -> bool:
        """Whether a sample gets one answer, as in the paper."""
        return self.answers() == 1 and not self.critics


class StandInCritic(Several):
    """A critic without a model that looks at picture and regions only: a name in `lvlmva_core.lvlm.offline.CRITICS`.

    prompts: folder of prompts/ (which DVC tracks whoever criticises).
    """

    critic: str

    @model_validator(mode="after")
    def _is_known(self) -> "StandInCritic":
        from lvlmva_core.lvlm.offline import CRITICS

        if self.critic not in CRITICS:
            known = ", ".join(name for name in {**CRITICS, **_CRITICS} if name)
            raise ValueError(f"no critic '{self.critic}'; known: {known}")
        return self


class OracleCritic(StandInCritic):
    """The critic that knows the true masks, with errors at set rates.

    errors: which verdicts are wrong: drawn "independent" of each other; "by_class": all of some classes, none of the
    others'; or those on "small_regions" or "large_regions", of relevant and of spurious ones alike.
    """

    critic: Literal["oracle"]
    oracle_rejects: Literal["spurious_feature", "off_object"] = "spurious_feature"
    overlap: Overlap = "half_of_feature"
    false_positive_rate: Share = 0.0
    false_negative_rate: Share = 0.0
    errors: Literal["independent", "by_class", "small_regions", "large_regions"] = "independent"
    seed: Seed = 0


class DetectorCritic(Several):
    """A trained detector of one thing (`lvlmva_core.lvlm.detectors`; an extension): no vision-language model."""

    critic: str


class TextCritic(DetectorCritic):
    """Rejects regions that hold text (extra `ocr`).

    side: what the picture's larger side is enlarged to before it is looked at. least_probability: of a piece of text.
    overlap: "half_of_feature", a region is text that holds half of a piece or more; "any": that holds a pixel of it.
    """

    critic: Literal["text"]
    side: Annotated[int, Field(ge=32, le=4096)] = 640
    least_probability: Share = 0.4
    overlap: Literal["any", "half_of_feature"] = "half_of_feature"


class ConceptCritic(DetectorCritic):
    """Rejects regions in which an ImageNet classifier sees a thing.

    concepts: names of ImageNet's classes. weights: file of EfficientNet-Lite0's (docs/data.md). look: "alone", at the
    square around each region; or "without", at the picture with the region filled. at_least: log-odds, or their fall,
    from which a region is rejected, in nats.
    """

    critic: Literal["concept"]
    concepts: Annotated[list[str], Field(min_length=1)]
    weights: str
    look: Literal["alone", "without"] = "alone"
    at_least: Annotated[float, Field(allow_inf_nan=False)]


class ModelCritic(Several):
    """A vision-language model, or (replay) only what it is known to have said.

    samples: answers to each sample. max_attempts: answers that may be bought for each of them over all runs, until one
    is usable. asked_again: how often
    `lvlmva calls retry` had failed samples asked anew; read by DVC alone.
    """

    critic: Literal["model", "replay"]
    samples: Annotated[int, Field(ge=1, le=32)] = 1
    name_spurious_feature: bool = False
    overlay: Overlay = "grey"
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    max_failed_share: Share = 0.1
    asked_again: Annotated[int, Field(ge=0)] = 0
    endpoint: Endpoint


class _JudgeOfVotes(Settings):
    """votes: what several answers make of a region (an extension): "no" where more than half say so, or all."""

    votes: Literal["majority", "unanimous"] = "majority"


class StandInJudge(_JudgeOfVotes):
    """A judge without a model, which reads the stand-ins' prose: a name in `lvlmva_core.lvlm.offline.JUDGES`."""

    judge: str
    prompts: Folder

    @model_validator(mode="after")
    def _is_known(self) -> "StandInJudge":
        from lvlmva_core.lvlm.offline import JUDGES

        if self.judge not in JUDGES:
            raise ValueError(f"no judge '{self.judge}'; known: {', '.join((*JUDGES, 'model', 'replay'))}")
        return self


class ModelJudge(_JudgeOfVotes):
    """A language model, or (replay) only what it is known to have said.

    max_attempts: answers that one run may buy for a sample, until one is valid. asked_again: as for the critic.
    """

    judge: Literal["model", "replay"]
    prompts: Folder
    answer_format: Literal["json_schema", "prompt"] = "json_schema"
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    max_failed_share: Share = 0.1
    asked_again: Annotated[int, Field(ge=0)] = 0
    endpoint: Endpoint


def _choose(key: str, kinds: dict[str, type[Settings]], content: Any) -> Any:
    """A section without the keys that only other kinds read, so that a file may hold what several kinds need."""
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        return content
    kind = kinds.get(content[key], kinds[""])
    if "endpoint" in kind.model_fields and content.get("endpoint") is None:
        section = "critique" if key == "critic" else "judge"
        raise ValueError(f"{key} '{content[key]}' needs {section}.endpoint; take one from presets/critics")
    others = {name for other in kinds.values() for name in other.model_fields} - kind.model_fields.keys()
    return {name: value for name, value in content.items() if name not in others}


def _kind(key: str, kinds: dict[str, type[Settings]], content: Any) -> str:
    name = content.get(key) if isinstance(content, dict) else getattr(content, key, None)
    return name if isinstance(name, str) and name in kinds else ""


_CRITICS: dict[str, type[Settings]] = {
    "": StandInCritic,
    "oracle": OracleCritic,
    "text": TextCritic,
    "concept": ConceptCritic,
    "model": ModelCritic,
    "replay": ModelCritic,
}
_JUDGES: dict[str, type[Settings]] = {"": StandInJudge, "model": ModelJudge, "replay": ModelJudge}

# A stand-in without settings of its own, the oracle, a detector, or a model. Keys that only another kind reads may
# stand there too, so that a critic can be exchanged by one key; they are not read.
Critique = Annotated[
    Annotated[StandInCritic, Tag("")]
    | Annotated[OracleCritic, Tag("oracle")]
    | Annotated[TextCritic, Tag("text")]
    | Annotated[ConceptCritic, Tag("concept")]
    | Annotated[ModelCritic, Tag("model")]
    | Annotated[ModelCritic, Tag("replay")],
    Discriminator(lambda content: _kind("critic", _CRITICS, content)),
    BeforeValidator(lambda content: _choose("critic", _CRITICS, content)),
]
Judge = Annotated[
    Annotated[StandInJudge, Tag("")] | Annotated[ModelJudge, Tag("model")] | Annotated[ModelJudge, Tag("replay")],
    Discriminator(lambda content: _kind("judge", _JUDGES, content)),
    BeforeValidator(lambda content: _choose("judge", _JUDGES, content)),
]

for _section in (StandInCritic, OracleCritic, TextCritic, ConceptCritic, ModelCritic):
    _section.model_rebuild()


def is_detector(name: str) -> bool:
    """Whether a critic, as records name it, is a trained detector of one thing."""
    return issubclass(_CRITICS.get(name, Settings), DetectorCritic)
