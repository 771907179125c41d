import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from lvlmva.params import load_params, sections_lacking
from lvlmva.preset import preset
from lvlmva_core.errors import InputError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
CRITICS = sorted(f"critics/{path.stem}" for path in (ROOT / "presets" / "critics").glob("*.yaml"))


@pytest.fixture
def params(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    return tmp_path / "params.yaml"


def _read(file: Path) -> Any:
    return YAML(typ="safe", pure=True).load(file.read_text())


def _apply(params: Path, name: str, *changes: str, dry_run: bool = False) -> None:
    preset(name, list(changes), dry_run, params, ROOT / "presets")


def test_the_shipped_params_are_the_default_preset() -> None:
    assert _read(ROOT / "params.yaml") == _read(ROOT / "presets" / "decoy_digits.yaml")


@pytest.mark.parametrize("name", [*EXPERIMENTS, *CRITICS])
def test_every_preset_gives_valid_params(params: Path, name: str) -> None:
    _apply(params, name)
    load_params(params)
    given, written = _read(ROOT / "presets" / f"{name}.yaml"), _read(params)

    def holds(layer: Any, content: Any) -> bool:
        if isinstance(layer, dict):
            return all(holds(value, content[key]) for key, value in layer.items())
        return bool(layer == content)

    assert holds(given, written)
    assert sorted(path.name for path in params.parent.iterdir()) == ["params.yaml"]


def test_only_what_the_preset_says_changes(params: Path) -> None:
    before = (ROOT / "presets" / "decoy_digits.yaml").read_text()
    _apply(params, "decoy_digits")
    assert params.read_text() == before
    _apply(params, "decoy_digits", "align.epochs=7")
    changed = [
        pair for pair in zip(before.splitlines(), params.read_text().splitlines(), strict=True) if len(set(pair)) > 1
    ]
    assert changed == [("  epochs: 30", "  epochs: 7")]


def test_an_experiment_forgets_what_stood_there_and_comments_stay(
    params: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params.write_text(params.read_text().replace("n_regions: 3", "n_regions: 9"))
    _apply(params, "decoy_mnist", "prepare.root=some/folder", "align.seeds=[4, 5]")
    loaded = load_params(params)
    assert (loaded.segment.n_regions, loaded.prepare.root, loaded.align.seeds) == (3, "some/folder", [4, 5])
    assert "# read by every stage that runs the model" in params.read_text()
    shown = capsys.readouterr().out
    assert "-  n_regions: 9" in shown
    assert "+  root: some/folder" in shown


def test_no_key_of_another_models_endpoint_stays(params: Path) -> None:
    _apply(params, "critics/gpt-5", "critique.endpoint.allow_upload=true", "critique.max_failed_share=0.3")
    _apply(params, "critics/local-vllm")
    written, given = _read(params), _read(ROOT / "presets" / "critics" / "local-vllm.yaml")
    assert [written[section]["endpoint"] for section in given] == [given[section]["endpoint"] for section in given]
    assert written["critique"]["max_failed_share"] == 0.3
    assert list(written["critique"]) == list(_read(ROOT / "params.yaml")["critique"])


def test_a_dry_run_and_a_mistake_write_nothing(params: Path) -> None:
    before = params.read_text()
    _apply(params, "decoy_mnist", dry_run=True)
    with pytest.raises(InputError, match=r"unknown key 'align\.lambda'"):
        _apply(params, "decoy_mnist", "align.lambda=1")
    with pytest.raises(InputError, match=r"no preset .mnist. under .*; known: .*decoy_mnist"):
        _apply(params, "mnist")
    with pytest.raises(InputError, match=r"expected section\.key=value"):
        _apply(params, "decoy_mnist", "align")
    with pytest.raises(InputError, match="no preset"):
        _apply(params, "../params")
    assert params.read_text() == before
    assert [path.name for path in params.parent.iterdir()] == ["params.yaml"]


def test_the_command_line_knows_it() -> None:
    from lvlmva.cli import app

    assert "preset" in CliRunner().invoke(app, ["--help"]).output


def test_the_shell_completes_commands() -> None:
    from lvlmva.cli import app

    asked = {"_LVLMVA_COMPLETE": "complete_bash", "COMP_WORDS": "lvlmva pre", "COMP_CWORD": "1"}
    assert CliRunner().invoke(app, [], env=asked, prog_name="lvlmva").output.split() == ["preset"]


def test_where_workers_run_belongs_to_the_machine(params: Path) -> None:
    """Another experiment leaves it; and a params.yaml without it, as before there were workers, is whole."""
    _apply(params, "decoy_digits", "execution.backend=submitit", "execution.options.cluster=local")
    _apply(params, "knee")
    assert load_params(params).execution.options == {"cluster": "local"}
    content = _read(params)
    del content["execution"]
    with params.open("w") as file:
        YAML(typ="safe", pure=True).dump(content, file)
    assert load_params(params).execution.backend == "processes"
    assert sections_lacking(params) == []
