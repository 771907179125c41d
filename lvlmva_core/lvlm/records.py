"""Rows of critiques.jsonl and verdicts.jsonl: JSON lines, sorted by sample, the same bytes for the same content."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lvlmva_core.errors import InputError

Row = dict[str, Any]

CRITIQUE_FIELDS = {"sample", "segmentation", "critic", "regions", "critique", "failure"}
VERDICT_FIELDS = {"sample", "segmentation", "critic", "judge", "verdicts", "failure"}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines sorted by `sample`, keys sorted."""
    ordered = sorted(rows, key=lambda row: str(row["sample"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for row in ordered)
    path.write_text(text, encoding="utf-8")


def read_rows(path: Path, fields: set[str]) -> list[Row]:
    """Read JSON lines and check that each row has `fields` and that no sample comes twice.

    Raises:
        InputError: naming the file and line.
    """
    try:
        # not splitlines(): prose may hold other characters that it takes for the end of a line
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_REPAIR}") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); {_REPAIR}") from error
        absent = sorted(fields - row.keys()) if isinstance(row, dict) else sorted(fields)
        if absent:
            raise InputError(f"{path}, line {number}: lacks {', '.join(absent)}; {_REPAIR}")
        if row["sample"] in rows:
            raise InputError(f"{path}, line {number}: second row for sample '{row['sample']}'; {_REPAIR}")
        rows[row["sample"]] = row
    return list(rows.values())


_REPAIR = "restore it with `dvc checkout`, or delete it and run `dvc repro`"
