"""What the Judge is asked, and how its answer is read (LVLM-VA §4.2)."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvlmva_core.lvlm import first_version
from lvlmva_core.lvlm.calls import Call, Message, Record, answer_text
from lvlmva_core.lvlm.client import (
    CallFailedError,
    NotInStoreError,
    UnusableAnswerError,
    call_of,
    model_name,
    sampling_parameters,
)
from lvlmva_core.lvlm.offline import JUDGES
from lvlmva_core.lvlm.prompts import Prompts
from lvlmva_core.lvlm.records import NO_VERDICT, CritiqueRow, VerdictRow
from lvlmva_core.lvlm.settings import Endpoint, ModelJudge, StandInJudge

MOST_ANSWERS = 10  # to one critique, over all runs
QUOTED = 2000  # characters of an answer that is told to be wrong
AGAIN = (
    "This answer cannot be used: {problem}. Answer again with the JSON object alone: one entry for each of the "
    "colours {colours}, each with the verdict yes or no."
)
FORM = 'Whatever the form in the examples, answer with one JSON object of this form: {{"output": {{{entries}}}}}'


def judge_call(
    endpoint: Endpoint,
    prompts: Prompts,
    critique: str,
    colours: list[str],
    *,
    answer_format: str,
    earlier: list[tuple[str, str]],
) -> Call:
    """The call for one critique.

    Args:
        colours: of the regions that need a verdict.
        answer_format: "json_schema" (the server enforces the form), "prompt" (asked for in words only), or
            "json_schema_1" (the schema of the first version, a list without end; only to find what was bought with it).
        earlier: (answer, what was wrong with it) of each earlier attempt.

    Raises:
        InputError: the template cannot be filled.
        ValueError: another answer_format.
    """
    if answer_format not in ("json_schema", "json_schema_1", "prompt"):
        raise ValueError(f"unknown answer_format '{answer_format}'; expected json_schema, json_schema_1 or prompt")
    text = judge_text(prompts, critique, colours)
    parameters = sampling_parameters(endpoint)
    if answer_format != "prompt":
        form = verdict_schema if answer_format == "json_schema" else first_version.verdict_schema
        schema = {"name": "verdicts", "strict": True, "schema": form(colours)}
        parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
    if answer_format == "json_schema":
        entries = ", ".join(f'"{colour}": "yes" or "no"' for colour in colours)
        text = f"{text.rstrip()}\n\n{FORM.format(entries=entries)}"
    turns = [Message("user", (text,))]
    for answer, problem in earlier:
        again = AGAIN.format(problem=problem, colours=", ".join(colours))
        turns += [Message("assistant", (answer,)), Message("user", (again,))]
    return call_of(endpoint, turns, len(earlier), parameters)


def judge_text(prompts: Prompts, critique: str, colours: list[str]) -> str:
    """The words of a first call: the critique stands between two lines `fence_of` it, which it cannot forge.

    Raises:
        InputError: the template cannot be filled.
    """
    return prompts.render(critique=critique, regions=colours, fence=fence_of(critique))


def fence_of(critique: str) -> str:
    """The line before and after a critique: it holds the critique's own digest."""
    return f"CRITIQUE {hashlib.sha256(critique.encode()).hexdigest()[:16]}"


def verdict_schema(colours: list[str]) -> dict[str, Any]:
    """JSON schema that admits exactly one verdict for each colour.

    An object with a required property for each colour, in an object at the root: what OpenAI's strict mode, vLLM and
    llama.cpp all enforce. A list could be given a length, but not in all of them entries that differ.
    """
    verdict = {"type": "string", "enum": ["yes", "no"]}
    return _object({"output": _object(dict.fromkeys(colours, verdict))})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_answer(text: str, colours: list[str]) -> dict[str, str]:
    """Verdict ("yes" | "no") of each colour, from a Judge's answer that can be read in one way only.

    It is one JSON object, alone, in a code fence, after a block of reasoning, or with words around it. Its "output" is
    an object colour -> verdict or a list of {"color", "verdict"}; either may stand without "output" around it. Case and
    a full stop do not count, true is yes and false is no, further fields are passed over.

    Raises:
        ValueError: it cannot be read, or in more than one way; saying so in words that a model understands.
    """
    answer = _one_value(text)
    if isinstance(answer, dict) and "output" in answer:
        for name, other in answer.items():
            if name != "output" and _reads(other, colours):
                raise ValueError(f'there are verdicts in "output" and in {json.dumps(name)[:40]}')
        answer = answer["output"]
    elif isinstance(answer, dict) and not any(_is(name, colours) for name in answer):
        raise ValueError('it has no list "output"')
    return _verdicts(answer, colours)


def _one_value(text: str) -> Any:
    """The one JSON value of an answer."""
    said = text.rpartition("</think>")[2].strip()
    try:
        return json.loads(said, object_pairs_hook=_no_key_twice)
    except _TwiceError as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError):
        pass
    found = list(_values_within(said))
    if len(found) != 1:
        raise ValueError("it is not one JSON object")
    return found[0]


def _values_within(text: str) -> Iterator[Any]:
    """Objects of JSON that stand in a text side by side, and lists of them."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_key_twice)
    place = 0
    while (match := re.compile(r"\{|\[\s*\{").search(text, place)) is not None:
        try:
            value, place = decoder.raw_decode(text, match.start())
            yield value
        except _TwiceError as error:
            raise ValueError(str(error)) from None
        except (ValueError, RecursionError):
            if '"' in text[match.start() : match.start() + 20]:  # it began like JSON: what is inside is but a part
                raise ValueError("it is not one JSON object") from None
            place = match.end()


class _TwiceError(ValueError):
    pass


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name.strip().casefold() for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _TwiceError(f"{json.dumps(name)[:40]} comes twice in one object")
    return dict(pairs)


def _is(name: Any, colours: list[str]) -> bool:
    return isinstance(name, str) and name.strip().casefold() in colours


def _reads(value: Any, colours: list[str]) -> bool:
    try:
        _verdicts(value, colours)
    except ValueError:
        return False
    return True


def _verdicts(answer: Any, colours: list[str]) -> dict[str, str]:
    if isinstance(answer, dict):
        entries = list(answer.items())
    elif isinstance(answer, list):
        entries = [_entry(each) for each in answer]
    else:
        raise ValueError('it has no list "output"')
    verdicts: dict[str, str] = {}
    for name, said in entries:
        if not _is(name, colours):
            raise ValueError(f"there is no region {json.dumps(name)[:40]}")
        colour = name.strip().casefold()
        if colour in verdicts:
            raise ValueError(f"{colour} comes twice")
        verdict = _yes_or_no(said)
        if verdict is None:
            raise ValueError(f"the verdict of {colour} is neither yes nor no")
        verdicts[colour] = verdict
    missing = [colour for colour in colours if colour not in verdicts]
    if missing:
        raise ValueError(f"there is no verdict for {', '.join(missing)}")
    return verdicts


def _entry(entry: Any) -> tuple[Any, Any]:
    fields = {name.strip().casefold(): value for name, value in entry.items()} if isinstance(entry, dict) else {}
    if not {"color", "verdict"} <= fields.keys():
        raise ValueError('an entry is not an object with "color" and "verdict"')
    return fields["color"], fields["verdict"]


def _yes_or_no(said: Any) -> str | None:
    if isinstance(said, bool):
        return "yes" if said else "no"
    word = said.strip().rstrip(".!").casefold() if isinstance(said, str) else ""
    return word if word in ("yes", "no") else None


@dataclass(frozen=True)
class Judged:
    """verdicts: colour -> "yes" | "no", or None and `failure` says why. records: of all attempts, in order.

    beyond: keys of answers that were bought beyond unusable ones in the store. looked_up: records that were found
    without being asked for.
    """

    verdicts: dict[str, str] | None
    records: list[Record]
    failure: str | None
    beyond: frozenset[str] = frozenset()
    looked_up: int = 0


async def ask_judge(
    ask: Callable[[Call], Awaitable[Record]],
    stored: Callable[[Call], Record | None],
    bought_now: Container[str],
    prompts: Prompts,
    critique: str,
    colours: list[str],
    *,
    config: ModelJudge,
) -> Judged:
    """Ask until an answer is valid, telling the model each time what was wrong.

    An answer that is refused, cut off, filtered or empty is an attempt like one that cannot be read. Those in the store
    are gone beyond: this run may buy `config.max_attempts` more, up to ten in all.

    Args:
        ask: buys what is not in the store. stored: only looks. bought_now: keys that were bought in this run.
    """

    def call(answer_format: str, earlier: list[tuple[str, str]]) -> Call:
        return judge_call(config.endpoint, prompts, critique, colours, answer_format=answer_format, earlier=earlier)

    first = "json_schema_1" if config.answer_format == "json_schema" else config.answer_format
    found = _bought_before(lambda earlier: stored(call(first, earlier)), colours)
    if found is not None:
        return found
    records: list[Record] = []
    earlier: list[tuple[str, str]] = []
    bought = from_store = 0
    beyond: set[str] = set()
    while bought < config.max_attempts and len(earlier) < MOST_ANSWERS:
        asked = call(config.answer_format, earlier)
        try:
            records.append(await ask(asked))
            answer, problem = answer_text(records[-1]), None
        except UnusableAnswerError as error:
            answer, problem = _quoted(error.text), str(error)
        except NotInStoreError:
            if len(earlier) >= config.max_attempts:
                break
            raise
        except CallFailedError as error:
            return Judged(None, records, str(error), frozenset(beyond))
        was_stored = asked.key() not in bought_now
        bought += not was_stored
        if not was_stored and from_store:
            beyond.add(asked.key())
        from_store += was_stored
        if problem is None:
            try:
                return Judged(read_answer(answer, colours), records, None, frozenset(beyond))
            except ValueError as error:
                problem = str(error)
        earlier.append((answer, problem))
    return Judged(None, records, f"no valid answer in {len(earlier)} attempts ({earlier[-1][1]})", frozenset(beyond))


def _bought_before(stored: Callable[[list[tuple[str, str]]], Record | None], colours: list[str]) -> Judged | None:
    """What the first version bought, if it is valid in the end."""
    records: list[Record] = []
    earlier: list[tuple[str, str]] = []
    while (record := stored(earlier)) is not None:
        records.append(record)
        answer = answer_text(record)
        try:
            return Judged(read_answer(answer, colours), records, None, looked_up=len(records))
        except ValueError:
            problem = first_version.problem_of(answer, colours)
            if problem is None:
                return None
            earlier.append((answer, problem))
    return None


def _quoted(answer: str) -> str:
    return answer[:QUOTED] + (" ..." if len(answer) > QUOTED else "") if answer.strip() else "(no answer)"


def judge_by_stand_in(config: StandInJudge, critiques: Sequence[CritiqueRow]) -> list[VerdictRow]:
    """Rows of what a stand-in reads in critiques; one that it cannot read is a failure."""
    rows = []
    for row in critiques:
        if row.critique is None:
            rows.append(verdict_row(row, config.judge, {}))
            continue
        try:
            found = JUDGES[config.judge](row.critique, [each.region for each in row.regions])
            rows.append(verdict_row(row, config.judge, found))
        except ValueError as error:
            rows.append(verdict_row(row, config.judge, {}, failure=f"unreadable critique: {error}"))
    return rows


def row_of_judged(row: CritiqueRow, config: ModelJudge, result: Judged | str | None) -> VerdictRow:
    """A row of what a model judged; of why it did not (a str); or None, of a critique that failed."""
    name = model_name(config.endpoint)
    if result is None:
        return verdict_row(row, name, {})
    if isinstance(result, str):
        return verdict_row(row, name, {}, failure=NO_VERDICT + result)
    if result.verdicts is None:
        return verdict_row(row, name, {}, failure=f"{NO_VERDICT}{result.failure}", records=result.records)
    found = {each.region: result.verdicts[each.color] for each in row.regions}
    return verdict_row(row, name, found, records=result.records)


def verdict_row(
    row: CritiqueRow,
    judge: str,
    verdicts: Mapping[int, str],
    *,
    failure: str | None = None,
    records: Sequence[Record] = (),
) -> VerdictRow:
    """A row of verdicts, region -> "yes" | "no"; a failure of the critique is carried over."""
    return VerdictRow.model_validate(
        {
            **{name: getattr(row, name) for name in ("sample", "segmentation", "critic", "settings")},
            "failure": failure or row.failure,
            "judge": judge,
            "verdicts": [
                {"region": each.region, "color": each.color, "verdict": verdicts[each.region]}
                for each in row.regions
                if verdicts
            ],
            "records": list(records),
            **({} if row.not_asked is None else {"not_asked": row.not_asked}),
        }
    )


def summarise(rows: Sequence[VerdictRow]) -> dict[str, Any]:
    """Counts for the metrics file: who judged how many samples and regions, and why samples stay without verdicts."""
    verdicts = Counter(each.verdict for row in rows for each in row.verdicts)
    failures = Counter(row.failure for row in rows if row.failure is not None)
    return {
        "critic": sorted({name for row in rows for name in row.critics()}),
        "critic_settings": rows[0].settings if rows else {},
        "judge": sorted({row.judge for row in rows}),
        "samples": len(rows),
        "samples_judged": sum(row.failure is None for row in rows),
        "failures": dict(sorted(failures.items())),
        "regions_yes": verdicts["yes"],
        "regions_no": verdicts["no"],
        **_not_asked(rows),
    }


def _not_asked(rows: Sequence[VerdictRow]) -> dict[str, int]:
    left = [row.not_asked for row in rows if row.not_asked is not None]
    if not left:
        return {}
    return {
        "regions_not_asked": sum(len(each.regions) for each in left),
        "samples_not_asked": sum(each.calls_saved > 0 for each in left),
        "critic_calls_saved": sum(each.calls_saved for each in left),
    }
