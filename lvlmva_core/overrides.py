"""An expert's verdicts in place of the Judge's: a CSV file a reviewer, undone and resolved (an extension)."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lvlmva_core.errors import InputError
from lvlmva_core.spreadsheet import read_spreadsheet, write_csv

Verdict = Literal["yes", "no", "unsure"]
Said = Literal["yes", "no", "unsure", "undo"]
VERDICTS = get_args(Verdict)
BY_HAND_COLUMNS = ["sample", "segmentation", "region", "verdict"]
COLUMNS = [*BY_HAND_COLUMNS, "note", "reviewer", "order"]
BY_HAND = "verdicts"  # the reviewer of the file that is written by hand
NAME = re.compile(r"\w(?:[\w .-]{0,58}\w)?")  # of a reviewer, and so of a file
PATTERNS = "patterns"  # the folder beside these files, with what reviewers call patterns
LONGEST_NOTE = 2000  # characters
Key = tuple[str, str, int]  # sample, digest of its segmentation, region


@dataclass(frozen=True)
class Event:
    """What a reviewer said of a region: a verdict, or that the one before it is taken back ("undo").

    segmentation: digest of the label map that was looked at, so that it counts for no other. order: rising numbers in
    a reviewer's file; what was said later counts.
    """

    sample: str
    segmentation: str
    region: int
    verdict: Said
    note: str
    reviewer: str
    order: int

    @property
    def key(self) -> Key:
        """What it is about."""
        return self.sample, self.segmentation, self.region


@dataclass(frozen=True)
class Override:
    """A verdict that replaces the Judge's, and the reviewers who stand behind it."""

    sample: str
    segmentation: str
    region: int
    verdict: str
    reviewers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tie:
    """A region that as many reviewers called relevant as irrelevant."""

    sample: str
    segmentation: str
    region: int
    yes: tuple[str, ...]
    no: tuple[str, ...]


@dataclass(frozen=True)
class Reviews:
    """What a folder of reviewers' files holds. notes: what was guessed or not read, for the user."""

    events: list[Event]
    notes: list[str]


def resolve(events: Iterable[Event]) -> tuple[list[Override], list[Tie]]:
    """What the reviewers say together, for each region that any of them judged.

    Each reviewer has one voice a region: the last verdict that was not taken back. The majority of those who said "yes"
    or "no" decides; those who are unsure have no part in it. Where all are unsure the verdict is "unsure", which masks
    nothing. Where as many say "yes" as "no" nothing is decided: it is a tie, and the Judge's verdict stands.

    Returns:
        (overrides, ties), each sorted by sample, segmentation and region.

    Raises:
        ValueError: an undo takes back what was never said.
    """
    voices: dict[Key, list[Event]] = {}
    by_reviewer: dict[str, list[Event]] = {}
    for event in events:
        by_reviewer.setdefault(event.reviewer, []).append(event)
    for reviewer in sorted(by_reviewer):
        for key, event in standing(by_reviewer[reviewer]).items():
            voices.setdefault(key, []).append(event)
    overrides, ties = [], []
    for key in sorted(voices):
        yes, no, unsure = (
            tuple(event.reviewer for event in voices[key] if event.verdict == verdict) for verdict in VERDICTS
        )
        if yes and len(yes) == len(no):
            ties.append(Tie(*key, yes, no))
        elif yes or no:
            verdict, behind = ("yes", yes) if len(yes) > len(no) else ("no", no)
            overrides.append(Override(*key, verdict, behind))
        else:
            overrides.append(Override(*key, "unsure", unsure))
    return overrides, ties


def standing(events: Sequence[Event]) -> dict[Key, Event]:
    """Of one reviewer, the verdict on each region that counts: the last that was not taken back.

    Raises:
        ValueError: an undo takes back what was never said.
    """
    said: dict[Key, list[Event]] = {}
    for event in sorted(events, key=lambda each: each.order):
        of_region = said.setdefault(event.key, [])
        if event.verdict != "undo":
            of_region.append(event)
        elif of_region:
            of_region.pop()
        else:
            raise ValueError(
                f"order {event.order} takes back a verdict on region {event.region} of '{event.sample}' that was never "
                "given"
            )
    return {key: of_region[-1] for key, of_region in said.items() if of_region}


def read_reviews(folder: Path) -> Reviews:
    """Read every reviewer's file of a folder, `<reviewer>.csv`, and `verdicts.csv`, which is written by hand.

    Raises:
        InputError: the folder is missing, a row is malformed (file and line are named), or two files are one person's.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; restore it with `git checkout {folder}`")
    events: list[Event] = []
    notes: list[str] = []
    names: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() == ".md" or path.name == PATTERNS:
            continue
        if path.suffix.lower() != ".csv" or not path.is_file():
            notes.append(f"{path}: not read; save it as CSV")
            continue
        other = names.setdefault(_plain(path.stem), path)
        if other != path:
            raise InputError(f"{path}: {other} is of the same reviewer; bring both into one file")
        found = read_events(path)
        events += found.events
        notes += found.notes
    return Reviews(events, notes)


def read_events(path: Path) -> Reviews:
    """Read one reviewer's file, in the order of its order numbers.

    Either the columns sample, segmentation, region, verdict, note, reviewer, order, where the reviewer is who the file
    is named after; or, written by hand, the first four and perhaps a note, one row a region. As spreadsheets save it:
    commas or semicolons, a byte order mark or none, "No" as well as "no", empty rows, UTF-8 or Windows-1252.

    Raises:
        InputError: the file is missing, the header differs, or a row is malformed or doubled; the line is named.
    """
    rows, notes = read_spreadsheet(path)
    _, header = next(rows, (0, []))
    if header not in (COLUMNS, BY_HAND_COLUMNS, [*BY_HAND_COLUMNS, "note"]):
        raise InputError(
            f"{path}: the first line must be '{','.join(COLUMNS)}', or '{','.join(BY_HAND_COLUMNS)}' (a column note "
            f"may follow), not '{','.join(header)[:200]}'"
        )
    events: list[tuple[Event, int]] = []
    seen: set[Key] = set()
    for line, cells in rows:
        where = f"{path}, line {line}"
        if len(cells) != len(header):
            raise InputError(f"{where}: expected {len(header)} values, not {len(cells)}")
        row = dict(zip(header, cells, strict=True))
        event = event_of_row(row, path.stem, len(events) + 1, where)
        if header != COLUMNS and event.key in seen:
            raise InputError(f"{where}: second verdict for region {event.region} of '{event.sample}'")
        seen.add(event.key)
        events.append((event, line))
    events.sort(key=lambda pair: pair[0].order)
    ordered = [event for event, _ in events]
    try:
        standing(ordered)
    except ValueError as error:
        raise InputError(f"{path}: {error}; remove that row, or restore the rows before it") from None
    return Reviews(ordered, notes)


def add_verdict(folder: Path, key: Key, verdict: Verdict, note: str, reviewer: str) -> Event:
    """Add what a reviewer says of a region to `<folder>/<reviewer>.csv`; it is on the disk when this returns.

    The file is written beside itself and renamed, so that at any moment it holds all rows up to one. Several processes
    and threads may write: `.lock` in the folder lets one after the other.

    Raises:
        InputError: the name, verdict or note cannot be kept, or the file is malformed; nothing is written then.
    """
    path = reviewer_file(folder, reviewer)
    if verdict not in VERDICTS:
        raise InputError(f"verdict '{verdict}' is none of {', '.join(VERDICTS)}")
    note = " ".join(note.split())
    if len(note) > LONGEST_NOTE:
        raise InputError(f"the note has {len(note)} characters, at most {LONGEST_NOTE} are kept; shorten it")
    with locked(folder):
        events = _events_so_far(path)
        return _appended(path, events, key, verdict, note)


def take_back(folder: Path, order: int, reviewer: str) -> Event:
    """Add an event that undoes the verdict of number `order`; the verdict before it on that region counts again.

    Raises:
        InputError: that verdict does not stand, e.g. since it was undone elsewhere; or as `add_verdict`.
    """
    path = reviewer_file(folder, reviewer)
    with locked(folder):
        events = _events_so_far(path)
        for event in standing(events).values():
            if event.order == order:
                return _appended(path, events, event.key, "undo", "")
    raise InputError(f"{path}: the verdict of order {order} does not stand any more; look again")


def reviewer_file(folder: Path, reviewer: str) -> Path:
    """The file of a reviewer. Raises InputError where the name cannot be a file's."""
    return person_file(folder, reviewer, "reviewer")


def person_file(folder: Path, person: str, what: str) -> Path:
    """A person's file: letters, digits, spaces, dots and hyphens, so that no name leads out of the folder.

    what: the person is, for messages.

    Raises:
        InputError: the name cannot be a file's.
    """
    name = unicodedata.normalize("NFC", person.strip())
    if not NAME.fullmatch(name) or _plain(name) == BY_HAND:
        raise InputError(
            f"{what} '{person[:80]}': expected a name of 1 to 60 letters, digits, spaces, dots, hyphens or "
            f"underscores, beginning and ending with a letter or digit, and not '{BY_HAND}'"
        )
    for path in folder.glob("*.csv"):
        if _plain(path.stem) == _plain(name):
            return path  # as it was written first
    return folder / f"{name}.csv"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process or thread after the other write into a folder of reviewers' files."""
    from filelock import FileLock  # here, so that reading needs no library

    with FileLock(folder / ".lock"):
        yield


def _events_so_far(path: Path) -> list[Event]:
    return read_events(path).events if path.exists() else []


def _appended(path: Path, events: list[Event], key: Key, verdict: Said, note: str) -> Event:
    event = Event(*key, verdict, note, path.stem, events[-1].order + 1 if events else 1)
    write_events(path, [*events, event])
    return event


def _plain(name: str) -> str:
    """The same for names that are one file on some disks."""
    return unicodedata.normalize("NFC", name).casefold()


def event_of_row(row: dict[str, str], stem: str, place: int, where: str) -> Event:
    """What a row says.

    Args:
        row: column -> cell. stem: the reviewer whose file it is. place: its order, where it has none of its own. where:
            file and line, for messages.

    Raises:
        InputError: a cell cannot be meant, or it is of another reviewer.
    """
    by_hand = "order" not in row
    verdict = row["verdict"].strip().lower()
    allowed = VERDICTS if by_hand else get_args(Said)
    if verdict not in allowed:
        raise InputError(f"{where}: verdict '{row['verdict'][:40]}' is none of {', '.join(allowed)}")
    for number in ("region",) if by_hand else ("region", "order"):
        if not re.fullmatch(r"[0-9]{1,9}", row[number].strip()):
            raise InputError(f"{where}: {number} '{row[number][:40]}' is not a number")
    for name in ("sample", "segmentation"):
        if not row[name].strip():
            raise InputError(f"{where}: no {name}")
    reviewer = row.get("reviewer", stem)
    if _plain(reviewer) != _plain(stem):
        raise InputError(f"{where}: the reviewer is '{reviewer[:80]}', but the file is named after '{stem}'")
    return Event(
        row["sample"],
        row["segmentation"].strip(),
        int(row["region"]),
        verdict,  # type: ignore[arg-type]  # looked at above
        row.get("note", ""),
        stem,
        place if by_hand else int(row["order"]),
    )


def write_events(path: Path, events: Sequence[Event]) -> None:
    """Put a reviewer's events in the place of the file; who calls it holds the folder's lock."""
    rows = [COLUMNS, *([str(getattr(event, name)) for name in COLUMNS] for event in events)]
    write_csv(path, rows)
