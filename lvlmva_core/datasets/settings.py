"""What the settings of every data set have in common."""

from pathlib import Path
from typing import TYPE_CHECKING

from lvlmva_core.errors import InputError
from lvlmva_core.settings import Seed, Settings

if TYPE_CHECKING:
    from lvlmva_core.datasets import Dataset


class PrepareSettings(Settings):
    """Section `prepare` of one data set, which adds `dataset: Literal["its name"]` and what it can be told.

    root: where the raw data lies, null for a data set that needs none. seed: of every draw.
    """

    root: str | None = None
    seed: Seed

    def prepare(self) -> "Dataset":
        """Build the data set. Raises InputError where the raw data is missing or malformed."""
        raise NotImplementedError

    def write(self, images: Path, samples: Path, spurious_masks: Path) -> None:
        """Write what the other stages read; a data set that may be larger than memory does it in parts."""
        from lvlmva_core.datasets import write_dataset

        write_dataset(self.prepare(), images, samples, spurious_masks)

    def folder(self) -> Path:
        """`root` as a path. Raises InputError where it is null."""
        if self.root is None:
            name = getattr(self, "dataset", "the data set")
            raise InputError(f"prepare.root is null: set it to the folder or tar of '{name}' (docs/data.md)")
        return Path(self.root).expanduser()
