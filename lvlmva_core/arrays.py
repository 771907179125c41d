"""Arrays and tables on disk: sharded zarr groups, parquet, JSON; byte-stable and checked when read."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

SHARD_ROWS = 64  # one file per 64 samples: few enough files for DVC, small enough to transfer singly
CHUNK_BYTES = 1 << 16  # decoded at once; smaller chunks cost more to find than to decode


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> None:
    """Write arrays of equal first dimension as one zarr group that replaces whatever stood at `path`.

    Chunks hold one sample, or as many as fill 64 KiB, shards 64 samples; blosc-zstd with shuffle, and a CRC-32C per
    chunk so that damage is noticed when it is read. The group is built beside `path` and renamed, so `path` is never
    half written.

    Args:
        path: folder of the group.
        arrays: name -> (N, ...) array, N > 0.
        attrs: JSON-able facts about the arrays (provenance). No times: the same input must give the same bytes.
    """
    with ArrayWriter(path) as writer:
        writer.append(arrays)
        writer.attrs = attrs


class ArrayWriter:
    """Writes arrays that need not fit into memory: what is appended in parts is what `write_arrays` writes at once.

    A context manager; where it is left by an exception, nothing is written and what stood at `path` stays.

    attrs: as of `write_arrays`; to be set before the end.
    """

    def __init__(self, path: Path) -> None:
        self.attrs: Mapping[str, Any] = {}
        self._path = path
        self._building = path.with_name(path.name + ".partial")
        self._waiting: dict[str, np.ndarray] = {}
        self._stored: dict[str, Any] = {}

    def __enter__(self) -> "ArrayWriter":
        import zarr

        shutil.rmtree(self._building, ignore_errors=True)
        self._building.parent.mkdir(parents=True, exist_ok=True)
        self._group = zarr.create_group(store=str(self._building), zarr_format=3)
        return self

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add rows to each array: name -> (n, ...), the same names, shapes of a row and dtypes each time."""
        for name in sorted(arrays):
            rows = np.ascontiguousarray(arrays[name])
            if name in self._waiting:
                rows = np.concatenate([self._waiting[name], rows])
            whole = len(rows) // SHARD_ROWS * SHARD_ROWS  # a shard is written once, when it is full
            self._write(name, rows[:whole])
            self._waiting[name] = rows[whole:]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self._building, ignore_errors=True)
            return
        for name, rows in self._waiting.items():
            self._write(name, rows)
        self._group.update_attributes(json.loads(_dump(self.attrs)))
        shutil.rmtree(self._path, ignore_errors=True)
        self._building.rename(self._path)

    def _write(self, name: str, rows: np.ndarray) -> None:
        import zarr
        from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

        with zarr.config.set({"array.write_empty_chunks": True, "async.concurrency": 4}):
            if name not in self._stored:
                self._stored[name] = self._group.create_array(
                    name,
                    shape=(0, *rows.shape[1:]),
                    dtype=rows.dtype,
                    chunks=(_chunk_rows(rows), *rows.shape[1:]),
                    shards=(SHARD_ROWS, *rows.shape[1:]),
                    compressors=[
                        BloscCodec(typesize=rows.itemsize, cname="zstd", clevel=5, shuffle=BloscShuffle.shuffle),
                        Crc32cCodec(),
                    ],
                )
            if len(rows):
                stored = self._stored[name]
                start = stored.shape[0]
                stored.resize((start + len(rows), *rows.shape[1:]))
                stored[start:] = rows


def read_array(path: Path, name: str, rows: np.ndarray | slice | None = None) -> np.ndarray:
    """Read one array (or some rows of it) that `write_arrays` wrote.

    Raises:
        InputError: the group or array is missing, a shard is missing, or a chunk does not match its checksum.
    """
    import zarr

    try:
        # not by its group, whose attributes may be long: as many ids as there are rows
        array = zarr.open_array(str(path / name), mode="r")
        missing = _missing_shards(path / name, array.shape, rows)
        if missing:
            raise InputError(f"{path}: array '{name}' lacks {missing} of its shard files; {_REPAIR}")
        if rows is None:
            return np.asarray(array[...])
        if isinstance(rows, slice):
            return np.asarray(array[rows])
        return np.asarray(array.oindex[rows])
    except InputError:
        raise
    except (FileNotFoundError, KeyError) as error:
        raise InputError(f"{path}: no zarr group with an array '{name}' there; {_REPAIR}") from error
    except (ValueError, RuntimeError, OSError) as error:  # what zarr's codecs raise on damaged bytes
        raise InputError(f"{path}: array '{name}' cannot be read ({_one_line(error)}); {_REPAIR}") from error


def read_attrs(path: Path) -> dict[str, Any]:
    """Read the attributes of a group that `write_arrays` wrote. Raises InputError where there is none."""
    import zarr

    try:
        return dict(zarr.open_group(str(path), mode="r").attrs)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a readable zarr group; {_REPAIR}") from error


def has_array(path: Path, name: str) -> bool:
    """Whether a group that `write_arrays` wrote has an array of that name."""
    import zarr

    return name in zarr.open_group(str(path), mode="r")


def array_names(path: Path) -> list[str]:
    """Names of the arrays of a group that `write_arrays` wrote, sorted. Raises InputError where there is none."""
    import zarr

    try:
        return sorted(zarr.open_group(str(path), mode="r").array_keys())
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a readable zarr group; {_REPAIR}") from error


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Write a table as parquet, without an index, byte for byte the same for the same table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path, index=False, engine="pyarrow", compression="zstd")


def read_table(path: Path, columns: list[str]) -> "pd.DataFrame":
    """Read a parquet table and check that it has `columns`. Raises InputError where it does not."""
    import pandas as pd  # here, so that a stage that reads no table starts without it

    with _readable(path):
        table = pd.read_parquet(path, engine="pyarrow")
    _check_columns(path, columns, table.columns)
    return table


def read_columns(path: Path, columns: list[str]) -> dict[str, np.ndarray]:
    """Columns of a parquet table, without pandas, whose import takes longer than what many a stage does with them.

    Returns:
        Column -> array of all rows: str, bool, int64 or float64; object with None where values are missing.

    Raises:
        InputError: the file is missing or damaged, or lacks a column.
    """
    from pyarrow import parquet

    with _readable(path):
        file = parquet.ParquetFile(path)
        _check_columns(path, columns, file.schema_arrow.names)
        table = file.read(columns)
    # by lists, since pyarrow's own way to NumPy imports pandas
    return {name: np.asarray(table[name].to_pylist()) for name in columns}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise InputError(f"{path}: not a readable parquet table ({_one_line(error)}); {_REPAIR}") from error


def _check_columns(path: Path, wanted: list[str], there: Iterable[str]) -> None:
    present = set(there)
    absent = [column for column in wanted if column not in present]
    if absent:
        raise InputError(f"{path}: lacks the columns {', '.join(absent)}; {_REPAIR}")


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys and no NaN, so that the same content gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_dump(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError naming the file where it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable JSON ({_one_line(error)}); {_REPAIR}") from error


_REPAIR = "restore it with `dvc checkout`, or delete it and run `dvc repro`"


def _chunk_rows(array: np.ndarray) -> int:
    """The largest power of two, so that it divides a shard, whose samples fit into CHUNK_BYTES."""
    fitting = CHUNK_BYTES // max(1, array.itemsize * math.prod(array.shape[1:]))
    return 1 << (min(max(fitting, 1), SHARD_ROWS).bit_length() - 1)


def _missing_shards(folder: Path, shape: tuple[int, ...], rows: np.ndarray | slice | None) -> int:
    """How many of the shards that hold `rows` have no file; zarr would read these as zeros."""
    if isinstance(rows, np.ndarray):
        touched = np.unique((np.flatnonzero(rows) if rows.dtype == bool else rows) // SHARD_ROWS).tolist()
    else:
        whole = range(shape[0])[rows or slice(None)]
        touched = list(range(whole.start // SHARD_ROWS, math.ceil(whole.stop / SHARD_ROWS))) if len(whole) else []
    return sum(not (folder / "c" / "/".join([str(shard), *"0" * (len(shape) - 1)])).is_file() for shard in touched)


def _dump(content: Any, indent: int | None = None) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
