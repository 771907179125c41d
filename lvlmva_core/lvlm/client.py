"""Asking a model over HTTP: every answer from the store if it is there, else bought within a budget and kept.

The openai client speaks the protocol; what it leaves open is done here: a limit on the whole of an answer's time,
bodies that are no JSON or an error under status 200, waits that a server asks for, and what is worth asking again.
"""

import asyncio
import email.utils
import ipaddress
import json
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.calls import KIND, Call, CallStore, Record, make_record
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.store import canonical_json

T = TypeVar("T")
S = TypeVar("S")

FINISHED = ("stop", "end_turn", "eos", None)  # what servers call an answer that is complete
FIRST_WAIT_S = 0.5
LONGEST_BACKOFF_S = 30.0
POLL_S = 0.05
CHARACTERS_PER_TOKEN = 4  # of English prose; for estimates only
_NO_KEY = "none"
_USAGE = ("prompt_tokens", "completion_tokens")
_HEADERS_SENT = {
    "host",
    "accept",
    "accept-encoding",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "transfer-encoding",
    "user-agent",
}


class CallFailedError(Exception):
    """One call has no usable answer; the others go on. The message is the reason that is recorded."""


class BudgetSpentError(InputError):
    """The next call would go over max_calls or max_cost_usd; what was bought is kept."""


class NotInStoreError(Exception):
    """Replay: the answer is not in the store."""


class _AgainError(Exception):
    """An attempt failed in a way that may pass. wait_s: how long the server asks to wait, if it says so."""

    def __init__(self, reason: str, *, wait_s: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.unreachable = unreachable


def sampling_parameters(endpoint: Endpoint) -> dict[str, Any]:
    """The fields of a request's body besides model and messages. What is null in params is not sent."""
    parameters: dict[str, Any] = {endpoint.token_limit_name: endpoint.token_limit, **endpoint.extra_body}
    if endpoint.temperature is not None:
        parameters["temperature"] = endpoint.temperature
    if endpoint.seed is not None:
        parameters["seed"] = endpoint.seed
    return parameters


def model_name(endpoint: Endpoint | None) -> str:
    """What records call the model: its name and revision."""
    assert endpoint is not None
    return f"{endpoint.model} ({endpoint.revision})"


def host_of(endpoint: Endpoint) -> str:
    """Scheme, host and port: all that is ever recorded or shown of an address."""
    parts = urlsplit(endpoint.base_url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def is_loopback(endpoint: Endpoint) -> bool:
    """Whether the endpoint is on this machine, by name or address."""
    host = urlsplit(endpoint.base_url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_endpoint(endpoint: Endpoint, environment: Mapping[str, str], *, pictures: bool) -> str:
    """Check what can be checked before anything is sent, and look up the API key ("" where none is needed).

    Raises:
        InputError: the variable is not set, pictures would leave the machine without `allow_upload`, or a key would
            travel unencrypted.
    """
    host = host_of(endpoint)
    if pictures and not endpoint.allow_upload and not is_loopback(endpoint):
        raise InputError(
            f"pictures would be sent to {host}, but allow_upload is false; set it to true in the endpoint if the "
            "pictures may leave this machine"
        )
    if endpoint.api_key_variable is None:
        return ""
    if host.startswith("http://") and not is_loopback(endpoint):
        raise InputError(f"{host}: an API key would travel unencrypted; use https, or a tunnel to localhost")
    key = environment.get(endpoint.api_key_variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {endpoint.api_key_variable} is not set; export it with your API key"
        )
    return key


@dataclass(frozen=True)
class Estimate:
    """What a run would take: calls in the store, calls to buy, and the tokens and cost of these at most."""

    hits: int
    new_calls: int
    input_tokens: int
    output_tokens_at_most: int
    cost_usd_at_most: float


def estimate_calls(endpoint: Endpoint, *, hits: int, tokens: Sequence[int]) -> Estimate:
    """Sum up. tokens: estimated input tokens of each call to buy."""
    most = len(tokens) * endpoint.token_limit
    return Estimate(hits, len(tokens), sum(tokens), most, cost_usd(endpoint, sum(tokens), most))


def estimate_input_tokens(call: Call) -> int:
    """Roughly the tokens of what is sent: four characters a token; a picture 85, and 170 per 512-pixel tile unless
    its detail is low (how OpenAI counts for GPT-4o; other models differ)."""
    tokens = math.ceil(call.text_size() / CHARACTERS_PER_TOKEN)
    for picture in call.pictures():
        height, width = picture.pixels.shape[:2]
        tiles = math.ceil(height / 512) * math.ceil(width / 512)
        tokens += 85 if picture.detail == "low" else 85 + 170 * tiles
    return tokens


def cost_usd(endpoint: Endpoint, input_tokens: int, output_tokens: int) -> float:
    """Cost at the prices in params, US dollars."""
    return (
        input_tokens * endpoint.usd_per_million_input_tokens + output_tokens * endpoint.usd_per_million_output_tokens
    ) / 1e6


def backoff_s(attempt: int, asked_s: float | None, chance: float) -> float:
    """Seconds to wait before the next attempt.

    Args:
        attempt: failures so far, 1 or more. asked_s: what the server asked for; never less than this is waited.
        chance: in [0, 1); spreads the clients out over the upper half of the interval.
    """
    longest = min(LONGEST_BACKOFF_S, FIRST_WAIT_S * 2.0 ** min(attempt - 1, 30))
    own = longest * (1 + chance) / 2
    return own if asked_s is None else asked_s + own * 0.1


@dataclass
class Spent:
    """What was bought in this run."""

    calls: int = 0
    hits: int = 0
    attempts: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


@dataclass(frozen=True)
class Question:
    """A call that is built only when it has to be sent. sample: whom it is about, for messages and local records."""

    key: str
    build: Callable[[], Call]
    sample: str


@dataclass
class Client:
    """Answers to calls, from the store or from an endpoint. One client belongs to one event loop.

    section: of params.yaml, for messages ("critique.endpoint").
    prepare: called once, before the first call that the store lacks; may fill the store, says the API key ("" where
        none is needed), or raises InputError where nothing may be sent.
    replay: never send.
    """

    endpoint: Endpoint
    section: str
    calls: CallStore
    prepare: Callable[[], str]
    replay: bool
    spent: Spent = field(default_factory=Spent)
    _prepared: bool = False
    _api_key: str = ""
    _openai: Any = None
    _under_way: int = 0
    _reserved_usd: float = 0.0
    _resume_at: float = 0.0

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._openai is not None:
            await self._openai.close()

    def _prepare_once(self) -> None:
        if not self._prepared:
            self._api_key = self.prepare()
            self._prepared = True

    def _connect(self) -> None:
        import httpx2
        import openai

        # the client's logger can print whole requests
        logging.getLogger("openai").setLevel(logging.WARNING)
        limits = httpx2.Limits(max_connections=self.endpoint.concurrency)
        http = httpx2.AsyncClient(
            # a redirect would carry pictures to a host that nobody agreed to
            follow_redirects=False,
            limits=limits,
            timeout=httpx2.Timeout(self.endpoint.timeout_s),
            trust_env=not is_loopback(self.endpoint),
            event_hooks={"request": [self._only_our_headers]},
        )
        self._openai = openai.AsyncOpenAI(
            api_key=self._api_key or _NO_KEY,
            base_url=self.endpoint.base_url,
            max_retries=0,
            http_client=http,
        )
        self._random = random.Random()

    async def _only_our_headers(self, request: Any) -> None:
        # the openai client adds headers from the environment and facts about this machine
        for name in list(request.headers):
            if name.lower() not in _HEADERS_SENT:
                del request.headers[name]
        request.headers["authorization"] = f"Bearer {self._api_key or _NO_KEY}"

    async def ask(self, question: Question) -> Record:
        """The record of a call: from the store, else bought and kept before it is returned.

        Raises:
            NotInStoreError: in replay. CallFailedError: there is no usable answer.
            InputError: nothing can be bought with these params; BudgetSpentError: or not any more.
        """
        key = question.key
        record = self.calls.get(key)
        if record is None:
            self._prepare_once()
            if not self.replay:
                return await self._buy_alone(question)
            record = self.calls.get(key)
        if record is None:
            raise NotInStoreError(question.sample)
        self.spent.hits += 1
        return record

    async def _buy_alone(self, question: Question) -> Record:
        """Buy under the key's lock, unless the answer came into the store meanwhile."""
        key = question.key
        descriptor = self.calls.store.acquire(KIND, key, wait=False)
        while descriptor is None:
            await asyncio.sleep(POLL_S)
            descriptor = self.calls.store.acquire(KIND, key, wait=False)
        try:
            record = self.calls.get(key)
            if record is not None:
                self.spent.hits += 1
                return record
            if self._openai is None:
                self._connect()
            return await self._buy(question.build(), key, question.sample)
        finally:
            self.calls.store.release(KIND, key, descriptor)

    async def _buy(self, call: Call, key: str, sample: str) -> Record:
        tokens = estimate_input_tokens(call)
        worst = cost_usd(self.endpoint, tokens, self.endpoint.token_limit)
        await self._wait_for_budget(worst)
        self.spent.calls += 1
        self._under_way += 1
        self._reserved_usd += worst
        try:
            response, attempts = await self._attempt_repeatedly(call.body())
            self._book(response.get("usage"), tokens)
            reason = why_unusable(response)
            meta = {
                "created": int(time.time()),
                "endpoint": host_of(self.endpoint),
                "attempts": attempts,
                "sample": sample,
                "section": self.section,
            }
            if reason is not None:
                failure = {**meta, "key": key, "model": call.model, "reason": reason, "response": response}
                self.calls.note_failure(failure)
                raise CallFailedError(reason)
            record = make_record(call, response)
            await asyncio.shield(asyncio.to_thread(self.calls.put, record, meta))
            return record
        except _AgainError as error:
            reason = f"{error} ({1 + self.endpoint.retries} attempts)"
            self.calls.note_failure({"key": key, "model": call.model, "sample": sample, "reason": reason})
            if error.unreachable:
                raise InputError(f"{host_of(self.endpoint)}: {reason}; see {self.section}.base_url") from None
            raise CallFailedError(reason) from None
        finally:
            self._under_way -= 1
            self._reserved_usd = self._reserved_usd - worst if self._under_way else 0.0

    async def _wait_for_budget(self, worst: float) -> None:
        """Let a call start only if the budget holds even where all calls under way cost what they may at most."""
        limits = self.endpoint
        while self._under_way and self.spent.cost_usd + self._reserved_usd + worst > limits.max_cost_usd:
            await asyncio.sleep(POLL_S)
        if self.spent.calls >= limits.max_calls:
            self._stop(f"max_calls = {limits.max_calls}", "max_calls")
        if self.spent.cost_usd + worst > limits.max_cost_usd:
            self._stop(f"the next call may go beyond max_cost_usd = {limits.max_cost_usd}", "max_cost_usd")

    def _stop(self, reason: str, name: str) -> None:
        raise BudgetSpentError(
            f"stopped after {self.spent.calls} new calls and {self.spent.cost_usd:.4f} USD: {reason}; all answers are "
            f"kept; raise {self.section}.{name} and repeat the command to go on"
        )

    def _book(self, usage: Any, estimated_tokens: int) -> None:
        """Add what an answer took; where the server does not say, as much as it may have been."""
        counted = [usage.get(name) if isinstance(usage, dict) else None for name in _USAGE]
        assumed = (estimated_tokens, self.endpoint.token_limit)
        inputs, outputs = (
            n if isinstance(n, int) and n >= 0 else most for n, most in zip(counted, assumed, strict=True)
        )
        self.spent.input_tokens += inputs
        self.spent.output_tokens += outputs
        self.spent.cost_usd += cost_usd(self.endpoint, inputs, outputs)

    async def _attempt_repeatedly(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """A response, and how many attempts it took."""
        failures = 0
        while True:
            await self._wait_until_resumed()
            self.spent.attempts += 1
            try:
                return await self._attempt(body), failures + 1
            except _AgainError as error:
                failures += 1
                if error.wait_s is not None and error.wait_s > self.endpoint.max_wait_s:
                    raise InputError(
                        f"{host_of(self.endpoint)} asks to wait {error.wait_s:.0f} s, longer than {self.section}."
                        f"max_wait_s = {self.endpoint.max_wait_s:.0f}; all answers are kept; repeat the command later"
                    ) from None
                if failures > self.endpoint.retries:
                    raise
                if error.wait_s is not None:  # a rate limit holds for all calls, not for this one
                    self._resume_at = max(self._resume_at, time.monotonic() + error.wait_s)
                await asyncio.sleep(backoff_s(failures, error.wait_s, self._random.random()))

    async def _wait_until_resumed(self) -> None:
        while (pause := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    async def _attempt(self, body: dict[str, Any]) -> dict[str, Any]:
        """One request. Raises _AgainError, CallFailedError or InputError, none of which holds the API key."""
        import httpx2
        import openai

        try:
            # the client's timeout counts from byte to byte; a body that dribbles would outlive it
            async with asyncio.timeout(self.endpoint.timeout_s):
                # as `chat.completions.create` does it, but for the raw response and without a walk over the pictures
                answer = await self._openai.post("/chat/completions", body=body, cast_to=httpx2.Response)
        except (TimeoutError, openai.APITimeoutError):
            raise _AgainError(f"no answer within timeout_s = {self.endpoint.timeout_s:g}") from None
        except openai.APIStatusError as error:
            raise self._classify(error.status_code, error.response.text, error.response.headers) from None
        except openai.APIConnectionError as error:
            raise _AgainError(
                f"no connection ({self._safe(str(error.__cause__ or error))})", unreachable=True
            ) from None
        if answer.status_code != 200:
            raise self._classify(answer.status_code, answer.text, answer.headers)
        return self._parse(answer.text)

    def _parse(self, text: str) -> dict[str, Any]:
        """A response under status 200, with the API key removed wherever the server put it."""
        try:
            response = json.loads(self._remove_key(text))
            canonical_json(response)  # what cannot be kept (NaN, half of a character) is no answer
        except (ValueError, RecursionError):
            if text.lstrip()[:1] == "<":
                raise _AgainError(
                    "a web page came back instead of JSON; is the path of base_url right?", unreachable=True
                ) from None
            raise _AgainError("the answer is no JSON, or was cut off") from None
        if not isinstance(response, dict):
            raise _AgainError("the answer is no JSON object")
        if response.get("error"):
            raise self._classify(200, text, {})
        choices = response.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _AgainError("the answer has no choices")
        if not isinstance(choices[0].get("message"), dict):
            raise _AgainError("the answer has no message")
        return response

    def _classify(self, status: int, text: str, headers: Mapping[str, str]) -> Exception:
        """What an error of the server means: try again, this call only, or the whole run."""
        message, code = _error_of(text)
        said = self._safe(message) or f"HTTP {status}"
        host = host_of(self.endpoint)
        where = self.section
        if 300 <= status < 400:
            return InputError(f"{host} redirects to another address; set {where}.base_url to the final one")
        if code == "insufficient_quota" or status == 402:
            return InputError(f"{host}: the account has no credit left ({said}); all answers are kept; top it up")
        if code in ("content_filter", "content_policy_violation"):
            return CallFailedError(f"refused by the server's content filter ({said})")
        if status in (408, 409, 429) or status >= 500 or status == 200:
            return _AgainError(f"HTTP {status}: {said}", wait_s=_asked_wait_s(headers, time.time()))
        if status in (401, 403):
            return InputError(
                f"{host} refuses the API key ({said}); see the variable {self.endpoint.api_key_variable} and "
                f"{where}.api_key_variable"
            )
        if status == 404:
            return InputError(
                f"{host} knows no model '{self.endpoint.model}' at this path ({said}); see {where}.model and "
                f"{where}.base_url"
            )
        low = message.lower()
        hint = f"see {where}"
        if "response_format" in low or "json_schema" in low or "schema" in low:
            hint = "set judge.answer_format: prompt to ask for JSON in words only"
        elif "image" in low or "vision" in low or "multimodal" in low:
            hint = f"this model seems to take no pictures; choose another {where}.model"
        elif "max_tokens" in low or "max_completion_tokens" in low:
            hint = f"set {where}.token_limit_name to the other name"
        elif "temperature" in low:
            hint = f"set {where}.temperature: null"
        return InputError(f"{host} refuses the request (HTTP {status}: {said}); {hint}")

    def _remove_key(self, text: str) -> str:
        if not self._api_key:
            return text
        for form in {
            self._api_key,
            json.dumps(self._api_key)[1:-1],
            json.dumps(self._api_key)[1:-1].replace("/", "\\/"),
        }:
            text = text.replace(form, "[API key removed]")
        return text

    def _safe(self, text: str) -> str:
        return " ".join(self._remove_key(text).split())[:300]


def why_unusable(response: Mapping[str, Any]) -> str | None:
    """Why an answer is not served as one, or None: a refusal, a filter, the token limit, or no text."""
    choice = response["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    if message.get("refusal"):
        return "the model refused"
    if finish == "length":
        return "cut off at the token limit; raise token_limit"
    if finish == "content_filter":
        return "stopped by the content filter"
    if finish not in FINISHED:
        return f"finish reason '{finish}'"
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return "empty answer"
    return None


async def map_calls(
    items: Sequence[T], work: Callable[[T], Awaitable[S]], concurrency: int, done: Callable[[], None]
) -> tuple[list[S | None], InputError | None]:
    """Run `work` over items, at most `concurrency` at once; the first InputError ends the run.

    Work that is under way then is finished, since it may be paid for already.

    Args:
        done: called after each item.

    Returns:
        (results in the order of items, None where not reached; the error that ended the run, or None).
    """
    results: list[S | None] = [None] * len(items)
    waiting = iter(range(len(items)))
    stopped: list[InputError] = []

    async def worker() -> None:
        for place in waiting:
            if stopped:
                return
            try:
                results[place] = await work(items[place])
            except InputError as error:
                stopped.append(error)
                return
            done()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(worker())
    return results, stopped[0] if stopped else None


def _error_of(text: str) -> tuple[str, str]:
    """Message and code of an error body in OpenAI's form, or the text itself."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return ("" if text.lstrip()[:1] == "<" else text[:500]), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:500], ""
    return str(error.get("message", ""))[:500], str(error.get("code") or error.get("type") or "")


def _asked_wait_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a server asks to wait: retry-after-ms, or retry-after as seconds or a date."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * scale
        except ValueError:
            date = email.utils.parsedate_tz(value) if value else None
            seconds = email.utils.mktime_tz(date) - now if date else math.nan
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
