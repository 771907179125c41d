"""Stage rank: the alignment set."""

from pathlib import Path

import pandas as pd

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import write_json, write_table
from lvlmva_core.models import load_checkpoint, predict_logits
from lvlmva_core.ranking import output_entropy, select_alignment_set
from lvlmva_core.samples import read_samples
from lvlmva_core.training import set_up_compute
from stages.data import split_tensors


def rank(params: Path, images: Path, samples: Path, base: Path, alignment_set: Path, rank_metrics: Path) -> None:
    """Choose the training samples that are explained and corrected."""
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    classifier, _ = load_checkpoint(base, device)
    pixels, _, table = split_tensors(images, read_samples(samples), "train", device)
    logits = predict_logits(classifier, pixels)
    candidates = pd.DataFrame(
        {
            "id": table["id"].to_numpy(),
            "entropy": output_entropy(logits).cpu().numpy(),
            "label": table["label"].to_numpy(),
            "prediction": logits.argmax(1).cpu().numpy(),
        }
    )
    config = loaded.rank
    chosen = select_alignment_set(
        candidates, config.n_samples, config.strategy, stratify=config.stratify, seed=config.seed
    )
    write_table(alignment_set, chosen)
    members = table.set_index("id").loc[chosen["id"]]
    summary = {
        "strategy": config.strategy,
        "samples": len(chosen),
        "share_with_spurious_feature": float(members["spurious"].mean()),
        "share_with_spurious_feature_in_training": float(table["spurious"].mean()),
        "samples_per_class": {str(k): int(n) for k, n in members["label"].value_counts().sort_index().items()},
        "samples_per_group": {str(k): int(n) for k, n in members["group"].value_counts().sort_index().items()},
        "entropy_largest_nats": float(chosen["entropy"].max()),
    }
    write_json(rank_metrics, {"rank": summary})


if __name__ == "__main__":
    run(rank)
