"""The shared store on a real S3 server: races of many writers, claims, and arrays that stand for all machines."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lvlmva.kept import kept_or_computed
from lvlmva_core import shared_store
from lvlmva_core.rows import Rows
from lvlmva_core.shared_store import NotFreeError, SharedStore
from lvlmva_core.store import Record, digest
from tests.s3 import BUCKET, S3, Proxy

pytest.importorskip("boto3", reason="the extra s3 is not installed")
pytest.importorskip("moto", reason="the S3 server of these tests is not installed")

WRITERS = 8
Open = Callable[[], SharedStore]


@pytest.fixture
def opened(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """A way to open the shared store of this test, by a client of its own."""
    for name, value in s3.variables(tmp_path.name).items():
        monkeypatch.setenv(name, value)
    return lambda: SharedStore(os.environ["LVLMVA_SHARED_STORE"])


def test_of_many_writers_one_stands_and_all_know_it(opened: Open) -> None:
    keys = [digest(n) for n in range(4)]
    together = threading.Barrier(WRITERS)

    def write(number: int) -> list[bytes]:
        store, stands = opened(), []
        for key in keys:
            together.wait()
            stands.append(store.keep("calls", key, "json", f"{number}".encode(), lambda content: True))
        return stands

    with ThreadPoolExecutor(WRITERS) as threads:
        stood = list(threads.map(write, range(WRITERS)))
    store = opened()
    for key, said in zip(keys, zip(*stood, strict=True), strict=True):
        found = store.get("calls", key, "json")
        assert found is not None
        assert set(said) == {found.content}
    assert list(store.etags("calls", "json")) == sorted(keys)


def test_a_claim_is_held_by_one_at_a_time(opened: Open) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> int:
        store, held = opened(), 0
        while held < 2:
            try:
                claim = store.claim("calls", digest("key"), f"owner{number}", "host")
            except NotFreeError:
                time.sleep(0.03)
                continue
            held += 1
            inside.append(number)
            most.append(len(inside))
            renewed = store.renew(claim)
            assert renewed is not None
            inside.remove(number)
            store.release(renewed, bought=bool(number % 2))
        return held

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [2] * 4
    assert most == [1] * 8


def test_a_claim_gives_way_to_its_owner_at_once_and_to_others_when_it_has_run_out(opened: Open) -> None:
    one, two, key = opened(), opened(), digest("key")
    first = one.claim("calls", key, "one", "here", seconds=2)
    with pytest.raises(NotFreeError, match="here"):
        two.claim("calls", key, "two", "there")
    again = one.claim("calls", key, "one", "here", seconds=2)  # of a process that took the place of a killed one
    assert one.renew(first) is None
    began = time.time()
    while True:
        try:
            taken = two.claim("calls", key, "two", "there")
            break
        except NotFreeError:
            time.sleep(0.1)
    assert time.time() - began > 1  # by the server's clock in whole seconds, it was held for two
    assert one.renew(again) is None
    one.release(again, bought=False)  # of no effect: it is another's now
    with pytest.raises(NotFreeError, match="there"):
        one.claim("calls", key, "one", "here")
    two.release(taken, bought=False)
    one.claim("calls", key, "one", "here")


def test_an_answer_of_the_server_that_is_lost_does_not_make_a_stranger_of_us(opened: Open, s3: S3) -> None:
    proxy = Proxy(s3.port)
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"  # as monkeypatch left it, and takes back
    store, content = opened(), b"x" * 5000
    store.etags("calls", "json")
    for lose in ("answer", "request"):
        proxy.fail(lose, times=1)
        assert store.keep("calls", digest(lose), "json", content, lambda theirs: False) == content
        proxy.fail(lose, times=1)
        claim = store.claim("calls", digest(lose), "one", "here")
        proxy.fail(lose, times=1)
        renewed = store.renew(claim)
        assert renewed is not None
        proxy.fail("answer", after=3000, times=1)
        found = store.get("calls", digest(lose), "json")
        assert found is not None
        assert found.content == content
    assert proxy.lost == 8


def test_a_thousand_and_more_objects_are_listed_page_by_page(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    send = store._send
    monkeypatch.setattr(store, "_send", lambda operation, **asked: send(operation, **_short(operation, asked)))
    keys = sorted(digest(n) for n in range(7))
    for key in keys:
        store.put("calls", key, "json", b"x")
    assert sorted(store.etags("calls", "json")) == keys


def _short(operation: str, asked: dict[str, object]) -> dict[str, object]:
    return {**asked, "MaxKeys": 3} if operation == "list_objects_v2" else asked


def test_the_arrays_that_were_put_first_stand_on_every_machine(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = [digest(n) for n in range(3)]
    computed: Counter[str] = Counter()

    def on(machine: str, keys: Sequence[str], value: float) -> list[float]:
        """The stage on one machine, which would compute `value`."""
        monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / machine))

        def compute(places: Sequence[int]) -> list[Record]:
            computed[machine] += len(places)
            return [{"x": np.array([value])} for _ in places]

        rows = Rows("maps", [key[:8] for key in keys], 2, lambda places: [keys[n] for n in places], compute)
        records = kept_or_computed(rows, Path("out.zarr"), records_in=lambda path: [], stage="s")[1]
        return [float(record["x"][0]) for record in records]

    address = os.environ["LVLMVA_SHARED_STORE"]
    monkeypatch.delenv("LVLMVA_SHARED_STORE")
    assert on("two", keys[:1], 2.0) == [2.0]  # before it shared anything
    monkeypatch.setenv("LVLMVA_SHARED_STORE", address)
    assert on("one", keys[:2], 1.0) == [1.0, 1.0]
    assert on("two", keys, 2.0) == [1.0, 1.0, 2.0]
    assert "s: 2 maps taken from s3://" in capsys.readouterr().err
    assert on("one", keys, 1.0) == [1.0, 1.0, 2.0]
    assert computed == {"one": 2, "two": 2}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert on("one", keys, 3.0) == [1.0, 1.0, 2.0]
    assert "warning: s: s3://" in capsys.readouterr().err
    with pytest.raises(shared_store.UnreachableError, match="mend the connection"):
        on("one", [*keys, digest("new")], 3.0)
    assert BUCKET in address
