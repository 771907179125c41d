"""The tables of a page, made from a study's rows: `lvlmva tables docs/results/knee.csv`."""

from pathlib import Path
from typing import Annotated

import typer

from lvlmva_core.report.tables import markdown_table
from lvlmva_core.study import tables as tables_of


def tables(
    rows: Annotated[Path, typer.Argument(help="a study's rows, such as docs/results/knee.csv")],
) -> None:
    """Print a study's tables as Markdown: its methods (mean ± standard deviation over models), and its comparisons."""
    typer.echo("\n".join(markdown_table(*each) for each in tables_of(rows)), nl=False)
