"""Leases: who is at work on what, with a time limit, for processes on any machines that share a folder.

A lease is a file that its holder writes to again and again; one that was not written for the time limit has no holder
any more (killed, switched off, cut off), and whoever comes next takes its place. It needs neither locks nor hard links,
only that a file is created once (O_EXCL, which holds on NFS since version 3), and no clocks that agree: ages are taken
by the clock of the file system.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

LEASE_S = 60.0  # without a sign of life, after which another takes over
SIGNS = 4  # of life in that time


class Lease:
    """A lease that is held. As a context it keeps showing signs of life until the context ends, and then lets go."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.file = file
        self.seconds = seconds
        self.lost = False  # somebody took over, since there was no sign of life for too long
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def start(self) -> None:
        """Begin to show signs of life."""
        self._thread.start()

    def end(self) -> None:
        """Let go."""
        self._ended.set()
        self._thread.join()
        self.file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another is at it already, or was
            self.file.parent.rmdir()

    def _live(self) -> None:
        while not self._ended.wait(self.seconds / SIGNS):
            try:
                with self.file.open("r+b") as file:  # os.utime would let some file systems take this machine's clock
                    file.write(b"{")
                    file.flush()
                    os.fsync(file.fileno())
            except FileNotFoundError:
                self.lost = True
                return
            except OSError:  # a server that is away for a moment
                continue


class Leases:
    """Leases in a folder, each by a name (which may stand in a file name)."""

    def __init__(self, folder: Path, seconds: float = LEASE_S) -> None:
        self.folder = folder
        self.seconds = seconds

    def take(self, name: str) -> Lease | None:
        """A lease of `name`, or None while another holds it.

        Files are numbered; who finds only dead ones creates the next number, which one alone can do, and then looks
        again: it holds the lease only if there is no other living file. So of two that look at the same moment, with
        whatever each has seen before, never both go on (both may stand back, and come again).

        Raises:
            OSError: the folder cannot be written.
        """
        place = self.folder / name
        while True:
            try:
                place.mkdir(parents=True, exist_ok=True)
            except FileExistsError:  # was there, and is gone
                continue
            try:
                there = _numbers(place)
                if self._any_alive(place, there):
                    return None
                mine = place / str(max(there, default=0) + 1)
                _create(mine)
                others = [number for number in _numbers(place) if place / str(number) != mine]
                if self._any_alive(place, others):
                    mine.unlink(missing_ok=True)
                    return None
            except FileExistsError:
                return None
            except FileNotFoundError:  # whoever let go of it removed the folder in between
                continue
            for number in others:
                (place / str(number)).unlink(missing_ok=True)
            return Lease(mine, self.seconds)

    def holder(self, name: str) -> str:
        """Who holds a lease, in words."""
        place = self.folder / name
        for number in sorted(_numbers(place), reverse=True) if place.is_dir() else []:
            with contextlib.suppress(OSError, ValueError, KeyError):
                content = json.loads((place / str(number)).read_text(encoding="utf-8"))
                return f"process {content['process']} on {content['host']}"
        return "another process"

    def _any_alive(self, place: Path, numbers: list[int]) -> bool:
        return any(self._alive(place, number) for number in numbers)

    def _alive(self, place: Path, number: int) -> bool:
        try:
            with (place / str(number)).open("rb") as file:  # to open it, unlike stat, asks the server
                touched = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False
        return _now(place) - touched <= self.seconds


def _create(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        json.dump({"host": socket.gethostname(), "process": os.getpid()}, opened)


def _numbers(place: Path) -> list[int]:
    return [int(name) for name in os.listdir(place) if name.isdecimal()]


def _now(folder: Path) -> float:
    """The time by the clock that dates the files of a folder, which may be a server's."""
    file = folder / f".now.{os.getpid()}.{secrets.token_hex(4)}"
    # without O_EXCL: NFS 3 keeps a mark of its own in the times of a file that is created exclusively
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        file.unlink(missing_ok=True)


# file systems that answer flock from this machine alone: type -> options with which they do
_LOCAL = {
    "nfs": ("local_lock=all", "local_lock=flock"),
    "nfs4": ("local_lock=all", "local_lock=flock"),
    "lustre": ("localflock",),
    "cifs": ("nobrl",),
    "fuse.sshfs": (),
}


def locks_are_local(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether flock in a folder is known to hold against processes of this machine only; False where nothing is known.

    mounts: the table of mounts, as Linux has it.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    found, length = False, -1
    for line in lines:
        words, _, after = line.partition(" - ")
        point = words.split()[4].replace("\\040", " ")
        kind, _, options = after.split(maxsplit=2)
        if len(point) >= length and folder.resolve().is_relative_to(point):  # the last of the deepest hides the others
            has = options.split(",")
            found, length = (
                kind in _LOCAL and (not _LOCAL[kind] or any(each in has for each in _LOCAL[kind])),
                len(point),
            )
    return found
