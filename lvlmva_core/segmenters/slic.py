"""SLIC superpixels of the picture, merged by attribution."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from lvlmva_core.segmenters.interface import Arrays, Segmenter, merged
from lvlmva_core.settings import Count

if TYPE_CHECKING:
    import torch


class Slic(Segmenter):
    """n_superpixels: about how many there are before they are merged."""

    reads_images: ClassVar[bool] = True

    method: Literal["slic"] = "slic"
    n_superpixels: Count = 64

    def kept_under(self) -> dict[str, object]:
        return {"n_superpixels": self.n_superpixels}

    def segment(
        self, attributions: np.ndarray, images: np.ndarray | None, ids: Sequence[str], device: "torch.device"
    ) -> Arrays:
        """Superpixels (Achanta et al. 2012) down to n_regions."""
        from lvlmva_core.segmentation.superpixels import slic_regions

        if images is None:
            raise ValueError("slic reads the pictures: give images")
        return merged([slic_regions(image, self.n_superpixels) for image in images], attributions, ids, self.n_regions)
