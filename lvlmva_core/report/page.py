"""The report and review page as HTML, as one file or as a server sends it; everything that goes in is escaped."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from lvlmva_core.report.headline import Headline

ENTRY = "review.js"
IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w]+\.js)";\n', re.MULTILINE)


@dataclass(frozen=True)
class Table:
    """A table of the page: a heading, a note under it, column names, rows of text."""

    heading: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: a caption, a data URL, pixels."""

    caption: str
    url: str
    width: int
    height: int


@dataclass(frozen=True)
class Page:
    """What stands on the page beside its samples.

    warning: in a red box at the top (who judged); empty = no box. headline: None where nothing was measured yet.
    facts: sentences under it. patterns: as `patterns_shown` gives them. rare: rejected regions in none of them.
    left_out_of_gallery: a sentence, or "". params: the text of params.yaml, or "".
    """

    title: str
    warning: str = ""
    headline: Headline | None = None
    facts: Sequence[str] = ()
    patterns: Sequence[Mapping[str, Any]] = ()
    rare: int = 0
    left_out_of_gallery: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Drawn] = field(default_factory=list)
    params: str = ""


def drawn_of(caption: str, png: Path) -> Drawn:
    """A figure from a PNG file."""
    content = png.read_bytes()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))  # of the header
    return Drawn(caption, f"data:image/png;base64,{base64.b64encode(content).decode()}", width, height)


def render_page(page: Page, folder: Path, data: Mapping[str, Any] | None = None) -> str:
    """Render `index.html` of a folder.

    Args:
        page: what stands in it. folder: of the template, its style and its script modules.
        data: what the scripts show, where the page is to be one file: they stand in it then, and by its policy it loads
            nothing and runs nothing else. None where a server sends all that.
    """
    inline = None if data is None else _inline(folder, data)
    return _template(folder).render(vars(page), inline=inline)


@cache
def _template(folder: Path) -> Template:
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html")


def one_script(folder: Path, entry: str = ENTRY) -> str:
    """A module and those that it imports as one script, each once and after what it imports.

    Names at the top of a module must be unique among all of them; a browser refuses the script otherwise.
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        text = (folder / name).read_text(encoding="utf-8")
        done[name] = ""  # modules may import one another
        for imported in IMPORT.findall(text):
            add(imported)
        del done[name]
        done[name] = re.sub(r"^export ", "", IMPORT.sub("", text), flags=re.MULTILINE)

    add(entry)
    return "\n".join(done.values())


def _inline(folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    script, style = one_script(folder), (folder / "review.css").read_text(encoding="utf-8")
    icon = base64.b64encode((folder / "icon.svg").read_bytes()).decode()
    if "</script" in script.lower() or "</style" in style.lower():
        raise ValueError(f"{folder}: a script or style that ends its own element")
    return {
        "policy": f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'",
        "script": Markup(script),  # ours, and looked at above
        "style": Markup(style),
        "icon": f"data:image/svg+xml;base64,{icon}",
        "data": Markup(_json(data)),  # without a "<", so that nothing in it ends the element
    }


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
