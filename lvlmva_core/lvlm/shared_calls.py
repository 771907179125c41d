"""Calls in a store that several machines share: none of them buys what another has bought, or is buying."""

import asyncio
import contextlib
import functools
import json
import logging
import platform
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lvlmva_core import shared_store
from lvlmva_core.lvlm.calls import KIND, UNUSABLE, CallStore, Record, check_record
from lvlmva_core.lvlm.redact import printable
from lvlmva_core.shared_store import AT_ONCE, Claim, NotFreeError, SharedStore, UnreachableError
from lvlmva_core.store import Store, canonical_json, digest

T = TypeVar("T")

log = logging.getLogger(__name__)

FIRST_LOOK_S, LONGEST_LOOK_S = 0.2, 2.0  # between two looks whether another machine has its answer
KINDS = (KIND, UNUSABLE)


class SharedCalls:
    """A `CallStore` and the shared store behind it.

    What is shared is a record without its `meta`: sample ids stay on this machine. What stands in the shared store
    stands for all; only what is committed at HEAD (`CallStore.preferred`) stands above it.
    """

    def __init__(self, calls: CallStore, shared: SharedStore) -> None:
        self.calls = calls
        self.shared = shared
        self.owner = f"{platform.node()}:{_identity(calls.store)}"
        self._stands: set[str] = set()  # keys of which both stores have the same answer
        self._waits_for: set[str] = set()
        self._threads = ThreadPoolExecutor(AT_ONCE)  # of its own: a lost connection must not hold up what keeps answers

    def exchange(self, keys: Iterable[str], *, put: bool = True) -> Counter[str]:
        """Make both stores hold the same answers to these calls; counts what `SharedStore.exchange` did."""
        asked = set(keys) - self._stands
        done: Counter[str] = Counter()
        for kind in KINDS if asked else ():
            found = self.shared.exchange(kind, "json", asked, self._ours(kind), self._taking(kind), put=put)
            self._stands |= {key for key, outcome in found.items() if outcome in ("same", "put", "taken")}
            done.update(found.values())
        return done

    def push(self) -> Counter[str]:
        """`exchange` of all that this machine has."""
        return self.exchange([key for kind in KINDS for key in self.calls.store.keys(kind, "json")])

    def pull(self) -> Counter[str]:
        """Take all that the shared store has."""
        return self.exchange([key for kind in KINDS for key in self.shared.etags(kind, "json")], put=False)

    async def keep(self, record: Record, *, usable: bool) -> Record:
        """Put an answer that is kept here; says which stands: it, or another machine's, kept here then in its place.

        Raises:
            UnreachableError: it is on this machine alone.
        """
        return await self._apart(lambda: self._keep(record, usable=usable))

    def _keep(self, record: Record, *, usable: bool) -> Record:
        kind, key = KIND if usable else UNUSABLE, record["key"]
        taken: list[Record] = []

        def is_whole(content: bytes) -> bool:
            taken.extend(found := self._take_whole(kind, key, content))
            return bool(found)

        self.shared.keep(kind, key, "json", canonical_json(_without_meta(record)), is_whole)
        self._stands.add(key)
        return taken[-1] if taken else record

    @contextlib.asynccontextmanager
    async def claim(self, key: str) -> AsyncIterator[None]:
        """Be the only machine that buys a call; waits while another buys it, and takes its answer.

        Inside, what the shared store has under the key lies in the local store. The caller holds the local lock of the
        key, which keeps the processes on one local store apart.

        Raises:
            UnreachableError: before anything was bought.
        """
        claim, pause, host = None, FIRST_LOOK_S, platform.node()
        while claim is None:
            try:
                claim = await self._apart(lambda: self.shared.claim(KIND, key, self.owner, host))
            except NotFreeError as error:
                if str(error) not in self._waits_for:
                    self._waits_for.add(str(error))
                    log.warning(f"note: waits for answers that {printable(str(error))} is buying")
            # only now: it may have been put while we were claiming
            if await self._apart(lambda: self._fetch(key)):
                break
            if claim is None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_LOOK_S)
        done = asyncio.Event()
        renewing = asyncio.create_task(self._renew(claim, done))
        try:
            yield
        finally:
            done.set()
            claim = await renewing
            if claim is not None:
                with contextlib.suppress(UnreachableError):  # it runs out by itself
                    await self._apart(lambda: self._release(claim))

    async def _renew(self, claim: Claim | None, done: asyncio.Event) -> Claim | None:
        """Hold a claim until `done`; says it as it stands then, None where it was lost."""
        while claim is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), shared_store.CLAIM_S / 3)
                break
            with contextlib.suppress(UnreachableError):  # tried again, until it runs out
                claim = await self._apart(functools.partial(self.shared.renew, claim))
        return claim

    def _release(self, claim: Claim) -> None:
        record, usable = self.calls.get(claim.key), True
        if record is None:
            record, usable = self.calls.find_unusable([claim.key]), False
        if record is not None and claim.key not in self._stands:
            self._keep(record, usable=usable)  # failed when it was bought; nobody may claim the key before
        self.shared.release(claim, bought=record is not None)

    def _fetch(self, key: str) -> bool:
        """Take what the shared store has under a key; says whether there is anything."""
        for kind in KINDS:
            found = self.shared.get(kind, key, "json")
            if found is not None and self._take_whole(kind, key, found.content):
                self._stands.add(key)
                return True
        return False

    async def look(self, key: str) -> None:
        """Take what the shared store has under a key, if anything. Raises UnreachableError."""
        await self._apart(lambda: self._fetch(key))

    def _ours(self, kind: str) -> Callable[[str], bytes | None]:
        def ours(key: str) -> bytes | None:
            record = self.calls.get(key) if kind == KIND else self.calls.find_unusable([key])
            return None if record is None else canonical_json(_without_meta(record))

        return ours

    def _taking(self, kind: str) -> Callable[[str, bytes], None]:
        def take(key: str, content: bytes) -> None:
            self._take(kind, key, content)

        return take

    def _take_whole(self, kind: str, key: str, content: bytes) -> list[Record]:
        """The record that these bytes are, kept; none where they are damaged."""
        try:
            return [self._take(kind, key, content)]
        except ValueError as error:
            log.warning(f"warning: {self.shared.name}: {kind} {key[:12]} is damaged there ({str(error)[:200]})")
            return []

    def _take(self, kind: str, key: str, content: bytes) -> Record:
        record = check_record(json.loads(content), key, usable=kind == KIND)
        kept = canonical_json({**record, "meta": {"source": self.shared.name}})
        self.calls.store.put_bytes(kind, key, "json", kept, replace=True)
        return record

    async def _apart(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _without_meta(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "meta"}


def _identity(store: Store) -> str:
    """What tells a local store from all others."""
    store.put_bytes("identity", _IDENTITY, "txt", secrets.token_hex(8).encode())
    return (store.get_bytes("identity", _IDENTITY, "txt") or b"").decode()


_IDENTITY = digest("identity")
