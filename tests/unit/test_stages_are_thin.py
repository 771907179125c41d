"""A stage reads, calls and writes: nothing to compute, and little to read."""

import ast
from pathlib import Path

import pytest

STAGES = sorted((Path(__file__).parents[2] / "stages").glob("*.py"))
LONGEST = 80  # lines
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Pow, ast.MatMult, ast.FloorDiv, ast.Mod)


@pytest.mark.parametrize("file", STAGES, ids=lambda file: file.stem)
def test_a_stage_is_under_80_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < LONGEST


@pytest.mark.parametrize("file", STAGES, ids=lambda file: file.stem)
def test_a_stage_holds_no_maths(file: Path) -> None:
    """Paths are joined by `/`, so that a division is none; a share of samples is compared with a limit in mask."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ARITHMETIC)]
    assert len(found) <= (1 if file.stem == "mask" else 0), f"arithmetic in lines {found}"
