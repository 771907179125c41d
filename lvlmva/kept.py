"""Rows that are never computed twice: look into the store, then into what is committed, compute the rest, keep it."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lvlmva.hydrate import committed_versions, open_store
from lvlmva.shared import exchange_arrays
from lvlmva_core.errors import InputError
from lvlmva_core.progress import track
from lvlmva_core.store import Record


def kept_or_computed(
    kind: str,
    keys: Sequence[str],
    out: Path,
    *,
    records_in: Callable[[Path], Iterable[tuple[str, Record]]],
    compute: Callable[[Sequence[int]], Sequence[Record]],
    chunk: int,
    stage: str,
) -> list[Record]:
    """The record of each key, from the store of this project where it is there.

    Where any is absent, the store first takes in the committed versions of the stage's output. With a store that
    several machines share, what was put there first stands for all of them.

    Args:
        kind: of the store. out: the stage's output. records_in: keys and records of a version of it.
        compute: places of keys -> their records. chunk: how many are computed before they are kept.
        stage: name, for messages.

    Raises:
        InputError: records were damaged while this ran; or some are to be computed, and the shared store cannot be
            reached.
    """
    store = open_store()
    absent = [n for n, key in enumerate(keys) if store.get_arrays(kind, key) is None]
    if absent:
        for version in committed_versions(str(out), store):
            for key, record in records_in(version):
                store.put_arrays(kind, key, record)
        absent = [n for n in absent if store.get_arrays(kind, keys[n]) is None]
    exchange_arrays(store, kind, keys, stage, must=bool(absent))
    absent = [n for n in absent if store.get_arrays(kind, keys[n]) is None]
    sys.stderr.write(f"{stage}: {len(keys) - len(absent)} {kind} are there, {len(absent)} to compute\n")
    for first in track(range(0, len(absent), chunk), stage):
        places = absent[first : first + chunk]
        for place, record in zip(places, compute(places), strict=True):
            store.put_arrays(kind, keys[place], record)
    exchange_arrays(store, kind, [keys[n] for n in absent], stage, must=False)
    records = [store.get_arrays(kind, key) for key in keys]
    whole = [record for record in records if record is not None]
    if len(whole) < len(keys):
        raise InputError(f"{store.root}: {len(keys) - len(whole)} {kind} were damaged meanwhile; run again")
    return whole
