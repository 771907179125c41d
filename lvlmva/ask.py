"""What critique and judge share: the call store and its hydration, the plan before anything is spent, the asking."""

import asyncio
import contextlib
import functools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import typer

from lvlmva.hydrate import committed_versions, open_store, version_at_head
from lvlmva.ledger import open_ledger
from lvlmva.shared import exchange_calls, share_calls
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.batches import Collector, Exported, export_calls, rate_of_input, under_way
from lvlmva_core.lvlm.budget import Estimate, Spent, cost_usd, estimate_calls, estimate_input_tokens, price_is_known
from lvlmva_core.lvlm.calls import Call, CallStore, Record, check_record, note
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.client import (
    CallFailedError,
    Client,
    NotInStoreError,
    Question,
    check_endpoint,
    host_of,
    is_loopback,
    is_under_way,
    map_calls,
)
from lvlmva_core.lvlm.critic import ask_critic, critic_call, row_of_answer, why_no_critique
from lvlmva_core.lvlm.judge import Judged, ask_judge, judge_call, row_of_judged
from lvlmva_core.lvlm.prompts import load_critic_prompts, load_judge_prompts
from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow
from lvlmva_core.lvlm.settings import Endpoint, ModelCritic, ModelJudge
from lvlmva_core.progress import tell
from lvlmva_core.store import canonical_json

T = TypeVar("T")
S = TypeVar("S")

NAMED_AT_MOST = 5  # samples in a message
CALLS_KEPT = 256  # of half a megabyte each


def criticise_by_model(
    config: ModelCritic,
    cases: Sequence[Case],
    class_names: list[str],
    folder: Path,
    out: Path,
    *,
    dry_run: bool,
    section: str = "critique.endpoint",
    bill: Spent | None = None,
    batch: Path | None = None,
) -> list[CritiqueRow]:
    """Rows of a model's critiques, bought as far as the store lacks them; none after a dry run.

    Args:
        folder: of the prompts. out: where the rows will be written. section, bill: as for `ask_all`. batch: folder to
            export the missing calls to.

    Returns:
        `config.samples` rows a case, one after the other.
    """
    prompts = load_critic_prompts(folder, class_names)
    named = config.name_spurious_feature

    def call_of(case: Case, index: int = 0) -> Call:
        return critic_call(
            config.endpoint,
            prompts,
            case.class_name,
            case.picture,
            case.segments,
            name_spurious_feature=named,
            overlay=config.overlay,
            index=index,
        )

    async def ask(client: Client, item: tuple[Case, int], first: Question) -> Record:
        case, number = item

        async def answer(attempt: int) -> Record:
            # the others' indices are passed over; with one answer, attempts are counted 0, 1, 2, ...
            index = number + attempt * config.samples
            later = first if attempt == 0 else _question(lambda: call_of(case, index), case.sample)
            return await client.ask(
                Question(later.keys, later.build, case.sample, lambda text: why_no_critique(text, colours), colours)
            )

        colours = list(case.regions().values())
        return await ask_critic(answer, max_attempts=config.max_attempts, beyond=client.beyond.add)

    asked = [(case, number) for case in cases if case.regions() for number in range(config.samples)]
    results = ask_all(
        asked,
        name_of=lambda item: item[0].sample,
        first_call=lambda item: call_of(*item),
        work=ask,
        failure_of=lambda record: None,
        config=config,
        section=section,
        bill=bill,
        out=out,
        replay=config.critic == "replay",
        pictures=True,
        dry_run=dry_run,
        batch=batch,
    )
    if results is None:
        return []
    settings = {"name_spurious_feature": named, "overlay": config.overlay, "prompt": prompts.digest}
    found = dict(zip(((case.sample, number) for case, number in asked), results, strict=True))
    return [
        row_of_answer(
            case, config, settings if (case.sample, number) in found else {}, found.get((case.sample, number), "")
        )
        for case in cases
        for number in range(config.samples)
    ]


def judge_by_model(
    config: ModelJudge,
    critiques: Sequence[CritiqueRow],
    folder: Path,
    out: Path,
    *,
    dry_run: bool,
    batch: Path | None = None,
) -> list[VerdictRow]:
    """Rows of a model's verdicts on critiques that have one; none after a dry run or an export to `batch`."""
    prompts = load_judge_prompts(folder)

    def colours_of(row: CritiqueRow) -> list[str]:
        return [each.color for each in row.regions]

    def first_call(row: CritiqueRow) -> Call:
        return judge_call(
            config.endpoint,
            prompts,
            row.critique or "",
            colours_of(row),
            answer_format=config.answer_format,
            earlier=[],
        )

    async def ask(client: Client, row: CritiqueRow, first: Question) -> Judged:
        judged = await ask_judge(
            lambda call: client.ask(_question(lambda: call, row.sample, call)),
            lambda call: client.calls.find(call.keys()),
            client.bought,
            prompts,
            row.critique or "",
            colours_of(row),
            config=config,
        )
        client.beyond |= judged.beyond
        client.spent.hits += judged.looked_up
        return judged

    asked = [row for row in critiques if row.critique is not None]
    results = ask_all(
        asked,
        name_of=lambda row: row.sample,
        first_call=first_call,
        work=ask,
        failure_of=lambda judged: judged.failure,
        config=config,
        section="judge.endpoint",
        out=out,
        replay=config.judge == "replay",
        pictures=False,
        dry_run=dry_run,
        batch=batch,
    )
    if results is None:
        return []
    found = iter(results)
    return [row_of_judged(row, config, next(found) if row.critique is not None else None) for row in critiques]


def ask_all(
    items: Sequence[T],
    *,
    name_of: Callable[[T], str],
    first_call: Callable[[T], Call],
    work: Callable[[Client, T, Question], Awaitable[S]],
    failure_of: Callable[[S], str | None],
    config: ModelCritic | ModelJudge,
    section: str,
    out: Path,
    replay: bool,
    pictures: bool,
    dry_run: bool,
    bill: Spent | None = None,
    batch: Path | None = None,
) -> list[S | str] | None:
    """Ask about each item, from the store where possible; say before what is bought, and after what it took.

    Args:
        name_of: the sample of an item, for messages. first_call: the call that an item starts with.
        work: asks about one item, of which the first question is given; raises CallFailedError where it gets no
            answer. failure_of: why a result is of no use, or None.
        section: of params.yaml that holds the endpoint. out: the stage's output, whose committed versions are
            searched for answers before anything is bought. replay: never send. pictures: whether calls hold some.
        bill: what others bought in this run, which counts against the limits; what is bought here is added.
        batch: folder that gets the missing calls as files for a Batch API, in the place of buying them.

    Returns:
        For each item the result, or the reason (str) why there is none; None after a dry run or an export.

    Raises:
        InputError: nothing can be bought, the budget is spent, too many failed, or replay lacks answers.
    """
    endpoint, share = config.endpoint, config.max_failed_share
    replay = replay or os.environ.get("LVLMVA_OFFLINE", "") not in ("", "0")
    calls = open_calls(out)
    shared = share_calls(calls)
    survey = _survey(items, first_call, name_of)
    may_pay = not (replay or dry_run)

    def is_missing() -> bool:
        return any(calls.find(question.keys) is None for question in survey.questions)

    def meet(keys: Iterable[str]) -> None:
        exchange_calls(shared, keys, section, put=not dry_run, must=may_pay and batch is None and is_missing())

    @functools.cache  # before the plan where it shows that something is missing, else when a later call turns out to be
    def fill() -> None:
        required = may_pay and not endpoint.allow_unhydrated
        # what stands in the shared store stands above what is older elsewhere
        hydrate(calls, out, required=required, keep_present=shared is not None)

    @functools.cache
    def prepare() -> str:
        fill()
        if not may_pay:
            return ""
        key = check_endpoint(endpoint, os.environ, pictures=pictures)
        confirm_host(endpoint)
        return key

    first_keys = [key for question in survey.questions for key in question.keys]
    meet(first_keys)
    if is_missing():
        fill()
        meet(first_keys)
    estimate = survey.estimate(calls, endpoint)
    _say(describe(estimate, endpoint, section))
    if (ledger := open_ledger()) is not None and dry_run:
        ledger.planned.append((section, estimate))
    if batch is not None:
        collector = Collector(endpoint, section, calls, prepare, True, save_elsewhere, shared=shared)
        asyncio.run(_run(collector, range(len(items)), functools.partial(_look_up, work, items, survey, collector), 1))
        known = ((record["response"], tokens) for record, tokens in survey.known(calls))
        exported = export_calls(calls.store, collector.missing, endpoint, section, batch, rate=rate_of_input(known))
        _say_exported(exported, endpoint, section)
        return None
    if dry_run:
        return None
    beside = os.environ.get("LVLMVA_BESIDE_BATCHES", "") not in ("", "0")
    waiting = set() if beside or replay else under_way(calls.store)
    count = sum(
        question.keys[0] in waiting and calls.find(question.keys) is None
        for question in {each.keys[0]: each for each in survey.questions}.values()
    )
    if count:
        raise InputError(is_under_way(count))
    if estimate.new_calls:
        prepare()
    client = Client(endpoint, section, calls, prepare, replay, save_elsewhere, under_way=waiting, shared=shared)
    if ledger is not None:
        ledger.hold(client.budget)
    elif bill is not None:
        client.budget.earlier = replace(bill)
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
            # where nothing succeeded yet, it may be a failure of all calls, which says more
            if len(failed) > share * len(items) and not client.doubts:
                raise InputError(_too_many(failed, len(items), section, share))
        return result

    started = time.monotonic()
    results, error = asyncio.run(_run(client, range(len(items)), attempt, endpoint.concurrency))
    if error is None:
        meet(client.answered)
    for line in _account(client, started):
        _say(line)
    spent = {name: value for name, value in asdict(client.spent).items() if value or name in ("calls", "hits")}
    with contextlib.suppress(*([InputError] if error is not None else [])):  # the first error says more
        note(calls.store, "runs.jsonl", {"section": section, "model": endpoint.model, **spent})
    if bill is not None:
        bill.calls += client.spent.calls
        bill.cost_usd += client.spent.cost_usd
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
    if client.doubts and not client.succeeded:
        raise client.doubts[0]
    if len(failed) > share * len(items):
        raise InputError(_too_many(failed, len(items), section, share))
    if failed:
        name = section.partition(".")[0]
        _say(
            f"{name}: {len(failed)} of {len(items)} samples failed and are left out (the last: {failed[-1]}); "
            "`lvlmva calls retry` and `dvc repro` ask again about them"
        )
    return [result for result in results if result is not None]


async def _look_up(
    work: Callable[[Client, T, Question], Awaitable[S]],
    items: Sequence[T],
    survey: "_Survey",
    client: Client,
    place: int,
) -> None:
    with contextlib.suppress(NotInStoreError, CallFailedError):
        await work(client, items[place], survey.questions[place])


def _say_exported(exported: Exported, endpoint: Endpoint, section: str) -> None:
    for batch, file in zip(exported.batches, exported.files, strict=True):
        typer.echo(f"{file}: {len(batch.keys)} calls, {file.stat().st_size / 1e6:.1f} MB")
    number = sum(len(batch.keys) for batch in exported.batches)
    cost = f"at most {exported.cost_usd_at_most:.4f} USD" if price_is_known(endpoint) else "at an unknown price"
    _say(f"{section}: {number} calls exported, {cost}; nothing was sent")
    if exported.under_way:
        _say(f"{section}: {exported.under_way} calls are under way in a batch and are left out")
    if exported.beyond_budget:
        _say(
            f"{section}: {exported.beyond_budget} calls are left out: beyond max_calls = {endpoint.max_calls} or "
            f"max_cost_usd = {endpoint.max_cost_usd}"
        )


def save_place() -> Path:
    """The file that `save_elsewhere` appends to."""
    return Path(tempfile.gettempdir()) / f"lvlmva-unsaved-{os.getpid()}.jsonl"


def save_elsewhere(record: Record) -> str:
    """Keep a record that was paid where the store cannot be written: in the folder for temporary files; says where.

    Raises:
        InputError: that cannot be written either; half of a record does not stay behind.
    """
    file = save_place()
    with _SAVING:
        before = file.stat().st_size if file.exists() else 0
        try:
            with file.open("ab") as lines:
                lines.write(canonical_json(record) + b"\n")
                lines.flush()
                os.fsync(lines.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(file, before)
            raise InputError(f"{file}: {error.strerror}") from error
    return str(file)


_SAVING = threading.Lock()  # several answers may come at once


def _question(build: Callable[[], Call], sample: str, call: Call | None = None) -> Question:
    return Question((call or build()).keys(), build, sample)


@dataclass(frozen=True)
class _Survey:
    """The first question of each item, and the input tokens that each would take."""

    questions: list[Question]
    tokens: list[int]

    def _pairs(self) -> Iterator[tuple[Question, int]]:
        return zip(self.questions, self.tokens, strict=True)

    def known(self, calls: CallStore) -> Iterator[tuple[Record, int]]:
        """The answers in the store, each with the input tokens that were estimated."""
        for question, tokens in self._pairs():
            if (record := calls.find(question.keys)) is not None:
                yield record, tokens

    def estimate(self, calls: CallStore, endpoint: Endpoint) -> Estimate:
        """What is in the store and what is to be bought; one call that several samples share is bought once."""
        tokens_of = {question.keys[0]: (question, tokens) for question, tokens in self._pairs()}
        new = [tokens for question, tokens in tokens_of.values() if calls.find(question.keys) is None]
        return estimate_calls(endpoint, hits=len(tokens_of) - len(new), tokens=new)


def _survey(items: Sequence[T], first_call: Callable[[T], Call], name_of: Callable[[T], str]) -> _Survey:
    questions, tokens = [], []
    for place, item in enumerate(items):
        call = first_call(item)
        tokens.append(estimate_input_tokens(call))
        # pictures are large: the first calls are kept for sending, later ones are built a second time
        build = (lambda call=call: call) if place < CALLS_KEPT else (lambda item=item: first_call(item))
        questions.append(Question(call.keys(), build, name_of(item)))
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


def hydrate(calls: CallStore, out: Path, *, required: bool, keep_present: bool = False) -> int:
    """Fill the store from all committed versions of an output; says how many answers were new.

    keep_present: as `CallStore.take_in` has it.
    """
    new = 0
    for copy in committed_versions(out.as_posix(), calls.store, required=required):
        added, refused = calls.take_in(_records_in(copy), out.as_posix(), keep_present=keep_present)
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
            row = json.loads(line)
            for part in (row, *(row.get("answers") or [])):
                yield from ([part["record"]] if part.get("record") else part.get("records") or [])
                yield from part.get("judged") or []
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
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
    cost = f"at most {estimate.cost_usd_at_most:.4f} USD"
    if not price_is_known(endpoint):
        cost = (
            f"at an unknown price ({section}.usd_per_million_input_tokens and ..._output_tokens are not set: "
            f"max_cost_usd cannot hold, max_calls = {endpoint.max_calls} does)"
        )
    elif endpoint.service_tier is not None and endpoint.tier_usd_per_million_input_tokens is not None:
        tier = endpoint.service_tier
        least = cost_usd(endpoint, estimate.input_tokens, estimate.output_tokens_at_most, tier=tier)
        cost += f" ({least:.4f} if all are served as '{tier}')"
    return (
        f"{plan} from {endpoint.model} at {host_of(endpoint)} ({variable}): about {estimate.input_tokens} tokens in, "
        f"at most {estimate.output_tokens_at_most} out, {cost}"
        + (f"; may stop at {' and '.join(over)}" if over else "")
    )


def confirm_host(endpoint: Endpoint, *, ask: bool = True) -> None:
    """Have a host (with the API key's variable) confirmed once on this machine; loopback needs none.

    ask: at the terminal, if there is one.

    Raises:
        InputError: it was never confirmed, and nobody can be asked.
    """
    if is_loopback(endpoint):
        return
    entry = f"{host_of(endpoint)} {endpoint.api_key_variable}"
    if host_of(endpoint) in os.environ.get("LVLMVA_ALLOW_HOSTS", "").split() or entry in allowed_hosts():
        return
    if (
        ask
        and sys.stdin.isatty()
        and typer.confirm(f"Send pictures and {endpoint.api_key_variable} to {host_of(endpoint)}?")
    ):
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
) -> tuple[list[S | None], Exception | None]:
    async with client:
        with _progress(client, len(items)) as done:
            return await map_calls(items, attempt, concurrency, done)


@contextlib.contextmanager
def _progress(client: Client, total: int) -> Iterator[Callable[[], None]]:
    """A bar with rate, remaining time and cost so far, on a terminal only."""
    completed, note = 0, tell()
    if not sys.stderr.isatty():

        def told() -> None:
            nonlocal completed
            completed += 1
            note(completed, total)

        yield told
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

        def done() -> None:
            nonlocal completed
            completed += 1
            rate = completed / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=1, rate=rate, cost=client.spent.cost_usd)

        yield done


def _account(client: Client, started: float) -> Iterator[str]:
    """What a run took, in a line, and what was out of the ordinary in lines of their own."""
    spent, section = client.spent, client.section
    yield (
        f"{section}: {spent.hits} answers from the store, {spent.calls} calls ({spent.attempts} attempts), "
        f"{spent.input_tokens} tokens in, {spent.output_tokens} out, {spent.cost_usd:.4f} USD, "
        f"{time.monotonic() - started:.1f} s"
    )
    beyond = client.beyond & client.bought
    if beyond:
        yield f"{section}: {len(beyond)} answers were asked for beyond unusable ones in the store"
    if spent.unreadable:
        yield f"{section}: {spent.unreadable} answers came, could not be read, and were booked as paid"
    if spent.unanswered:
        yield f"{section}: {spent.unanswered} requests got no answer, may be charged, and were booked as paid"
    if spent.other_tier:
        yield (
            f"{section}: {spent.other_tier} requests went to the standard tier at its price, since "
            f"'{client.endpoint.service_tier}' had no capacity (without_capacity: standard)"
        )
    if spent.short:
        yield f"warning: {section}: {short_inputs(spent)}"
    if spent.elsewhere:
        place = save_place()
        yield f"{section}: {spent.elsewhere} answers were paid and are kept in {place}, since the store took none"
    if spent.unshared:
        yield (
            f"warning: {section}: {spent.unshared} answers are on this machine and did not reach the shared store; the "
            "next run or `lvlmva calls push` puts them there"
        )
    if spent.lost:
        yield f"warning: {section}: {spent.lost} answers were paid and could be kept nowhere; they are lost"
    for name, count in sorted(spent.served.items()):
        yield f"warning: {section}: {count} answers came from '{name}'; '{client.endpoint.model}' was asked for"


def short_inputs(spent: Spent) -> str:
    """What it means that answers state too few input tokens."""
    return (
        f"{spent.short} of {spent.calls} answers state fewer tokens in than what was sent must take: pictures may have "
        "been dropped, or the prompt cut off (docs/critics.md, 'Too few tokens')"
    )


def _too_many(failed: list[str], total: int, section: str, share: float) -> str:
    name = section.partition(".")[0]
    return (
        f"{len(failed)} of {total} samples have no answer, more than {name}.max_failed_share = {share}; all answers "
        f"are kept; the last: {failed[-1]}"
    )


def _say(line: str) -> None:
    typer.echo(line, err=True)
