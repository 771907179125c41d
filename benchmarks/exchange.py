"""Does the exchange of regions say what the real shortcut does? Rank correlations on data whose shortcut is known.

Run it where `dvc repro exchange` has run: python benchmarks/exchange.py. Sample by sample it compares

- the truth: how the true class's centred logit falls when the real feature is taken away: in digits to the
  background (0), in knee and skin filled with what lies there in training pictures of the class without the feature;
- the estimate: how it falls when the regions on the feature are exchanged (`data/reliance.zarr`) for those of other
  classes, and of its own: the sum over regions that the feature dominates, which hold more than half of their positive
  attribution on it; where there is none, the region that holds most of the feature, and of the object beside it.
"""

from pathlib import Path

import numpy as np
import torch
from scipy import stats

from lvlmva.params import load_params
from lvlmva.pipeline import paths
from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.exchange import centred
from lvlmva_core.models import load_checkpoint, predict_logits
from lvlmva_core.samples import Split, read_known_masks, read_samples
from lvlmva_core.splits import read_sample_rows, read_split
from lvlmva_core.statistics import bootstrap_interval

PLAIN = 16  # pictures without the feature that a feature is covered from


def main() -> None:
    """Print one row of the table."""
    known = {name: Path(path) for name, path in paths().items()}
    loaded, device = load_params(Path("params.yaml")), torch.device("cpu")
    torch.set_num_threads(loaded.compute.threads)
    model, _ = load_checkpoint(known["base"], device, loaded.train.model)
    table, dataset = read_samples(known["samples"]), str(read_attrs(known["images"])["dataset"])
    all_ids = list(read_attrs(known["reliance"])["ids"])
    ids, masks = read_known_masks(known["spurious_masks"], table, all_ids)
    has = masks.any(axis=(1, 2))
    ids, masks = [sample for sample, shown in zip(ids, has, strict=True) if shown], masks[has]
    rows = [all_ids.index(sample) for sample in ids]
    segments = read_array(known["segments"], "segments")[rows]
    other, own = (read_array(known["reliance"], name)[rows] for name in ("other", "own"))
    samples = read_sample_rows(known["images"], table, ids, device)
    truth = true_falls(model, samples, masks, read_split(known["images"], table, "train", device), dataset)
    effect = np.maximum(read_array(known["attributions"], "attributions")[rows], 0.0)
    dominated = np.zeros(other.shape, dtype=bool)
    for region in range(other.shape[1]):
        inside = segments == region
        dominated[:, region] = (effect * (inside & masks)).sum((1, 2)) > 0.5 * (effect * inside).sum((1, 2))
    none = ~dominated.any(axis=1)
    most = [np.bincount(each[mask], minlength=256)[:255].argmax() for each, mask in zip(segments, masks, strict=True)]
    chosen = dominated.copy()
    chosen[np.flatnonzero(none), np.array(most)[none]] = True
    columns = [
        correlation(np.where(chosen, found, 0.0).sum(1), truth, rows_of)
        for rows_of in (np.ones(len(ids), dtype=bool), ~none)
        for found in (own, other)
    ]
    print(  # noqa: T201 - a benchmark's result
        f"| {dataset} | {loaded.train.model} | {truth.mean():.2f} | {len(ids)} | {' | '.join(columns[:2])} | "
        f"{int((~none).sum())} | {' | '.join(columns[2:])} |"
    )


def correlation(estimate: np.ndarray, truth: np.ndarray, chosen: np.ndarray) -> str:
    """Spearman's with its 95 % bootstrap interval, of the chosen samples."""
    pairs = np.stack([estimate, truth], axis=1)[chosen & ~np.isnan(estimate)]
    if len(pairs) < 10:
        return "too few"

    def rho(drawn: np.ndarray) -> float:
        return float(stats.spearmanr(drawn[:, 0], drawn[:, 1]).statistic)

    low, high = bootstrap_interval(pairs, rho)
    return f"{rho(pairs):.2f} [{low:.2f}, {high:.2f}]"


def true_falls(model: torch.nn.Module, samples: Split, masks: np.ndarray, training: Split, dataset: str) -> np.ndarray:
    """(N,): how the true class's centred logit falls without the feature."""
    before = centred(predict_logits(model, samples.images), samples.labels)
    where = torch.from_numpy(masks)[:, None]
    plain, labels = np.flatnonzero(~training.table["spurious"].to_numpy(dtype=bool)), training.labels.numpy()
    falls = []
    for n, label in enumerate(samples.labels.tolist()):
        fillings = torch.zeros_like(samples.images[n : n + 1])
        if not dataset.startswith("decoy"):
            same = plain[labels[plain] == label]
            fillings = training.images[np.random.default_rng([0, n]).choice(same, min(PLAIN, len(same)), replace=False)]
        changed = torch.where(where[n], fillings, samples.images[n])
        after = centred(predict_logits(model, changed), torch.full((len(changed),), label))
        falls.append(float((before[n] - after).mean()))
    return np.array(falls)


if __name__ == "__main__":
    main()
