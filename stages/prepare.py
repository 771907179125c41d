"""Stage prepare: raw data to one table and arrays."""

from pathlib import Path

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import write_arrays, write_table
from lvlmva_core.datasets import prepare_dataset


def prepare(params: Path, images: Path, samples: Path, spurious_masks: Path) -> None:
    """Decode, decoy and split the data set that params name."""
    dataset = prepare_dataset(load_params(params).prepare)
    attrs = {
        "dataset": dataset.name,
        "class_names": dataset.class_names,
        "spurious_feature": dataset.spurious_feature,
    }
    write_arrays(images, {"images": dataset.images}, attrs)
    masks = {"spurious_masks": dataset.spurious_masks, "known": dataset.known}
    if dataset.object_masks is not None:
        masks["object_masks"] = dataset.object_masks
    write_arrays(spurious_masks, masks, attrs)
    write_table(samples, dataset.samples)


if __name__ == "__main__":
    run(prepare)
