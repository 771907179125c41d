"""What is said of a model behind a server."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lvlmva_core.settings import Count, NonNegative, Positive, Seed, Settings

_CREDENTIALS = ("api_key", "apikey", "api-key", "authorization", "secret", "password")


def _keys_within(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(key) for key in value] + [key for inner in value.values() for key in _keys_within(inner)]
    return [key for inner in value for key in _keys_within(inner)] if isinstance(value, list) else []


class Endpoint(Settings):
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
