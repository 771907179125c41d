"""The gate, and the check of a classifier, as a user would call them, on a small project of prepared files."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from typer.testing import CliRunner

from lvlmva.cli import app
from lvlmva_core.arrays import write_arrays, write_table
from lvlmva_core.models import Mlp, ModelSpec, build_model, save_checkpoint

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec("mlp", 1, 8, 8, 2, 4)
CORNER = np.s_[:3, :3]


def _model(of_corner: float, of_middle: float) -> Mlp:
    """Logits that rise with the corner's and the middle's brightness: what it relies on is known."""
    model = build_model(SPEC, 0)
    assert isinstance(model, Mlp)
    weights = torch.zeros(4, 8, 8)
    weights[0][CORNER], weights[1, 4:, 4:] = of_corner, of_middle
    with torch.no_grad():
        model.hidden.weight.copy_(weights.flatten(1))
        model.hidden.bias.zero_()
        model.output.weight.copy_(torch.tensor([[-1.0, -1.0, 0, 0], [1.0, 1.0, 0, 0]]))
        model.output.bias.copy_(torch.tensor([1.0, -1.0]) * (of_corner * 4.5 + of_middle * 8))
    return model.eval()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bright corners go with class 1 in training; a bright middle does everywhere; the corners were rejected."""
    rng = np.random.default_rng(0)
    n = 120
    labels = np.arange(n) % 2
    images = rng.integers(0, 40, (n, 1, 8, 8)).astype(np.uint8)
    images[:, 0, 4:, 4:] += (labels * 180).astype(np.uint8)[:, None, None]
    images[:, 0, :3, :3] += (labels * 180).astype(np.uint8)[:, None, None]
    ids = [f"s{i:03d}" for i in range(n)]
    split = np.array(["train", "val", "test"])[(np.arange(n) // 2) % 3]
    table = pd.DataFrame({"id": ids, "split": split, "label": labels, "spurious": False, "group": "g", "source": "s"})
    write_table(tmp_path / "data/samples.parquet", table.assign(sha256="0"))
    attrs = {"class_names": ["dark", "bright"], "dataset": "toy", "spurious_feature": "a corner"}
    write_arrays(tmp_path / "data/images.zarr", {"images": images}, attrs)
    chosen = [each for each, s in zip(ids, split, strict=True) if s == "train"]
    masks = np.zeros((len(chosen), 8, 8), dtype=bool)
    masks[:, :3, :3] = True
    write_arrays(tmp_path / "data/masks.zarr", {"masks": masks}, {"ids": chosen, "left_out": {}})
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    save_checkpoint(tmp_path / "models/base.safetensors", SPEC, _model(1.0, 1.0))
    save_checkpoint(tmp_path / "blind.safetensors", SPEC, _model(0.0, 1.0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(words))
    return found.exit_code, found.output + (str(found.exception) if found.exception else "")


def test_a_checkpoint_that_relies_on_the_rejected_fails_and_one_that_does_not_passes(project: Path) -> None:
    code, out = _run("gate", "--model", "models/base.safetensors", "--reliance-at-most", "0.1")
    assert (code, "FAILED: more than 0.1 on 40 pictures" in out) == (1, True)
    code, out = _run("gate", "--model", "blind.safetensors", "--reliance-at-most", "0.1", "--json")
    content = json.loads(out)
    assert (code, content["passed"]) == (0, True)
    base, tested = content["models"]
    assert tested["reliance"] == pytest.approx(0, abs=1e-6)
    assert base["low"] <= base["reliance"] <= base["high"]
    # the corner's brightness makes 9 of the 25 pixels that the base model adds up; both classes differ by it alone
    assert base["reliance"] == pytest.approx(2 * 9 / 25, abs=0.03)
    assert (base["accuracy"], tested["accuracy"]) == (1.0, 1.0)


def test_the_gate_names_what_is_missing_or_does_not_fit(project: Path) -> None:
    code, out = _run("gate", "--model", "gone.safetensors", "--reliance-at-most", "0.1")
    assert (code, "gone.safetensors: no such checkpoint" in out) == (1, True)
    save_checkpoint(
        project / "other.safetensors", ModelSpec("mlp", 1, 9, 9, 2, 4), build_model(ModelSpec("mlp", 1, 9, 9, 2, 4), 0)
    )
    code, out = _run("gate", "--model", "other.safetensors", "--reliance-at-most", "0.1")
    assert (code, "for pictures and classes (1, 9, 9, 2), those here are (1, 8, 8, 2)" in out) == (1, True)
    ids = ["s000", "s001"]
    write_arrays(project / "data/masks.zarr", {"masks": np.zeros((2, 8, 8), bool)}, {"ids": ids, "left_out": {}})
    code, out = _run("gate", "--model", "blind.safetensors", "--reliance-at-most", "0.1")
    assert (code, "nothing was rejected" in out) == (1, True)


def test_check_model_finds_a_wrong_order_of_classes(project: Path) -> None:
    torch.save({"state_dict": _model(1.0, 1.0).state_dict()}, project / "w.pth")
    yaml = YAML(pure=True)
    content = yaml.load((project / "params.yaml").read_text())
    section = {"from": "checkpoint", "model": "mlp", "hidden": 4, "checkpoint": "w.pth", "normalisation": "none"}
    for classes, passes in ((["dark", "bright"], True), (["bright", "dark"], False)):
        content["train"] = {**section, "classes": classes, "expected_accuracy": {"test": 0.95}}
        with (project / "params.yaml").open("w") as file:
            yaml.dump(content, file)
        code, out = _run("check-model", "--json")
        findings = {each["name"]: each for each in json.loads(out[: out.rindex("]") + 1])}
        assert code == (0 if passes else 1)
        assert findings["model"]["passed"]
        assert findings["layers"]["passed"]
        assert findings["accuracy"]["passed"] == findings["reading"]["passed"] == passes
        if not passes:
            assert "train.classes [dark, bright]" in findings["reading"]["message"]
