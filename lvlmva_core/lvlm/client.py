"""Asking a model over HTTP: every answer from the store if it is there, else bought within a budget and kept.

The openai client speaks the protocol; what it leaves open is done here: a limit on the whole of an answer's time, what
is worth asking again, waits that a server asks for, and which failures concern one call and which all of them.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.budget import Budget, Spent, estimate_input_tokens, is_short
from lvlmva_core.lvlm.calls import KIND, Call, CallStore, Message, Record, answer_text, make_record, said, why_unusable
from lvlmva_core.lvlm.redact import printable, remove_secret
from lvlmva_core.lvlm.replies import (
    FILTERED,
    NO_CAPACITY,
    NO_CREDIT,
    UnreadableError,
    asked_wait_s,
    check_response,
    error_of,
    hint_for,
    read_json,
)
from lvlmva_core.lvlm.settings import TRANSPORT, Endpoint, is_loopback_url
from lvlmva_core.lvlm.shared_calls import SharedCalls

T = TypeVar("T")
S = TypeVar("S")

FIRST_WAIT_S = 0.5
LONGEST_BACKOFF_S = 30.0
DOUBTS_BEFORE = 3  # calls that fail in a way that may concern all, before any succeeded: then the run ends
DOUBTS_AFTER = 10  # the same in a row, once some succeeded
_LONG_WAIT_S = 1e6
_NO_KEY = "none"
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


class UnusableAnswerError(CallFailedError):
    """An answer was paid and is none. text: what it said. bought: in this run, else it came from the store."""

    def __init__(self, reason: str, text: str, *, bought: bool) -> None:
        super().__init__(reason)
        self.text = text
        self.bought = bought


class NotKeptError(InputError):
    """The store could not take an answer that was paid. place: where it is kept instead, or None: it is lost."""

    def __init__(self, message: str, place: str | None) -> None:
        super().__init__(message)
        self.place = place


class NotInStoreError(Exception):
    """Replay: the answer is not in the store."""


class _AgainError(Exception):
    """An attempt failed in a way that may pass.

    wait_s: how long the server asks to wait, if it says so. doubt: what it means if it concerns all calls. no_capacity:
    the tier asked for has none.
    """

    def __init__(
        self, reason: str, *, wait_s: float | None = None, doubt: str | None = None, no_capacity: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.doubt = doubt
        self.no_capacity = no_capacity


class _DoubtError(Exception):
    """The server refused a request: of this call, or of all. The message is for the case that it is of all."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def sampling_parameters(endpoint: Endpoint) -> dict[str, Any]:
    """The fields of a request's body besides model, messages and transport. What is null in params is not sent."""
    extra = {name: value for name, value in endpoint.extra_body.items() if name not in TRANSPORT}
    parameters: dict[str, Any] = {endpoint.token_limit_name: endpoint.token_limit, **extra}
    if endpoint.temperature is not None:
        parameters["temperature"] = endpoint.temperature
    if endpoint.seed is not None:
        parameters["seed"] = endpoint.seed
    return parameters


def transport_parameters(endpoint: Endpoint) -> dict[str, Any]:
    """The fields of a request's body that change price or transport, and not what is asked."""
    own = {} if endpoint.service_tier is None else {"service_tier": endpoint.service_tier}
    return {**{name: value for name, value in endpoint.extra_body.items() if name in TRANSPORT}, **own}


def call_of(
    endpoint: Endpoint, messages: Sequence[Message], index: int, parameters: Mapping[str, Any] | None = None
) -> Call:
    """What asks the model behind an endpoint.

    Args:
        index: 0 for the first answer, then 1, 2, ... parameters: in the place of `sampling_parameters`.
    """
    sent = sampling_parameters(endpoint) if parameters is None else dict(parameters)
    return Call(endpoint.model, endpoint.revision, tuple(messages), sent, index, transport_parameters(endpoint))


def model_name(endpoint: Endpoint) -> str:
    """What records call the model: its name and revision."""
    return f"{endpoint.model} ({endpoint.revision})"


def host_of(endpoint: Endpoint) -> str:
    """Scheme, host and port: all that is ever recorded or shown of an address."""
    parts = urlsplit(endpoint.base_url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def is_loopback(endpoint: Endpoint) -> bool:
    """Whether the endpoint is on this machine, by name or address."""
    return is_loopback_url(endpoint.base_url)


def check_endpoint(endpoint: Endpoint, environment: Mapping[str, str], *, pictures: bool) -> str:
    """Check what can be checked before anything is sent, and look up the API key ("" where none is needed).

    Raises:
        InputError: the variable is not set or holds no key, pictures would leave the machine without `allow_upload`,
            or a key would travel unencrypted.
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
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"the environment variable {endpoint.api_key_variable} holds a character that no API key has (a blank, a "
            "line break, a letter beyond ASCII); copy the key again"
        )
    return key


def open_openai(endpoint: Endpoint, api_key: str) -> Any:
    """An openai client of the endpoint that sends our headers only, follows no redirect and never asks again."""
    import httpx2
    import openai

    async def only_our_headers(request: Any) -> None:
        # the openai client adds headers from the environment and facts about this machine
        for name in list(request.headers):
            if name.lower() not in _HEADERS_SENT:
                del request.headers[name]
        request.headers["authorization"] = f"Bearer {api_key or _NO_KEY}"

    # the client's logger can print whole requests
    logging.getLogger("openai").setLevel(logging.WARNING)
    http = httpx2.AsyncClient(
        # a redirect would carry pictures to a host that nobody agreed to
        follow_redirects=False,
        limits=httpx2.Limits(max_connections=endpoint.concurrency),
        timeout=httpx2.Timeout(endpoint.timeout_s),
        trust_env=not is_loopback(endpoint),
        event_hooks={"request": [only_our_headers], "response": [_as_utf8]},
    )
    return openai.AsyncOpenAI(api_key=api_key or _NO_KEY, base_url=endpoint.base_url, max_retries=0, http_client=http)


def backoff_s(attempt: int, asked_s: float | None, chance: float) -> float:
    """Seconds to wait before the next attempt.

    Args:
        attempt: failures so far, 1 or more. asked_s: what the server asked for; never less than this is waited.
        chance: in [0, 1); spreads the clients out over the upper half of the interval.
    """
    longest = min(LONGEST_BACKOFF_S, FIRST_WAIT_S * 2.0 ** min(attempt - 1, 30))
    own = longest * (1 + chance) / 2
    return own if asked_s is None else asked_s + own * 0.1


def is_under_way(count: int) -> str:
    """What to do about calls that are in a batch already."""
    return (
        f"{count} of the calls to buy are under way in a batch; take its answers in with `lvlmva calls fetch`, or set "
        "LVLMVA_BESIDE_BATCHES=1 to buy them singly as well, at their price"
    )


def _anything(text: str) -> str | None:
    return None


@dataclass(frozen=True)
class Question:
    """A call that is built only when it has to be sent.

    keys: of the call, its own first (`Call.keys`). sample: whom it is about, for messages and local records.
    why_not: why a text is no answer to this question, or None. names: the same in a form that can be kept: an answer
        must hold one of them, if there are any.
    """

    keys: Sequence[str]
    build: Callable[[], Call]
    sample: str
    why_not: Callable[[str], str | None] = _anything
    names: Sequence[str] = ()


@dataclass
class Client:
    """Answers to calls, from the store or from an endpoint. One client belongs to one event loop.

    section: of params.yaml, for messages ("critique.endpoint").
    prepare: called once, before the first call that the store lacks; may fill the store, says the API key ("" where
        none is needed), or raises InputError where nothing may be sent.
    replay: never send. save: keeps a record that was paid where the store cannot be written; says where, or raises
        InputError.
    bought: keys of the answers that were bought in this run; beyond: of those beyond unusable ones in the store.
    under_way: keys of calls in a batch, which are not bought singly.
    shared: the store that other machines share, if there is one; answered: keys of the answers that were returned.
    """

    endpoint: Endpoint
    section: str
    calls: CallStore
    prepare: Callable[[], str]
    replay: bool
    save: Callable[[Record], str]
    doubts: list[InputError] = field(default_factory=list)
    bought: set[str] = field(default_factory=set)
    beyond: set[str] = field(default_factory=set)
    under_way: Container[str] = frozenset()
    shared: SharedCalls | None = None
    answered: set[str] = field(default_factory=set)
    succeeded: int = 0
    _prepared: bool = False
    _api_key: str = ""
    _openai: Any = None
    _resume_at: float = 0.0

    def __post_init__(self) -> None:
        self.budget = Budget(self.endpoint, self.section)
        self._random = random.Random()

    @property
    def spent(self) -> Spent:
        """What was bought so far."""
        return self.budget.spent

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._openai is not None:
            await self._openai.close()

    async def ask(self, question: Question) -> Record:
        """The record of a call: from the store, else bought and kept before it is returned.

        Raises:
            NotInStoreError: in replay. CallFailedError: there is no usable answer (UnusableAnswerError: it was paid).
            InputError: nothing can be bought with these params; BudgetSpentError: or not any more.
        """
        record = self._stored(question)
        if record is None:
            self._prepare_once()
            if not self.replay:
                return await self._buy_alone(question)
            if self.shared is not None:
                await self.shared.look(question.keys[0])
            record = self._stored(question)
        if record is None:
            raise NotInStoreError(question.sample)
        self.spent.hits += 1
        return record

    def _stored(self, question: Question) -> Record | None:
        record = self.calls.find(question.keys)
        if record is not None:
            self.answered.add(record["key"])
            reason = question.why_not(answer_text(record))
            if reason is not None:
                raise UnusableAnswerError(reason, answer_text(record), bought=record["key"] in self.bought)
            return record
        unusable = self.calls.find_unusable(question.keys)
        if unusable is not None:
            self.answered.add(unusable["key"])
            text = said(unusable["response"])
            reason = why_unusable(unusable["response"]) or question.why_not(text)
            raise UnusableAnswerError(reason or "unusable", text, bought=unusable["key"] in self.bought)
        return None

    def _prepare_once(self) -> None:
        if not self._prepared:
            self._api_key = self.prepare()
            self._prepared = True

    async def _buy_alone(self, question: Question) -> Record:
        """Buy under the key's lock, and alone among machines, unless the answer came into the store meanwhile."""
        key = question.keys[0]
        alone = contextlib.nullcontext() if self.shared is None else self.shared.claim(key)
        async with self.calls.store.lock_async(KIND, key), alone:
            record = self._stored(question)
            if record is not None:
                self.spent.hits += 1
                return record
            if question.keys[0] in self.under_way:
                raise InputError(is_under_way(1))
            if self._openai is None:
                self._openai = open_openai(self.endpoint, self._api_key)
            return await self._buy(question)

    async def _buy(self, question: Question) -> Record:
        call, key = question.build(), question.keys[0]
        noted = {"key": key, "model": call.model, "sample": question.sample}
        try:
            response, bought = await self._attempt_repeatedly(call)
        except _DoubtError as error:
            self.calls.note_failure({**noted, "reason": error.reason})
            raise self._doubt(str(error), error.reason) from None
        except _AgainError as error:
            reason = f"{error} ({1 + self.endpoint.retries} attempts)"
            self.calls.note_failure({**noted, "reason": reason})
            if error.doubt is not None:
                raise self._doubt(f"{host_of(self.endpoint)}: {reason}; {error.doubt}", reason) from None
            raise CallFailedError(reason) from None
        except CallFailedError as error:
            self.calls.note_failure({**noted, "reason": str(error)})
            raise
        self._succeed(response, call)
        meta = {
            "created": int(time.time()),
            "endpoint": host_of(self.endpoint),
            "sample": question.sample,
            "section": self.section,
            **bought,
        }
        record = make_record(call, response)
        reason_not = why_unusable(response) or question.why_not(said(response))
        self.bought.add(key)
        self.answered.add(key)
        not_kept = await asyncio.shield(asyncio.to_thread(self._keep, record, meta, reason_not is None))
        if self.shared is not None:
            record = await asyncio.shield(self._share(self.shared, record, reason_not is None))
        if not_kept is not None:
            self.spent.elsewhere += not_kept.place is not None
            self.spent.lost += not_kept.place is None
            raise not_kept
        if reason_not is not None:
            self.calls.note_failure({**noted, "reason": reason_not})
            raise UnusableAnswerError(reason_not, said(record["response"]), bought=True)
        return record

    async def _share(self, shared: SharedCalls, record: Record, usable: bool) -> Record:
        """The answer that stands for all machines: ours, unless another's was there first."""
        try:
            return await shared.keep(record, usable=usable)
        except InputError:
            self.spent.unshared += 1  # the next question says what is wrong, before it is paid
            return record

    def _keep(self, record: Record, meta: Mapping[str, Any], usable: bool) -> NotKeptError | None:
        try:
            if usable:
                self.calls.put(record, meta)
            else:
                self.calls.put_unusable(record, meta)
        except InputError as error:
            try:
                place = self.save(record)
            except InputError as again:
                return NotKeptError(f"{error}; an answer that was paid could be kept nowhere ({again})", None)
            return NotKeptError(f"{error}; answers that were paid are kept in {place}: `lvlmva calls import` it", place)
        return None

    def _succeed(self, response: Mapping[str, Any], call: Call) -> None:
        self.succeeded += 1
        self.doubts.clear()
        self.spent.short += is_short(response, call.text_size(), len(call.pictures()))
        served = response.get("model")
        if isinstance(served, str) and not _same_model(call.model, served):
            name = printable(served)[:80]
            self.spent.served[name] = self.spent.served.get(name, 0) + 1

    def _doubt(self, message: str, reason: str) -> Exception:
        """A refusal: of this call where others succeed, of the run where none does, or none any more."""
        self.doubts.append(InputError(message))
        if len(self.doubts) >= (DOUBTS_AFTER if self.succeeded else DOUBTS_BEFORE):
            return self.doubts[0]
        return CallFailedError(reason)

    async def _attempt_repeatedly(self, call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
        """A response, and how it was bought: the attempts it took, the tier that was asked for."""
        tokens, body = estimate_input_tokens(call), call.body()
        failures = waits = 0
        waited_s = 0.0
        while True:
            await self._wait_until_resumed()
            ticket = await self.budget.start(tokens)
            self.spent.attempts += 1
            try:
                response = await self._attempt(body, ticket, tokens)
                tier = {"service_tier": body["service_tier"]} if "service_tier" in body else {}
                return response, {"attempts": failures + waits + 1, **tier}
            except _AgainError as error:
                if error.wait_s is not None and error.wait_s > self.endpoint.max_wait_s:
                    seconds = f"{error.wait_s:.0f} s" if error.wait_s < _LONG_WAIT_S else "more than a week"
                    raise InputError(
                        f"{host_of(self.endpoint)} asks to wait {seconds}, longer than {self.section}."
                        f"max_wait_s = {self.endpoint.max_wait_s:.0f}; all answers are kept; repeat the command later"
                    ) from None
                if error.no_capacity and self.endpoint.without_capacity == "standard":
                    body = {**body, "service_tier": "default"}
                    self.spent.other_tier += 1
                    continue
                if error.no_capacity and waited_s < self.endpoint.max_wait_s:
                    waits += 1  # the tier is cheap because it waits; this is no failure
                else:
                    failures += 1
                if failures > self.endpoint.retries:
                    raise
                if error.wait_s is not None and not error.no_capacity:
                    # a rate limit holds for all calls, not for this one
                    self._resume_at = max(self._resume_at, time.monotonic() + error.wait_s)
                pause = backoff_s(failures + waits, error.wait_s, self._random.random())
                waited_s += pause
                await asyncio.sleep(pause)
            finally:
                self.budget.release(ticket)

    async def _wait_until_resumed(self) -> None:
        while (pause := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    async def _attempt(self, body: dict[str, Any], ticket: int, tokens: int) -> dict[str, Any]:
        """One request, booked before it is read. What it raises never holds the API key."""
        import httpx2
        import openai

        try:
            # the client's timeout counts from byte to byte; a body that dribbles would outlive it
            async with asyncio.timeout(self.endpoint.timeout_s):
                # as `chat.completions.create` does it, but for the raw response and without a walk over the pictures
                answer = await self._openai.post("/chat/completions", body=body, cast_to=httpx2.Response)
            status, content, headers = answer.status_code, answer.content, answer.headers
        except (TimeoutError, openai.APITimeoutError):
            self.budget.book(ticket, None, tokens, answered=False)
            raise _AgainError(f"no answer within timeout_s = {self.endpoint.timeout_s:g}") from None
        except openai.APIStatusError as error:
            status, content, headers = error.status_code, error.response.content, error.response.headers
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if not isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol):
                self.budget.book(ticket, None, tokens, answered=False)  # it was sent, and may be charged
            raise _AgainError(
                f"no connection ({self._safe(str(cause) or type(cause).__name__)})",
                doubt=f"see {self.section}.base_url",
            ) from None
        if not 200 <= status < 300:
            raise self._classify(status, content, headers)
        return self._read(status, content, ticket, tokens)

    def _read(self, status: int, content: bytes, ticket: int, tokens: int) -> dict[str, Any]:
        response: Any = None
        try:
            response = remove_secret(read_json(content), self._api_key)
            if isinstance(response, dict) and response.get("error"):
                raise self._classify(status, content, {})
            return check_response(response)
        except UnreadableError as error:
            self.spent.unreadable += 1
            doubt = "is the path of base_url right?" if error.web_page else None
            raise _AgainError(str(error), doubt=doubt) from None
        finally:
            self.budget.book(ticket, response, tokens)

    def _classify(self, status: int, content: bytes, headers: Mapping[str, str]) -> Exception:
        """What an error of the server means: try again, this call only, the whole run, or one of the two."""
        body = None
        with contextlib.suppress(UnreadableError):
            body = remove_secret(read_json(content), self._api_key)
        # before anything is cut: half of a key would not be found
        text = remove_secret(content.decode("utf-8", "replace"), self._api_key)
        message, code = error_of(body, text)
        told = self._safe(message)
        shown = told if told.startswith(f"HTTP {status}") else f"HTTP {status}: {told}" if told else f"HTTP {status}"
        host, where = host_of(self.endpoint), self.section
        if 300 <= status < 400:
            return InputError(f"{host} redirects to another address; set {where}.base_url to the final one")
        if code in NO_CREDIT or status == 402:
            return InputError(f"{host}: the account has no credit left ({shown}); all answers are kept; top it up")
        if code in FILTERED:
            return CallFailedError(f"refused by the server's content filter ({shown})")
        if status in (408, 409, 425, 429) or status >= 500 or 200 <= status < 300:
            capacity = status == 429 and self.endpoint.service_tier == "flex" and _lacks_capacity(message, code)
            return _AgainError(shown, wait_s=asked_wait_s(headers, time.time()), no_capacity=capacity)
        if status in (401, 403):
            meaning = (
                f"{host} refuses the API key ({shown}); see the variable {self.endpoint.api_key_variable} and "
                f"{where}.api_key_variable"
            )
        elif status == 404:
            meaning = (
                f"{host} knows no model '{self.endpoint.model}' at this path ({shown}); see {where}.model and "
                f"{where}.base_url"
            )
        else:
            meaning = f"{host} refuses the request ({shown}); {hint_for(message, where)}"
        return _DoubtError(meaning, f"the server refused the request ({shown})")

    def _safe(self, text: str) -> str:
        return printable(" ".join(str(remove_secret(text, self._api_key)).split()))[:300]


async def _as_utf8(response: Any) -> None:
    # a charset that is none (hex, idna) would break the client where it reads an error's text
    response.encoding = "utf-8"


def _lacks_capacity(message: str, code: str) -> bool:
    low = message.lower()
    return code == NO_CAPACITY or "resource unavailable" in low or "capacity" in low


def _same_model(asked: str, served: str) -> bool:
    """Whether a server's name for the model is the one asked for, with a date, a folder or a suffix more or less."""
    one, other = (name.lower().rpartition("/")[2].removesuffix(".gguf") for name in (asked, served))
    return one.startswith(other) or other.startswith(one)


async def map_calls(
    items: Sequence[T], work: Callable[[T], Awaitable[S]], concurrency: int, done: Callable[[], None]
) -> tuple[list[S | None], Exception | None]:
    """Run `work` over items, at most `concurrency` at once; the first error ends the run.

    Work that is under way then is finished, since it may be paid for already.

    Args:
        done: called after each item.

    Returns:
        (results in the order of items, None where not reached; the error that ended the run, or None).
    """
    results: list[S | None] = [None] * len(items)
    waiting = iter(range(len(items)))
    stopped: list[Exception] = []

    async def worker() -> None:
        for place in waiting:
            if stopped:
                return
            try:
                results[place] = await work(items[place])
            except Exception as error:  # noqa: BLE001 - raised by the caller, once the others have kept what they paid
                stopped.append(error)
                return
            done()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(worker())
    return results, stopped[0] if stopped else None
