"""Segmenters by name, each a module: one is added by a file here and its name in the line below (docs/adding.md)."""

from lvlmva_core.segmenters import grid, ppeps_wgm, sam, slic
from lvlmva_core.segmenters.interface import Arrays, Segmenter, merged

SEGMENTERS = Segmenter.kinds

__all__ = ["SEGMENTERS", "Arrays", "Segmenter", "grid", "merged", "ppeps_wgm", "sam", "slic"]
