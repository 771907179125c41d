"""What every segmenter is: its settings, and how it cuts attribution maps into regions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from lvlmva_core.errors import InputError
from lvlmva_core.regions import MAX_REGIONS
from lvlmva_core.settings import Choice, Seed

if TYPE_CHECKING:
    import torch

Arrays = dict[str, np.ndarray]


class Segmenter(Choice):
    """A way to cut attribution maps into regions; a subclass is one, with settings of its own.

    version: goes up with any change that can move a pixel to another region. reads_images: whether the pictures matter;
    only then are they part of what a segmentation is kept under. has_likelihood: whether `choose` can be anything but
    "fixed": for each sample the best number of regions up to n_regions, by BIC or by pixels that were held out.

    Modules of segmenters are read with params.yaml, by stages that do without torch: they import it, and whatever else
    takes time, inside `segment`.
    """

    version: ClassVar[int] = 1
    reads_images: ClassVar[bool] = False
    has_likelihood: ClassVar[bool] = False

    method: str
    n_regions: Annotated[int, Field(ge=1, le=MAX_REGIONS)]
    choose: Literal["fixed", "bic", "held_out"] = "fixed"
    seed: Seed = 0

    @model_validator(mode="after")
    def _only_a_likelihood_can_choose(self) -> "Segmenter":
        if self.choose != "fixed" and not self.has_likelihood:
            able = ", ".join(
                sorted(name for name, kind in self.kinds.items() if getattr(kind, "has_likelihood", False))
            )
            raise ValueError(f"segment.choose must be fixed: only {able} has a likelihood to choose by")
        return self

    def kept_under(self) -> dict[str, object]:
        """What the result depends on beside maps, pictures, method, version and number of regions: JSON-able."""
        return {}

    def segment(
        self, attributions: np.ndarray, images: np.ndarray | None, ids: Sequence[str], device: "torch.device"
    ) -> Arrays:
        """Cut maps into regions; a sample's result must not depend on the others.

        Args:
            attributions: float32 (n, H, W). images: uint8 (n, C, H, W), or None unless `reads_images`.
            ids: names of the samples, for messages. device: where to compute.

        Returns:
            "segments" uint8 (n, H, W), 255 = none, regions numbered by falling share of the positive attribution;
            "weights" float64 (n, J), these shares; "status" str (n,): "ok", "no_positive_effect" (segments 255,
            weights 0), "too_few_pixels" or "collapsed" (fewer regions than asked for). There may be more arrays.

        Raises:
            InputError: a map is not finite.
        """
        raise NotImplementedError


def merged(regions: Sequence[np.ndarray], attributions: np.ndarray, ids: Sequence[str], n_regions: int) -> Arrays:
    """What `segment` returns, from regions of any number and order: merged down to `n_regions`, then numbered.

    Args:
        regions: int64 (H, W) of each map, labels >= 0. attributions: float32 (n, H, W). ids: names, for messages.

    Raises:
        InputError: a map is not finite.
    """
    from lvlmva_core.segmentation.superpixels import merge_regions, number_by_share

    for sample, attribution in zip(ids, attributions, strict=True):
        if not np.isfinite(attribution).all():
            raise InputError(f"{sample}: the attribution map is not finite; check `attribute` and the base model")
    numbered = [
        number_by_share(merge_regions(labels, attribution, n_regions), attribution, n_regions)
        for labels, attribution in zip(regions, attributions, strict=True)
    ]
    segments, shares, status = zip(*numbered, strict=True)
    return {"segments": np.stack(segments), "weights": np.stack(shares), "status": np.array(status)}
