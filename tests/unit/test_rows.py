"""Records a shard at a time: the same keys, arrays and errors as all at once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lvlmva.kept import kept_or_computed
from lvlmva_core.arrays import SHARD_ROWS, ArrayWriter, read_array, write_arrays
from lvlmva_core.errors import InputError
from lvlmva_core.rows import Rows, shards_of, stacked
from lvlmva_core.store import Record, Store, digest

COUNT, CHUNK = 150, 7
VALUES = np.random.default_rng(0).normal(size=(COUNT, 3, 4))


class Counted:
    """Rows whose record is twice the value; remembers how many were asked for at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.rows = Rows("doubled", [f"s{n:03d}" for n in range(COUNT)], CHUNK, self.keys_of, self.compute)

    def keys_of(self, places: Sequence[int]) -> list[str]:
        self.asked.append(len(places))
        return [digest({"value": VALUES[place]}) for place in places]

    def compute(self, places: Sequence[int]) -> list[Record]:
        self.asked.append(len(places))
        return [{"double": 2 * VALUES[place], "sum": VALUES[place].sum()[None]} for place in places]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    return Store(tmp_path / "store")


def test_keys_are_those_of_a_loop_over_samples() -> None:
    rows = Counted().rows
    wanted = [digest({"value": value}) for value in VALUES]
    assert rows.keys() == wanted
    share = range(64, 128)
    assert rows.keys(share) == wanted[64:128]
    assert rows.keys([149, 3]) == [wanted[149], wanted[3]]


def test_the_output_is_that_of_all_at_once_and_no_more_than_a_shard_is_asked_for(store: Store, tmp_path: Path) -> None:
    counted = Counted()
    keys, records = kept_or_computed(counted.rows, tmp_path / "out", records_in=lambda _: [], stage="test")
    with ArrayWriter(tmp_path / "parts.zarr") as writer:
        for part in stacked(records):
            assert len(part["sum"]) <= SHARD_ROWS
            writer.append(part)
        writer.attrs = {"keys": keys}
    whole = {"double": 2 * VALUES, "sum": VALUES.sum((1, 2))[:, None]}
    write_arrays(tmp_path / "whole.zarr", whole, {"keys": [digest({"value": value}) for value in VALUES]})
    found, wanted = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "parts.zarr", tmp_path / "whole.zarr")
    )
    assert found == wanted
    assert max(counted.asked) == SHARD_ROWS
    assert sum(counted.asked) == 2 * COUNT  # each key and each record once


def test_records_that_are_damaged_meanwhile_are_counted(store: Store, tmp_path: Path) -> None:
    keys, records = kept_or_computed(Counted().rows, tmp_path / "out", records_in=lambda _: [], stage="test")
    next(records)
    for place in (5, 100):
        store.path("doubled", keys[place], "arrays").write_bytes(b"damaged")
    with pytest.raises(InputError, match="2 doubled were damaged meanwhile; run again"):
        list(records)


def test_shards_cover_each_row_once() -> None:
    for count in (1, 63, 64, 65, 150):
        assert [row for shard in shards_of(count) for row in range(count)[shard]] == list(range(count))


@pytest.mark.parametrize("rows", [slice(0, 64), slice(128, 150), np.array([3, 140]), np.arange(COUNT) < 10])
def test_rows_are_read_where_only_other_shards_are_missing(tmp_path: Path, rows: slice | np.ndarray) -> None:
    write_arrays(tmp_path / "a.zarr", {"x": VALUES}, {})
    (tmp_path / "a.zarr/x/c/1/0/0").unlink()
    np.testing.assert_array_equal(read_array(tmp_path / "a.zarr", "x", rows), VALUES[rows])
    for touching in (slice(60, 70), np.array([3, 64]), np.arange(COUNT) == 127, None):
        with pytest.raises(InputError, match="lacks 1 of its shard files"):
            read_array(tmp_path / "a.zarr", "x", touching)
