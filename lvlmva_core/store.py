"""A content-addressed store: what was paid for or computed once, by the digest of what it came from.

Records are files `<kind>/<first two digits>/<key>.<suffix>` below one folder. They are put if absent and never changed,
expired or evicted; several processes may share a store. POSIX only: hard links, and flock by the library filelock.
Where the file system has no hard links, a record is put by a rename; where it has no locks, or keeps them to each
machine, leases (`lvlmva_core.leases`) take their place. Either is said once.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvlmva_core.errors import InputError
from lvlmva_core.leases import Leases, locks_are_local

log = logging.getLogger(__name__)

Record = dict[str, np.ndarray]  # what `Store.put_arrays` keeps under one key

ARRAYS_SCHEMA = 1
POLL_S = 0.05  # how often a lock is tried that another holds
HYDRATED = "hydrated"  # folder of marks: which committed outputs the store has already taken in
BY_LEASE = "lock_leases"  # folder: where it is there, all who use the store take leases in the place of locks
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_KEY = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9_]*")
_SAID: set[str] = set()


def canonical_json(content: Any) -> bytes:
    """Bytes of JSON-able `content` that are the same for equal content: sorted keys, no blanks, UTF-8, no NaN."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8")


def digest(content: Any) -> str:
    """sha256 (64 hex digits) over canonical JSON, in which each array stands as its dtype, shape and digest.

    Args:
        content: JSON-able, with numpy arrays and numpy scalars anywhere inside. Arrays of equal values but another
            dtype or shape differ; tuples equal lists.
    """
    return hashlib.sha256(canonical_json(_plain(content))).hexdigest()


def digest_array(array: np.ndarray) -> str:
    """sha256 over dtype, shape and the values' bytes (row-major, little endian)."""
    header, data = _encode_array(array)
    return hashlib.sha256(canonical_json(header) + b"\n" + data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's bytes. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


class Store:
    """Records in a folder. A kind (`calls`, `attributions`, ...) is a subfolder, a key 64 hex digits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locks_are_local: bool | None = None  # not looked yet

    def get_arrays(self, kind: str, key: str) -> dict[str, np.ndarray] | None:
        """Arrays of a record, or None where there is none.

        A record that does not match its own digest is set aside (`set_aside`), said so, and counts as absent: arrays
        can be computed again.
        """
        content = self.get_bytes(kind, key, "arrays")
        if content is None:
            return None
        try:
            return _decode_arrays(content, kind, key)
        except ValueError as error:
            self.set_aside(kind, key, "arrays", str(error))
            return None

    def put_arrays(self, kind: str, key: str, arrays: Mapping[str, np.ndarray]) -> bool:
        """Keep `arrays` under `key` unless it is there already; says whether it was new. Same arrays, same bytes."""
        return self.put_bytes(kind, key, "arrays", _encode_arrays(arrays, kind, key))

    def take_arrays(self, kind: str, key: str, content: bytes) -> None:
        """Keep a record of arrays whose bytes come from another store, in the place of ours.

        Raises:
            ValueError: they are no such record, or another key's.
        """
        _decode_arrays(content, kind, key)
        self.put_bytes(kind, key, "arrays", content, replace=True)

    def get_bytes(self, kind: str, key: str, suffix: str) -> bytes | None:
        """Bytes of a record as they stand (verification is the caller's), or None where there is none."""
        try:
            return self.path(kind, key, suffix).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            return b""  # in a record's place; no kind of record is empty, so that it is set aside
        except OSError as error:
            raise InputError(f"{self.path(kind, key, suffix)}: cannot be read ({error.strerror})") from error

    def put_bytes(self, kind: str, key: str, suffix: str, content: bytes, *, replace: bool = False) -> bool:
        """Write a record durably unless it is there already: temporary file, fsync, hard link. Says whether it was new.

        Without hard links it is renamed: of two that put the same key at the same moment, the last stands.

        replace: put it in the place of the one that is there; for two equally good answers, of which one has to stand.

        Raises:
            InputError: the folder cannot be written.
        """
        path = self.path(kind, key, suffix)
        temporary = path.with_name(f".{key}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                if replace:
                    temporary.replace(path)
                else:
                    self._put_if_absent(temporary, path)
            except FileExistsError:
                return False
            sync_folder(path.parent)
        except OSError as error:
            raise _not_writable(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return True

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Append one line of JSON to a log in the store's folder, whole even where several processes write."""
        path = self.root / name
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, canonical_json(entry) + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _not_writable(path, error) from error

    def set_aside(self, kind: str, key: str, suffix: str, reason: str) -> None:
        """Rename a damaged record to `*.damaged`, say so, and forget which committed outputs were taken in.

        The file is kept as evidence; the record counts as absent, and can come back from a committed output.
        """
        path = self.path(kind, key, suffix)
        aside = path.with_name(path.name + ".damaged")
        log.warning(f"warning: {path}: damaged record ({reason}); set aside as {aside.name}, counts as absent")
        with contextlib.suppress(FileNotFoundError):  # another process was first
            path.replace(aside)
        shutil.rmtree(self.root / HYDRATED, ignore_errors=True)

    def keys(self, kind: str, suffix: str) -> Iterator[str]:
        """Keys of all records of a kind, sorted."""
        for path in sorted((self.root / kind).glob(f"??/*.{suffix}")):
            if _KEY.fullmatch(path.stem):
                yield path.stem

    def path(self, kind: str, key: str, suffix: str) -> Path:
        """Where a record stands, whether it is there or not."""
        return self._folder(kind, key) / f"{key}.{suffix}"

    @contextlib.contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Hold the lock of a key against threads and processes; waits for it. A killed holder lets go of it."""
        let_go = self._lock(kind, key, blocking=True)
        assert let_go is not None
        try:
            yield
        finally:
            let_go()

    @contextlib.asynccontextmanager
    async def lock_async(self, kind: str, key: str) -> AsyncIterator[None]:
        """`lock` that leaves the event loop to others while it waits."""
        while (let_go := self._lock(kind, key, blocking=False)) is None:
            await asyncio.sleep(POLL_S)
        try:
            yield
        finally:
            let_go()

    def _put_if_absent(self, temporary: Path, path: Path) -> None:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            self._say_once("has no hard links; records are put there by renaming")
            if path.exists():
                raise FileExistsError from error
            temporary.replace(path)

    def _lock(self, kind: str, key: str, *, blocking: bool) -> Callable[[], None] | None:
        """Take the lock of a key; what lets go of it, or None where another holds it and `blocking` is false."""
        self._folder(kind, key)
        try:
            if not self._by_lease():
                try:
                    return self._file_lock(kind, key, blocking=blocking)
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                (self.root / BY_LEASE).mkdir(parents=True, exist_ok=True)
            self._say_once("has no locks between machines; leases take their place")
            leases = Leases(self.root / BY_LEASE)
            while (lease := leases.take(f"{kind}-{key}")) is None:
                if not blocking:
                    return None
                time.sleep(POLL_S)
        except OSError as error:
            raise _not_writable(self.root / "locks" / f"{kind}-{key}", error) from error
        lease.start()
        return lease.end

    def _file_lock(self, kind: str, key: str, *, blocking: bool) -> Callable[[], None] | None:
        from filelock import FileLock, Timeout

        path = self.root / "locks" / f"{kind}-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # a soft lock would outlive a killed holder
        lock = FileLock(path, thread_local=False, poll_interval=POLL_S, fallback_to_soft=False)
        try:
            lock.acquire(blocking=blocking)
        except Timeout:
            return None

        def let_go() -> None:
            # while it is held: who waits for a file that has no name any more starts over (filelock looks)
            path.unlink(missing_ok=True)
            lock.release()

        return let_go

    def _by_lease(self) -> bool:
        """Whether leases take the place of locks here: one process has found locks not to hold, for all."""
        folder = self.root / BY_LEASE
        if self._locks_are_local is None:
            self._locks_are_local = locks_are_local(self.root)
            if self._locks_are_local:
                folder.mkdir(parents=True, exist_ok=True)
        return folder.is_dir()

    def _say_once(self, what: str) -> None:
        line = f"warning: {self.root}: the store's file system {what}"
        if line not in _SAID:
            _SAID.add(line)
            log.warning(line)

    def _folder(self, kind: str, key: str) -> Path:
        if not _KIND.fullmatch(kind) or not _KEY.fullmatch(key):
            raise ValueError(f"not a kind and a key of 64 hex digits: {kind!r}, {key!r}")
        return self.root / kind / key[:2]


def _not_writable(path: Path, error: OSError) -> InputError:
    remedy = "set LVLMVA_STORE to a folder that you may write"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room, or set LVLMVA_STORE to a folder on another disk"
    return InputError(f"{path}: the store cannot be written ({error.strerror}); {remedy}")


def _plain(content: Any) -> Any:
    if isinstance(content, np.ndarray):
        return {"ndarray": digest_array(content), "dtype": content.dtype.name, "shape": list(content.shape)}
    if isinstance(content, np.generic):
        return content.item()
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(item) for item in content]
    return content


def _encode_array(array: np.ndarray) -> tuple[dict[str, Any], bytes]:
    if array.dtype.hasobject:
        raise TypeError("arrays of objects cannot be digested or stored")
    little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return {"dtype": little.dtype.str, "shape": list(array.shape)}, little.tobytes()


def _encode_arrays(arrays: Mapping[str, np.ndarray], kind: str, key: str) -> bytes:
    encoded = {name: _encode_array(arrays[name]) for name in sorted(arrays)}
    header = {
        "schema": ARRAYS_SCHEMA,
        "kind": kind,
        "key": key,
        "arrays": [{"name": name, **fields} for name, (fields, _) in encoded.items()],
    }
    payload = b"".join(data for _, data in encoded.values())
    body = canonical_json(header) + b"\n" + payload
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _decode_arrays(content: bytes, kind: str, key: str) -> dict[str, np.ndarray]:
    """Inverse of `_encode_arrays`. Raises ValueError where anything differs from what was written."""
    stated, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != stated:
        raise ValueError("its bytes do not match its digest")
    first, _, payload = body.partition(b"\n")
    header = json.loads(first)
    if (header["schema"], header["kind"], header["key"]) != (ARRAYS_SCHEMA, kind, key):
        raise ValueError("it belongs to another key or version")
    arrays, start = {}, 0
    for fields in header["arrays"]:
        dtype = np.dtype(fields["dtype"])
        count = math.prod(fields["shape"])
        array = np.frombuffer(payload, dtype, count, start).reshape(fields["shape"])
        arrays[fields["name"]] = array.astype(dtype.newbyteorder("="))
        start += count * dtype.itemsize
    return arrays


def sync_folder(folder: Path) -> None:
    """Make names that were put into a folder durable, as fsync does for a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in the place of another: written beside it, fsync, renamed, so that it is whole at any moment.

    Who calls it holds a lock on the file, if others may write it too.
    """
    building = path.with_name(f".{path.name}.partial")
    try:
        with building.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)
    sync_folder(path.parent)  # the new name, too
