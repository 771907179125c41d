"""What the Judge is asked, and how its answer is checked (LVLM-VA §4.2)."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from lvlmva_core.lvlm.calls import Call, Message, Record, answer_text
from lvlmva_core.lvlm.client import CallFailedError, sampling_parameters
from lvlmva_core.lvlm.prompts import Prompts
from lvlmva_core.lvlm.settings import Endpoint

AGAIN = (
    "This answer cannot be used: {problem}. Answer again with the JSON object alone: one entry for each of the "
    "colours {colours}, each with the verdict yes or no."
)


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
        answer_format: "json_schema" (the server enforces the form) or "prompt" (asked for in words only).
        earlier: (answer, what was wrong with it) of each earlier attempt.

    Raises:
        InputError: the template cannot be filled.
    """
    turns = [Message("user", (judge_text(prompts, critique, colours),))]
    for answer, problem in earlier:
        again = AGAIN.format(problem=problem, colours=", ".join(colours))
        turns += [Message("assistant", (answer,)), Message("user", (again,))]
    parameters = sampling_parameters(endpoint)
    if answer_format == "json_schema":
        schema = {"name": "verdicts", "strict": True, "schema": verdict_schema(colours)}
        parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
    return Call(endpoint.model, endpoint.revision, tuple(turns), parameters, index=len(earlier))


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
    """JSON schema of an answer; an object at the root, as hosted servers want it."""
    entry = {
        "type": "object",
        "properties": {
            "color": {"type": "string", "enum": colours},
            "verdict": {"type": "string", "enum": ["yes", "no"]},
        },
        "required": ["color", "verdict"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"output": {"type": "array", "items": entry}},
        "required": ["output"],
        "additionalProperties": False,
    }


def read_answer(text: str, colours: list[str]) -> dict[str, str]:
    """Verdict ("yes" | "no") of each colour, from a Judge's answer: JSON alone or in one code fence.

    Raises:
        ValueError: saying in words that a model understands what is wrong with the answer.
    """
    stripped = text.strip()
    if stripped.startswith("```") and stripped.endswith("```") and "\n" in stripped:
        stripped = stripped[stripped.index("\n") : -3]
    try:
        answer = json.loads(stripped)
    except (ValueError, RecursionError):
        raise ValueError("it is not one JSON object") from None
    entries = answer.get("output") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise ValueError('it has no list "output"')
    verdicts: dict[str, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"color", "verdict"}:
            raise ValueError('an entry is not an object with "color" and "verdict"')
        colour, verdict = entry["color"], entry["verdict"]
        if colour not in colours:
            raise ValueError(f"there is no region {json.dumps(colour)[:40]}")
        if colour in verdicts:
            raise ValueError(f"{colour} comes twice")
        if verdict not in ("yes", "no"):
            raise ValueError(f"the verdict of {colour} is neither yes nor no")
        verdicts[colour] = verdict
    missing = [colour for colour in colours if colour not in verdicts]
    if missing:
        raise ValueError(f"there is no verdict for {', '.join(missing)}")
    return verdicts


@dataclass(frozen=True)
class Judged:
    """verdicts: colour -> "yes" | "no", or None and `failure` says why. records: of all attempts, in order."""

    verdicts: dict[str, str] | None
    records: list[Record]
    failure: str | None


async def ask_judge(
    ask: Callable[[Call], Awaitable[Record]],
    endpoint: Endpoint,
    prompts: Prompts,
    critique: str,
    colours: list[str],
    *,
    answer_format: str,
    max_attempts: int,
) -> Judged:
    """Ask until an answer is valid, telling the model each time what was wrong."""
    records: list[Record] = []
    earlier: list[tuple[str, str]] = []
    for _ in range(max_attempts):
        call = judge_call(endpoint, prompts, critique, colours, answer_format=answer_format, earlier=earlier)
        try:
            records.append(await ask(call))
        except CallFailedError as error:
            return Judged(None, records, str(error))
        answer = answer_text(records[-1])
        try:
            return Judged(read_answer(answer, colours), records, None)
        except ValueError as error:
            earlier.append((answer, str(error)))
    return Judged(None, records, f"no valid answer in {max_attempts} attempts ({earlier[-1][1]})")
