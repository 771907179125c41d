"""Stage settings: what params say of each method after inheritance, a file each."""

from pathlib import Path

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import write_json
from lvlmva_core.samples import groups_known, read_samples, read_spurious_masks, rows_of_split


def settings(params: Path, samples: Path, spurious_masks: Path, settings: Path) -> None:
    """Write the settings of each method, so that one is trained anew only when its own change."""
    loaded, table = load_params(params), read_samples(samples)
    known = read_spurious_masks(spurious_masks, rows_of_split(table, "train"))[1]
    loaded.check_supervision(groups=groups_known(table), true_masks=bool(known.any()))
    for name, chosen in loaded.chosen_methods().items():
        write_json(settings / f"{name}.json", chosen.model_dump())


if __name__ == "__main__":
    run(settings)
