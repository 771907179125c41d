"""Stage rank: the alignment set."""

from pathlib import Path

import pandas as pd

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import write_json, write_table
from lvlmva_core.compute import set_up_compute
from lvlmva_core.models import load_checkpoint, predict_logits
from lvlmva_core.ranking import output_entropy, select_alignment_set, summary_of
from lvlmva_core.samples import read_samples
from lvlmva_core.splits import read_split


def rank(
    params: Path, images: Path, samples: Path, base: Path, entropies: Path, alignment_set: Path, rank_metrics: Path
) -> None:
    """Choose the training samples that are explained and corrected."""
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    classifier, _ = load_checkpoint(base, device, loaded.train.model)
    training = read_split(images, read_samples(samples), "train", device)
    logits = predict_logits(classifier, training.images)
    candidates = pd.DataFrame(
        {
            "id": training.table["id"].to_numpy(),
            "entropy": output_entropy(logits).cpu().numpy(),
            "label": training.table["label"].to_numpy(),
            "prediction": logits.argmax(1).cpu().numpy(),
        }
    )
    write_table(entropies, candidates)
    config = loaded.rank
    chosen = select_alignment_set(
        candidates, config.n_samples, config.strategy, stratify=config.stratify, seed=config.seed
    )
    write_table(alignment_set, chosen)
    write_json(rank_metrics, {"rank": {"strategy": config.strategy, **summary_of(chosen, training.table)}})


if __name__ == "__main__":
    run(rank)
