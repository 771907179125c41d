"""The core without what only the pipeline needs: it imports, its examples run, its types are shipped."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DRAWING = ("chain", "diagnostics", "figures", "findings", "panel")  # of the report
EXAMPLES = {  # the functions that docs and README name first
    "lvlmva_core.attribution.deep_lift": {"deep_lift_shap"},
    "lvlmva_core.segmentation.mixture": {"fit_weighted_gmm"},
    "lvlmva_core.masks": {"assemble_mask"},
    "lvlmva_core.penalties": {"rrr_penalty"},
    "lvlmva_core.metrics": {"group_accuracies", "alignment_score"},
}
BLOCK = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

sys.meta_path.insert(0, Absent())
"""
SCRIPT = """
import doctest, importlib, json, pathlib, pkgutil
import numpy as np
import torch
import lvlmva_core

found = {{"without": {{}}, "examples": {{}}, "refused": {{}}}}
for module in pkgutil.walk_packages(lvlmva_core.__path__, "lvlmva_core."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        found["without"][module.name] = error.name.partition(".")[0]
for name in {examples!r}:
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(importlib.import_module(name)):
        if test.examples:
            failed, _ = runner.run(test)
            found["examples"][test.name.rpartition(".")[2]] = failed

from lvlmva_core.attribution import integrated_gradients
from lvlmva_core.segmentation.sam import load_sam
from lvlmva_core.segmentation.superpixels import slic_regions

model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
x = torch.ones(1, 1, 2, 2)
for extra, call in (
    ("captum", lambda: integrated_gradients(model, x, x, 0, steps=2, batch_size=2)),
    ("slic", lambda: slic_regions(np.zeros((1, 8, 8), np.uint8), 4)),
    ("sam", lambda: load_sam(pathlib.Path("."), torch.device("cpu"))),
):
    try:
        call()
    except lvlmva_core.errors.InputError as error:
        found["refused"][extra] = str(error)
print("found", json.dumps(found))
"""


def extra(name: str) -> set[str]:
    """Import names of what an extra brings."""
    modules = {"scikit-image": "skimage"}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][name]
    names = [requirement.partition(">")[0].strip() for requirement in listed]
    return {modules.get(name, name) for name in names}


ABSENT = sorted(extra("pipeline") | extra("captum") | extra("slic") | extra("sam"))


def alone(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that has none of the extras."""
    command = [sys.executable, "-W", "error", "-c", BLOCK.format(absent=ABSENT) + script]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = alone(SCRIPT.format(examples=sorted(EXAMPLES)))
    assert done.returncode == 0, done.stdout + done.stderr
    *failures, last = done.stdout.splitlines()
    assert failures == []  # doctest prints what differs
    return dict(json.loads(last.removeprefix("found ")))


def test_what_is_absent_is_what_the_pipeline_brings() -> None:
    assert {"dvc", "typer", "rich", "zarr", "matplotlib", "captum", "skimage", "transformers"} <= set(ABSENT)
    assert "No module named 'rich'" in alone("import rich").stderr


def test_every_module_but_those_that_draw_imports_without_the_extras(found: dict[str, Any]) -> None:
    assert found["without"] == {f"lvlmva_core.report.{name}": "matplotlib" for name in DRAWING}


def test_the_examples_of_the_main_functions_run_without_the_extras(found: dict[str, Any]) -> None:
    assert {name for names in EXAMPLES.values() for name in names} <= found["examples"].keys()
    assert set(found["examples"].values()) == {0}


def test_a_method_whose_library_is_absent_names_the_extra(found: dict[str, Any]) -> None:
    assert found["refused"].keys() == {"captum", "slic", "sam"}
    for extra, message in found["refused"].items():
        assert message.endswith(f"pip install 'lvlmva[{extra}]'")


def test_the_command_without_the_pipeline_says_what_to_install() -> None:
    assert "ImportError: lvlmva needs typer and more: pip install 'lvlmva[pipeline]'" in alone("import lvlmva").stderr


def test_types_are_shipped_with_both_packages() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("lvlmva", "lvlmva_core"):
        assert "py.typed" in data[package]
        assert (ROOT / package / "py.typed").is_file()


def test_one_library_reads_yaml_the_one_that_dvc_uses() -> None:
    for folder in ("lvlmva_core", "lvlmva", "stages", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(?:import|from) yaml\b", file.read_text(), re.MULTILINE), file
