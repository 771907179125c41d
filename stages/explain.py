"""Stage explain: what the aligned model looks at, on the alignment samples that the panel shows."""

from pathlib import Path

import numpy as np

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, write_arrays
from lvlmva_core.compute import set_up_compute
from lvlmva_core.errors import InputError
from lvlmva_core.models import load_checkpoint
from lvlmva_core.ranking import by_class_in_turn, masked_share
from lvlmva_core.samples import read_penalised, read_samples, rows_of_ids
from lvlmva_core.splits import read_sample_rows


def explain(
    params: Path, images: Path, samples: Path, attributions: Path, masks: Path, models: Path, explanations: Path
) -> None:
    """Explain the most masked samples of each class by LVLM-VA's first model, as the base model was explained."""
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table, before = read_samples(samples), read_attrs(attributions)
    masked, suppressed = read_penalised(masks)
    if before["method"] != loaded.attribute.method:
        raise InputError(f"{attributions}: by {before['method']}, not attribute.method; run `dvc repro attribute`")
    row_of = {sample: row for row, sample in enumerate(before["ids"])}
    maps = read_array(attributions, "attributions")[[row_of[sample] for sample in masked]]
    shares = masked_share(maps, suppressed)
    chosen = by_class_in_turn(shares, table["label"].to_numpy()[rows_of_ids(table, masked)])
    chosen = chosen[: sum((loaded.explain.panel_samples, loaded.explain.gallery_samples))]
    ids = [masked[row] for row in chosen]
    shown = read_sample_rows(images, table, ids, device)
    baselines = read_sample_rows(images, table, list(before["baseline_ids"]), device)
    checkpoint = sorted((models / "lvlm_va").glob("seed=*.safetensors"))[0]
    model, _ = load_checkpoint(checkpoint, device, loaded.train.model)
    explained = loaded.attribute.explain(model, shown.images, baselines.images, shown.labels)
    found = {"attributions": explained.attributions.sum(1).cpu().numpy(), "masked_share": np.asarray(shares[chosen])}
    about = {"ids": ids, "panel": loaded.explain.panel_samples, "method": before["method"]}
    write_arrays(explanations, found, {**about, "model": checkpoint.stem})


if __name__ == "__main__":
    run(explain)
