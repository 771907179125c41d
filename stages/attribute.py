"""Stage attribute: explanation maps of the alignment samples."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from lvlmva.entry import run
from lvlmva.hydrate import absent_rows, all_rows, open_store
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, read_table, write_arrays, write_json
from lvlmva_core.attribute_settings import Attribute
from lvlmva_core.attribution import METHODS
from lvlmva_core.compute import set_up_compute
from lvlmva_core.errors import InputError
from lvlmva_core.models import load_checkpoint, weights_digest
from lvlmva_core.progress import track
from lvlmva_core.samples import read_samples, rows_of_split
from lvlmva_core.splits import read_sample_rows
from lvlmva_core.store import Store, digest

KIND = "attributions"
CHUNK = 16  # samples that are explained before they are put into the store: what a killed run loses at most
NAMED = 5  # worst samples that an error names


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
    config, method = loaded.attribute, METHODS[loaded.attribute.method]
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    classifier, spec = load_checkpoint(base, device, loaded.train.model)
    table = read_samples(samples)
    ids = sorted(read_table(alignment_set, ["id"])["id"])
    shown = read_sample_rows(images, table, ids, device)
    pixels, labels = shown.images, shown.labels
    training = rows_of_split(table, "train")
    if config.n_baselines > len(training):
        raise InputError(
            f"attribute.n_baselines is {config.n_baselines}, the training split has {len(training)} samples"
        )
    drawn = np.sort(np.random.default_rng(config.seed).choice(training, config.n_baselines, replace=False))
    baseline_ids = table["id"].iloc[drawn].tolist()
    baselines = read_sample_rows(images, table, baseline_ids, device).images
    common = digest(
        {
            "method": config.method,
            "version": method.version,
            "settings": {name: getattr(config, name) for name in method.settings},
            "model": spec.facts(),
            "weights": weights_digest(classifier),
            "baselines": baselines.cpu().numpy(),
        }
    )
    keys = [
        digest({"common": common, "image": image.cpu().numpy(), "target": int(label)})
        for image, label in zip(pixels, labels, strict=True)
    ]

    store = open_store()
    absent = absent_rows(store, KIND, keys, str(attributions), _take_in)
    sys.stderr.write(f"attribute: {len(ids) - len(absent)} maps are there, {len(absent)} to compute\n")
    for first in track(range(0, len(absent), CHUNK), "attribute"):
        rows = absent[first : first + CHUNK]
        found = method.explain(
            classifier, pixels[rows], baselines, labels[rows], config.batch_size, config.integration_steps
        )
        maps, errors = found.attributions.sum(1).cpu().numpy(), found.completeness_error().cpu().numpy()
        for place, n in enumerate(rows):
            store.put_arrays(
                KIND, keys[n], {"attribution": maps[place], "completeness_error": errors[place : place + 1]}
            )

    records = all_rows(store, KIND, keys)
    arrays = {
        "attributions": np.stack([record["attribution"] for record in records]),
        "completeness_error": np.concatenate([record["completeness_error"] for record in records]),
    }
    if method.complete:
        _check_completeness(config, ids, arrays["completeness_error"])
    attrs = {
        "ids": ids,
        "keys": keys,
        "baseline_ids": baseline_ids,
        "targets": labels.tolist(),
        "method": config.method,
        "method_version": method.version,
    }
    write_arrays(attributions, arrays, attrs)
    write_json(attribute_metrics, {"attribute": _summary(config, arrays)})


def _check_completeness(config: Attribute, ids: list[str], errors: np.ndarray) -> None:
    worst = [n for n in np.argsort(-errors, kind="stable") if not errors[n] <= config.completeness_tolerance]
    if worst:
        named = ", ".join(f"'{ids[n]}' ({errors[n]:.1e})" for n in worst[:NAMED])
        raise InputError(
            f"{len(worst)} of {len(ids)} maps miss the output difference by more than "
            f"attribute.completeness_tolerance {config.completeness_tolerance:g} of their absolute sum; "
            f"worst: {named}; check the model's weights (huge ones cancel badly) or raise the tolerance"
        )


def _take_in(version: Path, store: Store) -> None:
    """Put every row of an earlier output into the store."""
    maps, errors = read_array(version, "attributions"), read_array(version, "completeness_error")
    for n, key in enumerate(read_attrs(version)["keys"]):
        store.put_arrays(KIND, key, {"attribution": maps[n], "completeness_error": errors[n : n + 1]})


def _summary(config: Attribute, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    errors = arrays["completeness_error"]
    return {
        "method": config.method,
        "n_samples": len(errors),
        "max_completeness_error": float(errors.max()),
        "mean_completeness_error": float(errors.mean()),
        "n_without_positive_attribution": int((arrays["attributions"] <= 0).all(axis=(1, 2)).sum()),
    }


if __name__ == "__main__":
    run(attribute)
