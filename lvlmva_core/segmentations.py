"""Segmentations of an alignment set: what each is kept under, how they are computed, and counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva_core.arrays import array_names, read_array, read_attrs
from lvlmva_core.errors import InputError
from lvlmva_core.segmenters import Segmenter
from lvlmva_core.store import Record, digest

if TYPE_CHECKING:
    import torch

KIND = "segmentations"  # of the store
CHUNK = 64  # samples that are segmented before they are put into the store: what a killed run loses at most


def segmentation_keys(segmenter: Segmenter, maps: np.ndarray, pictures: np.ndarray | None) -> list[str]:
    """What the segmentation of each map is kept under: a digest of all that changes it.

    Args:
        maps: float32 (N, H, W). pictures: uint8 (N, C, H, W), or None where the segmenter doesn't read them.
    """
    common = {
        "method": segmenter.method,
        "version": segmenter.version,
        "n_regions": segmenter.n_regions,
        "settings": segmenter.kept_under(),
    }
    return [
        digest({**common, "attribution": maps[n], "image": None if pictures is None else pictures[n]})
        for n in range(len(maps))
    ]


def segment_rows(
    segmenter: Segmenter,
    maps: np.ndarray,
    pictures: np.ndarray | None,
    ids: Sequence[str],
    device: "torch.device",
    rows: Sequence[int],
) -> list[Record]:
    """A record for each of these samples: the arrays of `Segmenter.segment`, a row each."""
    chosen = np.asarray(rows)
    shown = None if pictures is None else pictures[chosen]
    found = segmenter.segment(maps[chosen], shown, [ids[n] for n in rows], device)
    return [{name: np.asarray(array[place]) for name, array in found.items()} for place in range(len(rows))]


def records_in(output: Path) -> Iterator[tuple[str, Record]]:
    """Key and record of every row of an earlier output."""
    attrs = read_attrs(output)
    arrays = {name: read_array(output, name) for name in array_names(output)}
    for n, (key, state) in enumerate(zip(attrs["keys"], attrs["status"], strict=True)):
        yield key, {"status": np.array(state), **{name: np.asarray(array[n]) for name, array in arrays.items()}}


def arrays_of(records: Sequence[Record]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The output's arrays, and the status of each sample.

    Raises:
        InputError: no sample has anything to segment.
    """
    arrays = {name: np.stack([record[name] for record in records]) for name in sorted(records[0])}
    status = [str(state) for state in arrays.pop("status")]
    if set(status) == {"no_positive_effect"}:
        raise InputError(
            "no sample has any positive attribution, so that there is nothing to segment; check `attribute` and the "
            "base model"
        )
    return arrays, status


def summary_of(segmenter: Segmenter, arrays: dict[str, np.ndarray], status: Sequence[str]) -> dict[str, Any]:
    """For the metrics file."""
    used = [n for n, state in enumerate(status) if state != "no_positive_effect"]
    present = [len(np.unique(arrays["segments"][n])) for n in used]
    summary: dict[str, Any] = {
        "method": segmenter.method,
        "n_regions": segmenter.n_regions,
        "samples": len(status),
        "n_samples_left_out": len(status) - len(used),
        "status": dict(sorted(Counter(status).items())),
        "empty_regions": segmenter.n_regions * len(used) - sum(present),
    }
    if "log_likelihood" in arrays:
        summary["mean_log_likelihood_nats"] = float(arrays["log_likelihood"][used].mean())
    return summary
