"""RRR fine-tuning: cross-entropy plus a penalty on input gradients inside masks (LVLM-VA §4.4; Ross et al. 2017)."""

from lvlmva_core.alignment.loop import AlignedRun, align_ensemble
from lvlmva_core.penalties import PENALTIES, contrast_penalty, rrr_penalty

__all__ = ["PENALTIES", "AlignedRun", "align_ensemble", "contrast_penalty", "rrr_penalty"]
