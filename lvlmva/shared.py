"""The store that several machines share: where it lies, and what a run exchanges with it."""

import os
import sys
from collections.abc import Iterable, Sequence

from lvlmva_core.lvlm.calls import CallStore
from lvlmva_core.lvlm.shared_calls import SharedCalls
from lvlmva_core.shared_store import SharedStore, UnreachableError
from lvlmva_core.store import Store

TOLD = {"put": "put into", "taken": "taken from", "damaged": "damaged in"}


def open_shared() -> SharedStore | None:
    """The store behind the local one (`hydrate.open_store`): `LVLMVA_SHARED_STORE`, or None where it is not set.

    Raises:
        InputError: it is no address on S3, or boto3 is not installed.
    """
    chosen = os.environ.get("LVLMVA_SHARED_STORE", "").strip()
    return SharedStore(chosen) if chosen else None


def share_calls(calls: CallStore) -> SharedCalls | None:
    """A call store and the shared store behind it, if there is one."""
    shared = open_shared()
    return None if shared is None else SharedCalls(calls, shared)


def exchange_calls(shared: SharedCalls | None, keys: Iterable[str], section: str, *, put: bool, must: bool) -> None:
    """Make the local and the shared store hold the same answers to calls, and say what changed.

    must: whether a shared store that cannot be reached is an error (something would be paid for) or a warning.
    """
    if shared is None:
        return
    try:
        _say(section, shared.exchange(keys, put=put), "answers", shared.shared)
    except UnreachableError as error:
        if must:
            raise
        sys.stderr.write(f"warning: {section}: {error}; what this run uses may be on this machine alone\n")


def exchange_arrays(store: Store, kind: str, keys: Sequence[str], stage: str, *, must: bool) -> None:
    """Make both stores hold the same arrays, if any is shared: what was put there first stands for all machines.

    Other segmentations than the others' would make other calls, and these would be paid again.

    must: as for `exchange_calls`.
    """
    shared = open_shared()
    if shared is None:
        return

    def ours(key: str) -> bytes | None:
        return store.get_bytes(kind, key, "arrays")

    def take(key: str, content: bytes) -> None:
        store.take_arrays(kind, key, content)

    try:
        found = list(shared.exchange(kind, "arrays", keys, ours, take).values())
    except UnreachableError as error:
        if must:
            raise
        sys.stderr.write(f"warning: {stage}: {error}; what this run uses may be on this machine alone\n")
        return
    _say(stage, {outcome: found.count(outcome) for outcome in TOLD}, kind, shared)


def _say(where: str, done: dict[str, int], what: str, shared: SharedStore) -> None:
    for outcome, told in TOLD.items():
        if done.get(outcome):
            sys.stderr.write(f"{where}: {done[outcome]} {what} {told} {shared.name}\n")
