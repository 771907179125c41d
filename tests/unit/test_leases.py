import contextlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lvlmva_core.leases import LEASE_S, Leases, locks_are_local

LONG_AGO = 1000.0  # seconds
TURNS = 15


def _aged(file: Path) -> None:
    """Make a lease look as if its holder had shown no sign of life for long."""
    then = file.stat().st_mtime - LONG_AGO
    os.utime(file, (then, then))


def test_one_holds_a_lease_until_it_lets_go(tmp_path: Path) -> None:
    leases, others = Leases(tmp_path), Leases(tmp_path)
    lease = leases.take("a")
    assert lease is not None
    with lease:
        assert others.take("a") is None
        assert f"process {os.getpid()} on " in others.holder("a")
        other = others.take("b")
        assert other is not None
        with other:
            pass
    again = others.take("a")
    assert again is not None
    with again:
        pass
    assert not list(tmp_path.iterdir())


def test_who_shows_no_sign_of_life_is_followed_by_another_and_told(tmp_path: Path) -> None:
    leases = Leases(tmp_path, seconds=0.2)
    first = leases.take("a")
    assert first is not None
    assert Leases(tmp_path).take("a") is None
    _aged(first.file)
    second = Leases(tmp_path).take("a")
    assert second is not None
    assert not first.file.exists()
    first.start()  # it was asleep, and goes on
    first._thread.join(60)
    assert first.lost
    first.end()
    with second:
        assert Leases(tmp_path).take("a") is None


def test_a_holder_shows_signs_of_life(tmp_path: Path) -> None:
    lease = Leases(tmp_path, seconds=0.2).take("a")
    assert lease is not None
    with lease:
        for _ in range(2):
            _aged(lease.file)
            aged = lease.file.stat().st_mtime
            while lease.file.stat().st_mtime < aged + LONG_AGO / 2:
                time.sleep(0.01)
    assert not lease.lost


def _hold(folder: Path) -> None:
    lease = Leases(folder).take("a")
    assert lease is not None
    with lease:
        threading.Event().wait()


def test_a_killed_holder_is_waited_for_as_long_as_the_lease_lasts(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "a" / "1").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert LEASE_S >= 60
    assert Leases(tmp_path).take("a") is None
    _aged(tmp_path / "a" / "1")
    lease = Leases(tmp_path).take("a")
    assert lease is not None


def _count(folder: Path, counter: Path, age: bool) -> None:
    leases = Leases(folder)
    for _ in range(TURNS):
        while (lease := leases.take("a")) is None:
            time.sleep(0.002)
        with lease:
            found = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(found + 1))
        if age:  # a dead one is left behind, which all find at the same time
            dead = folder / "a" / str(1000 + os.getpid() % 1000)
            with contextlib.suppress(FileNotFoundError):  # another let go
                dead.parent.mkdir(exist_ok=True)
                dead.touch()
                os.utime(dead, (0, 0))


@pytest.mark.parametrize("age", [False, True])
def test_processes_that_take_and_take_over_never_hold_it_together(tmp_path: Path, age: bool) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(tmp_path / "leases", counter, age)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert counter.read_text() == str(3 * TURNS)


ROOT_MOUNT = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
NFS = "80 22 0:50 / /data rw,relatime shared:2 - nfs4 server:/ rw,vers=4.2,hard,local_lock=none,addr=10.0.0.1\n"


@pytest.mark.parametrize(
    ("mounts", "local"),
    [
        (ROOT_MOUNT, False),
        (ROOT_MOUNT + NFS, False),
        (ROOT_MOUNT + NFS.replace("none", "all").replace("nfs4", "nfs"), True),
        (ROOT_MOUNT + NFS.replace("none", "flock"), True),
        (ROOT_MOUNT + NFS.replace("none", "posix"), False),  # flock goes to the server
        (ROOT_MOUNT + NFS.replace("none", "all").replace("/data", "/dat"), False),  # another folder
        (ROOT_MOUNT + NFS.replace("none", "all") + ROOT_MOUNT.replace("/ /", "/ /data/a"), False),  # mounted over it
        (ROOT_MOUNT + "81 22 0:51 / /data/a rw - lustre mgs:/fs rw,flock,lazystatfs\n", False),
        (ROOT_MOUNT + "81 22 0:51 / /data/a rw - lustre mgs:/fs rw,localflock\n", True),
        (ROOT_MOUNT + "81 22 0:51 / /data rw shared:3 - fuse.sshfs me@host: rw,user_id=0\n", True),
    ],
)
def test_file_systems_that_lock_for_one_machine_are_known(tmp_path: Path, mounts: str, local: bool) -> None:
    file = tmp_path / "mountinfo"
    file.write_text(mounts)
    assert locks_are_local(Path("/data/a/store"), file) is local
    assert not locks_are_local(tmp_path, tmp_path / "there_is_none")
    assert not locks_are_local(tmp_path)
