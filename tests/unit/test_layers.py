"""The order of docs/architecture.md: no module of the core imports one that stands to its right."""

from pathlib import Path

import pytest

from tests.unit.test_dvc_yaml import ROOT, _imports

LAYERS = [
    ["errors", "progress", "arrays", "config", "store"],
    ["datasets", "samples", "corruptions"],
    ["models", "efficientnet_lite", "training", "resume"],
    ["ranking"],
    ["attribution"],
    ["segmentation", "render", "overlap"],
    ["lvlm"],
    ["masks"],
    ["alignment", "stacked_mlp", "selection", "baselines"],
    ["metrics"],
    ["report"],
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
CORE = ROOT / "lvlmva_core"
FILES = sorted(file for file in CORE.rglob("*.py") if file != CORE / "__init__.py")


def _name(file: Path) -> str:
    return file.relative_to(CORE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_imports_point_left(file: Path) -> None:
    imported = {_name(path) for path in _imports(file) if path.is_relative_to(CORE) and path != CORE / "__init__.py"}
    assert {name for name in imported if LAYER_OF[name] > LAYER_OF[_name(file)]} == set()


def test_the_core_knows_no_stage_no_dvc_and_no_command_line() -> None:
    for file in FILES:
        text = file.read_text()
        for foreign in ("from stages", "import stages", "import dvc", "from dvc", "import typer", "from typer"):
            assert foreign not in text, f"{file}: {foreign}"
