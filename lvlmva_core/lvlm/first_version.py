"""The Judge of the first version: the schema that it sent and what it said of answers, by which its calls are found."""

import json
from typing import Any


def verdict_schema(colours: list[str]) -> dict[str, Any]:
    """JSON schema of an answer: a list of colours and verdicts, which may grow without end and repeat a colour."""
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


def problem_of(text: str, colours: list[str]) -> str | None:
    """What was said to be wrong with an answer, or None: these words are part of the next attempt's key."""
    stripped = text.strip()
    if stripped.startswith("```") and stripped.endswith("```") and "\n" in stripped:
        stripped = stripped[stripped.index("\n") : -3]
    try:
        answer = json.loads(stripped)
    except (ValueError, RecursionError):
        return "it is not one JSON object"
    entries = answer.get("output") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        return 'it has no list "output"'
    seen = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"color", "verdict"}:
            return 'an entry is not an object with "color" and "verdict"'
        colour, verdict = entry["color"], entry["verdict"]
        if colour not in colours:
            return f"there is no region {json.dumps(colour)[:40]}"
        if colour in seen:
            return f"{colour} comes twice"
        if verdict not in ("yes", "no"):
            return f"the verdict of {colour} is neither yes nor no"
        seen.append(colour)
    missing = [colour for colour in colours if colour not in seen]
    return f"there is no verdict for {', '.join(missing)}" if missing else None
