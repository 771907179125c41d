"""Stage attribute: explanation maps of the alignment samples."""

import functools
from pathlib import Path

from lvlmva.entry import run
from lvlmva.kept import kept_or_computed
from lvlmva.params import load_params
from lvlmva_core import attribution_maps as maps
from lvlmva_core.arrays import read_table, write_arrays, write_json
from lvlmva_core.compute import set_up_compute
from lvlmva_core.models import load_checkpoint
from lvlmva_core.samples import read_samples, rows_of_split
from lvlmva_core.splits import read_sample_rows


def attribute(
    params: Path,
    images: Path,
    samples: Path,
    alignment_set: Path,
    base: Path,
    attributions: Path,
    attribute_metrics: Path,
) -> None:
    """Explain the ground-truth logit of every alignment sample."""
    loaded = load_params(params)
    method = loaded.attribute
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    classifier, spec = load_checkpoint(base, device, loaded.train.model)
    table = read_samples(samples)
    ids = sorted(read_table(alignment_set, ["id"])["id"])
    shown = read_sample_rows(images, table, ids, device)
    drawn = maps.draw_baselines(rows_of_split(table, "train"), method.n_baselines, method.seed)
    baseline_ids = table["id"].iloc[drawn].tolist()
    baselines = read_sample_rows(images, table, baseline_ids, device).images
    keys = maps.map_keys(method, classifier, spec, baselines, shown)
    records = kept_or_computed(
        maps.KIND,
        keys,
        attributions,
        records_in=maps.records_in,
        compute=functools.partial(maps.explain_rows, method, classifier, baselines, shown),
        chunk=maps.CHUNK,
        stage="attribute",
    )
    arrays = maps.arrays_of(method, ids, records)
    attrs = {
        "ids": ids,
        "keys": keys,
        "baseline_ids": baseline_ids,
        "targets": shown.labels.tolist(),
        "method": method.method,
        "method_version": method.version,
    }
    write_arrays(attributions, arrays, attrs)
    write_json(attribute_metrics, {"attribute": maps.summary_of(method.method, arrays)})


if __name__ == "__main__":
    run(attribute)
