"""Progress of long steps: a bar on a terminal, now and then a line elsewhere, a file for who watches from outside."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
QUIET_S = 15.0  # between two lines where there is no terminal
TOLD_S = 0.5  # between two states of the file
FILE = "LVLMVA_PROGRESS"  # environment variable: the file that holds which share of the current step is done


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, with a bar on stderr while it is a terminal, else with a line every QUIET_S seconds.

    total: how many items there are, where `items` has no length. rich is imported only where a bar is drawn, so that
    the library works without it. Of processes that torchrun started, the first says something.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    items = _told(items, total)
    if not sys.stderr.isatty():
        yield from _lines(items, description, total)
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=description, total=total, console=Console(stderr=True))


@contextlib.contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[float], None]]:
    """Progress of what others do: call what is yielded with how much of `total` is done (it may be a fraction).

    What is written to stderr meanwhile stands above the bar.
    """
    if not sys.stderr.isatty():
        started = last = time.monotonic()

        def line(done: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= QUIET_S:
                last = now
                left = f", about {(now - started) / done * (total - done):.0f} s left" if done else ""
                sys.stderr.write(f"{description}: {done / total:.0%} done{left}\n")

        yield line
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as shown:
        task = shown.add_task(description, total=total)
        yield lambda done: shown.update(task, completed=done)


def share_done(file: Path) -> float:
    """What a process says in its file of progress, 0..1; 0 where it has said nothing yet."""
    try:
        return min(max(float(file.read_text(encoding="ascii")), 0.0), 1.0)
    except (FileNotFoundError, ValueError):
        return 0.0


def tell() -> Callable[[int, int | None], None]:
    """What to call, now and then, with how much is done and the total: keeps the file up to date, if there is one."""
    file, told = os.environ.get(FILE), 0.0

    def note(done: int, total: int | None) -> None:
        nonlocal told
        if file and total and time.monotonic() - told >= TOLD_S:
            told = time.monotonic()
            Path(file).write_text(f"{done / total:.4f}", encoding="ascii")

    return note


def _told(items: Iterable[T], total: int | None) -> Iterator[T]:
    note = tell()
    for done, item in enumerate(items, start=1):
        yield item
        note(done, total)


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= QUIET_S:
            last = now
            left = "" if total is None else f", about {(now - started) / done * (total - done):.0f} s left"
            sys.stderr.write(f"{description}: {done} of {'?' if total is None else total}{left}\n")
