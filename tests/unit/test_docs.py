"""Documents that run: the tour, and the API reference."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs" / "tour.ipynb"
LONGEST_CELL = 16  # lines
MOST_BYTES = 300_000


def code_cells() -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]


def test_the_tour_runs_and_ends_where_its_text_says() -> None:
    """What the text claims, checked with the notebook's own variables in its own process."""
    script = """
import nbformat, sys
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
notebook.cells.append(nbformat.v4.new_code_cell('''
assert float((maps.sum((1, 2)) - (logit - expected)).abs().max()) < 1e-4
assert scores["LVLM-VA"]["WGA"] > max(scores["base"]["WGA"], scores["λ = 0"]["WGA"]) + 0.1
assert scores["LVLM-VA"]["μ_align"] > max(scores["base"]["μ_align"], scores["λ = 0"]["μ_align"]) + 0.05
assert share[caught].min() > 0.25
'''))
NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
"""
    done = subprocess.run([sys.executable, "-c", script, str(TOUR)], capture_output=True, text=True, check=False)
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
