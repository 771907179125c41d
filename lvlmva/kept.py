"""Rows that are never computed twice: look into the stores, then into what is committed, compute the rest, keep it."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lvlmva.hydrate import committed_versions, open_store
from lvlmva.shared import exchange_arrays
from lvlmva_core.errors import InputError
from lvlmva_core.progress import track
from lvlmva_core.rows import Rows
from lvlmva_core.store import Record, Store

RecordsIn = Callable[[Path], Iterable[tuple[str, Record]]]  # a version of an output -> its keys and records


def kept_or_computed(rows: Rows, out: Path, *, records_in: RecordsIn, stage: str) -> tuple[list[str], Iterator[Record]]:
    """The key of each row, and its record, from the store of this project where it is there.

    Where any is absent, the store first takes in the committed versions of the stage's output. With a store that
    several machines share, what was put there first stands for all of them, before and after something is computed.
    Records are read one after the other as they are asked for.

    Args:
        out: the stage's output. stage: name, for messages.

    Raises:
        InputError: records were damaged while this ran, at the first of them that is asked for; or something is to be
            computed, and the shared store cannot be reached.
    """
    store, keys = open_store(), rows.keys()
    absent = found_nowhere(store, rows.kind, keys, out, records_in, stage)
    sys.stderr.write(f"{stage}: {len(keys) - len(absent)} {rows.kind} are there, {len(absent)} to compute\n")
    for first in track(range(0, len(absent), rows.chunk), stage):
        compute_some(store, rows, keys, absent[first : first + rows.chunk])
    exchange_arrays(store, rows.kind, [keys[place] for place in absent], stage, must=False)
    return keys, _read(store, rows.kind, keys)


def found_nowhere(
    store: Store, kind: str, keys: Sequence[str], out: Path, records_in: RecordsIn, stage: str
) -> list[int]:
    """The places of the keys whose record is nowhere, after the store took in what is committed and what is shared.

    Raises:
        InputError: something is to be computed, and the shared store cannot be reached.
    """
    absent = missing(store, kind, keys, range(len(keys)))
    if absent:
        for version in committed_versions(str(out), store):
            for key, record in records_in(version):
                store.put_arrays(kind, key, record)
        absent = missing(store, kind, keys, absent)
    exchange_arrays(store, kind, keys, stage, must=bool(absent))
    return missing(store, kind, keys, absent)


def missing(store: Store, kind: str, keys: Sequence[str], places: Iterable[int]) -> list[int]:
    """Those of `places` whose key has no whole record."""
    return [place for place in places if store.get_arrays(kind, keys[place]) is None]


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
