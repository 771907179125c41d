"""Stage judge: a yes or no per region from each critique."""

from collections import Counter
from pathlib import Path
from typing import Any

import typer

from lvlmva.ask import ask_all
from lvlmva.entry import run
from lvlmva.params import Judge, load_params
from lvlmva_core.arrays import write_json
from lvlmva_core.lvlm.calls import Call
from lvlmva_core.lvlm.client import Client, Question, model_name
from lvlmva_core.lvlm.judge import Judged, ask_judge, judge_call
from lvlmva_core.lvlm.offline import judge_by_rules
from lvlmva_core.lvlm.prompts import load_judge_prompts
from lvlmva_core.lvlm.records import CRITIQUE_FIELDS, Row, read_rows, write_rows


def judge(
    params: Path, critiques: Path, prompts: Path, verdicts: Path, judge_metrics: Path, dry_run: bool = False
) -> None:
    """Turn each critique into one verdict per region."""
    config = load_params(params).judge
    given = read_rows(critiques, CRITIQUE_FIELDS)
    rows = [_row(critique, config) for critique in given]
    places = [place for place, row in enumerate(rows) if row["failure"] is None]
    if config.judge == "rules" and dry_run:
        typer.echo("judge: 'rules' is a stand-in; nothing to buy", err=True)
        return
    if config.judge == "rules":
        for place in places:
            _judge_by_rules(rows[place], given[place])
    else:
        _ask_model(config, rows, given, places, prompts / config.prompts, verdicts, dry_run)
    if not dry_run:
        write_rows(verdicts, rows)
        write_json(judge_metrics, {"judge": summarise(rows)})


def _row(critique: Row, config: Judge) -> Row:
    """A verdict row without verdicts yet; a failure of the critique is carried over."""
    kept = {name: critique[name] for name in ("sample", "segmentation", "critic", "settings", "failure")}
    name = config.judge if config.judge == "rules" else model_name(config.endpoint)
    return {**kept, "judge": name, "verdicts": [], "records": []}


def _judge_by_rules(row: Row, critique: Row) -> None:
    try:
        given = judge_by_rules(critique["critique"], [entry["region"] for entry in critique["regions"]])
    except ValueError as error:
        row["failure"] = f"unreadable critique: {error}"
        return
    row["verdicts"] = [{**entry, "verdict": given[entry["region"]]} for entry in critique["regions"]]


def _ask_model(
    config: Judge, rows: list[Row], given: list[Row], places: list[int], folder: Path, out: Path, dry_run: bool
) -> None:
    """Fill in the verdicts of a model; after a dry run there are none."""
    endpoint = config.endpoint
    assert endpoint is not None
    loaded = load_judge_prompts(folder)

    def colours_of(place: int) -> list[str]:
        return [entry["color"] for entry in given[place]["regions"]]

    def first_call(place: int) -> Call:
        critique, colours = given[place]["critique"], colours_of(place)
        return judge_call(endpoint, loaded, critique, colours, answer_format=config.answer_format, earlier=[])

    async def ask(client: Client, place: int, question: Question) -> Judged:
        return await ask_judge(
            lambda call: client.ask(Question(call.key(), lambda: call, question.sample)),
            endpoint,
            loaded,
            given[place]["critique"],
            colours_of(place),
            answer_format=config.answer_format,
            max_attempts=config.max_attempts,
        )

    results = ask_all(
        places,
        name_of=lambda place: str(rows[place]["sample"]),
        first_call=first_call,
        work=ask,
        failure_of=lambda judged: judged.failure,
        endpoint=endpoint,
        section="judge.endpoint",
        out=out,
        replay=config.judge == "replay",
        pictures=False,
        max_failed_share=config.max_failed_share,
        dry_run=dry_run,
    )
    if results is None:
        return
    for place, result in zip(places, results, strict=True):
        if isinstance(result, str):
            rows[place]["failure"] = f"no verdict: {result}"
            continue
        rows[place]["records"] = result.records
        if result.verdicts is None:
            rows[place]["failure"] = f"no verdict: {result.failure}"
            continue
        rows[place]["verdicts"] = [
            {**entry, "verdict": result.verdicts[entry["color"]]} for entry in given[place]["regions"]
        ]


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Counts for the metrics file: who judged how many samples and regions, and why samples stay without verdicts."""
    verdicts = Counter(entry["verdict"] for row in rows for entry in row["verdicts"])
    failures = Counter(row["failure"] for row in rows if row["failure"] is not None)
    return {
        "critic": sorted({row["critic"] for row in rows}),
        "critic_settings": rows[0]["settings"] if rows else {},
        "judge": sorted({row["judge"] for row in rows}),
        "samples": len(rows),
        "samples_judged": sum(row["failure"] is None for row in rows),
        "failures": dict(sorted(failures.items())),
        "regions_yes": verdicts["yes"],
        "regions_no": verdicts["no"],
    }


if __name__ == "__main__":
    run(judge)
