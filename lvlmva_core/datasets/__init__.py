"""Data sets: each a module that holds its settings and what they build, entered in `lvlmva_core.datasets.registry`.

All give the same prepared arrays and table. At its top a module imports no more than numpy and pydantic, since every
stage reads params.yaml; pandas, too, is imported where it is used.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from lvlmva_core.arrays import write_arrays, write_table
from lvlmva_core.errors import InputError
from lvlmva_core.samples import COLUMNS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Dataset:
    """A prepared data set, N samples sorted by id.

    images: uint8 (N, C, H, W). samples: the table that `lvlmva_core.samples.read_samples` describes.
    spurious_masks: bool (N, H, W), True on the spurious feature; known: bool (N,), False where the mask is not known.
    spurious_feature: what the feature is, in words, for reports.
    object_masks: bool (N, H, W), True on the object that the class is about (a lesion), or None where nobody drew it.
    """

    name: str
    class_names: list[str]
    spurious_feature: str
    images: np.ndarray
    samples: "pd.DataFrame"
    spurious_masks: np.ndarray
    known: np.ndarray
    object_masks: np.ndarray | None = None


def assemble(
    name: str,
    class_names: list[str],
    spurious_feature: str,
    *,
    ids: list[str],
    split: np.ndarray,
    label: np.ndarray,
    spurious: np.ndarray | None,
    source: list[str],
    images: np.ndarray,
    spurious_masks: np.ndarray,
    known: np.ndarray,
    object_masks: np.ndarray | None = None,
) -> Dataset:
    """Put columns and arrays of equal length into one data set, sorted by sample id.

    spurious: bool (N,), None where nobody knows in which pictures the spurious feature is.
    """
    order = np.argsort(np.asarray(ids, dtype=str), kind="stable")
    images = np.ascontiguousarray(images[order])
    digests = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])
    table = sample_table(
        class_names,
        np.asarray(ids, dtype=str)[order],
        np.asarray(split, dtype=str)[order],
        label[order],
        None if spurious is None else spurious[order],
        np.asarray(source, dtype=str)[order],
        digests,
    )
    for wanted in ("train", "val", "test"):
        if not (table["split"] == wanted).any():
            raise InputError(f"data set '{name}' has no '{wanted}' split; see what `prepare.root` points to")
    return Dataset(
        name,
        class_names,
        spurious_feature,
        images,
        table,
        spurious_masks[order].astype(bool),
        known[order],
        None if object_masks is None else object_masks[order].astype(bool),
    )


def sample_table(
    class_names: list[str],
    ids: ArrayLike,
    split: ArrayLike,
    label: np.ndarray,
    spurious: np.ndarray | None,
    source: ArrayLike,
    digests: ArrayLike,
) -> "pd.DataFrame":
    """The table that `lvlmva_core.samples.read_samples` describes; N samples by rising id.

    spurious: None where groups are not known; then the column is null, and a sample's group is its class.
    digests: sha256 of each sample's prepared pixels.
    """
    import pandas as pd

    classes = [class_names[k] for k in label]
    table = pd.DataFrame(
        {
            "id": np.asarray(ids, dtype=str),
            "split": np.asarray(split, dtype=str),
            "label": label.astype(np.int64),
            "spurious": pd.array([None] * len(label), dtype="boolean") if spurious is None else spurious.astype(bool),
            "source": np.asarray(source, dtype=str),
            "sha256": np.asarray(digests, dtype=str),
        }
    )
    table["group"] = (
        classes
        if spurious is None
        else [f"{name}/{'spurious' if has else 'plain'}" for name, has in zip(classes, table["spurious"], strict=True)]
    )
    return table[COLUMNS]


def write_dataset(dataset: Dataset, images: Path, samples: Path, spurious_masks: Path) -> None:
    """Write a data set as the stages read it: two zarr groups and a table."""
    attrs = attrs_of(dataset.name, dataset.class_names, dataset.spurious_feature)
    write_arrays(images, {"images": dataset.images}, attrs)
    masks = {"spurious_masks": dataset.spurious_masks, "known": dataset.known}
    if dataset.object_masks is not None:
        masks["object_masks"] = dataset.object_masks
    write_arrays(spurious_masks, masks, attrs)
    write_table(samples, dataset.samples)


def attrs_of(name: str, class_names: list[str], spurious_feature: str) -> dict[str, Any]:
    """Attributes of both groups."""
    return {"dataset": name, "class_names": class_names, "spurious_feature": spurious_feature}
