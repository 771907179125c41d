"""The outcome as a table on the terminal: `lvlmva results`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lvlmva.pipeline import paths
from lvlmva_core.arrays import read_json
from lvlmva_core.comparison import edge_notes
from lvlmva_core.report.tables import (
    before_and_after,
    choices,
    judged_by,
    left_out,
    markdown_table,
    significance,
    supervision,
)


def results(
    evaluation: Annotated[Path | None, typer.Option(help="the metrics file; by default dvc.yaml's")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="with supervision and p values")] = False,
) -> None:
    """Print the table of methods before and after alignment."""
    from rich.console import Console
    from rich.table import Table

    content = read_json(evaluation or Path(paths().get("evaluation", "metrics/evaluate.json")))
    columns, rows = before_and_after(content)
    if markdown:
        rows = [[row[0], need, *row[1:]] for row, need in zip(rows, supervision(content), strict=True)]
        typer.echo(f"{judged_by(content)}\n")
        typer.echo(markdown_table(["method", "supervision beside class labels", *columns[1:]], rows))
        typer.echo(markdown_table(*significance(content)))
        if content.get("chosen"):
            typer.echo(markdown_table(*choices(content)))
        if content.get("left_out"):
            typer.echo(markdown_table(*left_out(content)))
        return
    table = Table(title="Before and after, test split", caption=judged_by(content))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    # a pipe has no width of its own: wide enough for the table
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for note in edge_notes(content):
        typer.echo(note)
    for what, why in left_out(content)[1]:
        typer.echo(f"left out: {what}: {why}")
