from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from lvlmva_core.arrays import (
    read_array,
    read_attrs,
    read_columns,
    read_json,
    read_table,
    write_arrays,
    write_json,
    write_table,
)
from lvlmva_core.errors import InputError
from lvlmva_core.samples import groups_known

RNG = np.random.default_rng(0)
ARRAYS = {
    "images": RNG.integers(0, 256, (130, 1, 5, 6), dtype=np.uint8),
    "maps": RNG.normal(size=(130, 5, 6)).astype(np.float32),
    "masks": RNG.random((130, 5, 6)) < 0.5,
    "errors": RNG.normal(size=130),
    "zeros": np.zeros((130, 5), dtype=np.int64),
}


@pytest.fixture
def group(tmp_path: Path) -> Path:
    write_arrays(tmp_path / "a.zarr", ARRAYS, {"ids": [f"s{i}" for i in range(130)], "share": np.float64(0.5)})
    return tmp_path / "a.zarr"


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_what_is_written_is_read(group: Path, name: str) -> None:
    whole = read_array(group, name)
    assert whole.dtype == ARRAYS[name].dtype
    np.testing.assert_array_equal(whole, ARRAYS[name])
    rows = np.array([129, 3, 64])
    np.testing.assert_array_equal(read_array(group, name, rows), ARRAYS[name][rows])
    np.testing.assert_array_equal(read_array(group, name, slice(60, 70)), ARRAYS[name][60:70])


def test_attributes_and_few_files(group: Path) -> None:
    assert read_attrs(group)["share"] == 0.5
    assert len(list((group / "maps" / "c").rglob("0"))) > 0
    assert sum(file.is_file() for file in (group / "maps").rglob("*")) == 1 + 3  # zarr.json and ceil(130 / 64) shards


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_old(group: Path, tmp_path: Path) -> None:
    first = _bytes(group)
    (group / "stale").write_text("old")
    write_arrays(group, ARRAYS, read_attrs(group))
    assert _bytes(group) == first
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_a_missing_group_array_or_shard_is_named(group: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.zarr: no zarr group"):
        read_array(tmp_path / "nothing.zarr", "maps")
    with pytest.raises(InputError, match="array 'other'"):
        read_array(group, "other")
    shard = next(file for file in (group / "maps" / "c").rglob("*") if file.is_file())
    shard.unlink()
    with pytest.raises(InputError, match="array 'maps' lacks 1 of its shard files"):
        read_array(group, "maps")
    with pytest.raises(InputError, match="not a readable zarr group"):
        read_attrs(tmp_path / "nothing.zarr")


@pytest.mark.parametrize("place", [10, 200, -40, -3])
def test_damaged_bytes_are_noticed(group: Path, place: int) -> None:
    shard = sorted(file for file in (group / "images" / "c").rglob("*") if file.is_file())[0]
    content = bytearray(shard.read_bytes())
    content[place] ^= 0xFF
    shard.write_bytes(bytes(content))
    with pytest.raises(InputError, match="array 'images' cannot be read"):
        read_array(group, "images")


def test_columns_without_pandas_are_those_of_pandas(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "id": ["a", "ä\U0001f9b4", ""],
            "label": [0, -1, 2**40],
            "spurious": [True, False, True],
            "nobody": pd.Series([None, None, None], dtype=object),
            "some": pd.Series([True, None, False], dtype=object),
            "entropy": [0.1, -0.0, 3.0],
        }
    )
    write_table(tmp_path / "t.parquet", table)
    found = read_columns(tmp_path / "t.parquet", list(table))
    read = read_table(tmp_path / "t.parquet", list(table))
    assert {name: found[name].dtype.kind for name in found} == dict(zip(found, "UibOOf", strict=True))
    for name in table:
        np.testing.assert_array_equal(found[name], read[name].to_numpy())
    for name, known in (("spurious", True), ("nobody", False), ("some", False)):
        assert groups_known({"spurious": found[name]}) is known
        assert groups_known(pd.DataFrame({"spurious": read[name]})) is known


def test_tables_and_json_round_trip_and_say_what_is_wrong(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["a", "b"], "label": [0, 1]})
    write_table(tmp_path / "t.parquet", table)
    first = (tmp_path / "t.parquet").read_bytes()
    write_table(tmp_path / "t.parquet", table)
    assert (tmp_path / "t.parquet").read_bytes() == first
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.parquet", ["id"]), table, check_dtype=False)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for read in (read_table, read_columns):
        with pytest.raises(InputError, match="lacks the columns entropy"):
            read(tmp_path / "t.parquet", ["id", "entropy"])
        for name in ("cut.parquet", "missing.parquet"):
            with pytest.raises(InputError, match=f"{name}: not a readable parquet table"):
                read(tmp_path / name, ["id"])
    write_json(tmp_path / "m.json", {"b": np.float64(1.5), "a": np.int64(2)})
    assert read_json(tmp_path / "m.json") == {"a": 2, "b": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "m.json", {"a": float("nan")})
    with pytest.raises(InputError, match="not readable JSON"):
        read_json(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("shape", "rows"), [((28, 28), 64), ((64, 64), 16), ((3, 96, 96), 2), ((224, 224), 1), ((), 64)]
)
def test_a_chunk_holds_as_many_samples_as_fill_64_kib(tmp_path: Path, shape: tuple[int, ...], rows: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (130, *shape), dtype=np.uint8)
    write_arrays(tmp_path / "a.zarr", {"x": array}, {})
    stored = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")["x"]
    assert isinstance(stored, zarr.Array)
    assert stored.chunks[0] == rows
    np.testing.assert_array_equal(read_array(tmp_path / "a.zarr", "x", np.array([129, 0, 64])), array[[129, 0, 64]])
