"""Calls bought in batches: the same questions at about half the price, answered within a day.

One file format serves OpenAI's Batch API and `vllm run-batch`: a request a line, with the call's key as `custom_id`. A
ledger in the store says which keys are in which batch. It is written before anything is sent, and each batch carries
its own digest as metadata: whatever was killed in between, the batch is found again by listing and never sent twice.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.budget import (
    CHARACTERS_PER_TOKEN,
    LEAST_OF_A_PICTURE,
    UNSEEN,
    Budget,
    Spent,
    cost_usd,
    estimate_input_tokens,
    is_short,
)
from lvlmva_core.lvlm.calls import CallStore, Digest, record_of, said, why_unusable
from lvlmva_core.lvlm.client import Client, NotInStoreError, Question, host_of, open_openai
from lvlmva_core.lvlm.critic import why_no_critique
from lvlmva_core.lvlm.redact import printable, remove_secret
from lvlmva_core.lvlm.replies import UnreadableError, check_response, error_of, read_json
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.store import Store, canonical_json, digest

LEDGER = "batches"
REQUESTS = "batch_requests"  # what was asked under each key of a batch; large, and read only when results come
MOST_REQUESTS = 50_000  # of OpenAI's Batch API, a file
MOST_BYTES = 195_000_000  # 200 MB are allowed
PATH = "/v1/chat/completions"
MARKER = "lvlmva"  # the name in a batch's metadata under which its digest stands
ENDED = ("completed", "failed", "expired", "cancelled")
_WHOLE_LEDGER = "0" * 64  # the lock under which batches are submitted and results taken in
_NOT_SENT = ("service_tier",)  # a batch is a tier of its own


class Batch(BaseModel):
    """An entry of the ledger.

    digest: over the keys and `attempt`, how many batches with the same keys ended before. section: of params.yaml that
    holds the endpoint. input_tokens: estimated, at the rate of answers in the store. state: exported (a file is
    written), submitting (it may have been sent), submitted, done (its results are in the store; what it did not
    answer may be asked again). counts: of a batch that is done, what came of its calls.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    digest: Digest
    attempt: int
    section: str
    model: str
    keys: list[Digest]
    file_sha256: Digest
    input_tokens: int
    state: Literal["exported", "submitting", "submitted", "done"] = "exported"
    host: str | None = None
    batch_id: str | None = None
    counts: dict[str, int] | None = None


@dataclass
class Collector(Client):
    """A client that sends nothing and notes which questions the store does not answer."""

    missing: list[Question] = field(default_factory=list)

    async def ask(self, question: Question) -> Any:
        """The record of a call from the store. Raises NotInStoreError where it is missing."""
        record = self._stored(question)
        if record is None:
            self.missing.append(question)
            raise NotInStoreError(question.sample)
        return record


@dataclass(frozen=True)
class Exported:
    """Files that were written; calls left out because they are under way, or because of the budget."""

    files: list[Path]
    batches: list[Batch]
    under_way: int
    beyond_budget: int
    cost_usd_at_most: float


def priced_for_batches(endpoint: Endpoint) -> Endpoint:
    """The endpoint with the prices of batches as its prices; the standard prices where none are stated."""
    prices = {
        f"usd_per_million_{kind}_tokens": value
        for kind in ("input", "output")
        if (value := getattr(endpoint, f"batch_usd_per_million_{kind}_tokens")) is not None
    }
    none = {"service_tier": None, "tier_usd_per_million_input_tokens": None, "tier_usd_per_million_output_tokens": None}
    return endpoint.model_copy(update={**none, **prices})


def read_ledger(store: Store) -> list[Batch]:
    """All batches, by digest.

    Raises:
        InputError: an entry is damaged; calls may be under way that nobody knows of.
    """
    return [_read(store, key) for key in store.keys(LEDGER, "json")]


def under_way(store: Store) -> set[str]:
    """Keys of calls that were sent in a batch, or may have been, and whose results are not in the store."""
    return {key for batch in read_ledger(store) if batch.state in ("submitting", "submitted") for key in batch.keys}


def rate_of_input(known: Iterable[tuple[Mapping[str, Any], int]]) -> float:
    """The most that an answer's input took of what was estimated, 1 or more; `UNSEEN` where no answer says it.

    Args:
        known: (response, estimated input tokens) of answers in the store.
    """
    rates = []
    for response, tokens in known:
        usage = response.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            rates.append(count / max(tokens, 1))
    return max([1.0, *rates]) if rates else UNSEEN


def export_calls(
    store: Store,
    questions: Sequence[Question],
    endpoint: Endpoint,
    section: str,
    folder: Path,
    *,
    rate: float,
    most_requests: int = MOST_REQUESTS,
    most_bytes: int = MOST_BYTES,
) -> Exported:
    """Write questions as files for a Batch API, as many as the budget allows, and note them in the ledger.

    Args:
        rate: `rate_of_input`, for the costs. folder: gets `<section>-<digest>.jsonl`; made if it is not there.

    Raises:
        InputError: the folder or the store cannot be written, or one request is larger than a file may be.
    """
    priced, waiting = priced_for_batches(endpoint), under_way(store)
    first = {question.keys[0]: question for question in reversed(questions)}
    open_ = [first[key] for key in dict.fromkeys(question.keys[0] for question in questions) if key not in waiting]
    files, batches, cost, written = [], [], 0.0, 0
    part: _Part | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while written < len(open_):
            part = _Part(folder, section)
            for question in open_[written:]:
                call = question.build()
                tokens = math.ceil(estimate_input_tokens(call) * rate)
                most = cost_usd(priced, tokens, endpoint.token_limit)
                if written >= endpoint.max_calls or cost + most > endpoint.max_cost_usd:
                    break
                body = {name: value for name, value in call.body().items() if name not in _NOT_SENT}
                line = {"custom_id": question.keys[0], "method": "POST", "url": PATH, "body": body}
                content = canonical_json(line) + b"\n"
                if len(content) > most_bytes:
                    raise InputError(f"a request about {question.sample} is larger than {most_bytes} bytes")
                if part.size + len(content) > most_bytes or len(part.requests) == most_requests:
                    break
                asked = {
                    "request": call.request(),
                    "sample": question.sample,
                    "names": list(question.names),
                    "tokens": estimate_input_tokens(call),  # while the sizes of the pictures are known
                }
                part.add(question.keys[0], content, asked, tokens)
                cost, written = cost + most, written + 1
            if not part.requests:
                break
            batch = _noted(store, part, section, endpoint.model)
            files.append(part.finish(batch.digest))
            batches.append(batch)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    finally:
        if part is not None:
            part.drop()
    return Exported(files, batches, len(first) - len(open_), len(open_) - written, cost)


class _Part:
    """A file that is being written, and what was asked in it."""

    def __init__(self, folder: Path, section: str) -> None:
        self.name = section.partition(".")[0]
        self.temporary = folder / f".{self.name}.{os.getpid()}.tmp"
        self.file = self.temporary.open("wb")
        self.sha256 = hashlib.sha256()
        self.size = self.tokens = 0
        self.requests: dict[str, Any] = {}

    def add(self, key: str, content: bytes, asked: dict[str, Any], tokens: int) -> None:
        self.file.write(content)
        self.sha256.update(content)
        self.size += len(content)
        self.tokens += tokens
        self.requests[key] = asked

    def drop(self) -> None:
        """Leave nothing behind, unless it was finished."""
        with contextlib.suppress(OSError):  # a full disk
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def finish(self, name: str) -> Path:
        self.file.close()
        return self.temporary.replace(self.temporary.with_name(f"{self.name}-{name[:16]}.jsonl"))


def _noted(store: Store, part: _Part, section: str, model: str) -> Batch:
    keys = sorted(part.requests)
    attempt = sum(batch.keys == keys for batch in read_ledger(store) if batch.state == "done")
    name = digest({"keys": keys, "attempt": attempt})
    batch = Batch(
        digest=name,
        attempt=attempt,
        section=section,
        model=model,
        keys=keys,
        file_sha256=part.sha256.hexdigest(),
        input_tokens=part.tokens,
    )
    store.put_bytes(REQUESTS, name, "json", canonical_json(part.requests), replace=True)
    write_batch(store, batch)
    return batch


def write_batch(store: Store, batch: Batch) -> None:
    """Note a batch's state, in the place of the earlier one."""
    store.put_bytes(LEDGER, batch.digest, "json", canonical_json(batch.model_dump()), replace=True)


def _read(store: Store, name: str) -> Batch:
    try:
        return Batch.model_validate(json.loads(store.get_bytes(LEDGER, name, "json") or b""))
    except (ValueError, ValidationError) as error:
        raise InputError(
            f"{store.path(LEDGER, name, 'json')}: damaged entry of the ledger of batches ({type(error).__name__}); "
            "calls may be under way in it: look at the host's list of batches, then delete the file"
        ) from None


def batch_of_file(store: Store, file: Path) -> Batch:
    """The batch that was exported into a file.

    Raises:
        InputError: none was, or the file was changed.
    """
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    for batch in read_ledger(store):
        if batch.file_sha256 == found and batch.digest.startswith(file.stem.rpartition("-")[2]):
            return batch
    raise InputError(
        f"{file}: not in the ledger of this store as it stands; write it anew with `lvlmva calls export-batch`"
    )


def why_not_submit(calls: CallStore, batch: Batch) -> str | None:
    """Why an exported batch must not be sent, or None: calls of it were answered or sent in another meanwhile."""
    waiting = under_way(calls.store)
    sent = sum(key in waiting for key in batch.keys)
    if sent:
        return f"{sent} of its calls are under way in another batch"
    there = sum(calls.get(key) is not None or calls.find_unusable([key]) is not None for key in batch.keys)
    return f"{there} of its calls were answered since" if there else None


def check_budget(endpoint: Endpoint, section: str, batches: Sequence[Batch]) -> float:
    """What batches cost at most, US dollars.

    Raises:
        InputError: together they go beyond max_calls or max_cost_usd; nothing was sent.
    """
    number = sum(len(batch.keys) for batch in batches)
    tokens = sum(batch.input_tokens for batch in batches)
    cost = cost_usd(priced_for_batches(endpoint), tokens, number * endpoint.token_limit)
    for name, value in (("max_calls", number), ("max_cost_usd", cost)):
        # a sum over files, in another order than when they were exported
        if value > getattr(endpoint, name) * (1 + 1e-9):
            raise InputError(
                f"{number} calls in {len(batches)} batches may cost {cost:.4f} USD, beyond {section}.{name} = "
                f"{getattr(endpoint, name)}; nothing was sent; raise it, or submit fewer files at a time"
            )
    return cost


class Host:
    """The Batch endpoints of a host, through the openai client. What it raises never holds the API key."""

    def __init__(self, endpoint: Endpoint, api_key: str) -> None:
        self.endpoint = endpoint
        self.api_key = api_key

    async def submit(self, store: Store, batch: Batch, file: Path) -> Batch:
        """Send a batch that was exported or whose sending was cut off; its entry with the host's id.

        Raises:
            InputError: it could not be sent; the entry says whether it may have been.
        """
        host = host_of(self.endpoint)
        if batch.state == "submitting" and batch.host not in (None, host):
            raise InputError(f"batch {batch.digest[:12]} may have been sent to {batch.host}; set base_url back to it")
        before = batch.model_copy(update={"state": "exported", "host": None})
        batch = batch.model_copy(update={"state": "submitting", "host": host})
        write_batch(store, batch)
        async with self._client() as client:
            sent = False
            try:
                found = await self._find(client, batch)
                if found is None:
                    with file.open("rb") as content:
                        uploaded = await client.files.create(file=(file.name, content), purpose="batch")
                    sent = True
                    found = await client.batches.create(
                        completion_window="24h",
                        endpoint=PATH,
                        input_file_id=uploaded.id,
                        metadata={MARKER: batch.digest},
                    )
            except Exception as error:
                if not sent or 400 <= getattr(error, "status_code", 0) < 500:
                    write_batch(store, before)  # surely not sent
                raise
        batch = batch.model_copy(update={"state": "submitted", "batch_id": str(found.id)})
        write_batch(store, batch)
        return batch

    async def find_again(self, store: Store, batch: Batch) -> Batch:
        """A batch whose sending was cut off: submitted where the host has it, else as it is."""
        async with self._client() as client:
            found = await self._find(client, batch)
        if found is None:
            return batch
        batch = batch.model_copy(update={"state": "submitted", "batch_id": str(found.id)})
        write_batch(store, batch)
        return batch

    async def status(self, batch: Batch) -> tuple[str, str]:
        """(status, how far it is) as the host says."""
        async with self._client() as client:
            found = await client.batches.retrieve(batch.batch_id)
        counts = found.request_counts
        told = f"{counts.completed} answered, {counts.failed} failed of {counts.total}" if counts else ""
        errors = [str(each.message) for each in (found.errors.data or [])] if found.errors else []
        return self._safe(found.status), self._safe("; ".join([told, *errors]))

    async def cancel(self, batch: Batch) -> str:
        """Have a batch that is under way end early; its status then. What was answered is still there to fetch."""
        async with self._client() as client:
            found = await client.batches.retrieve(batch.batch_id)
            if found.status not in (*ENDED, "cancelling"):
                found = await client.batches.cancel(batch.batch_id)
        return self._safe(found.status)

    async def fetch(self, batch: Batch) -> list[bytes] | None:
        """Lines of the results and of the errors of a batch that has ended; None while it is under way."""
        async with self._client() as client:
            found = await client.batches.retrieve(batch.batch_id)
            if found.status not in ENDED:
                return None
            lines: list[bytes] = []
            for name in (found.output_file_id, found.error_file_id):
                if name is not None:
                    content = await client.files.content(name)
                    lines += content.content.split(b"\n")
        return [line for line in lines if line.strip()]

    @staticmethod
    async def _find(client: Any, batch: Batch) -> Any:
        async for each in client.batches.list(limit=100):
            if (each.metadata or {}).get(MARKER) == batch.digest:
                return each
        return None

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        import openai

        host = host_of(self.endpoint)
        async with open_openai(self.endpoint, self.api_key) as client:
            try:
                yield client
            except openai.APIStatusError as error:
                content = error.response.content
                try:
                    body = read_json(content)
                except UnreadableError:
                    body = None
                message, _ = error_of(body, content.decode("utf-8", "replace"))
                raise InputError(
                    f"{host}: HTTP {error.status_code}: {self._safe(message)}; the ledger is kept; repeat the command"
                ) from None
            except (openai.APIConnectionError, TimeoutError) as error:
                cause = error.__cause__ or error
                told = self._safe(str(cause) or type(cause).__name__)
                raise InputError(f"{host}: no answer ({told}); the ledger is kept; repeat the command") from None

    def _safe(self, text: str) -> str:
        return printable(" ".join(str(remove_secret(text, self.api_key)).split()))[:300]


@dataclass
class Results:
    """What came of lines of results: calls by what happened, and what they cost.

    counts: stored, unusable (paid and kept apart), present (the store had an answer), unreadable (paid), failed (an
    error of the host), lost (no line at all), repeated (a further line of a call), strangers (of no call that was
    asked). answered: keys of which a line came.
    """

    counts: Counter[str]
    spent: Spent
    answered: set[str]


def take_results(
    calls: CallStore, batches: Sequence[Batch], lines: Iterable[bytes], endpoint: Endpoint, api_key: str
) -> Results:
    """Take results in, each checked as a single call's answer; lines may come in any order, twice or not at all.

    Every answer under a status of success is booked before it is read; taking the same lines in again books nothing
    new, since the results stand in the place of the batch's earlier ones.

    Raises:
        InputError: the store cannot be written, or what was asked is not there any more.
    """
    asked = {key: each for batch in batches for key, each in _requests(calls.store, batch).items()}
    batch_of = {key: batch for batch in batches for key in batch.keys}
    budget = Budget(priced_for_batches(endpoint), batches[0].section)
    counts: Counter[str] = Counter()
    responses: dict[str, set[str]] = {}
    reasons: dict[str, str] = {}
    for content in lines:
        key, status, body, error = _parse(content, api_key)
        if key not in asked:
            counts["strangers"] += 1
            continue
        if body is None or not 200 <= status < 300 or (isinstance(body, dict) and body.get("error")):
            message, code = error_of(error if error is not None else body, "")
            told = " ".join(each for each in (code, message) if each) or f"HTTP {status}"
            reasons.setdefault(key, printable(" ".join(told.split()))[:300])
            continue
        known = responses.setdefault(key, set())
        if digest(body) in known:
            counts["repeated"] += 1
            continue
        text, pictures = _sent(asked[key]["request"])
        guess = math.ceil(text / CHARACTERS_PER_TOKEN) + LEAST_OF_A_PICTURE * pictures  # of a ledger without tokens
        budget.book(0, body, asked[key].get("tokens", guess))
        budget.spent.short += is_short(body, text, pictures)
        known.add(digest(body))
        if len(known) > 1:
            counts["repeated"] += 1
            continue
        meta = {
            "created": int(time.time()),
            "endpoint": batch_of[key].host or "file",
            "sample": asked[key]["sample"],
            "section": batch_of[key].section,
            "batch": batch_of[key].batch_id or batch_of[key].digest[:12],
        }
        outcome, reason = _keep(calls, key, asked[key], body, meta)
        counts[outcome] += 1
        if reason is not None:
            calls.note_failure({"key": key, "sample": asked[key]["sample"], "reason": reason, "batch": meta["batch"]})
    for key in sorted(reasons.keys() - responses.keys()):
        counts["failed"] += 1
        calls.note_failure({"key": key, "sample": asked[key]["sample"], "reason": reasons[key]})
    answered = {*reasons, *responses}
    counts["lost"] = len(asked.keys() - answered)
    return Results(counts, budget.spent, answered)


def settle(store: Store, batch: Batch, results: Results) -> None:
    """Note that a batch is done: what it did not answer may be asked again."""
    write_batch(store, batch.model_copy(update={"state": "done", "counts": dict(results.counts)}))


def _keep(
    calls: CallStore, key: str, asked: Mapping[str, Any], body: Any, meta: Mapping[str, Any]
) -> tuple[str, str | None]:
    """Where an answer goes, and why it is not served, or None."""
    try:
        response = check_response(body)
    except UnreadableError as error:
        return "unreadable", str(error)
    if calls.get(key) is not None or calls.find_unusable([key]) is not None:
        return "present", None
    record = record_of(asked["request"], response)
    reason = why_unusable(response)
    if reason is None and asked["names"]:
        reason = why_no_critique(said(response), asked["names"])
    if reason is not None:
        calls.put_unusable(record, meta)
        return "unusable", reason
    return ("stored" if calls.put(record, meta) else "present"), None


def _requests(store: Store, batch: Batch) -> dict[str, Any]:
    content = store.get_bytes(REQUESTS, batch.digest, "json")
    try:
        asked: dict[str, Any] = json.loads(content or b"")
        if sorted(asked) != batch.keys or any(digest(each["request"]) != key for key, each in asked.items()):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{store.path(REQUESTS, batch.digest, 'json')}: damaged or missing; write it anew by exporting the same "
            "calls with `lvlmva calls export-batch`, or restore the file"
        ) from None
    return asked


def _sent(request: Mapping[str, Any]) -> tuple[int, int]:
    """Characters of text and number of pictures in a request as records hold it."""
    text = pictures = 0
    for message in request["body"]["messages"]:
        content = message["content"]
        for part in [{"text": content}] if isinstance(content, str) else content:
            text += len(part.get("text", ""))
            pictures += "image_url" in part
    return text, pictures


def _parse(content: bytes, api_key: str) -> tuple[str, int, Any, Any]:
    """(key, status, body, error) of a line, without the API key; "" as key where it is no result."""
    try:
        line = remove_secret(read_json(content), api_key)
    except UnreadableError:
        return "", 0, None, None
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
        return "", 0, None, None
    response = line.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    body = response.get("body") if isinstance(response, dict) else None
    number = status if isinstance(status, int) and not isinstance(status, bool) else 0
    return line["custom_id"], number, body, line.get("error")


def key_of(line: bytes) -> str:
    """The call that a line of results is about, "" where it is none."""
    return _parse(line, "")[0]


def is_settled(batch: Batch, results: Results) -> bool:
    """Whether results from a file end a batch: it was never sent to a host, or all its calls have a line."""
    return batch.state == "exported" or not results.counts["lost"]


@contextlib.contextmanager
def submitting_alone(store: Store) -> Iterator[None]:
    """Keep other processes from submitting or taking results in meanwhile."""
    with store.lock(LEDGER, _WHOLE_LEDGER):
        yield


def read_lines(file: Path) -> Iterator[bytes]:
    """Lines of a file of results. Raises InputError."""
    try:
        with file.open("rb") as stream:
            yield from (line for line in stream if line.strip())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
