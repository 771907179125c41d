"""Tiles of nearly equal area: regions from nothing, to compare with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from lvlmva_core.segmenters.interface import Arrays, Segmenter, merged

if TYPE_CHECKING:
    import torch


class Grid(Segmenter):
    """Tiles have no settings of their own."""

    method: Literal["grid"] = "grid"

    def segment(
        self, attributions: np.ndarray, images: np.ndarray | None, ids: Sequence[str], device: "torch.device"
    ) -> Arrays:
        """The same tiles for every map, numbered by the share that each holds."""
        from lvlmva_core.segmentation.superpixels import grid_regions

        regions = grid_regions((attributions.shape[1], attributions.shape[2]), self.n_regions)
        return merged([regions] * len(attributions), attributions, ids, self.n_regions)
