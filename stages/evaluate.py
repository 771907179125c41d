"""Stage evaluate: one method's models on the test splits."""

from pathlib import Path

import torch

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs
from lvlmva_core.compute import set_up_compute
from lvlmva_core.evaluation import Rejected, evaluate_models, is_test, probe_rows
from lvlmva_core.models import load_checkpoint
from lvlmva_core.outputs import BASE, write_outputs
from lvlmva_core.samples import read_samples, read_spurious_masks, rows_of_split
from lvlmva_core.splits import read_sample_rows, read_split


def evaluate(
    params: Path,
    method: str,
    images: Path,
    samples: Path,
    spurious_masks: Path,
    attributions: Path,
    masks: Path,
    base: Path,
    models: Path,
    evaluations: Path,
) -> None:
    """Write logits, predictions under corruptions, attributions and features of a method's models."""
    loaded = load_params(params)
    config = loaded.evaluate
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    table = read_samples(samples)
    tests = {
        split: read_split(images, table, split, device) for split in sorted(table["split"].unique()) if is_test(split)
    }
    rows = rows_of_split(table, "test")
    true_masks, known = read_spurious_masks(spurious_masks, rows)
    chosen = rows[probe_rows(known & true_masks.any(axis=(1, 2)), config.attribution_samples, config.seed)]
    probe = read_sample_rows(images, table, table["id"].iloc[chosen].tolist(), device) if len(chosen) else None
    baselines = read_sample_rows(images, table, list(read_attrs(attributions)["baseline_ids"]), device)
    judged = read_sample_rows(images, table, list(read_attrs(masks)["ids"]), device)
    rejected = Rejected(judged, torch.from_numpy(read_array(masks, "masks")).to(device), loaded.exchange)
    checkpoints = {"": base} if method == BASE else _by_seed(models / method)
    outputs = evaluate_models(
        {seed: load_checkpoint(checkpoint, device, loaded.train.model)[0] for seed, checkpoint in checkpoints.items()},
        tests,
        probe,
        baselines.images,
        rejected,
        batch_size=loaded.attribute.batch_size,
        robustness=config.robustness,
    )
    write_outputs(evaluations / f"{method}.safetensors", outputs)


def _by_seed(folder: Path) -> dict[str, Path]:
    return {path.stem.removeprefix("seed="): path for path in sorted(folder.glob("seed=*.safetensors"))}


if __name__ == "__main__":
    run(evaluate)
