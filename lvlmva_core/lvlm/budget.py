"""What calls cost: estimates before, what is booked after, and a budget that holds whatever a server answers.

An answer is booked as soon as it came, before it is read. In a run with n calls at once, no more than `max_calls`
answers are paid; costs go beyond `max_cost_usd` by no more than what the calls in flight cost above the dearest answer
before them: at most n answers, and one while no answer has come yet and the budget is near.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.calls import Call, said
from lvlmva_core.lvlm.replies import UnreadableError, check_response
from lvlmva_core.lvlm.settings import Endpoint, is_loopback_url

CHARACTERS_PER_TOKEN = 4  # of English prose; for estimates only
LEAST_OF_A_PICTURE = 85
POLL_S = 0.05
UNSEEN = 4.0  # reserve so many times the estimate until a server has said what an answer took
MOST_TOKENS = 10**9  # a usage above it is no count of tokens
LEAST_SHARE = 0.1  # of what the text must take at least; a usage below it is no count either


class BudgetSpentError(InputError):
    """The next call would go over max_calls or max_cost_usd; what was bought is kept."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take: calls in the store, calls to buy, and the tokens and cost of these at most."""

    hits: int
    new_calls: int
    input_tokens: int
    output_tokens_at_most: int
    cost_usd_at_most: float


def estimate_calls(endpoint: Endpoint, *, hits: int, tokens: Sequence[int]) -> Estimate:
    """Sum up. tokens: estimated input tokens of each call to buy."""
    most = len(tokens) * endpoint.token_limit
    return Estimate(hits, len(tokens), sum(tokens), most, cost_usd(endpoint, sum(tokens), most))


def estimate_input_tokens(call: Call) -> int:
    """Roughly the tokens of what is sent: four characters a token; a picture 85, and 170 per 512-pixel tile unless
    its detail is low (how OpenAI counts for GPT-4o; other models differ, until an answer states its own)."""
    tokens = math.ceil(call.text_size() / CHARACTERS_PER_TOKEN)
    for picture in call.pictures():
        height, width = picture.pixels.shape[:2]
        tiles = math.ceil(height / 512) * math.ceil(width / 512)
        tokens += LEAST_OF_A_PICTURE if picture.detail == "low" else LEAST_OF_A_PICTURE + 170 * tiles
    return tokens


def is_short(response: Any, characters: int, pictures: int) -> bool:
    """Whether the input tokens that an answer states say that not all was read: pictures dropped, a prompt cut off.

    Four characters of prose make about a token, and a picture takes tokens of its own, few or many. So input with
    pictures that is less than the text's estimate is short, and text alone that is less than half of it. An answer
    that states nothing is not.

    Args:
        characters: of the text that was sent. pictures: how many were.
    """
    usage = response.get("usage") if isinstance(response, dict) else None
    stated = _count(usage.get("prompt_tokens"), 0.0) if isinstance(usage, dict) else None
    least = characters / CHARACTERS_PER_TOKEN * (1.0 if pictures else 0.5)
    return stated is not None and stated < least


def cost_usd(endpoint: Endpoint, input_tokens: int, output_tokens: int, *, tier: str | None = None) -> float:
    """Cost at the prices in params, US dollars; 0 where they are unknown.

    Args:
        tier: which the server says that it served by. The tier's own prices hold only where it is the one asked for;
            None: the dearer of both.
    """
    prices = [(endpoint.usd_per_million_input_tokens or 0.0, endpoint.usd_per_million_output_tokens or 0.0)]
    if endpoint.tier_usd_per_million_input_tokens is not None and endpoint.service_tier is not None:
        own = (endpoint.tier_usd_per_million_input_tokens, endpoint.tier_usd_per_million_output_tokens or prices[0][1])
        prices = [own] if tier == endpoint.service_tier else prices if tier is not None else [*prices, own]
    return max(input_tokens * each + output_tokens * other for each, other in prices) / 1e6


def price_is_known(endpoint: Endpoint) -> bool:
    """Whether `max_cost_usd` means anything: prices are stated, or the server is this machine's own."""
    stated = (endpoint.usd_per_million_input_tokens, endpoint.usd_per_million_output_tokens)
    return None not in stated or is_loopback_url(endpoint.base_url)


@dataclass
class Spent:
    """What was bought in this run.

    calls: answers that came, and requests that may have been charged without one (unanswered). unreadable: answers
    that were paid and could not be read, of these. other_tier: served by the standard tier for lack of capacity.
    served: how many answers came under a name that is not the model's. elsewhere, lost: answers that were paid and
    that the store could not take: kept in another file, or nowhere. short: answers whose stated input is less than what
    was sent can have taken (`is_short`). unshared: answers that are kept here and did not reach the shared store.
    """

    calls: int = 0
    hits: int = 0
    attempts: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unanswered: int = 0
    unreadable: int = 0
    other_tier: int = 0
    served: dict[str, int] = field(default_factory=dict)
    elsewhere: int = 0
    lost: int = 0
    short: int = 0
    unshared: int = 0


class Budget:
    """The limits of one run. Every request asks `start`, and says `book` or `release` when it is over."""

    def __init__(self, endpoint: Endpoint, section: str) -> None:
        self.endpoint = endpoint
        self.section = section
        self.spent = Spent()
        self.earlier = Spent()  # by others under the same limits
        self.earlier_by = "by the critics before"
        self.on_booked: Callable[[float], None] | None = None  # is told what each answer cost, in USD
        self._in_flight: dict[int, int] = {}  # estimated input tokens of each request
        self._next = 0
        self._input_ratio = 1.0  # the most that an answer's input took, of what was estimated
        self._output_most = endpoint.token_limit
        self._seen = False

    async def start(self, tokens: int) -> int:
        """Wait until a request of estimated input `tokens` may be sent; a number for `book` or `release`.

        Raises:
            BudgetSpentError: it never may.
        """
        limits = self.endpoint
        while True:
            worst = self._worst(tokens)
            factor = 1.0 if self._seen else UNSEEN
            reserved = worst  # of the first alone without the factor, so that a small budget can be used
            if self._in_flight:
                reserved = factor * (worst + sum(map(self._worst, self._in_flight.values())))
            full = self.earlier.calls + self.spent.calls + len(self._in_flight) >= limits.max_calls
            dear = self.earlier.cost_usd + self.spent.cost_usd + reserved > limits.max_cost_usd and reserved > 0
            if not full and not dear:
                break
            if not self._in_flight:
                if full:
                    self._stop(f"max_calls = {limits.max_calls}", "max_calls")
                self._stop(f"the next call may go beyond max_cost_usd = {limits.max_cost_usd}", "max_cost_usd")
            await asyncio.sleep(POLL_S)
        self._next += 1
        self._in_flight[self._next] = tokens
        return self._next

    def release(self, ticket: int) -> None:
        """A request is over; nothing is owed unless it was booked."""
        self._in_flight.pop(ticket, None)

    def book(self, ticket: int, response: Any, tokens: int, *, answered: bool = True) -> None:
        """Add what an answer took: what the server says, or where that is no count, as much as it may have been.

        Args:
            response: what the server sent, whatever it is. tokens: estimated input. answered: False where nothing
                came, though the request was sent and may be charged.
        """
        usage = response.get("usage") if isinstance(response, dict) else None
        stated = usage if isinstance(usage, dict) else {}
        inputs = _count(stated.get("prompt_tokens"), LEAST_SHARE * tokens)
        outputs = _count(stated.get("completion_tokens"), LEAST_SHARE * _length(response) / CHARACTERS_PER_TOKEN)
        if inputs is None:
            inputs = math.ceil(tokens * self._input_ratio)
        self._input_ratio = max(self._input_ratio, inputs / max(tokens, 1))
        outputs = self._output_most if outputs is None else outputs
        self._output_most = max(self._output_most, outputs)
        tier = response.get("service_tier") if isinstance(response, dict) else None
        self._seen = self._seen or answered
        self.spent.calls += 1
        self.spent.unanswered += not answered
        self.spent.input_tokens += inputs
        self.spent.output_tokens += outputs
        cost = cost_usd(self.endpoint, inputs, outputs, tier=tier if isinstance(tier, str) else None)
        self.spent.cost_usd += cost
        if self.on_booked is not None:
            self.on_booked(cost)
        self.release(ticket)

    def _worst(self, tokens: int) -> float:
        return cost_usd(self.endpoint, math.ceil(tokens * self._input_ratio), self._output_most)

    def _stop(self, reason: str, name: str) -> None:
        raise BudgetSpentError(
            f"stopped after {self.spent.calls} new calls and {self.spent.cost_usd:.4f} USD"
            + (
                f" (and {self.earlier.calls} and {self.earlier.cost_usd:.4f} USD {self.earlier_by})"
                if self.earlier.calls
                else ""
            )
            + f": {reason}; all answers are kept; raise {self.section}.{name} and repeat the command to go on"
        )


def _count(number: Any, above: float) -> int | None:
    """A number of tokens, or None where what stands there can't be one."""
    if isinstance(number, bool) or not isinstance(number, int):
        return None
    return number if above < number <= MOST_TOKENS else None


def _length(response: Any) -> int:
    """Characters of an answer's text, 0 where it has none."""
    try:
        return len(said(check_response(response)))
    except UnreadableError:
        return 0
