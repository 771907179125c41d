"""Stage segment: attribution maps to regions."""

import functools
from pathlib import Path

from lvlmva.entry import run
from lvlmva.kept import kept_or_computed
from lvlmva.params import load_params
from lvlmva_core import segmentations
from lvlmva_core.arrays import read_array, read_attrs, write_arrays, write_json
from lvlmva_core.compute import set_up_compute
from lvlmva_core.samples import read_images, read_samples, rows_of_ids


def segment(
    params: Path, attributions: Path, images: Path, samples: Path, segments: Path, segment_metrics: Path
) -> None:
    """Cut each attribution map into regions."""
    loaded = load_params(params)
    segmenter = loaded.segment
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    ids = list(read_attrs(attributions)["ids"])
    maps = read_array(attributions, "attributions")
    pictures = read_images(images, rows_of_ids(read_samples(samples), ids)) if segmenter.reads_images else None
    keys = segmentations.segmentation_keys(segmenter, maps, pictures)
    records = kept_or_computed(
        segmentations.KIND,
        keys,
        segments,
        records_in=segmentations.records_in,
        compute=functools.partial(segmentations.segment_rows, segmenter, maps, pictures, ids, device),
        chunk=segmentations.CHUNK,
        stage="segment",
    )
    arrays, status = segmentations.arrays_of(records)
    attrs = {
        "ids": ids,
        "keys": keys,
        "status": status,
        "method": segmenter.method,
        "method_version": segmenter.version,
        "n_regions": segmenter.n_regions,
        "seed": segmenter.seed,
    }
    write_arrays(segments, arrays, attrs)
    write_json(segment_metrics, {"segment": segmentations.summary_of(segmenter, arrays, status)})


if __name__ == "__main__":
    run(segment)
