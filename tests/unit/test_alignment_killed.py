"""The align stage, killed in the middle and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from lvlmva_core.arrays import read_json, write_arrays, write_table
from lvlmva_core.models import ModelSpec, build_model, save_checkpoint
from lvlmva_core.samples import read_images, read_samples
from stages.prepare import prepare
from stages.settings import settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the stage reads, with a base model that was not trained."""
    folder = tmp_path_factory.mktemp("inputs")
    yaml = YAML(pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["compute"]["threads"] = 1
    params["align"] |= {"epochs": 150, "seeds": [0, 1]}
    params["methods"]["rrr_gt"]["selection"] = {
        "rule": "pseudo_group",
        "rrr_lambdas": [0.0, 0.3],
        "patience": None,
        "seed": 0,
    }
    yaml.dump(params, folder / "params.yaml")
    prepare(folder / "params.yaml", folder / "images.zarr", folder / "samples.parquet", folder / "masks.zarr")
    samples = read_samples(folder / "samples.parquet")
    chosen = samples[samples["split"] == "train"][["id"]].iloc[:64]
    write_table(folder / "alignment_set.parquet", chosen)
    verdicts = np.zeros((64, 28, 28), dtype=bool)
    verdicts[:, :5] = True  # the donors that every method is chosen by
    write_arrays(folder / "verdicts.zarr", {"masks": verdicts}, {"ids": chosen["id"].tolist()})
    channels, height, width = read_images(folder / "images.zarr", np.array([0])).shape[1:]
    spec = ModelSpec("mlp", channels, height, width, 10, 64)
    save_checkpoint(folder / "base.safetensors", spec, build_model(spec, seed=0))
    settings(
        folder / "params.yaml", folder / "samples.parquet", folder / "masks.zarr", ROOT / "prompts", folder / "settings"
    )
    return folder


def _start(inputs: Path, out: Path, store: Path) -> subprocess.Popen[str]:
    options = {
        "params": inputs / "params.yaml",
        "method": "rrr_gt",
        "images": inputs / "images.zarr",
        "samples": inputs / "samples.parquet",
        "alignment-set": inputs / "alignment_set.parquet",
        "spurious-masks": inputs / "masks.zarr",
        "settings": inputs / "settings",
        "masks": inputs / "verdicts.zarr",
        "base": inputs / "base.safetensors",
        "models": out / "models",
        "method-metrics": out,
        "curves": out,
    }
    command = [sys.executable, "-m", "stages.align"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "LVLMVA_STORE": str(store)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def _outputs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_and_started_again_the_stage_writes_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    whole = _start(inputs, tmp_path / "whole", tmp_path / "store of the whole run")
    assert whole.communicate()[1] == ""
    assert whole.returncode == 0

    store = tmp_path / "store"
    killed = _start(inputs, tmp_path / "killed", store)
    while killed.poll() is None and not list(store.glob("resume/??/*.pt")):
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not _outputs(tmp_path / "killed")

    again = _start(inputs, tmp_path / "killed", store)
    assert "goes on from the checkpoint" in again.communicate()[1]
    assert again.returncode == 0
    expected = _outputs(tmp_path / "whole")
    assert set(expected) == {
        "models/rrr_gt/seed=0.safetensors",
        "models/rrr_gt/seed=1.safetensors",
        "rrr_gt.json",
        "rrr_gt.csv",
    }
    assert _outputs(tmp_path / "killed") == expected
    assert not list(store.glob("resume/??/*.pt"))
    assert not list((tmp_path / "store of the whole run").glob("resume/??/*.pt"))

    metrics = read_json(tmp_path / "whole/rrr_gt.json")["rrr_gt"]
    assert metrics["rrr_lambda"]["inputs_0_to_255"] == metrics["rrr_lambda"]["inputs_0_to_1"] * 65025
    candidates = metrics["selection"]["candidates"]
    best = max(candidates, key=lambda name: candidates[name]["score"]["mean"])
    assert best == f"lambda={metrics['rrr_lambda']['inputs_0_to_1']:g}"
