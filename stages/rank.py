"""Stage rank: the alignment set."""

from pathlib import Path

import pandas as pd

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import write_json, write_table
from lvlmva_core.compute import set_up_compute
from lvlmva_core.models import load_checkpoint
from lvlmva_core.ranking import output_entropy, select_alignment_set, summary_of
from lvlmva_core.samples import read_samples, rows_of_split
from lvlmva_core.splits import logits_of_rows


def rank(
    params: Path, images: Path, samples: Path, base: Path, entropies: Path, alignment_set: Path, rank_metrics: Path
) -> None:
    """Choose the training samples that are explained and corrected."""
    loaded = load_params(params)
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    classifier, _ = load_checkpoint(base, device, loaded.train.model)
    table = read_samples(samples)
    training = table.iloc[rows_of_split(table, "train")]
    logits = logits_of_rows(classifier, images, training, device)
    candidates = pd.DataFrame(
        {
            "id": training["id"].to_numpy(),
            "entropy": output_entropy(logits).cpu().numpy(),
            "label": training["label"].to_numpy(),
            "prediction": logits.argmax(1).cpu().numpy(),
        }
    )
    write_table(entropies, candidates)
    config = loaded.rank
    chosen = select_alignment_set(
        candidates, config.n_samples, config.strategy, stratify=config.stratify, seed=config.seed
    )
    write_table(alignment_set, chosen)
    write_json(rank_metrics, {"rank": {"strategy": config.strategy, **summary_of(chosen, training)}})


if __name__ == "__main__":
    run(rank)
