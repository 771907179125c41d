"""A reviewer's answers that came by mail: every row checked, then taken in beside what that reviewer said before."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from lvlmva_core.errors import InputError
from lvlmva_core.overrides import (
    COLUMNS,
    LONGEST_NOTE,
    Event,
    Key,
    event_of_row,
    locked,
    read_events,
    reviewer_file,
    standing,
    write_events,
)
from lvlmva_core.spreadsheet import read_spreadsheet

Prefer = Literal["mailed", "present"]
CHANGED = "a spreadsheet may have changed it: ask for the file as the page downloaded it"
Said = tuple[str, str]  # verdict and note


@dataclass(frozen=True)
class Regions:
    """What a sample shows now. segmentation: its digest. regions: those that are present."""

    segmentation: str
    regions: Collection[int]


@dataclass
class Mailed:
    """A file as it came. problems: rows that cannot be taken in, each with its line. stale: of other segmentations."""

    path: Path
    reviewer: str = ""
    events: list[Event] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Conflict:
    """A region on which the mailed verdict is another than the one that stands."""

    path: Path
    key: Key
    present: str
    mailed: str


@dataclass(frozen=True)
class TakenIn:
    """What became of a file. into: the reviewer's file. added: rows. known: regions on which nothing was new."""

    path: Path
    into: Path
    added: int
    known: int


def read_mailed(path: Path, shown: Mapping[str, Regions]) -> Mailed:
    """Read a file as the page downloads it, also as a spreadsheet saved it, and check every row of it.

    Args:
        shown: sample -> its regions now.

    Raises:
        InputError: the file cannot be read, or is no such file at all.
    """
    rows, notes = read_spreadsheet(path)
    found = Mailed(path, notes=notes)
    _, header = next(rows, (0, []))
    if header != COLUMNS:
        raise InputError(
            f"{path}: the first line must be '{','.join(COLUMNS)}', not '{','.join(header)[:200]}'; ask for the file "
            "as the page downloaded it"
        )
    orders: dict[int, int] = {}
    for line, cells in rows:
        where = f"{path}, line {line}"
        try:
            if len(cells) != len(COLUMNS):
                raise InputError(f"{where}: expected {len(COLUMNS)} values, not {len(cells)}")
            row = dict(zip(COLUMNS, cells, strict=True))
            found.reviewer = found.reviewer or row["reviewer"].strip()
            if row["reviewer"].strip().casefold() != found.reviewer.casefold():
                raise InputError(f"{where}: is of '{row['reviewer'][:80]}', the rows before of '{found.reviewer[:80]}'")
            event = event_of_row({**row, "reviewer": found.reviewer}, found.reviewer, 0, where)
            event = replace(event, note=" ".join(event.note.split()))
        except InputError as error:
            found.problems.append(str(error))
            continue
        if event.order in orders:
            found.problems.append(f"{where}: order {event.order} stands in line {orders[event.order]} already")
        orders.setdefault(event.order, line)
        if len(event.note) > LONGEST_NOTE:
            found.problems.append(
                f"{where}: the note has {len(event.note)} characters, at most {LONGEST_NOTE} are kept"
            )
        _check_region(found, event, shown, where)
        found.events.append(event)
    found.events.sort(key=lambda each: each.order)
    if not found.problems:
        _check_whole(found)
    return found


def _check_region(found: Mailed, event: Event, shown: Mapping[str, Regions], where: str) -> None:
    now = shown.get(event.sample)
    if now is None:
        close = difflib.get_close_matches(event.sample, list(shown), n=1)
        alike = f"; alike: '{close[0]}'" if close else ""
        found.problems.append(f"{where}: no sample '{event.sample[:80]}' in the alignment set{alike}; {CHANGED}")
    elif event.segmentation != now.segmentation:
        found.stale.append(f"{where}: '{event.sample}' has other regions by now")
    elif event.region not in now.regions:
        known = ", ".join(str(region) for region in sorted(now.regions))
        found.problems.append(f"{where}: '{event.sample}' has no region {event.region}, but {known}; {CHANGED}")


def _check_whole(found: Mailed) -> None:
    if not found.events:
        found.problems.append(f"{found.path}: holds no verdict")
        return
    try:
        standing(found.events)
    except ValueError as error:
        found.problems.append(f"{found.path}: {error}; {CHANGED}")


def merge(
    present: Sequence[Event], mailed: Sequence[Event], prefer: Prefer | None
) -> tuple[list[Event], list[tuple[Event, Event]]]:
    """Which of the mailed events are new beside those that are there, and which of them contradict.

    A region at a time. What was said before in the same order is known. A mailed history that goes on from the one that
    is there adds what follows. Otherwise the verdicts that count are compared: the same ones agree (another note is
    added), others contradict. Nothing that is there is ever taken away.

    Args:
        present, mailed: events of one reviewer. prefer: of verdicts that contradict, "mailed" adds the mailed one,
            which then counts, "present" leaves it out; None leaves it out as a conflict.

    Returns:
        (events to add, in the order of the mailed ones; (present, mailed) verdicts that contradict and that `prefer`
        does not decide).

    Raises:
        ValueError: another `prefer`.
    """
    if prefer is not None and prefer not in get_args(Prefer):
        raise ValueError(f"prefer '{prefer}' is none of {', '.join(get_args(Prefer))}")
    there, came = _by_region(present), _by_region(mailed)
    counts, arrived = standing(present), standing(mailed)
    new: list[Event] = []
    conflicts: list[tuple[Event, Event]] = []
    for key, history in came.items():
        before = [_said(each) for each in there.get(key, [])]
        after = [_said(each) for each in history]
        if _is_within(after, before):
            continue
        if after[: len(before)] == before:
            new += history[len(before) :]
            continue
        old, said = counts.get(key), arrived.get(key)
        if said is None or (old is not None and _said(old) == _said(said)):
            continue
        if old is None or prefer == "mailed" or (old.verdict == said.verdict and said.note):
            new.append(said)
        elif old.verdict != said.verdict and prefer is None:
            conflicts.append((old, said))
    return sorted(new, key=lambda each: each.order), conflicts


def take_in(
    folder: Path, files: Sequence[Mailed], prefer: Prefer | None = None
) -> tuple[list[TakenIn], list[Conflict]]:
    """Add what is new in mailed files to the reviewers' own, `<folder>/<reviewer>.csv`; all of it, or nothing.

    Args:
        files: without problems. prefer: as for `merge`.

    Returns:
        (what became of each file, conflicts). Where there is a conflict nothing is written.

    Raises:
        InputError: a reviewer's name or present file is malformed; nothing is written then.
        ValueError: a file has problems.
    """
    if any(each.problems for each in files):
        raise ValueError("a file has problems; take in those without")
    done: list[TakenIn] = []
    conflicts: list[Conflict] = []
    with locked(folder):
        held: dict[Path, list[Event]] = {}
        changed: set[Path] = set()
        for each in files:
            own = reviewer_file(folder, each.reviewer)
            into = next((path for path in held if path.name.casefold() == own.name.casefold()), own)
            if into not in held:
                held[into] = read_events(into).events if into.exists() else []
            new, contradicting = merge(held[into], each.events, prefer)
            conflicts += [Conflict(each.path, old.key, old.verdict, said.verdict) for old, said in contradicting]
            last = held[into][-1].order if held[into] else 0
            held[into] = held[into] + [
                Event(*event.key, event.verdict, event.note, into.stem, last + place)
                for place, event in enumerate(new, start=1)
            ]
            if new:
                changed.add(into)
            regions = {event.key for event in each.events}
            done.append(TakenIn(each.path, into, len(new), len(regions - {event.key for event in new})))
        if not conflicts:
            for into in sorted(changed):
                write_events(into, held[into])
    return done, conflicts


def _by_region(events: Sequence[Event]) -> dict[Key, list[Event]]:
    found: dict[Key, list[Event]] = {}
    for event in sorted(events, key=lambda each: each.order):
        found.setdefault(event.key, []).append(event)
    return found


def _said(event: Event) -> Said:
    return event.verdict, event.note


def _is_within(some: Sequence[Said], many: Sequence[Said]) -> bool:
    """Whether all of `some` stand in `many` in their order, with or without others between."""
    rest: Iterator[Said] = iter(many)
    return all(each in rest for each in some)
