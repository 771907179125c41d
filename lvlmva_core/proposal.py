"""A model is asked how the specification should change, given the experts' corrections (an extension)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from lvlmva_core.corrections import Judged
from lvlmva_core.lvlm.calls import Call, Message
from lvlmva_core.lvlm.client import call_of
from lvlmva_core.lvlm.judge import fence_of
from lvlmva_core.lvlm.prompts import Prompts, Specification
from lvlmva_core.lvlm.settings import Endpoint

MOST_TOLD = 60  # corrections in a question
LONGEST_TOLD = 300  # characters of what was said about one
SAYS = {"yes": "relevant", "no": "spurious or irrelevant"}


@dataclass(frozen=True)
class Proposal:
    """A model's answer. why: its reason. specification: as it would be."""

    specification: Specification
    why: str


def proposal_call(
    endpoint: Endpoint, prompts: Prompts, now: Specification, corrections: Sequence[Judged], *, index: int = 0
) -> Call:
    """The call that asks for a change. It holds no sample id and no picture; experts' notes and critiques are in it.

    Args:
        now: the specification. corrections: all of them; MOST_TOLD are told, of each class in turn, those that hold
            most of the positive attribution first. index: 0 for the first answer, then 1, 2, ... beyond unusable ones.

    Raises:
        InputError: the template cannot be filled.
    """
    told = _in_turn(corrections)[:MOST_TOLD]
    lines = "\n".join(_line(each) for each in told)
    text = prompts.render(
        picture=" ".join(now.picture.split()),
        classes={name: " ".join(words.split()) for name, words in now.classes.items()},
        spurious_features=[" ".join(feature.split()) for feature in now.spurious_features],
        corrections=lines,
        count=len(told),
        total=len(corrections),
        fence=fence_of(lines).replace("CRITIQUE", "CORRECTIONS"),
    )
    return call_of(endpoint, [Message("user", (text,))], index)


def read_proposal(text: str, now: Specification) -> Proposal:
    """The specification that an answer proposes.

    Raises:
        ValueError: it cannot be read, in words that say why.
    """
    said = text.rpartition("</think>")[2]
    start = said.find("{")
    try:
        if start < 0:
            raise ValueError("no object")
        answer, _ = json.JSONDecoder().raw_decode(said[start:])
    except (ValueError, RecursionError):
        raise ValueError("it holds no JSON object") from None
    if not isinstance(answer, dict):
        raise ValueError("it holds no JSON object")
    classes, features, why = (answer.get(name) for name in ("classes", "spurious_features", "why"))
    if not isinstance(classes, dict) or not all(_is_text(each) for each in classes.values()):
        raise ValueError('its "classes" are no object of texts')
    if unknown := [name for name in classes if name not in now.classes]:
        raise ValueError(f"there is no class {json.dumps(unknown[0])[:40]}")
    if not isinstance(features, list) or not all(_is_text(each) for each in features):
        raise ValueError('its "spurious_features" are no list of texts')
    changed = {name: " ".join(classes[name].split()) if name in classes else old for name, old in now.classes.items()}
    plain = [" ".join(feature.split()) for feature in features]
    return Proposal(
        Specification(picture=now.picture, classes=changed, spurious_features=plain),
        why if isinstance(why, str) else "",
    )


def why_no_proposal(text: str, now: Specification) -> str | None:
    """Why a text proposes nothing, or None."""
    try:
        read_proposal(text, now)
    except ValueError as error:
        return str(error)
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() not in ("", "~", "null")


def _in_turn(corrections: Sequence[Judged]) -> list[Judged]:
    of_class: dict[str, list[Judged]] = {}
    for each in sorted(corrections, key=lambda each: (each.class_name, -each.share)):
        of_class.setdefault(each.class_name, []).append(each)
    longest = max(map(len, of_class.values()), default=0)
    return [of_class[name][n] for n in range(longest) for name in sorted(of_class) if n < len(of_class[name])]


def _line(each: Judged) -> str:
    class_name = json.dumps(each.class_name, ensure_ascii=False)
    line = (
        f"- class {class_name}, a region at the {each.place} with {each.share:.0%} of what speaks for the class. "
        f"Critic: {SAYS[each.critic]}. Experts: {SAYS[each.expert or each.critic]}."
    )
    for name, texts in (("critic", [each.said]), ("experts", each.notes)):
        words = " ".join(" / ".join(text for text in texts if text).split())
        if words:
            line += f" The {name} wrote: {json.dumps(words[:LONGEST_TOLD], ensure_ascii=False)}."
    return line
