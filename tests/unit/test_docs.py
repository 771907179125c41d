"""Documents that run: the tour, the API reference, the commands and names in prose."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from lvlmva.changes import apply_changes
from lvlmva.cli import app
from lvlmva.params import load_params
from lvlmva.pipeline import paths
from lvlmva.preset import preset
from tests.tour import TOUR

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(page for folder in ("docs", "benchmarks") for page in (ROOT / folder).glob("*.md"))
OURS = ("stages", "lvlmva", "lvlmva_core", "tests", "benchmarks", "presets", "docs", "metrics", "models", "prompts")
LONGEST_CELL = 16  # lines
MOST_BYTES = 300_000


def code_cells() -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]


def test_the_tour_runs_and_ends_where_its_text_says() -> None:
    """What the text claims, checked with the notebook's own variables in its own process."""
    script = """
from tests.tour import executed

executed('''
assert float((maps.sum((1, 2)) - (logit - expected)).abs().max()) < 1e-4
assert scores["LVLM-VA"]["WGA"] > max(scores["base"]["WGA"], scores["λ = 0"]["WGA"]) + 0.1
assert scores["LVLM-VA"]["μ_align"] > max(scores["base"]["μ_align"], scores["λ = 0"]["μ_align"]) + 0.05
assert share[caught].min() > 0.25
''')
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_tour_is_committed_with_what_its_cells_say() -> None:
    cells = code_cells()
    assert TOUR.stat().st_size < MOST_BYTES
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert set(kinds) == {"stream", "display_data"}
    assert kinds.count("display_data") >= 6
    for cell in cells:
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.text


def test_the_tour_needs_the_core_alone() -> None:
    tree = ast.parse("\n".join(cell.source for cell in code_cells()))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"lvlmva_core", "matplotlib", "numpy", "torch"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The API reference, built by the Makefile's own line, in which warnings are errors."""
    recipe = re.search(r"^\t\$\(BIN\)/python (.*-m pdoc .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    assert "-W error" in recipe[1]
    folder = tmp_path_factory.mktemp("api")
    command = [sys.executable, *recipe[1].replace("build/api", str(folder)).split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    ("page", "name", "words"),
    [
        ("attribution", "deep_lift_shap", "mean over baselines of DeepLIFT"),
        ("segmentation", "fit_weighted_gmm", "weighted maximum likelihood"),
        ("masks", "assemble_mask", "never masked"),
        ("alignment", "rrr_penalty", "Squared input gradient"),
        ("metrics", "group_accuracies", "AGA is the plain mean"),
        ("metrics", "alignment_score", "does not count"),
    ],
)
def test_the_reference_shows_the_main_functions(reference: Path, page: str, name: str, words: str) -> None:
    text = (reference / "lvlmva_core" / f"{page}.html").read_text()
    assert f'id="{name}"' in text
    assert words in text


def test_the_reference_loads_nothing_from_elsewhere(reference: Path) -> None:
    for page in reference.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert loaded == [], page


def by_page(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


def commands(page: Path, program: str) -> list[list[str]]:
    """Words of each command of a program in the code blocks and code spans of a page."""
    text = page.read_text()
    code = [block.replace("\\\n", " ") for block in re.findall(r"```(?:console)?\n(.*?)```", text, re.DOTALL)]
    code += [span for span in re.findall(r"`([^`\n]+)`", text) if " " in span]
    lines = [part.strip() for block in code for line in block.split("\n") for part in re.split(r"&&|;|\||>", line)]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def changes_in(words: list[str]) -> list[str]:
    """What stands after each -S, of a list of values the first; what the shell fills in is left out."""
    given = [words[n + 1] for n, word in enumerate(words) if word == "-S"]
    return [
        change if "[" in change or "{" in change else change.partition(",")[0] for change in given if "$" not in change
    ]


@by_page(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@by_page(PAGES)
def test_files_and_names_exist(page: Path) -> None:
    text, outputs = page.read_text(), set(paths(ROOT / "dvc.yaml").values())
    for found in re.findall(rf"(?<![\w./])((?:{'|'.join(OURS)})/[\w./<>@=-]+)", text):
        file = found.rstrip(".")
        made = any(file == out or file.startswith(f"{out}/") for out in outputs)
        shown = re.sub(r"<[^>]+>.*", "", file)  # prompts/<data set>/specification.yaml
        new = page.name == "adding.md"  # whose examples are files that the reader writes
        assert made or new or (ROOT / shown).exists(), found
    for found in re.findall(r"\blvlmva_core(?:\.\w+)+", text):
        importlib.import_module("lvlmva_core")
        try:
            importlib.import_module(found)
        except ModuleNotFoundError:
            module, _, name = found.rpartition(".")
            assert hasattr(importlib.import_module(module), name), found


@by_page([page for page in PAGES if commands(page, "lvlmva")])
def test_commands_exist_with_their_options_and_presets_apply(page: Path, tmp_path: Path) -> None:
    root: Any = get_command(app)
    params = tmp_path / "params.yaml"
    for words in commands(page, "lvlmva"):
        command, rest = root, list(words)
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        known |= {"--install-completion"} if command is root else set()
        used = {word.strip("[]").partition("=")[0] for word in rest if word.strip("[]").startswith("-")}
        assert used <= known, words
        if words[0] == "preset" and len(words) > 1:
            params.write_text((ROOT / "params.yaml").read_text())
            preset(words[1], changes_in(words), False, params, ROOT / "presets")


@by_page([page for page in PAGES if any(changes_in(words) for words in commands(page, "dvc"))])
def test_changes_of_experiments_give_valid_params(page: Path, tmp_path: Path) -> None:
    for words in commands(page, "dvc"):
        content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
        apply_changes(content, changes_in(words))
        with (tmp_path / "params.yaml").open("w") as file:
            YAML(typ="safe", pure=True).dump(content, file)
        load_params(tmp_path / "params.yaml")


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = YAML(typ="safe", pure=True).load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == version
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2512.21985"
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
