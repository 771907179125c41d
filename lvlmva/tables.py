"""The tables of a page, made from a study's rows: `lvlmva tables docs/results/knee.csv`."""

from pathlib import Path
from typing import Annotated

import typer

from lvlmva_core.errors import InputError
from lvlmva_core.report.tables import markdown_table
from lvlmva_core.study import tables as tables_of

END = "<!-- end -->"


def tables(
    rows: Annotated[Path, typer.Argument(help="a study's rows, such as docs/results/knee.csv")],
    page: Annotated[Path | None, typer.Option(help="put them into this page, in place of those that are there")] = None,
) -> None:
    """Print a study's tables as Markdown: its methods (mean ± standard deviation over models), and its comparisons.

    In a page they stand between `<!-- lvlmva tables <rows> -->` and `<!-- end -->`.
    """
    made = "\n".join(markdown_table(*each) for each in tables_of(rows))
    if page is None:
        typer.echo(made, nl=False)
        return
    put_tables(page, f"lvlmva tables {rows}", made)


def put_tables(page: Path, command: str, made: str) -> None:
    """Put tables into a page, between `<!-- <command> -->` and `<!-- end -->`. Raises InputError where either is
    missing."""
    start = f"<!-- {command} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise InputError(
            f"{page}: no '{start.strip()}' with a '{END}' after it; add both where the tables are to stand"
        )
    page.write_text(before + start + made + END + after, encoding="utf-8")
