"""What a segmenter can be told."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lvlmva_core.regions import MAX_REGIONS
from lvlmva_core.settings import Count, Seed, Settings


class Segment(Settings):
    """Regions of each explanation map."""

    method: Literal["ppeps_wgm", "sam", "slic", "grid"]
    n_regions: Annotated[int, Field(ge=1, le=MAX_REGIONS)]
    choose: Literal["fixed", "bic", "held_out"]
    n_starts: Count
    n_superpixels: Count
    sam_checkpoint: str | None
    seed: Seed

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> "Segment":
        if self.method == "sam" and self.sam_checkpoint is None:
            raise ValueError("segment.method 'sam' needs sam_checkpoint: a folder with a SAM in transformers' format")
        if self.method != "ppeps_wgm" and self.choose != "fixed":
            raise ValueError("segment.choose must be fixed: only ppeps_wgm has a likelihood to choose by")
        return self
