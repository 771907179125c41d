"""Regions that a prediction does not depend on, by what their exchange did (an extension of LVLM-VA)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.errors import InputError


def typical_size(logit: np.ndarray) -> float:
    """Root mean square of centred logits (N,): what falls are measured against."""
    return float(np.sqrt(np.mean(np.square(logit, dtype=np.float64))))


def independent_regions(
    falls: Sequence[np.ndarray], spreads: Sequence[np.ndarray], logit: np.ndarray, at_most: float
) -> np.ndarray:
    """Regions that need no critic, since no exchange moves the prediction by much: bool (N, J).

    A region counts where the root mean square of its falls over donors is small for each kind of donors, so that falls
    and rises do not cancel.

    Args:
        falls, spreads: for each kind of donors (N, J) each, `other` and `own` of `lvlmva_core.exchange.Reliance` and
            their spreads; NaN where there is no region. logit: (N,), of the same.
        at_most: the largest size of a change that counts as none, as a share of the logit's typical size.
    """
    limit = at_most * typical_size(logit)
    sizes = [np.hypot(fall, spread, dtype=np.float64) for fall, spread in zip(falls, spreads, strict=True)]
    return np.asarray(np.all([np.nan_to_num(size, nan=np.inf) <= limit for size in sizes], axis=0))


def read_independent(reliance: Path, ids: Sequence[str], at_most: float) -> np.ndarray:
    """`independent_regions` of the samples in data/reliance.zarr.

    Raises:
        InputError: the file is missing or damaged, or holds other samples.
    """
    if list(read_attrs(reliance)["ids"]) != list(ids):
        raise InputError(f"{reliance}: other samples than the segmentations; run `dvc repro exchange`")
    falls, spreads = (
        [read_array(reliance, f"{kind}{suffix}") for kind in ("other", "own")] for suffix in ("", "_spread")
    )
    return independent_regions(falls, spreads, read_array(reliance, "logit"), at_most)
