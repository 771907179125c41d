"""MedMNIST's files: one npz with pictures and labels of three splits, read row by row."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from lvlmva_core.datasets.decode import BadFileError, Decoding, Picture, resized
from lvlmva_core.datasets.tables import Listed
from lvlmva_core.errors import InputError

SPLITS = ("test", "train", "val")  # in the order of the ids


@dataclass(frozen=True)
class ListedNpz:
    """Labels and splits of all samples, by rising id. colour: whether the pictures have three channels."""

    listed: Listed
    ids: list[str]
    colour: bool


def listed_npz(path: Path) -> ListedNpz:
    """Read the labels of train_labels, val_labels and test_labels, and the shapes of the pictures beside them.

    Raises:
        InputError: a part is missing, holds Python objects, or is not what MedMNIST's 2D sets with one label are.
    """
    import pandas as pd

    rows: list[tuple[str, str, str]] = []
    colour = False
    with _opened(path) as archive:
        for split in SPLITS:
            shape = _header(path, archive, f"{split}_images")[1]
            with archive.open(_member(path, archive, f"{split}_labels")) as file:
                labels = _whole(path, file, f"{split}_labels")
            if labels.ndim == 2 and labels.shape[1] > 1:
                raise InputError(f"{path}: {labels.shape[1]} labels a picture; sets with one label a picture are read")
            if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3):
                raise InputError(f"{path}: '{split}_images' has the shape {shape}; expected (N, H, W) or (N, H, W, 3)")
            if len(labels) != shape[0]:
                raise InputError(f"{path}: {shape[0]} pictures but {len(labels)} labels in '{split}'; fetch it again")
            colour = len(shape) == 4
            rows += [(f"{split}-{place:06d}", str(int(label)), split) for place, label in enumerate(labels.reshape(-1))]
    table = pd.DataFrame(rows, columns=["file", "label", "split"])
    where = [f"{path}: {name}" for name in table["file"]]
    return ListedNpz(Listed(table, where, [f"{path}: MedMNIST's layout"]), table["file"].tolist(), colour)


def pictures_of(path: Path, how: Decoding) -> Iterator[Picture | BadFileError]:
    """Each picture in the order of the ids, read from the archive one at a time."""
    with _opened(path) as archive:
        for split in SPLITS:
            dtype, shape = _header(path, archive, f"{split}_images")
            size = int(np.prod(shape[1:])) * dtype.itemsize
            with archive.open(_member(path, archive, f"{split}_images")) as file:
                _read_header(path, file, f"{split}_images")
                for _ in range(shape[0]):
                    content = file.read(size)
                    if len(content) < size:
                        raise InputError(f"{path}: '{split}_images' ends too early; fetch it again")
                    yield Picture(resized(np.frombuffer(content, dtype).reshape(shape[1:]), how), None, 0.0)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; set prepare.root") from error
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise InputError(f"{path}: not a readable npz file ({error}); fetch it again") from error


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> str:
    if f"{name}.npy" not in archive.namelist():
        there = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist()[:8])
        raise InputError(f"{path}: no '{name}' in it (there are: {there}); expected MedMNIST's layout")
    return f"{name}.npy"


def _header(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    with archive.open(_member(path, archive, name)) as file:
        dtype, shape = _read_header(path, file, name)
    if dtype != np.uint8:
        raise InputError(f"{path}: '{name}' is of {dtype}; expected uint8, 0..255")
    return dtype, shape


def _read_header(path: Path, file: IO[bytes], name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise InputError(f"{path}: '{name}' is no array ({' '.join(str(error).split())}); fetch it again") from error
    if fortran:
        raise InputError(f"{path}: '{name}' is stored column by column; save it in C order")
    return dtype, shape


def _whole(path: Path, file: IO[bytes], name: str) -> np.ndarray:
    try:
        labels = np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except ValueError as error:
        raise InputError(f"{path}: '{name}' cannot be read ({error}); only plain numbers are") from error
    if labels.dtype.kind not in "iu":
        raise InputError(f"{path}: '{name}' is of {labels.dtype}; expected whole numbers")
    return labels
