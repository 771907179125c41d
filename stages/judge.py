"""Stage judge: a yes or no per region from each critique."""

from pathlib import Path

import typer

from lvlmva.ask import judge_by_model
from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import write_json
from lvlmva_core.lvlm.judge import judge_by_stand_in, summarise
from lvlmva_core.lvlm.records import CritiqueRow, read_rows, write_rows
from lvlmva_core.lvlm.settings import ModelJudge


def judge(
    params: Path,
    critiques: Path,
    prompts: Path,
    verdicts: Path,
    judge_metrics: Path,
    dry_run: bool = False,
    export_batch: Path | None = None,
) -> None:
    """Turn each critique into one verdict per region."""
    config = load_params(params).judge
    given = read_rows(critiques, CritiqueRow)
    if isinstance(config, ModelJudge):
        rows = judge_by_model(config, given, prompts / config.prompts, verdicts, dry_run=dry_run, batch=export_batch)
    elif dry_run or export_batch:
        typer.echo(f"judge: '{config.judge}' is a stand-in; nothing to buy", err=True)
    else:
        rows = judge_by_stand_in(config, given)
    if not (dry_run or export_batch):
        write_rows(verdicts, rows)
        write_json(judge_metrics, {"judge": summarise(rows)})


if __name__ == "__main__":
    run(judge)
