"""Attribution maps of an alignment set: what each is kept under, how they are computed, checked and counted."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva_core.arrays import ArrayWriter, read_array, read_attrs, read_columns
from lvlmva_core.attribution_methods import AttributionMethod
from lvlmva_core.checkpoints import ModelSpec, read_weights_digest
from lvlmva_core.errors import InputError
from lvlmva_core.rows import Rows, shards_of, stacked
from lvlmva_core.samples import read_images, read_sample_columns, rows_of_ids, rows_of_split, to_unit_range
from lvlmva_core.store import Record, digest

if TYPE_CHECKING:
    import torch
    from torch import nn

KIND = "attributions"  # of the store
CHUNK = 16  # samples that are explained before they are put into the store: what a killed run loses at most
NAMED = 5  # worst samples that an error names

Shown = tuple[np.ndarray, np.ndarray]  # pictures, float32 (n, C, H, W) in [0, 1]; which logit of each, int64 (n,)


def draw_baselines(training: np.ndarray, n_baselines: int, seed: int) -> np.ndarray:
    """Rows of the training split that are baselines, rising.

    Raises:
        InputError: there are fewer than asked for.
    """
    if n_baselines > len(training):
        raise InputError(f"attribute.n_baselines is {n_baselines}, the training split has {len(training)} samples")
    return np.sort(np.random.default_rng(seed).choice(training, n_baselines, replace=False))


def rows_to_explain(
    method: AttributionMethod,
    model: "Callable[[], nn.Module]",
    spec: ModelSpec,
    weights: str,
    baselines: np.ndarray,
    ids: Sequence[str],
    read: Callable[[Sequence[int]], Shown],
) -> Rows:
    """The map of each sample: under a digest of all that changes it, a record "attribution" (H, W), channels summed,
    and "completeness_error" (1,).

    The digests are made without PyTorch.

    Args:
        model: gives it in eval mode; asked for once, and only where a map is to be computed.
        spec, weights: of the model, the latter its `weights_digest`. baselines: float32 (R, C, H, W) in [0, 1].
        ids: of N samples. read: places (0..N-1) -> these samples.
    """
    common = digest(
        {
            "method": method.method,
            "version": method.version,
            "settings": {name: getattr(method, name) for name in method.decisive},
            "model": spec.facts(),
            "weights": weights,
            "baselines": baselines,
        }
    )

    def keys_of(places: Sequence[int]) -> list[str]:
        pictures, targets = read(places)
        return [
            digest({"common": common, "image": picture, "target": int(target)})
            for picture, target in zip(pictures, targets, strict=True)
        ]

    @functools.cache
    def on_device() -> "tuple[nn.Module, Callable[[np.ndarray], torch.Tensor], torch.Tensor]":
        import torch  # here, so that a stage whose maps are all there starts without it

        explained = model()
        device = next(explained.parameters()).device
        return explained, lambda array: torch.from_numpy(array).to(device), torch.from_numpy(baselines).to(device)

    def compute(places: Sequence[int]) -> list[Record]:
        explained, put, compared = on_device()
        inputs, logits = map(put, read(places))
        found = method.explain(explained, inputs, compared, logits)
        maps, errors = found.attributions.sum(1).cpu().numpy(), found.completeness_error().cpu().numpy()
        return [{"attribution": maps[n], "completeness_error": errors[n : n + 1]} for n in range(len(places))]

    return Rows(KIND, ids, CHUNK, keys_of, compute)


@dataclass(frozen=True)
class ToExplain:
    """The alignment samples' maps, by rising id. targets: the logit that is explained of each. baseline_ids: rising."""

    rows: Rows
    targets: list[int]
    baseline_ids: list[str]


def rows_of_alignment_set(
    method: AttributionMethod,
    *,
    images: Path,
    samples: Path,
    alignment_set: Path,
    base: Path,
    own_model: str | None,
    device: "Callable[[], torch.device]",
) -> ToExplain:
    """`rows_to_explain` of the ground-truth logit of the alignment set, from files of which no more is read than is
    asked for. own_model: `train.model`, where its builder is the user's own. device: asked for only with the model."""

    @functools.cache
    def model() -> "nn.Module":
        from lvlmva_core.models import load_checkpoint

        return load_checkpoint(base, device(), own_model)[0]

    spec, weights = read_weights_digest(base)
    if weights is None:
        from lvlmva_core.models import weights_digest

        weights = weights_digest(model())
    table = read_sample_columns(samples, "split", "label")
    chosen = rows_of_ids(table, sorted(read_columns(alignment_set, ["id"])["id"].tolist()))
    drawn = draw_baselines(rows_of_split(table, "train"), method.n_baselines, method.seed)
    baselines = to_unit_range(read_images(images, drawn))

    def read(places: Sequence[int]) -> Shown:
        some = chosen[np.asarray(places)]
        return to_unit_range(read_images(images, some)), table["label"][some]

    rows = rows_to_explain(method, model, spec, weights, baselines, table["id"][chosen].tolist(), read)
    return ToExplain(rows, table["label"][chosen].tolist(), table["id"][drawn].tolist())


def records_in(output: Path) -> Iterator[tuple[str, Record]]:
    """Key and record of every row of an earlier output."""
    keys = read_attrs(output)["keys"]
    for shard in shards_of(len(keys)):
        maps, errors = (read_array(output, name, shard) for name in ("attributions", "completeness_error"))
        for n, key in enumerate(keys[shard]):
            yield key, {"attribution": maps[n], "completeness_error": errors[n : n + 1]}


def write_maps(
    writer: ArrayWriter, method: AttributionMethod, ids: Sequence[str], records: Iterable[Record]
) -> dict[str, Any]:
    """Append the output's arrays, attributions (N, H, W) and completeness_error (N,); what the metrics file says.

    Raises:
        InputError: maps of a complete method miss the difference of outputs by more than its tolerance.
    """
    found, without = [], 0
    for part in stacked(records):
        maps, errors = part["attribution"], part["completeness_error"][:, 0]
        writer.append({"attributions": maps, "completeness_error": errors})
        without += int((maps <= 0).all(axis=(1, 2)).sum())
        found.append(errors)
    errors = np.concatenate(found)
    check_completeness(method, ids, errors)
    return {
        "method": method.method,
        "n_samples": len(errors),
        "max_completeness_error": float(errors.max()),
        "mean_completeness_error": float(errors.mean()),
        "n_without_positive_attribution": without,
    }


def check_completeness(method: AttributionMethod, ids: Sequence[str], errors: np.ndarray) -> None:
    """Raise InputError where maps of a complete method miss the difference of outputs by more than its tolerance.

    errors: (N,), a map's gap over the sum of its absolute attributions.
    """
    tolerance = method.completeness_tolerance
    worst = [n for n in np.argsort(-errors, kind="stable") if not errors[n] <= tolerance]
    if worst and method.complete:
        named = ", ".join(f"'{ids[n]}' ({errors[n]:.1e})" for n in worst[:NAMED])
        raise InputError(
            f"{len(worst)} of {len(ids)} maps miss the output difference by more than "
            f"attribute.completeness_tolerance {tolerance:g} of their absolute sum; "
            f"worst: {named}; check the model's weights (huge ones cancel badly) or raise the tolerance"
        )
