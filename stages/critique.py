"""Stage critique: what the Critic says about the regions of each alignment sample."""

from pathlib import Path

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva.several import criticise_all, needs_truth
from lvlmva_core.lvlm.cases import read_cases
from lvlmva_core.lvlm.records import write_rows


def critique(
    params: Path,
    images: Path,
    samples: Path,
    segments: Path,
    attributions: Path,
    spurious_masks: Path,
    prompts: Path,
    critiques: Path,
    dry_run: bool = False,
    export_batch: Path | None = None,
) -> None:
    """Have the regions of each alignment sample criticised."""
    loaded = load_params(params)
    config = loaded.critique
    with_truth = needs_truth(config)
    cases, class_names = read_cases(images, samples, segments, attributions, spurious_masks, with_truth=with_truth)
    rows = criticise_all(
        config, loaded.judge, cases, class_names, prompts, critiques, dry_run=dry_run, batch=export_batch
    )
    if not (dry_run or export_batch):
        write_rows(critiques, rows)


if __name__ == "__main__":
    run(critique)
