"""Attribution maps of an alignment set: what each is kept under, how they are computed, checked and counted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.attribution_methods import AttributionMethod
from lvlmva_core.errors import InputError
from lvlmva_core.models import ModelSpec, weights_digest
from lvlmva_core.samples import Split
from lvlmva_core.store import Record, digest

if TYPE_CHECKING:
    from torch import Tensor, nn

KIND = "attributions"  # of the store
CHUNK = 16  # samples that are explained before they are put into the store: what a killed run loses at most
NAMED = 5  # worst samples that an error names


def draw_baselines(training: np.ndarray, n_baselines: int, seed: int) -> np.ndarray:
    """Rows of the training split that are baselines, rising.

    Raises:
        InputError: there are fewer than asked for.
    """
    if n_baselines > len(training):
        raise InputError(f"attribute.n_baselines is {n_baselines}, the training split has {len(training)} samples")
    return np.sort(np.random.default_rng(seed).choice(training, n_baselines, replace=False))


def map_keys(
    method: AttributionMethod, model: "nn.Module", spec: ModelSpec, baselines: "Tensor", shown: Split
) -> list[str]:
    """What the map of each sample is kept under: a digest of all that changes it."""
    common = digest(
        {
            "method": method.method,
            "version": method.version,
            "settings": {name: getattr(method, name) for name in method.decisive},
            "model": spec.facts(),
            "weights": weights_digest(model),
            "baselines": baselines.cpu().numpy(),
        }
    )
    return [
        digest({"common": common, "image": image.cpu().numpy(), "target": int(label)})
        for image, label in zip(shown.images, shown.labels, strict=True)
    ]


def explain_rows(
    method: AttributionMethod, model: "nn.Module", baselines: "Tensor", shown: Split, rows: Sequence[int]
) -> list[Record]:
    """A record for each of these samples: "attribution" (H, W), channels summed, and "completeness_error" (1,)."""
    rows = list(rows)
    found = method.explain(model, shown.images[rows], baselines, shown.labels[rows])
    maps, errors = found.attributions.sum(1).cpu().numpy(), found.completeness_error().cpu().numpy()
    return [{"attribution": maps[place], "completeness_error": errors[place : place + 1]} for place in range(len(rows))]


def records_in(output: Path) -> Iterator[tuple[str, Record]]:
    """Key and record of every row of an earlier output."""
    maps, errors = read_array(output, "attributions"), read_array(output, "completeness_error")
    for n, key in enumerate(read_attrs(output)["keys"]):
        yield key, {"attribution": maps[n], "completeness_error": errors[n : n + 1]}


def arrays_of(method: AttributionMethod, ids: Sequence[str], records: Sequence[Record]) -> dict[str, np.ndarray]:
    """The output's arrays: attributions (N, H, W), completeness_error (N,).

    Raises:
        InputError: maps of a complete method miss the difference of outputs by more than its tolerance.
    """
    errors = np.concatenate([record["completeness_error"] for record in records])
    if method.complete:
        _check_completeness(method.completeness_tolerance, ids, errors)
    return {
        "attributions": np.stack([record["attribution"] for record in records]),
        "completeness_error": errors,
    }


def _check_completeness(tolerance: float, ids: Sequence[str], errors: np.ndarray) -> None:
    worst = [n for n in np.argsort(-errors, kind="stable") if not errors[n] <= tolerance]
    if worst:
        named = ", ".join(f"'{ids[n]}' ({errors[n]:.1e})" for n in worst[:NAMED])
        raise InputError(
            f"{len(worst)} of {len(ids)} maps miss the output difference by more than "
            f"attribute.completeness_tolerance {tolerance:g} of their absolute sum; "
            f"worst: {named}; check the model's weights (huge ones cancel badly) or raise the tolerance"
        )


def summary_of(method: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """For the metrics file."""
    errors = arrays["completeness_error"]
    return {
        "method": method,
        "n_samples": len(errors),
        "max_completeness_error": float(errors.max()),
        "mean_completeness_error": float(errors.mean()),
        "n_without_positive_attribution": int((arrays["attributions"] <= 0).all(axis=(1, 2)).sum()),
    }
