"""dvc.yaml against the code: DVC does not follow imports, so the deps must name every module that a stage imports."""

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lvlmva.params import Params

ROOT = Path(__file__).parents[2]
PIPELINE: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, Any] = PIPELINE["stages"]

# Reach DVC as params, or say nothing about what comes out.
NOT_TRACKED = {
    "lvlmva_core/__init__.py",
    "lvlmva_core/config.py",
    "lvlmva_core/errors.py",
    "lvlmva_core/progress.py",
    "stages/__init__.py",
    "stages/entry.py",
}


def _file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").exists() else None


def _imports(file: Path) -> set[Path]:
    """Files of ours that a file imports, anywhere in it, with the packages that importing them runs."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("lvlmva_core", "stages"):
                parts = name.split(".")
                packages = [".".join(parts[: i + 1]) for i in range(len(parts))]
                found |= {path for package in packages if (path := _file_of(package)) is not None}
    return found


def _closure(file: Path) -> set[str]:
    seen: set[Path] = set()
    todo = [file]
    while todo:
        current = todo.pop()
        if current in seen or str(current.relative_to(ROOT)) in NOT_TRACKED:
            continue
        seen.add(current)
        todo += _imports(current)
    return {str(path.relative_to(ROOT)) for path in seen}


def _module_of(command: str) -> Path:
    words = command.split()
    assert words[:2] == ["python", "-m"]
    file = _file_of(words[2])
    assert file is not None
    return file


@pytest.mark.parametrize("name", STAGES)
def test_deps_name_every_module_that_the_stage_imports(name: str) -> None:
    expected = _closure(_module_of(STAGES[name]["cmd"]))
    listed = {dep for dep in STAGES[name]["deps"] if dep.endswith(".py")}
    assert listed == expected


@pytest.mark.parametrize("name", STAGES)
def test_every_path_of_a_command_is_a_dep_or_an_output(name: str) -> None:
    stage = STAGES[name]
    known = {*stage["deps"], *stage.get("outs", []), *stage.get("metrics", []), "params.yaml"}
    words = [word.partition("=")[2] or word for word in stage["cmd"].split()]
    paths = {word for word in words if "/" in word or word in ("prompts", "reports", "params.yaml")}
    files = {path for path in known if not path.endswith(".py")}
    assert {path for path in paths if path not in known} <= {"prompts"}  # of which a stage reads one folder's files
    assert {path for path in files if not path.startswith("prompts/")} <= paths | {"params.yaml"}
    assert any(path.startswith("prompts/") for path in files) == ("prompts" in paths)


@pytest.mark.parametrize("name", STAGES)
def test_params_are_sections_that_exist(name: str) -> None:
    for key in STAGES[name]["params"]:
        section = key.split(".")[0]
        assert section in Params.model_fields


def test_the_stages_are_those_of_the_paper_in_its_order() -> None:
    chain = ["prepare", "train", "rank", "attribute", "segment", "critique", "judge", "mask", "align"]
    assert list(STAGES) == [*chain, "baseline", "retrain", "control", "evaluate", "report"]


def test_nothing_is_frozen_persisted_or_always_changed() -> None:
    text = (ROOT / "dvc.yaml").read_text()
    assert not [word for word in ("persist", "frozen", "always_changed") if word in text]
