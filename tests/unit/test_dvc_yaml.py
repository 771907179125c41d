"""dvc.yaml against the code: DVC does not follow imports, so the deps must name every module that a stage imports."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lvlmva.params import EXECUTION, Params
from lvlmva.pipeline import code_of, paths, with_code
from lvlmva_core.baselines import subg
from lvlmva_core.controls import MASK_SOURCES
from lvlmva_core.errors import InputError
from lvlmva_core.methods import METHODS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "dvc.yaml").read_text()
PIPELINE: dict[str, Any] = YAML(typ="safe", pure=True).load(TEXT)
STAGES: dict[str, Any] = PIPELINE["stages"]
PATHS = paths(ROOT / "dvc.yaml")


def _module(stage: str) -> str:
    return str(STAGES[stage]["cmd"].split()[2])


def test_the_code_that_stages_depend_on_is_written_as_the_command_writes_it() -> None:
    assert with_code(TEXT, ROOT) == TEXT


def test_a_stale_file_is_noticed_and_mended() -> None:
    stale = TEXT.replace("      - lvlmva_core/ranking.py\n", "", 1)
    assert stale != TEXT
    assert with_code(stale, ROOT) == TEXT


def test_the_closure_follows_imports_but_not_those_for_types(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    core = tmp_path / "lvlmva_core"
    core.mkdir()
    (tmp_path / "stages" / "one.py").write_text("from lvlmva_core import a\n\ndef f():\n    import lvlmva_core.b\n")
    (core / "__init__.py").write_text("")
    (core / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lvlmva_core import c\n")
    (core / "b.py").write_text("from lvlmva_core.settings import x\n")
    (core / "c.py").write_text("")
    (core / "settings.py").write_text("")
    assert code_of("stages.one", tmp_path) == ["lvlmva_core/a.py", "lvlmva_core/b.py", "stages/one.py"]


@pytest.mark.parametrize("name", STAGES)
def test_every_path_that_a_stage_takes_is_a_dependency_or_an_output(name: str) -> None:
    stage = STAGES[name]
    function = getattr(importlib.import_module(_module(name)), _module(name).removeprefix("stages."))
    taken = {each.name for each in inspect.signature(function).parameters.values() if each.annotation is Path}
    assert taken <= PATHS.keys()
    entries = [*stage["deps"], *stage.get("outs", []), *stage.get("metrics", [])]
    named = {match[1] for entry in entries if (match := re.match(r"\$\{paths\.(\w+)\}", entry))}
    of_its_models = {"base", "models"}  # evaluate reads one or the other
    by_digest = {"prompts"} if f"${{paths.settings}}/{name}_prompts.json" in stage["deps"] else set()
    assert taken - {"params"} - named - by_digest <= (of_its_models if name.startswith("evaluate") else set())
    assert named - ({"settings"} if by_digest else set()) <= taken


def test_no_path_stands_in_the_file_twice() -> None:
    assert len(set(PATHS.values())) == len(PATHS)
    commands = [stage["cmd"] for stage in STAGES.values()]
    assert not [command for command in commands if "/" in command or len(command) > 80]


def test_a_change_of_color_is_known_to_the_report_alone_and_metrics_touch_no_model() -> None:
    with_methods = [name for name in STAGES if "lvlmva_core/methods.py" in STAGES[name]["deps"]]
    assert with_methods == ["report"]
    of_comparison = [name for name in STAGES if "lvlmva_core/comparison.py" in STAGES[name]["deps"]]
    assert of_comparison == ["compare"]
    for name in ("compare", "report"):
        assert "lvlmva_core/models.py" not in STAGES[name]["deps"]


@pytest.mark.parametrize("name", STAGES)
def test_params_are_sections_that_exist(name: str) -> None:
    for key in STAGES[name].get("params", []):
        assert key.split(".")[0] in Params.model_fields
        assert key.split(".")[0] != EXECUTION  # where workers run changes nothing that comes out


def test_every_method_has_what_its_kind_needs() -> None:
    assert {name for name, method in METHODS.items() if method.kind == "penalty"} == set(MASK_SOURCES)
    for name in (name for name, method in METHODS.items() if method.kind == "retrained"):
        module = importlib.import_module(f"lvlmva_core.baselines.{name}")
        assert issubclass(module.Settings, subg.RetrainSettings.__base__)
        assert callable(module.retrain)


def test_the_stages_are_those_of_the_paper_in_its_order() -> None:
    chain = [
        "prepare",
        "train",
        "rank",
        "attribute",
        "segment",
        "exchange",
        "critique",
        "judge",
        "mask",
        "settings",
        "align",
    ]
    after = ["retrain", "explain", "evaluate_base", "evaluate", "evaluate_retrained", "compare", "report"]
    assert list(STAGES) == [*chain, *after]


def test_nothing_is_frozen_persisted_or_always_changed() -> None:
    assert not [word for word in ("persist", "frozen", "always_changed") if word in TEXT]


def test_the_paths_are_read_without_the_stages_and_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "dvc.yaml"
    file.write_text("vars:\n  - paths: {one: a/b}\nstages: [no, yaml: {\n")
    assert paths(file) == {"one": "a/b"}
    file.write_text("# stages:\nstages:\n  x: {cmd: y}\nvars:\n  - other.yaml\n  - paths: {one: a/b}\n")
    assert paths(file) == {"one": "a/b"}
    file.write_text("stages:\n  x: {cmd: y}\n")
    assert paths(file) == {}
    assert paths(tmp_path / "absent.yaml") == {}
    file.write_text("vars: [\n")
    with pytest.raises(InputError, match=r"dvc\.yaml: cannot be read"):
        paths(file)
