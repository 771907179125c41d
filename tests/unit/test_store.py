"""The store: deterministic bytes, nothing half written, nothing damaged served, locks that hold and let go."""

import asyncio
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lvlmva_core.errors import InputError
from lvlmva_core.store import Store, canonical_json, digest, digest_array

KEY, OTHER = "ab" + "0" * 62, "cd" + "0" * 62
FORMAT1 = Path(__file__).parents[1] / "fixtures" / "format1"
ARRAYS = npst.arrays(
    dtype=st.sampled_from([np.dtype(name) for name in ("uint8", "bool", "int64", "float32", ">f8", "float16")]),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


@given(arrays=st.dictionaries(st.text(max_size=5), ARRAYS, max_size=3))
@settings(max_examples=60, deadline=None)
def test_arrays_come_back_as_they_were_put(tmp_path_factory: pytest.TempPathFactory, arrays: dict) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    assert store.put_arrays("maps", KEY, arrays)
    found = store.get_arrays("maps", KEY)
    assert found is not None
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], array)


def test_the_same_arrays_give_the_same_bytes_and_the_first_record_stands(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    x, y = np.arange(6.0).reshape(2, 3), np.array([1, 2], dtype=np.uint8)
    one.put_arrays("maps", KEY, {"x": x, "y": y})
    two.put_arrays("maps", KEY, {"y": y, "x": np.asfortranarray(x)})
    assert one.path("maps", KEY, "arrays").read_bytes() == two.path("maps", KEY, "arrays").read_bytes()
    assert not one.put_arrays("maps", KEY, {"x": x + 1})
    np.testing.assert_array_equal(one.get_arrays("maps", KEY)["x"], x)  # type: ignore[index]
    assert [path.name for path in (tmp_path / "one").rglob("*") if path.is_file()] == [f"{KEY}.arrays"]


@pytest.mark.parametrize("place", [0, 70, -1])
def test_a_changed_byte_is_noticed_said_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    store = Store(tmp_path)
    store.put_arrays("maps", KEY, {"x": np.arange(100)})
    (tmp_path / "hydrated").mkdir()
    (tmp_path / "hydrated" / "0123").touch()
    path = store.path("maps", KEY, "arrays")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert store.get_arrays("maps", KEY) is None
    assert "damaged record" in caplog.text
    assert str(path) in caplog.text
    assert path.with_name(path.name + ".damaged").exists()
    assert not (tmp_path / "hydrated").exists()  # so that a committed copy is looked for again
    assert store.put_arrays("maps", KEY, {"x": np.arange(100)})


def test_a_record_under_another_key_or_kind_is_not_served(tmp_path: Path) -> None:
    store = Store(tmp_path)
    other = "cd" + "0" * 62
    store.put_arrays("maps", KEY, {"x": np.arange(3)})
    for kind, key in (("maps", other), ("segments", KEY)):
        path = store.path(kind, key, "arrays")
        path.parent.mkdir(parents=True)
        path.write_bytes(store.path("maps", KEY, "arrays").read_bytes())
        assert store.get_arrays(kind, key) is None


@pytest.mark.parametrize(("kind", "key"), [("maps", "../" + "0" * 61), ("maps", "ab"), ("../maps", KEY)])
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, kind: str, key: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        Store(tmp_path).put_arrays(kind, key, {})


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="set LVLMVA_STORE to a folder that you may write"):
        Store(tmp_path / "file").put_arrays("maps", KEY, {})


def test_canonical_json_is_what_the_standard_library_reads_back() -> None:
    content = {"b": [1, 2.5, None, True], "a": {"ü": "x\u2028"}}
    assert json.loads(canonical_json(content)) == content
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1}) == b'{"a":1,"b":2}'
    assert digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(float("nan"))


def test_digests_of_arrays_tell_values_shapes_and_types_apart_but_not_layouts() -> None:
    base = np.arange(6, dtype=np.int32).reshape(2, 3)
    same = [np.asfortranarray(base), base.astype(">i4"), np.arange(12, dtype=np.int32).reshape(2, 6)[:, ::2] // 2]
    assert {digest_array(array) for array in same} == {digest_array(base)}
    other = [base.astype(np.int64), base.reshape(3, 2), base + 1, base.astype(np.uint32)]
    assert len({digest_array(array) for array in [base, *other]}) == 5
    assert digest({"x": base}) != digest({"x": base.tolist()})
    with pytest.raises(TypeError, match="objects"):
        digest_array(np.array([None]))


def _hold(root: Path, entered: str, seconds: float) -> None:
    with Store(root).lock("maps", KEY):
        Path(entered).touch()
        time.sleep(seconds)


def _count(root: Path, file: Path) -> None:
    store = Store(root)
    for _ in range(50):
        with store.lock("maps", KEY):
            file.write_text(str(int(file.read_text()) + 1))


def _count_together(tmp_path: Path) -> None:
    file = tmp_path / "counter"
    file.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(tmp_path / "store", file)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert file.read_text() == "150"


def test_a_lock_keeps_processes_apart(tmp_path: Path) -> None:
    _count_together(tmp_path)
    assert not list((tmp_path / "store" / "locks").iterdir())


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    entered = tmp_path / "entered"
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, str(entered), 600))
    process.start()
    while not entered.exists():
        time.sleep(0.01)
    store = Store(tmp_path)
    assert not _free(store)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with store.lock("maps", KEY):
        assert not _free(store)
    assert _free(store)


def _free(store: Store) -> bool:
    """Whether the lock of KEY can be had within half a second, without the event loop standing still."""

    async def beat(count: list[int]) -> None:
        while True:
            count.append(1)
            await asyncio.sleep(0.01)

    async def take() -> None:
        async with store.lock_async("maps", KEY):
            pass

    async def attempt() -> bool:
        count: list[int] = []
        beats = asyncio.create_task(beat(count))
        try:
            await asyncio.wait_for(take(), 0.5)
        except TimeoutError:
            assert len(count) > 20
            return False
        finally:
            beats.cancel()
        return True

    return asyncio.run(attempt())


def test_threads_and_tasks_exclude_each_other(tmp_path: Path) -> None:
    store, held, most = Store(tmp_path), [], []

    async def one() -> None:
        async with store.lock_async("maps", KEY):
            held.append(1)
            most.append(len(held))
            await asyncio.sleep(0.001)
            held.pop()

    async def several() -> None:
        await asyncio.gather(*(one() for _ in range(5)))

    threads = [threading.Thread(target=lambda: asyncio.run(several())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 15
    assert not list((tmp_path / "locks").iterdir())


def test_records_of_the_first_version_are_read_and_written_as_they_were(tmp_path: Path) -> None:
    store = Store(FORMAT1 / "store")
    found = store.get_arrays("attributions", KEY)
    assert found is not None
    np.testing.assert_array_equal(found["map"], np.arange(12, dtype=np.float32).reshape(3, 4))
    assert found["label"] == 3
    again = Store(tmp_path)
    again.put_arrays("attributions", KEY, found)
    written = again.path("attributions", KEY, "arrays").read_bytes()
    assert written == store.path("attributions", KEY, "arrays").read_bytes()


def test_a_folder_in_the_place_of_a_record_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    store.path("maps", KEY, "arrays").mkdir(parents=True)
    assert store.get_arrays("maps", KEY) is None
    assert "damaged record" in caplog.text
    assert store.put_arrays("maps", KEY, {"x": np.arange(3)})


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_records_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """As on FAT, and on some network file systems."""

    def no_link(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_link)
    store = Store(tmp_path / "store")
    assert store.put_arrays("maps", KEY, {"x": np.arange(3)})
    assert not Store(tmp_path / "store").put_arrays("maps", KEY, {"x": np.arange(4)})
    assert store.put_arrays("maps", OTHER, {"x": np.arange(5)})
    np.testing.assert_array_equal(store.get_arrays("maps", KEY)["x"], np.arange(3))  # type: ignore[index]
    assert sorted(path.name for path in store.root.rglob("*") if path.is_file()) == [
        f"{KEY}.arrays",
        f"{OTHER}.arrays",
    ]
    assert caplog.text.count("has no hard links") == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_leases_take_their_place_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def no_lock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    root = tmp_path / "store"
    with monkeypatch.context() as here:
        here.setattr(fcntl, "flock", no_lock)
        with Store(root).lock("maps", KEY):
            assert not _free(Store(root))
            here.undo()
            assert not _free(Store(root))  # a machine on which locks work goes by leases too
        assert _free(Store(root))
    assert (root / "lock_leases").is_dir()
    assert caplog.text.count("leases take their place") == 1


def test_leases_keep_processes_apart_as_locks_do(tmp_path: Path) -> None:
    (tmp_path / "store" / "lock_leases").mkdir(parents=True)
    _count_together(tmp_path)
    assert not list((tmp_path / "store" / "lock_leases").iterdir())
    assert not (tmp_path / "store" / "locks").exists()


def test_where_locks_are_known_to_stay_on_one_machine_leases_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvlmva_core.store.locks_are_local", lambda root: root == tmp_path)
    with Store(tmp_path).lock("maps", KEY):
        assert [path.name for path in (tmp_path / "lock_leases").iterdir()] == [f"maps-{KEY}"]
