"""Stage critique: what the Critic says about the regions of each alignment sample."""

from pathlib import Path

import typer

from lvlmva.ask import criticise_by_model
from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.lvlm.cases import read_cases
from lvlmva_core.lvlm.critic import criticise
from lvlmva_core.lvlm.offline import CRITICS
from lvlmva_core.lvlm.records import write_rows
from lvlmva_core.lvlm.settings import ModelCritic


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
    config = load_params(params).critique
    with_truth = config.critic in CRITICS and CRITICS[config.critic].knows_truth
    cases, class_names = read_cases(images, samples, segments, attributions, spurious_masks, with_truth=with_truth)
    if isinstance(config, ModelCritic):
        folder = prompts / config.prompts
        rows = criticise_by_model(config, cases, class_names, folder, critiques, dry_run=dry_run, batch=export_batch)
    elif dry_run or export_batch:
        typer.echo(f"critique: '{config.critic}' is a stand-in; nothing to buy", err=True)
    else:
        rows = criticise(config, cases)
    if not (dry_run or export_batch):
        write_rows(critiques, rows)


if __name__ == "__main__":
    run(critique)
