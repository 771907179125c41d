"""What a server sends back: bodies read whatever their headers say, errors sorted by what they mean."""

import email.utils
import json
import math
from collections.abc import Mapping
from typing import Any

from lvlmva_core.store import canonical_json

NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
FILTERED = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")
NO_CAPACITY = "resource_unavailable"


class UnreadableError(Exception):
    """A body that is no answer; the message says why. web_page: it is HTML."""

    def __init__(self, reason: str, *, web_page: bool = False) -> None:
        super().__init__(reason)
        self.web_page = web_page


def read_json(content: bytes) -> Any:
    """JSON in UTF-8, with or without a byte order mark; the charset of the headers is not asked.

    Raises:
        UnreadableError: it is none, or holds what JSON cannot keep (NaN, half of a character, 1e400).
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
        canonical_json(value)
    except (ValueError, RecursionError):
        if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
            raise UnreadableError("a web page came back instead of JSON", web_page=True) from None
        raise UnreadableError("the answer is no JSON, or was cut off") from None
    return value


def check_response(response: Any) -> dict[str, Any]:
    """A body under a status of success as a response with an answer in it. Raises UnreadableError."""
    if not isinstance(response, dict):
        raise UnreadableError("the answer is no JSON object")
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnreadableError("the answer has no choices")
    if not isinstance(choices[0].get("message"), dict):
        raise UnreadableError("the answer has no message")
    if not all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices):
        raise UnreadableError("one of several answers is none")
    return response


def error_of(body: Any, text: str) -> tuple[str, str]:
    """Message and code of an error body in OpenAI's form, or (body None) the text itself."""
    if body is None:
        return ("" if text.lstrip()[:1] == "<" else text[:500]), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:500], ""
    return str(error.get("message", ""))[:500], str(error.get("code") or error.get("type") or "")[:100]


def asked_wait_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a server asks to wait: retry-after-ms, or retry-after as seconds or a date."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * scale
        except ValueError:
            seconds = _until(value, now)
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _until(date: str, now: float) -> float:
    try:
        parsed = email.utils.parsedate_tz(date) if date else None
        return email.utils.mktime_tz(parsed) - now if parsed else math.nan
    except (ValueError, OverflowError, TypeError):  # a date that no calendar has
        return math.nan


def hint_for(message: str, section: str) -> str:
    """What to change after an error of the kind 400, as far as its words tell."""
    low = message.lower()
    if "api key" in low or "api_key" in low or "authentication" in low or "unauthorized" in low:
        return f"see the variable that {section}.api_key_variable names"
    if "context" in low and ("length" in low or "size" in low or "window" in low):
        return "the model's context is too short for it: start the server with a longer one, or choose another model"
    if "response_format" in low or "json_schema" in low or "schema" in low:
        return "set judge.answer_format: prompt to ask for JSON in words only"
    if "image" in low or "vision" in low or "multimodal" in low:
        return f"this model seems to take no pictures; choose another {section}.model"
    if "max_tokens" in low or "max_completion_tokens" in low:
        return f"set {section}.token_limit_name to the other name"
    if "temperature" in low:
        return f"set {section}.temperature: null"
    if "service_tier" in low or "service tier" in low:
        return f"this server has no such tier; set {section}.service_tier: null"
    return f"see {section}"
