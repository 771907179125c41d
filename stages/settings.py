"""Stage settings: what params say of each method after inheritance, a file each."""

from pathlib import Path

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import write_json


def settings(params: Path, settings: Path) -> None:
    """Write the settings of each method, so that one is trained anew only when its own change."""
    loaded = load_params(params)
    for name, chosen in loaded.chosen_methods().items():
        write_json(settings / f"{name}.json", chosen.model_dump())


if __name__ == "__main__":
    run(settings)
