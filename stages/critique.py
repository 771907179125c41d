"""Stage critique: what the Critic says about the regions of each alignment sample."""

from pathlib import Path

import typer

import lvlmva_core.lvlm.detectors
import lvlmva_core.lvlm.offline  # noqa: F401 - so that dvc.yaml names what the critics that are no models go by
from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva.several import criticise_all, name_of, needs_truth
from lvlmva.work import buy
from lvlmva_core.independence import read_independent
from lvlmva_core.lvlm.cases import read_cases
from lvlmva_core.lvlm.not_asked import cases_to_ask, summarise_not_asked, with_not_asked
from lvlmva_core.lvlm.records import write_rows


def critique(
    params: Path,
    images: Path,
    samples: Path,
    segments: Path,
    attributions: Path,
    spurious_masks: Path,
    reliance: Path,
    prompts: Path,
    critiques: Path,
    dry_run: bool = False,
    export_batch: Path | None = None,
    shard: str | None = None,
) -> None:
    """Have the regions of each alignment sample criticised. shard: "i/n", only puts that part into the store."""
    loaded = load_params(params)
    config = loaded.critique
    with_truth = needs_truth(config)
    cases, class_names = read_cases(images, samples, segments, attributions, spurious_masks, with_truth=with_truth)
    at_most, asked = config.independent_at_most, cases
    if at_most is not None:
        asked = cases_to_ask(cases, read_independent(reliance, [case.sample for case in cases], at_most))
    if shard is not None:
        buy(config, loaded.judge, asked, class_names, prompts, critiques, share=shard)
        return
    rows = criticise_all(
        config, loaded.judge, asked, class_names, prompts, critiques, dry_run=dry_run, batch=export_batch
    )
    if dry_run or export_batch:
        return
    if at_most is not None:
        rows = with_not_asked(rows, cases, critic=name_of(config), at_most=at_most, calls=config.first_calls())
        typer.echo(f"critique: {summarise_not_asked(rows, cases)}", err=True)
    write_rows(critiques, rows)


if __name__ == "__main__":
    run(critique)
