"""The prepared data: one row a sample in samples.parquet, and the rows of images.zarr beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lvlmva_core.arrays import has_array, read_array, read_attrs, read_columns, read_table
from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    # what `read_samples` or `read_sample_columns` gives
    Samples = pd.DataFrame | Mapping[str, np.ndarray]

# a split: the pictures of `test`, each with the spurious feature if it was without, and the other way round
TWINS = "test_twins"
COLUMNS = ["id", "split", "label", "spurious", "group", "source", "sha256"]


def _no_table() -> "pd.DataFrame":
    import pandas as pd  # here, so that a stage that reads no table starts without it

    return pd.DataFrame()


@dataclass(frozen=True)
class Split:
    """Samples that a model is run on.

    images: float32 (N, C, H, W) in [0, 1]. labels: int64 (N,), on the same device. table: their rows of the sample
    table, for what needs ids or groups.
    """

    images: "Tensor"
    labels: "Tensor"
    table: "pd.DataFrame" = field(default_factory=_no_table)


def read_samples(path: Path) -> "pd.DataFrame":
    """Read samples.parquet: one row a sample, sorted by id, in the row order of images.zarr.

    Columns: `id` (str, unique), `split` (str), `label` (int64, 0..K-1), `spurious` (bool: the spurious feature is in
    the picture; null for all where nobody knows), `group` (str, "class/spurious" or "class/plain"; the class alone
    where nobody knows), `source` (str, where the raw image came from), `sha256` (str, of the prepared pixels).

    Raises:
        InputError: a column is missing, or ids are doubled or unsorted.
    """
    samples = read_table(path, COLUMNS)
    _check_ids(path, samples["id"].to_numpy(dtype=str))
    return samples


def read_sample_columns(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Some columns of `read_samples`, `id` among them, as arrays (`read_columns`); raises what it raises."""
    columns = read_columns(path, ["id", *names])
    _check_ids(path, columns["id"])
    return columns


def _check_ids(path: Path, ids: np.ndarray) -> None:
    if not (ids[:-1] < ids[1:]).all():
        raise InputError(f"{path}: sample ids must be unique and sorted; rerun `dvc repro prepare`")


def groups_known(samples: "Samples") -> bool:
    """Whether the table says of every sample if the spurious feature is in the picture."""
    spurious = np.asarray(samples["spurious"])
    return spurious.dtype == bool or all(isinstance(value, bool | np.bool_) for value in spurious)


def rows_of_split(samples: "Samples", split: str) -> np.ndarray:
    """Row numbers (int64, rising) of a split. Raises InputError where the data set has no such split."""
    rows = np.flatnonzero(np.asarray(samples["split"]) == split)
    if not len(rows):
        has = ", ".join(sorted(set(samples["split"])))
        raise InputError(f"the data set has no '{split}' split (it has: {has}); give it one in `prepare`")
    return rows


def rows_of_ids(samples: "Samples", ids: list[str]) -> np.ndarray:
    """Row numbers (int64) of sample ids, in their order. Raises InputError naming the first id that is not there."""
    ordered = np.asarray(samples["id"], dtype=str)
    wanted = np.asarray(ids, dtype=str)
    rows = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    absent = wanted[ordered[rows] != wanted]
    if len(absent):
        raise InputError(f"sample '{absent[0]}' is not in samples.parquet; rerun `dvc repro` so that the stages agree")
    return rows


def read_images(path: Path, rows: np.ndarray) -> np.ndarray:
    """Read pictures by row: uint8 (N, C, H, W), 0..255."""
    return read_array(path, "images", rows)


def read_spurious_masks(path: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read true spurious masks by row.

    Returns:
        (masks, known): bool (N, H, W), True where the spurious feature lies; bool (N,), False where nobody knows.
    """
    return read_array(path, "spurious_masks", rows), read_array(path, "known", rows)


def read_penalised(path: Path) -> tuple[list[str], np.ndarray]:
    """What the penalty is taken on, from the stage `mask`: sample ids, and their masks (n, H, W).

    bool, or float32 in [0, 1] where the share of votes weighs them (an extension).
    """
    attrs = read_attrs(path)
    return list(attrs["ids"]), read_array(path, "weights" if attrs.get("weights") else "masks")


def read_known_masks(path: Path, samples: "pd.DataFrame", ids: list[str]) -> tuple[list[str], np.ndarray]:
    """Those of `ids` whose true mask is known, and these masks, bool (n, H, W). Raises InputError where none is."""
    masks, known = read_spurious_masks(path, rows_of_ids(samples, ids))
    if not known.any():
        raise InputError(
            f"{path}: no true mask is known for any of the {len(ids)} samples asked for; use what needs none"
        )
    return [sample for sample, is_known in zip(ids, known, strict=True) if is_known], masks[known]


def read_object_masks(path: Path, rows: np.ndarray) -> np.ndarray | None:
    """Read the masks of the object that a class is about, by row: bool (N, H, W); None where the data set has none."""
    return read_array(path, "object_masks", rows) if has_array(path, "object_masks") else None


def read_class_names(path: Path) -> list[str]:
    """Names of the classes 0..K-1, from the attributes of images.zarr."""
    return list(read_attrs(path)["class_names"])


def to_unit_range(images: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 in [0, 1]: the scale that gradients, attributions and λ refer to (LVLM-VA §3)."""
    return images.astype(np.float32) / np.float32(255)
