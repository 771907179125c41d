"""Stage prepare: raw data to one table and arrays."""

from pathlib import Path

import lvlmva_core.datasets.registry  # noqa: F401 - so that dvc.yaml names the code of the data sets
from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva.roots import with_local_root


def prepare(params: Path, images: Path, samples: Path, spurious_masks: Path) -> None:
    """Decode, decoy and split the data set that params name."""
    with_local_root(load_params(params).prepare).write(images, samples, spurious_masks)


if __name__ == "__main__":
    run(prepare)
