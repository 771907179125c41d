"""Hold a store of records to account.

from lvlmva_core.testing.store import StoreTests

class TestMine(StoreTests):
    def store(self, root):
        return MyStore(root)
"""

import threading
from pathlib import Path

import numpy as np

from lvlmva_core.errors import InputError
from lvlmva_core.store import Store
from lvlmva_core.testing.checks import assert_same_arrays, refused

KEY, OTHER = "ab" + "0" * 62, "cd" + "0" * 62
ARRAYS: dict[str, np.ndarray] = {
    "picture": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "map": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "mask": np.array([True, False]),
    "nothing": np.zeros((0, 3)),
    "number": np.array(2.5),
    "word": np.array("ok"),
}


class StoreTests:
    """What a store owes those who pay for what it keeps. Subclass it, override `store`, and let pytest collect it."""

    def store(self, root: Path) -> Store:
        """A store in the folder `root`, which need not exist; what was put there before is there still."""
        raise NotImplementedError

    def test_arrays_come_back_as_they_were_put(self, tmp_path: Path) -> None:
        """Also from another object on the same folder; what was not put is None."""
        assert self.store(tmp_path).put_arrays("maps", KEY, ARRAYS)
        for store in (self.store(tmp_path), Store(tmp_path)):
            found = store.get_arrays("maps", KEY)
            assert found is not None
            assert_same_arrays(found, ARRAYS, "what was put must come back")
            assert store.get_arrays("maps", OTHER) is None
            assert store.get_arrays("segments", KEY) is None

    def test_the_first_record_stands(self, tmp_path: Path) -> None:
        """A second one is not written, and it is said so."""
        store = self.store(tmp_path)
        assert store.put_arrays("maps", KEY, {"x": np.array([1])}) is True
        assert store.put_arrays("maps", KEY, {"x": np.array([2])}) is False
        found = store.get_arrays("maps", KEY)
        assert found is not None
        assert found["x"].tolist() == [1]

    def test_same_arrays_same_bytes(self, tmp_path: Path) -> None:
        """Whatever their order or layout; and no other file is left behind."""
        one, two = self.store(tmp_path / "one"), self.store(tmp_path / "two")
        one.put_arrays("maps", KEY, ARRAYS)
        two.put_arrays("maps", KEY, {name: np.array(ARRAYS[name], order="F") for name in reversed(ARRAYS)})
        paths = [store.path("maps", KEY, "arrays") for store in (one, two)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        left = [path for path in (tmp_path / "one").rglob("*") if path.is_file()]
        assert left == [paths[0]], "other files are left behind"

    def test_damage_is_never_served(self, tmp_path: Path) -> None:
        """A changed, missing or foreign byte counts as absent, is kept as evidence, and can be put again."""
        for number, damage in enumerate((_flip_first, _flip_last, _cut_off)):
            store = self.store(tmp_path / str(number))
            store.put_arrays("maps", KEY, ARRAYS)
            path = store.path("maps", KEY, "arrays")
            path.write_bytes(damage(path.read_bytes()))
            assert store.get_arrays("maps", KEY) is None, "a damaged record was served"
            assert list(path.parent.glob("*.damaged")), "the damaged record is gone"
            assert store.put_arrays("maps", KEY, ARRAYS) is True

    def test_a_record_is_served_under_its_own_key_alone(self, tmp_path: Path) -> None:
        """A file that was copied to another key or kind is damage."""
        store = self.store(tmp_path)
        store.put_arrays("maps", KEY, ARRAYS)
        for kind, key in (("maps", OTHER), ("segments", KEY)):
            path = store.path(kind, key, "arrays")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.path("maps", KEY, "arrays").read_bytes())
            assert store.get_arrays(kind, key) is None, f"a record of another key was served for {kind}, {key[:2]}"

    def test_keys_are_listed_in_order(self, tmp_path: Path) -> None:
        """Those of a kind, and no leftovers."""
        store = self.store(tmp_path)
        for key in (OTHER, KEY):
            store.put_bytes("calls", key, "json", b"{}")
        store.put_bytes("maps", KEY, "arrays", b"")
        store.path("calls", KEY, "json").with_name(".left.tmp").touch()
        assert list(store.keys("calls", "json")) == [KEY, OTHER]

    def test_names_that_could_leave_the_folder_are_refused(self, tmp_path: Path) -> None:
        """A kind is a word, a key 64 hex digits."""
        store = self.store(tmp_path / "store")
        for kind, key in (("maps", "../" + "0" * 61), ("maps", "ab"), ("../maps", KEY)):
            with refused("64 hex digits"):
                store.put_bytes(kind, key, "arrays", b"x")
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_a_folder_that_cannot_be_written_says_what_to_do(self, tmp_path: Path) -> None:
        """An InputError with the remedy."""
        (tmp_path / "file").touch()
        with refused("LVLMVA_STORE", by=InputError):
            self.store(tmp_path / "file").put_arrays("maps", KEY, ARRAYS)

    def test_one_at_a_time_holds_a_lock(self, tmp_path: Path) -> None:
        """And another key's lock is free meanwhile."""
        inside: list[int] = []
        most: list[int] = []

        def work(number: int) -> None:
            store = self.store(tmp_path)
            for _ in range(20):
                with store.lock("maps", KEY):
                    inside.append(number)
                    most.append(len(inside))
                    threading.Event().wait(0.001)
                    inside.remove(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        with self.store(tmp_path).lock("maps", OTHER):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert most == [1] * 80, "two held one lock at a time"


def _flip_first(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def _flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _cut_off(content: bytes) -> bytes:
    return content[: len(content) // 2]
