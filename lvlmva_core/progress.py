"""Progress of long steps: a bar on a terminal, now and then a line elsewhere."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
QUIET_S = 15.0  # between two lines where there is no terminal


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, with a bar on stderr while it is a terminal, else with a line every QUIET_S seconds.

    total: how many items there are, where `items` has no length. rich is imported only where a bar is drawn, so that
    the library works without it. Of processes that torchrun started, the first says something.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
        return
    if not sys.stderr.isatty():
        yield from _lines(items, description, len(items) if total is None and isinstance(items, Sized) else total)
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=description, total=total, console=Console(stderr=True))


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= QUIET_S:
            last = now
            left = "" if total is None else f", about {(now - started) / done * (total - done):.0f} s left"
            sys.stderr.write(f"{description}: {done} of {'?' if total is None else total}{left}\n")
