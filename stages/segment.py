"""Stage segment: attribution maps to regions."""

from functools import partial
from pathlib import Path

from lvlmva.entry import run
from lvlmva.kept import kept_or_computed
from lvlmva.params import load_params
from lvlmva_core import segmentations
from lvlmva_core.arrays import ArrayWriter, write_json
from lvlmva_core.compute import set_up_compute


def segment(
    params: Path,
    attributions: Path,
    images: Path,
    samples: Path,
    segments: Path,
    segment_metrics: Path,
    shard: str | None = None,
) -> None:
    """Cut each attribution map into regions. shard: "i/n", only puts that part into the store."""
    loaded = load_params(params)
    segmenter = loaded.segment
    device = partial(set_up_compute, loaded.compute.device, loaded.compute.threads)
    rows = segmentations.rows_of_maps(
        segmenter, attributions=attributions, images=images, samples=samples, device=device
    )
    if shard is not None:
        from lvlmva.work import fill  # here, since it brings all that asks models

        fill(rows, segments, records_in=segmentations.records_in, stage="segment", share=shard)
        return
    keys, records = kept_or_computed(rows, segments, records_in=segmentations.records_in, stage="segment")
    with ArrayWriter(segments) as writer:
        status, summary = segmentations.write_segmentations(writer, segmenter, records)
        writer.attrs = {
            "ids": rows.ids,
            "keys": keys,
            "status": status,
            "method": segmenter.method,
            "method_version": segmenter.version,
            "n_regions": segmenter.n_regions,
            "seed": segmenter.seed,
        }
    write_json(segment_metrics, {"segment": summary})


if __name__ == "__main__":
    run(segment)
