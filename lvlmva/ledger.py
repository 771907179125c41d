"""One budget for several runs of critique and judge: what they plan, and what they bought, kills included.

Without a ledger the limits of an endpoint (`max_calls`, `max_cost_usd`) hold for one run of one stage. While one is
open, they hold for all that is written in it.
"""

import contextlib
import contextvars
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.budget import Budget, Estimate, Spent
from lvlmva_core.store import canonical_json


class Ledger:
    """A file with a line for each answer that was paid. planned: what dry runs said they would buy, by section."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.planned: list[tuple[str, Estimate]] = []
        self._lost = ""  # why a line could not be written

    def hold(self, budget: Budget) -> None:
        """Have a budget count what is written here, and write here what it books."""
        budget.earlier = self.spent(budget.section)
        budget.earlier_by = "before, under this budget"
        budget.on_booked = lambda cost_usd: self._add(budget.section, cost_usd)

    def spent(self, section: str) -> Spent:
        """Answers and their cost of the stage that a section of params belongs to.

        Raises:
            InputError: a line is no record of an answer, or one could not be written.
        """
        if self._lost:
            raise InputError(
                f"{self.file}: {self._lost}; answers were paid that it lacks; mend it before more is bought"
            )
        found = Spent()
        for number, line in enumerate(self._lines(), start=1):
            try:
                entry = json.loads(line)
                cost, stage = float(entry["cost_usd"]), str(entry["stage"])
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{self.file}, line {number}: not an answer that was paid ({error}); mend it, or set it aside and "
                    "lower the limits by what was paid"
                ) from error
            if stage == _stage(section):
                found.calls += 1
                found.cost_usd += cost
        return found

    def _lines(self) -> list[str]:
        if not self.file.exists():
            return []
        text = self.file.read_text(encoding="utf-8")
        whole, _, _ = text.rpartition("\n")  # a kill may have left half a line
        return whole.split("\n") if whole else []

    def _add(self, section: str, cost_usd: float) -> None:
        line = canonical_json({"stage": _stage(section), "cost_usd": cost_usd}) + b"\n"
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:  # the answer itself may still be kept; who asks next is told
            self._lost = f"could not be written ({error.strerror})"


def _stage(section: str) -> str:
    """`critique` of `critique.critics[0].endpoint`."""
    return section.partition(".")[0]


_OPEN: contextvars.ContextVar[Ledger | None] = contextvars.ContextVar("ledger", default=None)


@contextlib.contextmanager
def keeping(ledger: Ledger) -> Iterator[Ledger]:
    """While it is open, what is asked in this process counts against one budget."""
    token = _OPEN.set(ledger)
    try:
        yield ledger
    finally:
        _OPEN.reset(token)


def open_ledger() -> Ledger | None:
    """The ledger that is open, if any."""
    return _OPEN.get()
