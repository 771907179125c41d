"""PPEPS-WGM: a Gaussian mixture weighted by the positive attributions (LVLM-VA §4.1)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from lvlmva_core.segmenters.interface import Arrays, Segmenter
from lvlmva_core.settings import Count

if TYPE_CHECKING:
    import torch


class PpepsWgm(Segmenter):
    """n_starts: that are compared."""

    version: ClassVar[int] = 2  # of `lvlmva_core.segmentation`: goes up when a pixel may move to another region
    has_likelihood: ClassVar[bool] = True

    method: Literal["ppeps_wgm"] = "ppeps_wgm"
    n_starts: Count = 32

    def kept_under(self) -> dict[str, object]:
        return {"seed": self.seed, "n_starts": self.n_starts, "choose": self.choose}

    def segment(
        self, attributions: np.ndarray, images: np.ndarray | None, ids: Sequence[str], device: "torch.device"
    ) -> Arrays:
        """The mixtures too: "means" (n, J, 2), "covariances" (n, J, 2, 2) and "log_likelihood" (n,), float64."""
        import torch

        from lvlmva_core.segmentation.choice import fit_chosen_gmm
        from lvlmva_core.segmentation.mixture import fit_weighted_gmm

        weights = torch.from_numpy(np.maximum(attributions, 0)).to(device)
        seed, n_starts = self.seed, self.n_starts
        if self.choose == "fixed":
            fit = fit_weighted_gmm(weights, self.n_regions, seed=seed, n_starts=n_starts, names=ids)
        else:
            numbers = range(1, self.n_regions + 1)
            fit, _ = fit_chosen_gmm(weights, numbers, self.choose, seed=seed, n_starts=n_starts, names=ids)
        return {
            "segments": fit.labels.cpu().numpy(),
            "weights": fit.weights.double().cpu().numpy(),
            "means": fit.means.double().cpu().numpy(),
            "covariances": fit.covariances.double().cpu().numpy(),
            "log_likelihood": fit.log_likelihood.double().cpu().numpy(),
            "status": np.array(fit.status),
        }
