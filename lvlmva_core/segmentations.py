"""Segmentations of an alignment set: what each is kept under, how they are computed, and counted."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva_core.arrays import ArrayWriter, array_names, read_array, read_attrs
from lvlmva_core.errors import InputError
from lvlmva_core.rows import Rows, shards_of, stacked
from lvlmva_core.samples import read_images, read_sample_columns, rows_of_ids
from lvlmva_core.segmenters import Segmenter
from lvlmva_core.store import Record, digest

if TYPE_CHECKING:
    import torch

KIND = "segmentations"  # of the store
NOTHING = "no_positive_effect"  # status of a map that has nothing to segment
CHUNK = 64  # samples that are segmented before they are put into the store: what a killed run loses at most


def rows_to_segment(
    segmenter: Segmenter,
    ids: Sequence[str],
    read_maps: Callable[[Sequence[int]], np.ndarray],
    read_pictures: Callable[[Sequence[int]], np.ndarray],
    device: "Callable[[], torch.device]",
) -> Rows:
    """The segmentation of each sample's map: under a digest of all that changes it, the arrays of `Segmenter.segment`.

    Args:
        ids: of N samples. read_maps, read_pictures: places (0..N-1) -> float32 (n, H, W), uint8 (n, C, H, W); pictures
            are read only where the segmenter looks at them. device: asked for only where something is to be computed.
    """
    common = {
        "method": segmenter.method,
        "version": segmenter.version,
        "n_regions": segmenter.n_regions,
        "settings": segmenter.kept_under(),
    }

    def read(places: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        return read_maps(places), read_pictures(places) if segmenter.reads_images else None

    def keys_of(places: Sequence[int]) -> list[str]:
        maps, pictures = read(places)
        return [
            digest({**common, "attribution": maps[n], "image": None if pictures is None else pictures[n]})
            for n in range(len(maps))
        ]

    def compute(places: Sequence[int]) -> list[Record]:
        maps, pictures = read(places)
        found = segmenter.segment(maps, pictures, [ids[place] for place in places], device())
        return [{name: np.asarray(array[n]) for name, array in found.items()} for n in range(len(places))]

    return Rows(KIND, ids, CHUNK, keys_of, compute)


def rows_of_maps(
    segmenter: Segmenter, *, attributions: Path, images: Path, samples: Path, device: "Callable[[], torch.device]"
) -> Rows:
    """`rows_to_segment` of an output of the stage attribute, from files of which no more is read than is asked for."""
    ids = list(read_attrs(attributions)["ids"])

    @functools.cache
    def in_images() -> np.ndarray:
        return rows_of_ids(read_sample_columns(samples), ids)

    def read_maps(places: Sequence[int]) -> np.ndarray:
        return read_array(attributions, "attributions", np.asarray(places))

    def read_pictures(places: Sequence[int]) -> np.ndarray:
        return read_images(images, in_images()[np.asarray(places)])

    return rows_to_segment(segmenter, ids, read_maps, read_pictures, device)


def records_in(output: Path) -> Iterator[tuple[str, Record]]:
    """Key and record of every row of an earlier output."""
    attrs, names = read_attrs(output), array_names(output)
    for shard in shards_of(len(attrs["keys"])):
        arrays = {name: read_array(output, name, shard) for name in names}
        for n, (key, state) in enumerate(zip(attrs["keys"][shard], attrs["status"][shard], strict=True)):
            yield key, {"status": np.array(state), **{name: np.asarray(array[n]) for name, array in arrays.items()}}


def write_segmentations(
    writer: ArrayWriter, segmenter: Segmenter, records: Iterable[Record]
) -> tuple[list[str], dict[str, Any]]:
    """Append the output's arrays; the status of each sample, and what the metrics file says.

    Raises:
        InputError: no sample has anything to segment.
    """
    status: list[str] = []
    present, likelihoods = 0, []
    for part in stacked(records):
        states = [str(state) for state in part.pop("status")]
        writer.append(part)
        used = [n for n, state in enumerate(states) if state != NOTHING]
        present += sum(len(np.unique(part["segments"][n])) for n in used)
        if "log_likelihood" in part:
            likelihoods.append(part["log_likelihood"][used])
        status += states
    check_some(status)
    counts = Counter(status)
    n_used = len(status) - counts[NOTHING]
    summary: dict[str, Any] = {
        "method": segmenter.method,
        "n_regions": segmenter.n_regions,
        "samples": len(status),
        "n_samples_left_out": counts[NOTHING],
        "status": {state: count for state, count in sorted(counts.items()) if count},
        "empty_regions": segmenter.n_regions * n_used - present,
    }
    if likelihoods:
        summary["mean_log_likelihood_nats"] = float(np.concatenate(likelihoods).mean())
    return status, summary


def check_some(status: Sequence[str]) -> None:
    """Raise InputError where no sample has anything to segment."""
    if set(status) == {NOTHING}:
        raise InputError(
            "no sample has any positive attribution, so that there is nothing to segment; check `attribute` and the "
            "base model"
        )
