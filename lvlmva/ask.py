"""What critique and judge share: the call store and its hydration, the plan before anything is spent, the asking."""

import asyncio
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import typer

from lvlmva.hydrate import committed_versions, open_store, version_at_head
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.calls import Call, CallStore, Record, append_line, check_record
from lvlmva_core.lvlm.client import (
    CallFailedError,
    Client,
    Estimate,
    NotInStoreError,
    Question,
    check_endpoint,
    estimate_calls,
    estimate_input_tokens,
    host_of,
    is_loopback,
    map_calls,
)
from lvlmva_core.lvlm.records import Row
from lvlmva_core.lvlm.settings import Endpoint

T = TypeVar("T")
S = TypeVar("S")

NAMED_AT_MOST = 5  # samples in a message
CALLS_KEPT = 256  # of half a megabyte each


def ask_all(
    items: Sequence[T],
    *,
    name_of: Callable[[T], str],
    first_call: Callable[[T], Call],
    work: Callable[[Client, T, Question], Awaitable[S]],
    failure_of: Callable[[S], str | None],
    endpoint: Endpoint,
    section: str,
    out: Path,
    replay: bool,
    pictures: bool,
    max_failed_share: float,
    dry_run: bool,
) -> list[S | str] | None:
    """Ask about each item, from the store where possible; say before what is bought, and after what it took.

    Args:
        name_of: the sample of an item, for messages. first_call: the call that an item starts with.
        work: asks about one item, of which the first question is given; raises CallFailedError where it gets no
            answer. failure_of: why a result is of no use, or None.
        section: of params.yaml that holds the endpoint. out: the stage's output, whose committed versions are
            searched for answers before anything is bought. replay: never send. pictures: whether calls hold some.

    Returns:
        For each item the result, or the reason (str) why there is none; None after a dry run.

    Raises:
        InputError: nothing can be bought, the budget is spent, too many failed, or replay lacks answers.
    """
    replay = replay or os.environ.get("LVLMVA_OFFLINE", "") not in ("", "0")
    calls = open_calls(out)
    survey = _survey(items, first_call, name_of)
    may_pay = not (replay or dry_run)

    @functools.cache  # before the plan where it shows that something is missing, else when a later call turns out to be
    def fill() -> None:
        hydrate(calls, out, required=may_pay and not endpoint.allow_unhydrated)

    @functools.cache
    def prepare() -> str:
        fill()
        if not may_pay:
            return ""
        key = check_endpoint(endpoint, os.environ, pictures=pictures)
        confirm_host(endpoint)
        return key

    if any(calls.get(question.key) is None for question in survey.questions):
        fill()
    estimate = survey.estimate(calls, endpoint)
    _say(describe(estimate, endpoint, section))
    if dry_run:
        return None
    if estimate.new_calls:
        prepare()
    client = Client(endpoint, section, calls, prepare, replay)
    missing: list[str] = []
    failed: list[str] = []

    async def attempt(place: int) -> S | str:
        item = items[place]
        result: S | str
        try:
            result = await work(client, item, survey.questions[place])
            failure = failure_of(result)
        except NotInStoreError:
            missing.append(name_of(item))
            return "not in the store"
        except CallFailedError as error:
            result = failure = str(error)
        if failure is not None:
            failed.append(f"{name_of(item)}: {failure}")
            if len(failed) > max_failed_share * len(items):
                raise InputError(_too_many(failed, len(items), section, max_failed_share))
        return result

    started = time.monotonic()
    results, error = asyncio.run(_run(client, range(len(items)), attempt, endpoint.concurrency))
    _say(_account(client, started))
    append_line(calls.store, "runs.jsonl", {"section": section, "model": endpoint.model, **asdict(client.spent)})
    if missing:
        missing.sort()
        named = ", ".join(missing[:NAMED_AT_MOST]) + (", ..." if len(missing) > NAMED_AT_MOST else "")
        raise InputError(
            f"replay: the store {calls.store.root} lacks the answers for {len(missing)} of {len(items)} samples "
            f"({named}); fetch them with `dvc fetch --all-commits {out}`, or buy them with the params' 'model' in the "
            "place of 'replay'"
        )
    if error is not None:
        raise error
    return [result for result in results if result is not None]


@dataclass(frozen=True)
class _Survey:
    """The first question of each item, and the input tokens that each would take."""

    questions: list[Question]
    tokens: list[int]

    def estimate(self, calls: CallStore, endpoint: Endpoint) -> Estimate:
        """What is in the store and what is to be bought; one call that several samples share is bought once."""
        tokens_of = dict(zip((question.key for question in self.questions), self.tokens, strict=True))
        new = [tokens for key, tokens in tokens_of.items() if calls.get(key) is None]
        return estimate_calls(endpoint, hits=len(tokens_of) - len(new), tokens=new)


def _survey(items: Sequence[T], first_call: Callable[[T], Call], name_of: Callable[[T], str]) -> _Survey:
    questions, tokens = [], []
    for place, item in enumerate(items):
        call = first_call(item)
        tokens.append(estimate_input_tokens(call))
        # pictures are large: the first calls are kept for sending, later ones are built a second time
        build = (lambda call=call: call) if place < CALLS_KEPT else (lambda item=item: first_call(item))
        questions.append(Question(call.key(), build, name_of(item)))
    return _Survey(questions, tokens)


def open_calls(out: Path) -> CallStore:
    """The call store of this project; answers committed at HEAD in `out` stand above those of the store."""
    with version_at_head(out.as_posix()) as copy:
        committed = list(_records_in(copy)) if copy else []
    preferred: dict[str, Record] = {}
    for candidate in committed:
        with contextlib.suppress(ValueError):  # said by hydrate, should it be needed
            record = check_record(candidate)
            preferred[record["key"]] = record
    calls = CallStore(open_store(), preferred)
    new, _ = calls.take_in(preferred.values(), out.as_posix())
    if new:
        _say(f"{new} answers taken from {out} as committed")
    return calls


def hydrate(calls: CallStore, out: Path, *, required: bool) -> int:
    """Fill the store from all committed versions of an output; says how many answers were new."""
    new = 0
    for copy in committed_versions(out.as_posix(), calls.store, required=required):
        added, refused = calls.take_in(_records_in(copy), out.as_posix())
        new += added
        for reason in refused:
            _say(f"warning: left out: {reason}")
    if new:
        _say(f"{new} answers taken from committed versions of {out}")
    return new


def _records_in(path: Path) -> Iterator[Any]:
    """Call records in the rows of critiques.jsonl or verdicts.jsonl; a line that is no JSON gives a bad one."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            row: Row = json.loads(line)
            yield from ([row["record"]] if row.get("record") else row.get("records") or [])
        except (ValueError, AttributeError, KeyError):
            yield None


def describe(estimate: Estimate, endpoint: Endpoint, section: str) -> str:
    """The plan in one line."""
    plan = f"{section}: {estimate.hits} answers in the store, {estimate.new_calls} calls to buy"
    if not estimate.new_calls:
        return plan
    variable = endpoint.api_key_variable or "no API key"
    over = []
    if estimate.new_calls > endpoint.max_calls:
        over.append(f"max_calls = {endpoint.max_calls}")
    if estimate.cost_usd_at_most > endpoint.max_cost_usd:
        over.append(f"max_cost_usd = {endpoint.max_cost_usd}")
    return (
        f"{plan} from {endpoint.model} at {host_of(endpoint)} ({variable}): about {estimate.input_tokens} tokens in, "
        f"at most {estimate.output_tokens_at_most} out, at most {estimate.cost_usd_at_most:.4f} USD"
        + (f"; may stop at {' and '.join(over)}" if over else "")
    )


def confirm_host(endpoint: Endpoint) -> None:
    """Have a host (with the API key's variable) confirmed once on this machine; loopback needs none.

    Raises:
        InputError: it was never confirmed, and nobody can be asked.
    """
    if is_loopback(endpoint):
        return
    entry = f"{host_of(endpoint)} {endpoint.api_key_variable}"
    if host_of(endpoint) in os.environ.get("LVLMVA_ALLOW_HOSTS", "").split() or entry in allowed_hosts():
        return
    if sys.stdin.isatty() and typer.confirm(f"Send pictures and {endpoint.api_key_variable} to {host_of(endpoint)}?"):
        allow_host(entry)
        return
    raise InputError(
        f"{host_of(endpoint)} was never used on this machine with {endpoint.api_key_variable}; agree once with "
        f"`lvlmva calls allow {host_of(endpoint)} --variable {endpoint.api_key_variable}`, or in scripts with "
        f"LVLMVA_ALLOW_HOSTS={host_of(endpoint)}"
    )


def allowed_hosts() -> list[str]:
    """Confirmed "host variable" pairs."""
    file = _hosts_file()
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def allow_host(entry: str) -> None:
    """Remember a confirmed "host variable" pair in the user's configuration folder."""
    file = _hosts_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(entry + "\n")


def _hosts_file() -> Path:
    folder = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(folder) / "lvlmva" / "hosts"


async def _run(
    client: Client, items: Sequence[T], attempt: Callable[[T], Awaitable[S]], concurrency: int
) -> tuple[list[S | None], InputError | None]:
    async with client:
        with _progress(client, len(items)) as done:
            return await map_calls(items, attempt, concurrency, done)


@contextlib.contextmanager
def _progress(client: Client, total: int) -> Iterator[Callable[[], None]]:
    """A bar with rate, remaining time and cost so far, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[cost]:.4f} USD"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(client.section, total=total, rate=0.0, cost=0.0)
        started = time.monotonic()
        completed = 0

        def done() -> None:
            nonlocal completed
            completed += 1
            rate = completed / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=1, rate=rate, cost=client.spent.cost_usd)

        yield done


def _account(client: Client, started: float) -> str:
    spent = client.spent
    return (
        f"{client.section}: {spent.hits} answers from the store, {spent.calls} calls ({spent.attempts} attempts), "
        f"{spent.input_tokens} tokens in, {spent.output_tokens} out, {spent.cost_usd:.4f} USD, "
        f"{time.monotonic() - started:.1f} s"
    )


def _too_many(failed: list[str], total: int, section: str, share: float) -> str:
    name = section.partition(".")[0]
    return (
        f"{len(failed)} of {total} samples have no answer, more than {name}.max_failed_share = {share}; all answers "
        f"are kept; the last: {failed[-1]}"
    )


def _say(line: str) -> None:
    typer.echo(line, err=True)
