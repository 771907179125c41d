"""Stage exchange: what the base model's predictions depend on, region by region (an extension)."""

from dataclasses import asdict
from pathlib import Path

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, write_arrays, write_json
from lvlmva_core.compute import set_up_compute
from lvlmva_core.exchange import exchange_regions, summary_of
from lvlmva_core.models import load_checkpoint
from lvlmva_core.samples import read_samples
from lvlmva_core.splits import read_sample_rows, read_split


def exchange(
    params: Path, images: Path, samples: Path, segments: Path, base: Path, reliance: Path, exchange_metrics: Path
) -> None:
    """Exchange each region of each alignment sample for the same place of training pictures."""
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    model, _ = load_checkpoint(base, device, loaded.train.model)
    table, attrs = read_samples(samples), read_attrs(segments)
    ids = list(attrs["ids"])
    donors = read_split(images, table, "train", device)
    found = exchange_regions(
        model,
        read_sample_rows(images, table, ids, device),
        ids,
        read_array(segments, "segments"),
        donors,
        donors.table["id"].tolist(),
        n_regions=int(attrs["n_regions"]),
        **loaded.exchange.model_dump(include={"n_donors", "batch_size", "seed"}),
    )
    write_arrays(reliance, asdict(found), {"ids": ids, **loaded.exchange.model_dump()})
    write_json(exchange_metrics, {"exchange": summary_of(found)})


if __name__ == "__main__":
    run(exchange)
