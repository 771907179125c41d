"""`lvlmva new`: the questions that it asks on a terminal, and class folders without a table."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lvlmva.new import new
from tests.pictures import CLASSES, scene

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params, presets and twenty pictures of each class in class folders."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "presets").mkdir()
    shutil.copy(ROOT / "presets/decoy_digits.yaml", tmp_path / "presets")
    for label, name in enumerate(CLASSES):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for place in range(20):
            scene(label, place).save(tmp_path / "tree" / name / f"{label}_{place}.png")
    return tmp_path


def _preset(folder: Path, name: str) -> Any:
    return YAML(typ="safe", pure=True).load((folder / f"presets/{name}.yaml").read_text("utf-8"))


def test_class_folders_become_a_preset(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new("scans", images="tree", yes=True)
    found = _preset(here, "scans")
    assert found["prepare"]["table"] is None
    assert "columns" not in found["prepare"]
    assert found["prepare"]["classes"] == sorted(CLASSES)
    assert found["prepare"]["image_size"] == 32
    assert found["rank"]["n_samples"] == 14  # half of the 28 that 70 % of 40 are
    assert "rrr_gt" not in found["methods"]
    assert '+  dataset: "folder"' in capsys.readouterr().out


def test_on_a_terminal_it_asks_and_suggests(here: Path) -> None:
    rows = [
        f"{name};{label}_{place};{place % 2};{place // 2}" for label, name in enumerate(CLASSES) for place in range(20)
    ]
    (here / "tree/findings.csv").write_text("what;name;tag;case\n" + "\n".join(rows) + "\n", encoding="utf-8")
    # the suggestions are right but for the file: a stem without its folder leads to no one file
    answers = ["tree", "", "", "", "spurious=tag,patient=case", "", "", "48", ",".join(CLASSES)]
    leader, follower = pty.openpty()
    os.write(leader, "".join(f"{answer}\n" for answer in answers).encode())
    done = subprocess.run(
        [sys.executable, "-m", "lvlmva.cli", "new", "asked"],
        stdin=follower,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(leader)
    os.close(follower)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Column of the class (there are what, name, tag, case) [what]" in done.stdout
    assert "Pixels a side [32]" in done.stdout
    prepare = _preset(here, "asked")["prepare"]
    assert prepare["columns"] == {"file": "name", "label": "what", "spurious": "tag", "patient": "case"}
    assert prepare["image_size"] == 48
    assert prepare["classes"] == CLASSES
