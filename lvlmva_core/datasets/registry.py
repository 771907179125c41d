"""Every data set by the name that `prepare.dataset` gives; a new one is a module of its own and a line here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, get_args

from pydantic import Field

from lvlmva_core.datasets import decoy, folder, knee, skin
from lvlmva_core.datasets.settings import PrepareSettings

Known = (
    decoy.DecoyDigits
    | decoy.DecoyMnist
    | folder.Folder
    | knee.KneePrepare
    | skin.SkinPrepare
)  # fmt: skip
Prepare = Annotated[Known, Field(discriminator="dataset")]

DATASETS: Mapping[str, type[PrepareSettings]] = MappingProxyType(
    {get_args(section.model_fields["dataset"].annotation)[0]: section for section in get_args(Known)}
)
