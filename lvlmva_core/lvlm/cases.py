"""What a critic is asked about: a sample with its picture and regions, and for some critics what is true of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.errors import InputError
from lvlmva_core.regions import regions_present, segmentation_digest
from lvlmva_core.render import COLOUR_NAMES
from lvlmva_core.samples import (
    read_class_names,
    read_images,
    read_object_masks,
    read_sample_columns,
    read_spurious_masks,
    rows_of_ids,
)


@dataclass(frozen=True)
class Case:
    """One sample.

    picture: uint8 (C, H, W). segments: uint8 (H, W); 255 = none. status: of its segmentation, "ok" or why it has no
    region. attribution: float32 (H, W), spurious_mask and object_mask: bool (H, W); None where unknown or not read.
    errors: region -> the rate from which a stand-in with set rates judges it wrongly, 0..1; None = drawn by itself.
    """

    sample: str
    class_name: str
    picture: np.ndarray
    segments: np.ndarray
    status: str = "ok"
    attribution: np.ndarray | None = None
    spurious_mask: np.ndarray | None = None
    object_mask: np.ndarray | None = None
    errors: Mapping[int, float] | None = None

    def regions(self) -> dict[int, str]:
        """Region -> name of its colour, for those that own a pixel."""
        return {region: COLOUR_NAMES[region] for region in regions_present(self.segments)}

    def segmentation(self) -> str:
        """Digest of the label map, which verdicts are tied to."""
        return segmentation_digest(self.segments)


def read_cases(
    images: Path, samples: Path, segments: Path, attributions: Path, spurious_masks: Path, *, with_truth: bool
) -> tuple[list[Case], list[str]]:
    """Read the alignment samples.

    Args:
        with_truth: also their attributions and true masks, as far as they are known.

    Returns:
        (cases in the order of `segments`, all class names).

    Raises:
        InputError: a file is missing or damaged, or attributions are of other samples.
    """
    attrs = read_attrs(segments)
    ids = [str(sample) for sample in attrs["ids"]]
    table = read_sample_columns(samples, "label")
    places = rows_of_ids(table, ids)
    labels = table["label"][places]
    class_names = read_class_names(images)
    label_maps, pictures = read_array(segments, "segments"), read_images(images, places)
    count = len(ids)
    effects: list[np.ndarray | None] = [None] * count
    spurious: list[np.ndarray | None] = [None] * count
    objects: list[np.ndarray | None] = [None] * count
    if with_truth:
        if read_attrs(attributions)["ids"] != ids:
            raise InputError(f"{attributions}: other samples than the segmentations; rerun `dvc repro segment`")
        effects = list(read_array(attributions, "attributions"))
        masks, known = read_spurious_masks(spurious_masks, places)
        spurious = [mask if is_known else None for mask, is_known in zip(masks, known, strict=True)]
        of_objects = read_object_masks(spurious_masks, places)
        objects = [None] * count if of_objects is None else list(of_objects)
    cases = [
        Case(ids[n], class_names[int(labels[n])], pictures[n], label_maps[n], str(attrs["status"][n]), *truth)
        for n, truth in enumerate(zip(effects, spurious, objects, strict=True))
    ]
    return cases, class_names
