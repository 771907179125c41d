"""A specification.yaml with other words in it, and all else as it was: comments, order, quotes (an extension)."""

import difflib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.prompts import Specification, parse_specification

WIDTH = 112  # characters of a line, as the files in prompts/ have them
LONGEST = 10_000  # characters of a description


def edited(text: str, wanted: Specification, file: Path) -> str:
    """The text of a specification.yaml that says what is wanted.

    Only what differs is written anew, in the place where it stood; the rest, comments too, stays byte for byte.

    Args:
        text: as the file has it. file: for messages.

    Raises:
        InputError: the text is malformed, the classes are others, a description cannot be one, or the file is written
            in a way that cannot be edited here (an anchor, say).
    """
    now = parse_specification(text, file)
    if list(wanted.classes) != list(now.classes):
        raise InputError(f"{file}: the classes are others by now; load the page anew")
    for name, words in [("picture", wanted.picture), *wanted.classes.items(), *enumerate(wanted.spurious_features, 1)]:
        if not words.strip() or len(words) > LONGEST:
            raise InputError(f"{file}: '{name}': expected 1 to {LONGEST} characters, not {len(words.strip())}")
    if now == wanted:
        return text
    root = _compose(text, file)
    changes = list(_changes(text, root, now, wanted))
    after = text
    for start, end, new in sorted(changes, reverse=True):
        after = after[:start] + new + after[end:]
    try:
        understood = parse_specification(after, file)
    except InputError:
        understood = None
    if understood != wanted or _comments(after) < _comments(text):
        raise InputError(f"{file}: is written in a way that cannot be edited here; change it in an editor")
    return after


def _compose(text: str, file: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="base", pure=True).compose(text)
    except YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error


def _changes(text: str, root: Any, now: Specification, wanted: Specification) -> Iterator[tuple[int, int, str]]:
    """(Start, end, new text) of each place that changes."""
    nodes = {key.value: (key, value) for key, value in root.value}
    if wanted.picture != now.picture:
        yield _scalar(text, *nodes["picture"], wanted.picture)
    for key, value in nodes["classes"][1].value:
        if wanted.classes[key.value] != now.classes[key.value]:
            yield _scalar(text, key, value, wanted.classes[key.value])
    if wanted.spurious_features != now.spurious_features:
        yield _items(text, *nodes["spurious_features"], now.spurious_features, wanted.spurious_features)


def _scalar(text: str, key: Any, value: Any, words: str) -> tuple[int, int, str]:
    """A value of a mapping."""
    indent = key.start_mark.column
    end = _end(text, value, indent)
    alone = text[end:].partition("\n")[0].strip() == ""  # a comment behind it would become part of a block
    return value.start_mark.index, end, _written(words, indent) if alone else _quoted(words)


def _end(text: str, node: Any, indent: int) -> int:
    """Where a scalar ends. A block ends before the first line that is indented no further than its key."""
    if node.style not in ("|", ">"):
        return int(node.end_mark.index)
    place = text.find("\n", node.start_mark.index) + 1 or len(text)
    end = place
    while place < len(text):
        after = text.find("\n", place) + 1 or len(text)
        line = text[place:after]
        if line.strip() and len(line) - len(line.lstrip(" ")) <= indent:
            break
        end = after if line.strip() else end
        place = after
    return end - 1 if text[end - 1 : end] == "\n" else end


def _items(text: str, key: Any, value: Any, now: list[str], wanted: list[str]) -> tuple[int, int, str]:
    """The whole list; lines of comments between its items stay."""
    first = key.start_mark.column
    if not value.value or value.flow_style:
        new = "".join(f"\n{' ' * (first + 2)}- {_written(words, first + 2)}" for words in wanted)
        start, end = value.start_mark.index, int(value.end_mark.index)
        while text[start - 1] == " ":
            start -= 1
        behind = text[end:].partition("\n")[0]  # a comment, which stays on its line
        return start, end + len(behind), behind + new if wanted else " []" + behind
    indent = value.start_mark.column
    start = text.rfind("\n", 0, value.start_mark.index) + 1
    kept, place = [], start  # of each item, its comments and its own lines
    for node in value.value:
        dash = text.rfind("\n", 0, node.start_mark.index) + 1
        end = _end(text, node, indent)
        end = text.find("\n", end) + 1 or len(text)
        kept.append((text[place:dash], text[dash:end]))
        place = end
    lines: list[str] = []
    matched = difflib.SequenceMatcher(a=now, b=wanted, autojunk=False)
    for kind, a, b, c, d in matched.get_opcodes():
        if kind == "equal":
            lines += [comments + item for comments, item in kept[a:b]]
            continue
        lines += [comments for comments, _ in kept[a:b]]
        lines += [f"{' ' * indent}- {_written(words, indent)}\n" for words in wanted[c:d]]
    if not wanted:
        colon = key.end_mark.index + text[key.end_mark.index :].index(":") + 1
        comments = (text[colon:start] + "".join(lines)).rstrip("\n")
        return colon, place - (text[place - 1 : place] == "\n"), " []" + comments
    return start, place, "".join(lines) if text[place - 1 : place] == "\n" else "".join(lines).rstrip("\n")


def _written(words: str, indent: int) -> str:
    """A text as a YAML scalar: plain where it is short and simple, folded where it is long, else in double quotes."""
    simple = words == " ".join(words.split()) and words.isprintable()
    if simple and len(words) + indent < WIDTH - 20 and re.fullmatch(r"[^\W\d_][\w ,.;()'/+-]*", words):
        return words
    if simple:
        pad = " " * (indent + 2)
        lines = textwrap.wrap(words, WIDTH - indent, break_long_words=False, break_on_hyphens=False)
        return ">-\n" + "\n".join(pad + line for line in lines)
    return _quoted(words)


def _quoted(words: str) -> str:
    return '"' + "".join(map(_escaped, words)) + '"'


def _escaped(each: str) -> str:
    if each in '"\\':
        return f"\\{each}"
    return each if each.isprintable() else f"\\U{ord(each):08x}"


def _comments(text: str) -> int:
    """Lines that are comments, and comments behind values."""
    return len(re.findall(r"^[ \t]*#|[ \t]#", text, re.MULTILINE))
