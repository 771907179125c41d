"""Regions of attribution maps: PPEPS-WGM and the segmenters that it is compared with."""

from lvlmva_core.segmentation.mixture import METHOD_VERSION, NO_REGION, WeightedGMM, fit_weighted_gmm

__all__ = ["METHOD_VERSION", "NO_REGION", "WeightedGMM", "fit_weighted_gmm"]
