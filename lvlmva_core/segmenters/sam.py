"""Masks of Segment Anything, merged by attribution."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import field_validator

from lvlmva_core.segmenters.interface import Arrays, Segmenter, merged

if TYPE_CHECKING:
    import torch


class Sam(Segmenter):
    """sam_checkpoint: folder of a SAM in transformers' format."""

    version: ClassVar[int] = 2
    reads_images: ClassVar[bool] = True

    method: Literal["sam"] = "sam"
    sam_checkpoint: str

    @field_validator("sam_checkpoint", mode="before")
    @classmethod
    def _is_given(cls, value: object) -> object:
        if value is None:
            raise ValueError("segment.method 'sam' needs sam_checkpoint: a folder with a SAM in transformers' format")
        return value

    def kept_under(self) -> dict[str, object]:
        from lvlmva_core.segmentation.sam import checkpoint_digest

        return {"checkpoint": checkpoint_digest(Path(self.sam_checkpoint))}

    def segment(
        self, attributions: np.ndarray, images: np.ndarray | None, ids: Sequence[str], device: "torch.device"
    ) -> Arrays:
        """Masks at a grid of points (Kirillov et al. 2023), smaller ones on top, down to n_regions."""
        import torch

        from lvlmva_core.segmentation.sam import load_sam, sam_regions

        if images is None:
            raise ValueError("sam reads the pictures: give images")
        with torch.random.fork_rng(devices=[]):  # transformers draws weights before it reads them
            model = load_sam(Path(self.sam_checkpoint), device)
            regions = [sam_regions(model, image) for image in images]
        return merged(regions, attributions, ids, self.n_regions)
