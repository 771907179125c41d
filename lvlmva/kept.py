"""Rows that are never computed twice: look into the store, then into what is committed, compute the rest, keep it."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lvlmva.hydrate import committed_versions, open_store
from lvlmva_core.errors import InputError
from lvlmva_core.progress import track
from lvlmva_core.rows import Rows
from lvlmva_core.store import Record, Store


def kept_or_computed(
    rows: Rows, out: Path, *, records_in: Callable[[Path], Iterable[tuple[str, Record]]], stage: str
) -> tuple[list[str], Iterator[Record]]:
    """The key of each row, and its record, from the store of this project where it is there.

    Where any is absent, the store first takes in the committed versions of the stage's output. Records are read one
    after the other as they are asked for.

    Args:
        out: the stage's output. records_in: keys and records of a version of it. stage: name, for messages.

    Raises:
        InputError: records were damaged while this ran; at the first of them that is asked for.
    """
    store, keys = open_store(), rows.keys()
    absent = missing(store, rows.kind, keys, range(len(keys)))
    if absent:
        take_in_committed(store, rows.kind, out, records_in)
        absent = missing(store, rows.kind, keys, absent)
    sys.stderr.write(f"{stage}: {len(keys) - len(absent)} {rows.kind} are there, {len(absent)} to compute\n")
    for first in track(range(0, len(absent), rows.chunk), stage):
        compute_some(store, rows, keys, absent[first : first + rows.chunk])
    return keys, _read(store, rows.kind, keys)


def missing(store: Store, kind: str, keys: Sequence[str], places: Iterable[int]) -> list[int]:
    """Those of `places` whose key has no whole record."""
    return [place for place in places if store.get_arrays(kind, keys[place]) is None]


def take_in_committed(
    store: Store, kind: str, out: Path, records_in: Callable[[Path], Iterable[tuple[str, Record]]]
) -> None:
    """Put what the committed versions of an output hold into the store, once each."""
    for version in committed_versions(str(out), store):
        for key, record in records_in(version):
            store.put_arrays(kind, key, record)


def compute_some(store: Store, rows: Rows, keys: Sequence[str], places: Sequence[int]) -> None:
    """Compute the records of `places` and keep them. keys: of all rows."""
    for place, record in zip(places, rows.compute(places), strict=True):
        store.put_arrays(rows.kind, keys[place], record)


def _read(store: Store, kind: str, keys: Sequence[str]) -> Iterator[Record]:
    for place, key in enumerate(keys):
        record = store.get_arrays(kind, key)
        if record is None:
            damaged = 1 + len(missing(store, kind, keys, range(place + 1, len(keys))))
            raise InputError(f"{store.root}: {damaged} {kind} were damaged meanwhile; run again")
        yield record
