"""Stage attribute: explanation maps of the alignment samples."""

from functools import partial
from pathlib import Path

from lvlmva.entry import run
from lvlmva.kept import kept_or_computed
from lvlmva.params import load_params
from lvlmva_core import attribution_maps as maps
from lvlmva_core.arrays import ArrayWriter, write_json
from lvlmva_core.compute import set_up_compute


def attribute(
    params: Path,
    images: Path,
    samples: Path,
    alignment_set: Path,
    base: Path,
    attributions: Path,
    attribute_metrics: Path,
    shard: str | None = None,
) -> None:
    """Explain the ground-truth logit of every alignment sample. shard: "i/n", only puts that part into the store."""
    loaded = load_params(params)
    method = loaded.attribute
    found = maps.rows_of_alignment_set(
        method,
        images=images,
        samples=samples,
        alignment_set=alignment_set,
        base=base,
        own_model=loaded.train.model,
        device=partial(set_up_compute, loaded.compute.device, loaded.compute.threads),
    )
    if shard is not None:
        from lvlmva.work import fill  # here, since it brings all that asks models

        fill(found.rows, attributions, records_in=maps.records_in, stage="attribute", share=shard)
        return
    keys, records = kept_or_computed(found.rows, attributions, records_in=maps.records_in, stage="attribute")
    with ArrayWriter(attributions) as writer:
        summary = maps.write_maps(writer, method, found.rows.ids, records)
        writer.attrs = {
            "ids": found.rows.ids,
            "keys": keys,
            "baseline_ids": found.baseline_ids,
            "targets": found.targets,
            "method": method.method,
            "method_version": method.version,
        }
    write_json(attribute_metrics, {"attribute": summary})


if __name__ == "__main__":
    run(attribute)
