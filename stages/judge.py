"""Stage judge: a yes or no per region from each critique."""

from collections import Counter
from pathlib import Path
from typing import Any

from lvlmva_core.arrays import write_json
from lvlmva_core.config import load_params
from lvlmva_core.lvlm.offline import judge_by_rules
from lvlmva_core.lvlm.records import CRITIQUE_FIELDS, Row, read_rows, write_rows
from stages.entry import run


def judge(params: Path, critiques: Path, prompts: Path, out: Path, metrics: Path) -> None:
    """Turn each critique into one verdict per region."""
    config = load_params(params).judge
    critiques_read = read_rows(critiques, CRITIQUE_FIELDS)
    rows = [_row(critique, config.judge) for critique in critiques_read]
    for row, critique in zip(rows, critiques_read, strict=True):
        if row["failure"] is None:
            _judge_by_rules(row, critique)
    write_rows(out, rows)
    write_json(metrics, {"judge": summarise(rows)})


def _row(critique: Row, judge: str) -> Row:
    """A verdict row without verdicts yet; a failure of the critique is carried over."""
    kept = {name: critique[name] for name in ("sample", "segmentation", "critic", "settings", "failure")}
    return {**kept, "judge": judge, "verdicts": [], "records": []}


def _judge_by_rules(row: Row, critique: Row) -> None:
    try:
        given = judge_by_rules(critique["critique"], [entry["region"] for entry in critique["regions"]])
    except ValueError as error:
        row["failure"] = f"unreadable critique: {error}"
        return
    row["verdicts"] = [{**entry, "verdict": given[entry["region"]]} for entry in critique["regions"]]


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
