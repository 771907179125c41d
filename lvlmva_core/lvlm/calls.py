"""Calls to a model, each bought once: what is sent, its key, and the records of the answers.

A key is the digest of everything that is sent, never of a chosen list of parameters; the address, the API key,
timeouts and retries are not sent as content and are not in it.
"""

import base64
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlmva_core.render import to_png
from lvlmva_core.store import Store, canonical_json, digest

SCHEMA = 1
KIND = "calls"
Record = dict[str, Any]


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
    the key without being sent.
    """

    model: str
    revision: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    index: int

    def body(self) -> dict[str, Any]:
        """The JSON body of the request, pictures as PNG data URLs."""
        return self._body(_data_url)

    def request(self) -> dict[str, Any]:
        """The same with digests of pixels for pictures: what the key is taken of and what records hold."""
        return {"schema": SCHEMA, "revision": self.revision, "index": self.index, "body": self._body(_pixel_digest)}

    def key(self) -> str:
        """sha256 over the canonical JSON of `request()`."""
        return digest(self.request())

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
    content = {"schema": SCHEMA, "key": call.key(), "request": call.request(), "response": dict(response)}
    return {**content, "sha256": digest(content)}


def check_record(record: Any, key: str | None = None) -> Record:
    """Check a record as a whole, and that it belongs to `key`; without its `meta`.

    Raises:
        ValueError: saying what does not fit.
    """
    fields = ("schema", "key", "request", "response")
    if not isinstance(record, dict) or not {*fields, "sha256"} <= record.keys():
        raise ValueError("it lacks " + ", ".join((*fields, "sha256")))
    if record["schema"] != SCHEMA:
        raise ValueError(f"its schema is {record['schema']!r}, not {SCHEMA}")
    if digest(record["request"]) != record["key"] or key not in (None, record["key"]):
        raise ValueError("its request does not match its key")
    content = {name: record[name] for name in fields}
    if digest(content) != record["sha256"]:
        raise ValueError("its content does not match its digest")
    return {**content, "sha256": record["sha256"]}


def answer_text(record: Record) -> str:
    """What the model said."""
    return str(record["response"]["choices"][0]["message"]["content"])


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
        record = self._read(key)
        return None if record is None else check_record(record)

    def get_with_meta(self, key: str) -> Record | None:
        """The verified record of a key as it stands in the store."""
        return self._read(key)

    def put(self, record: Record, meta: Mapping[str, Any]) -> bool:
        """Keep a record unless its key is there; says whether it was new."""
        content = canonical_json({**record, "meta": dict(meta)})
        return self.store.put_bytes(KIND, record["key"], "json", content)

    def take_in(self, records: Iterable[Any], source: str) -> tuple[int, list[str]]:
        """Put records that come from elsewhere.

        Where another answer to the same call is there, the one that the server gave earlier stands (then the one with
        the smaller digest), so that all stores agree whatever the order of imports.

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
            present = self._read(record["key"])
            if present is None:
                new += self.put(record, {"source": source})
            elif _seniority(record) < _seniority(present):
                content = canonical_json({**record, "meta": {"source": source}})
                self.store.put_bytes(KIND, record["key"], "json", content, replace=True)
        return new, refused

    def records(self) -> Iterator[Record]:
        """All verified records with their meta, by key; damaged ones are set aside."""
        for key in self.store.keys(KIND, "json"):
            record = self._read(key)
            if record is not None:
                yield record

    def note_failure(self, entry: Mapping[str, Any]) -> None:
        """Append to the log of failures, which is never read for an answer."""
        append_line(self.store, "failures.jsonl", entry)

    def _read(self, key: str) -> Record | None:
        content = self.store.get_bytes(KIND, key, "json")
        if content is None:
            return None
        try:
            record: Record = json.loads(content)
            check_record(record, key)
        except ValueError as error:
            self.store.set_aside(KIND, key, "json", str(error))
            return None
        return record


def append_line(store: Store, name: str, entry: Mapping[str, Any]) -> None:
    """Append one line to a log in the store's folder, whole even where several processes write."""
    store.root.mkdir(parents=True, exist_ok=True)
    line = canonical_json({**entry, "time": int(time.time())}) + b"\n"
    descriptor = os.open(store.root / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _seniority(record: Record) -> tuple[float, str]:
    created = record["response"].get("created")
    return (float(created) if isinstance(created, int | float) else float("inf"), record["sha256"])
