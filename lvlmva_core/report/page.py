"""The report as one self-contained HTML page; everything that goes in is escaped."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True)
class Table:
    """A table of the page: a heading, a note under it, column names, rows of text."""

    heading: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def render_page(
    title: str, summary: str, warning: str, tables: Sequence[Table], figures: Mapping[str, Path], params: Any
) -> str:
    """Render the page. `warning` stands in a box at the top (who judged); empty = no box. Figures: caption -> PNG."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pictures = {caption: base64.b64encode(path.read_bytes()).decode() for caption, path in figures.items()}
    return environment.get_template("page.html").render(
        title=title, summary=summary, warning=warning, tables=tables, pictures=pictures, params=params
    )
