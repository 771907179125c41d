"""Stage judge: a yes or no per region from each critique."""

from pathlib import Path

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva.several import judge_all
from lvlmva_core.arrays import write_json
from lvlmva_core.lvlm.answers import summarise_answers
from lvlmva_core.lvlm.judge import summarise
from lvlmva_core.lvlm.records import CritiqueRow, read_rows, write_rows


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
    rows = judge_all(config, given, prompts, verdicts, dry_run=dry_run, batch=export_batch)
    if not (dry_run or export_batch):
        write_rows(verdicts, rows)
        write_json(judge_metrics, {"judge": {**summarise(rows), **summarise_answers(given, rows, config.votes)}})


if __name__ == "__main__":
    run(judge)
