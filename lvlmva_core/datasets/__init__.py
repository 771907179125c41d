"""Data sets by name; each yields the same prepared arrays and table."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd

from lvlmva_core.datasets.settings import Prepare
from lvlmva_core.errors import InputError
from lvlmva_core.samples import COLUMNS


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
    samples: pd.DataFrame
    spurious_masks: np.ndarray
    known: np.ndarray
    object_masks: np.ndarray | None = None


def prepare_dataset(config: Prepare) -> Dataset:
    """Build the data set that params name.

    Raises:
        InputError: the raw data is missing or malformed; the message says what was expected where.
    """
    return REGISTRY[config.dataset](config)


def assemble(
    name: str,
    class_names: list[str],
    spurious_feature: str,
    *,
    ids: list[str],
    split: np.ndarray,
    label: np.ndarray,
    spurious: np.ndarray,
    source: list[str],
    images: np.ndarray,
    spurious_masks: np.ndarray,
    known: np.ndarray,
    object_masks: np.ndarray | None = None,
) -> Dataset:
    """Put columns and arrays of equal length into one data set, sorted by sample id."""
    order = np.argsort(np.asarray(ids, dtype=str), kind="stable")
    table = pd.DataFrame(
        {
            "id": np.asarray(ids, dtype=str)[order],
            "split": np.asarray(split, dtype=str)[order],
            "label": label.astype(np.int64)[order],
            "spurious": spurious.astype(bool)[order],
            "source": np.asarray(source, dtype=str)[order],
        }
    )
    table["group"] = [
        f"{class_names[k]}/{'spurious' if s else 'plain'}"
        for k, s in zip(table["label"], table["spurious"], strict=True)
    ]
    images = np.ascontiguousarray(images[order])
    table["sha256"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    for wanted in ("train", "val", "test"):
        if not (table["split"] == wanted).any():
            raise InputError(f"data set '{name}' has no '{wanted}' split; see what `prepare.root` points to")
    return Dataset(
        name,
        class_names,
        spurious_feature,
        images,
        table[COLUMNS],
        spurious_masks[order].astype(bool),
        known[order],
        None if object_masks is None else object_masks[order].astype(bool),
    )


def _decoy_digits(config: Prepare) -> Dataset:
    from lvlmva_core.datasets.decoy import decoy_digits

    return decoy_digits(config.seed)


def _decoy_mnist(config: Prepare) -> Dataset:
    from lvlmva_core.datasets.decoy import decoy_mnist

    if config.root is None:
        raise InputError("prepare.root is null: set it to the folder that holds MNIST/raw/*.gz for decoy_mnist")
    return decoy_mnist(Path(config.root), config.seed)


def _knee(config: Prepare) -> Dataset:
    from lvlmva_core.datasets.knee import knee

    assert config.knee is not None  # config.Prepare sees to both
    assert config.image_size is not None
    return knee(_root(config), config.knee, config.image_size, config.seed)


def _skin(config: Prepare) -> Dataset:
    from lvlmva_core.datasets.skin import skin

    assert config.skin is not None
    assert config.image_size is not None
    return skin(_root(config), config.skin, config.image_size, config.seed)


def _root(config: Prepare) -> Path:
    if config.root is None:
        raise InputError(
            f"prepare.root is null: set it to the folder or tar of the {config.dataset} set (docs/data.md)"
        )
    return Path(config.root).expanduser()


REGISTRY: Mapping[str, Callable[[Prepare], Dataset]] = MappingProxyType(
    {"decoy_digits": _decoy_digits, "decoy_mnist": _decoy_mnist, "knee": _knee, "skin": _skin}
)
