"""Rows that are never computed twice: look into the stores, then into what is committed, compute the rest, keep it."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lvlmva.hydrate import committed_versions, open_shared, open_store
from lvlmva_core.errors import InputError
from lvlmva_core.progress import track
from lvlmva_core.shared_store import SharedStore, UnreachableError
from lvlmva_core.store import Record, Store


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
    several machines share, what was put there first stands for all of them, before and after something is computed.

    Args:
        kind: of the store. out: the stage's output. records_in: keys and records of a version of it.
        compute: places of keys -> their records. chunk: how many are computed before they are kept.
        stage: name, for messages.

    Raises:
        InputError: records were damaged while this ran; or something is to be computed, and the shared store cannot be
            reached.
    """
    store, shared = open_store(), open_shared()
    absent = _absent(store, kind, keys)
    if absent:
        for version in committed_versions(str(out), store):
            for key, record in records_in(version):
                store.put_arrays(kind, key, record)
    if shared is not None:
        # other segmentations than the others' would make other calls, and these would be paid again
        _exchange(store, shared, kind, keys, must=bool(_absent(store, kind, keys)))
    absent = _absent(store, kind, keys)
    sys.stderr.write(f"{stage}: {len(keys) - len(absent)} {kind} are there, {len(absent)} to compute\n")
    for first in track(range(0, len(absent), chunk), stage):
        places = absent[first : first + chunk]
        for place, record in zip(places, compute(places), strict=True):
            store.put_arrays(kind, keys[place], record)
    if shared is not None and absent:
        _exchange(store, shared, kind, [keys[n] for n in absent], must=False)
    records = [store.get_arrays(kind, key) for key in keys]
    whole = [record for record in records if record is not None]
    if len(whole) < len(keys):
        raise InputError(f"{store.root}: {len(keys) - len(whole)} {kind} were damaged meanwhile; run again")
    return whole


def _absent(store: Store, kind: str, keys: Sequence[str]) -> list[int]:
    return [n for n, key in enumerate(keys) if store.get_arrays(kind, key) is None]


def _exchange(store: Store, shared: SharedStore, kind: str, keys: Sequence[str], *, must: bool) -> None:
    def take(key: str, content: bytes) -> None:
        store.take_arrays(kind, key, content)

    try:
        found = shared.exchange(kind, "arrays", keys, lambda key: store.get_bytes(kind, key, "arrays"), take)
    except UnreachableError as error:
        if must:
            raise
        sys.stderr.write(f"warning: {error}; what this run uses may be on this machine alone\n")
        return
    for outcome, told in (("put", "put into"), ("taken", "taken from")):
        if count := sum(each == outcome for each in found.values()):
            sys.stderr.write(f"{count} {kind} {told} {shared.name}\n")
