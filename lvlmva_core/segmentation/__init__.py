"""Regions of attribution maps: PPEPS-WGM and the segmenters that it is compared with."""

from lvlmva_core.regions import NO_REGION
from lvlmva_core.segmentation.choice import fit_chosen_gmm
from lvlmva_core.segmentation.mixture import WeightedGMM, fit_weighted_gmm, log_likelihood

__all__ = ["NO_REGION", "WeightedGMM", "fit_chosen_gmm", "fit_weighted_gmm", "log_likelihood"]
