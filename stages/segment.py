"""Stage segment: attribution maps to regions."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lvlmva.entry import run
from lvlmva.hydrate import absent_rows, all_rows, open_store
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, write_arrays, write_json
from lvlmva_core.compute import set_up_compute
from lvlmva_core.errors import InputError
from lvlmva_core.progress import track
from lvlmva_core.samples import read_images, read_samples, rows_of_ids
from lvlmva_core.segment_settings import Segment
from lvlmva_core.segmentation.methods import SEGMENTERS
from lvlmva_core.store import Store, digest

KIND = "segmentations"
CHUNK = 64  # samples that are segmented before they are put into the store: what a killed run loses at most


def segment(
    params: Path, attributions: Path, images: Path, samples: Path, segments: Path, segment_metrics: Path
) -> None:
    """Cut each attribution map into regions."""
    loaded = load_params(params)
    config, segmenter = loaded.segment, SEGMENTERS[loaded.segment.method]
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    ids = list(read_attrs(attributions)["ids"])
    maps = read_array(attributions, "attributions")
    pictures = read_images(images, rows_of_ids(read_samples(samples), ids)) if segmenter.reads_images else None
    common = {
        "method": config.method,
        "version": segmenter.version,
        "n_regions": config.n_regions,
        "settings": segmenter.settings(config),
    }
    keys = [
        digest({**common, "attribution": maps[n], "image": None if pictures is None else pictures[n]})
        for n in range(len(ids))
    ]

    store = open_store()
    absent = absent_rows(store, KIND, keys, str(segments), take_in)
    sys.stderr.write(f"segment: {len(ids) - len(absent)} segmentations are there, {len(absent)} to compute\n")
    for first in track(range(0, len(absent), CHUNK), "segment"):
        rows = np.array(absent[first : first + CHUNK])
        found = segmenter.segment(
            maps[rows], None if pictures is None else pictures[rows], [ids[n] for n in rows], config, device
        )
        for place, n in enumerate(rows):
            store.put_arrays(KIND, keys[n], {name: array[place] for name, array in found.items()})

    records = all_rows(store, KIND, keys)
    arrays = {name: np.stack([record[name] for record in records]) for name in sorted(records[0])}
    status = [str(state) for state in arrays.pop("status")]
    attrs = {
        "ids": ids,
        "keys": keys,
        "status": status,
        "method": config.method,
        "method_version": segmenter.version,
        "n_regions": config.n_regions,
        "seed": config.seed,
    }
    if "no_positive_effect" in status and len(set(status)) == 1:
        raise InputError(
            f"{attributions}: no sample has any positive attribution, so that there is nothing to segment; "
            "check `attribute` and the base model"
        )
    write_arrays(segments, arrays, attrs)
    write_json(segment_metrics, {"segment": _summary(config, arrays, status)})


def take_in(version: Path, store: Store) -> None:
    """Put every row of an earlier output into the store."""
    attrs = read_attrs(version)
    names = ["segments", "weights"]
    if attrs["method"] == "ppeps_wgm":
        names += ["means", "covariances", "log_likelihood"]
    arrays = {name: read_array(version, name) for name in names}
    for n, (key, state) in enumerate(zip(attrs["keys"], attrs["status"], strict=True)):
        store.put_arrays(KIND, key, {"status": np.array(state), **{name: array[n] for name, array in arrays.items()}})


def _summary(config: Segment, arrays: dict[str, np.ndarray], status: list[str]) -> dict[str, Any]:
    used = [n for n, state in enumerate(status) if state != "no_positive_effect"]
    present = [len(np.unique(arrays["segments"][n])) for n in used]
    summary: dict[str, Any] = {
        "method": config.method,
        "n_regions": config.n_regions,
        "samples": len(status),
        "n_samples_left_out": len(status) - len(used),
        "status": dict(sorted(Counter(status).items())),
        "empty_regions": config.n_regions * len(used) - sum(present),
    }
    if "log_likelihood" in arrays:
        summary["mean_log_likelihood_nats"] = float(arrays["log_likelihood"][used].mean())
    return summary


if __name__ == "__main__":
    run(segment)
