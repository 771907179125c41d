"""Taking a secret out of what a server sent back, in whatever form it is written there; and text safe to print."""

import base64
import re
from functools import lru_cache
from typing import Any

REMOVED = "[API key removed]"


def remove_secret(value: Any, secret: str) -> Any:
    """JSON-able `value` with `secret` replaced in all strings and names, whatever the nesting.

    Found are the secret itself, with any of its characters as JSON, percent or HTML escapes, and its base64 and hex
    forms, also inside the base64 of a longer text (but for at most two characters at either end).
    """
    if not secret:
        return value
    if isinstance(value, str):
        return _forms(secret).sub(REMOVED, value)
    if isinstance(value, dict):
        return {remove_secret(name, secret): remove_secret(inner, secret) for name, inner in value.items()}
    if isinstance(value, list):
        return [remove_secret(inner, secret) for inner in value]
    return value


def printable(text: str) -> str:
    """Text with all that is no letter, sign or blank (line breaks, escape sequences, marks of direction) escaped."""
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[n]:02x}{units[n + 1]:02x}" for n in range(0, len(units), 2))


@lru_cache(maxsize=8)
def _forms(secret: str) -> re.Pattern[str]:
    spelled = "".join(_spellings(character) for character in secret)
    data = secret.encode("utf-8", "surrogatepass")
    encoded = {data.hex(), data.hex().upper()}
    for start in range(3):  # where the secret begins within a group of three bytes
        text = base64.b64encode(b"\0" * start + data).decode().rstrip("=")
        whole = text[(start * 8 + 5) // 6 :]
        if (start + len(data)) % 3:  # its last character mixes in what follows
            whole = whole[:-1]
        encoded |= {whole, whole.replace("+", "-").replace("/", "_")}
    return re.compile("|".join([spelled, *(re.escape(each) + "=*" for each in sorted(encoded) if len(each) > 5)]))


def _spellings(character: str) -> str:
    number = ord(character)
    percent = "".join(f"%{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
    forms = [rf"\\u{number:04x}", percent, f"&#x0*{number:x};", f"&#0*{number};"]
    escaped = re.escape(character)
    if character in "/\"'\\":
        escaped = rf"\\*{escaped}"
    return f"(?:{escaped}|(?i:{'|'.join(forms)}))"
