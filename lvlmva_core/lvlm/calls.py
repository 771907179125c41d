"""Calls to a model, each bought once: what is sent, its key, and the records of the answers.

A key is the digest of everything that is asked, never of a chosen list of parameters. The address, the API key,
timeouts and retries are not in it, nor what changes the price or the transport of an answer (`settings.TRANSPORT`).
Records that were bought when these still were in the key are found under their earlier keys.
"""

import base64
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lvlmva_core.lvlm.settings import TIERS
from lvlmva_core.render import to_png
from lvlmva_core.store import Store, canonical_json, digest

SCHEMA = 1
KIND = "calls"
UNUSABLE = "unusable"  # answers that were paid and are none (refused, cut off, ...): kept, never served
FINISHED = ("stop", "end_turn", "eos", None)  # what servers call an answer that is complete
Record = dict[str, Any]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class Body(_Part):
    """What was sent, pictures as digests of their pixels; parameters beside these."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]


class Request(_Part):
    """A question: the body, which version of the model stood behind its name, and which answer to it this was."""

    model_config = ConfigDict(extra="forbid")

    schema_: Literal[1] = Field(alias="schema")
    revision: str
    index: Annotated[int, Field(ge=0)]
    body: Body


class Choice(_Part):
    """One answer."""

    message: dict[str, Any]


class Response(_Part):
    """What a server answered, as it came but for the API key."""

    choices: Annotated[list[Choice], Field(min_length=1)]


class CallRecord(_Part):
    """A call and its answer; in a store file with a `meta` beside them, which says how it was bought."""

    model_config = ConfigDict(extra="forbid")

    schema_: Literal[1] = Field(alias="schema")
    key: Digest
    request: Request
    response: Response
    sha256: Digest
    meta: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A picture in a message. pixels: uint8 (H, W, 3); detail: how closely the model is to look, or None."""

    pixels: np.ndarray
    detail: str | None


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and text and pictures in order."""

    role: str
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True)
class Call:
    """Everything that is sent to a model for one answer.

    parameters: all other fields of the body (sampling, token limit, response format, extra body). revision: which
    version of the model is behind the name; index: 0 for the first answer to a question, then 1, 2, ... Both are in
    the key without being sent. transport: fields of the body that are sent without being in the key.
    """

    model: str
    revision: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    index: int
    transport: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON body of the request, pictures as PNG data URLs."""
        return {**self._body(_data_url), **self.transport}

    def request(self) -> dict[str, Any]:
        """The same with digests of pixels for pictures: what the key is taken of and what records hold."""
        return {"schema": SCHEMA, "revision": self.revision, "index": self.index, "body": self._body(_pixel_digest)}

    def key(self) -> str:
        """sha256 over the canonical JSON of `request()`."""
        return digest(self.request())

    def keys(self) -> list[str]:
        """Its key, and those under which it was bought when what changes the transport was still part of them."""
        request = self.request()
        earlier = [self.transport, *({**self.transport, "service_tier": tier} for tier in TIERS)]
        bodies = [request["body"], *({**request["body"], **transport} for transport in earlier if transport)]
        return list(dict.fromkeys(digest({**request, "body": body}) for body in bodies))

    def text_size(self) -> int:
        """Characters of text sent."""
        return sum(len(part) for message in self.messages for part in message.parts if isinstance(part, str))

    def pictures(self) -> list[Picture]:
        """Pictures sent, in order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, Picture)]

    def _body(self, show: Callable[[Picture], dict[str, str]]) -> dict[str, Any]:
        messages = [{"role": turn.role, "content": _content(turn.parts, show)} for turn in self.messages]
        return {**self.parameters, "model": self.model, "messages": messages}


def _content(parts: tuple[str | Picture, ...], show: Callable[[Picture], dict[str, str]]) -> Any:
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]  # some servers take a list only where there are pictures
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {**show(part), **({"detail": part.detail} if part.detail else {})}}
        for part in parts
    ]


def _data_url(picture: Picture) -> dict[str, str]:
    return {"url": "data:image/png;base64," + base64.b64encode(to_png(picture.pixels)).decode("ascii")}


def _pixel_digest(picture: Picture) -> dict[str, str]:
    # of pixels, not of the file: another version of the PNG encoder must not make us pay again
    return {"pixels": digest(picture.pixels), "mime": "image/png"}


def make_record(call: Call, response: Mapping[str, Any]) -> Record:
    """A record of an answer: schema, key, request (pictures as digests), raw response, and a digest over them."""
    return record_of(call.request(), response)


def record_of(request: Mapping[str, Any], response: Mapping[str, Any]) -> Record:
    """`make_record` of a call that is known by its request (`Call.request`) only."""
    content = {"schema": SCHEMA, "key": digest(request), "request": dict(request), "response": dict(response)}
    return {**content, "sha256": digest(content)}


def check_record(record: Any, key: str | None = None, *, usable: bool = True) -> Record:
    """Check a record as a whole: what it must hold, that it is an answer, and that it belongs to `key`.

    Args:
        usable: whether its answer must be one that can be served (`why_unusable`).

    Returns:
        The record without its `meta`.

    Raises:
        ValueError: saying what does not fit.
    """
    fields = ("schema", "key", "request", "response", "sha256")
    if not isinstance(record, dict) or not {*fields} <= record.keys():
        raise ValueError("it lacks " + ", ".join(fields))
    content = {name: record[name] for name in fields[:-1]}
    try:
        CallRecord.model_validate(record)
        if digest(record["request"]) != record["key"] or key not in (None, record["key"]):
            raise ValueError("its request does not match its key")
        if digest(content) != record["sha256"]:
            raise ValueError("its content does not match its digest")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"its {'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    reason = why_unusable(record["response"]) if usable else None
    if reason is not None:
        raise ValueError(f"it holds no answer ({reason})")
    return {**content, "sha256": record["sha256"]}


def why_unusable(response: Mapping[str, Any]) -> str | None:
    """Why an answer is not served as one, or None: a refusal, a filter, the token limit, or no text."""
    choice = response["choices"][0]
    finish = choice.get("finish_reason")
    if choice["message"].get("refusal"):
        return "the model refused"
    if finish == "length":
        return "cut off at the token limit; raise token_limit"
    if finish == "content_filter":
        return "stopped by the content filter"
    if finish not in FINISHED:
        return f"finish reason {str(finish)[:40]!r}"
    return None if said(response).strip() else "empty answer"


def said(response: Mapping[str, Any]) -> str:
    """The text of a response, "" where there is none; parts of text are put together."""
    content = response["choices"][0]["message"].get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def answer_text(record: Record) -> str:
    """What the model said."""
    return said(record["response"])


class CallStore:
    """Records of calls in a `Store`.

    preferred: records that stand above those of the store; where one call was bought twice, everybody has to go on
    with the same answer, and that is the one which is committed.
    """

    def __init__(self, store: Store, preferred: Mapping[str, Record] | None = None) -> None:
        self.store = store
        self.preferred = dict(preferred or {})

    def get(self, key: str) -> Record | None:
        """The verified record of a key without its meta, or None. A damaged one is set aside and said so."""
        if key in self.preferred:
            return self.preferred[key]
        record = self._read(KIND, key)
        return None if record is None else check_record(record)

    def find(self, keys: Iterable[str]) -> Record | None:
        """The record of the first of several keys that has one."""
        return next((record for record in map(self.get, keys) if record is not None), None)

    def find_unusable(self, keys: Iterable[str]) -> Record | None:
        """The answer under the first of several keys that was paid and is none."""
        records = (self._read(UNUSABLE, key) for key in keys)
        return next((record for record in records if record is not None), None)

    def get_with_meta(self, key: str) -> Record | None:
        """The verified record of a key as it stands in the store."""
        return self._read(KIND, key)

    def put(self, record: Record, meta: Mapping[str, Any]) -> bool:
        """Keep a record unless its key is there; says whether it was new."""
        content = canonical_json({**record, "meta": dict(meta)})
        return self.store.put_bytes(KIND, record["key"], "json", content)

    def put_unusable(self, record: Record, meta: Mapping[str, Any]) -> None:
        """Keep an answer that was paid and is none, so that nobody pays for the same again without knowing."""
        content = canonical_json({**record, "meta": dict(meta)})
        self.store.put_bytes(UNUSABLE, record["key"], "json", content)

    def take_in(self, records: Iterable[Any], source: str, *, keep_present: bool = False) -> tuple[int, list[str]]:
        """Put records that come from elsewhere.

        Where another answer to the same call is there, the one that the server gave earlier stands (then the one with
        the smaller digest), so that all stores agree whatever the order; with `keep_present` the one that is there.

        Returns:
            (new, refused): number of keys that were new; why records were refused.
        """
        new, refused = 0, []
        for number, candidate in enumerate(records, start=1):
            try:
                record = check_record(candidate)
            except ValueError as error:
                refused.append(f"record {number} of {source}: {error}")
                continue
            present = self._read(KIND, record["key"])
            if present is None:
                new += self.put(record, {"source": source})
            elif not keep_present and _seniority(record) < _seniority(present):
                content = canonical_json({**record, "meta": {"source": source}})
                self.store.put_bytes(KIND, record["key"], "json", content, replace=True)
        return new, refused

    def records(self) -> Iterator[Record]:
        """All verified records with their meta, by key; damaged ones are set aside."""
        for key in self.store.keys(KIND, "json"):
            record = self._read(KIND, key)
            if record is not None:
                yield record

    def note_failure(self, entry: Mapping[str, Any]) -> None:
        """Append to the log of failures, which is never read for an answer."""
        note(self.store, "failures.jsonl", entry)

    def _read(self, kind: str, key: str) -> Record | None:
        content = self.store.get_bytes(kind, key, "json")
        if content is None:
            return None
        try:
            record: Record = json.loads(content)
            check_record(record, key, usable=kind == KIND)
        except (ValueError, RecursionError) as error:
            self.store.set_aside(kind, key, "json", str(error)[:200])
            return None
        return record


def note(store: Store, name: str, entry: Mapping[str, Any]) -> None:
    """Append a line with the time to a log of the store."""
    store.append(name, {**entry, "time": int(time.time())})


def created(record: Record) -> int | None:
    """When a server says that it answered, in seconds since 1970; None where what it says is no such time."""
    stated = record["response"].get("created")
    if not isinstance(stated, int | float) or isinstance(stated, bool) or not math.isfinite(min(stated, 1e300)):
        return None
    return int(stated) if EARLIEST <= stated < LATEST else None


EARLIEST, LATEST = 0, 2**32  # a time in milliseconds or nanoseconds lies beyond


def _seniority(record: Record) -> tuple[float, str]:
    stated = created(record)
    return (math.inf if stated is None else stated, record["sha256"])
