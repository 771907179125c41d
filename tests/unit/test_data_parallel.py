"""Two processes that train one model together, by gloo on the CPU, against one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

from lvlmva.params import load_params
from lvlmva_core.arrays import read_attrs, read_json, write_arrays, write_table
from lvlmva_core.foreign import initial_spec
from lvlmva_core.models import build_model
from lvlmva_core.samples import read_images, read_samples, rows_of_split
from lvlmva_core.splits import read_split
from lvlmva_core.training import train_classifier
from stages.prepare import prepare
from tests.together import ALIGNMENTS, everything

ROOT = Path(__file__).parents[2]
TRAIN_TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("together")
    subprocess.run(
        [*TRAIN_TOGETHER, "-m", "tests.together", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    assert list(out.glob("store of 0/resume/??/*.pt"))
    assert not (out / "store of 1").exists()  # one keeps the state of both
    return [torch.load(out / f"{number}.pt") for number in (0, 1)]


def test_curves_and_weights_are_those_of_one_process(together: list[dict[str, Any]], one_thread: None) -> None:
    alone, found = everything(), together[0]["found"]
    assert found.keys() == alone.keys() > ALIGNMENTS.keys()
    for name, runs in alone.items():
        assert len(runs) == len(found[name])
        for (curve, weights), (other, others) in zip(runs, found[name], strict=True):
            np.testing.assert_allclose(other, curve, rtol=1e-10, atol=1e-12, err_msg=name)
            assert weights.keys() == others.keys()
            for key, tensor in weights.items():
                torch.testing.assert_close(others[key], tensor, rtol=1e-10, atol=1e-12)


def test_all_processes_end_with_the_same_bits_and_resumed_too(together: list[dict[str, Any]]) -> None:
    expected = together[0]["found"]
    for found in (together[0]["resumed"], together[1]["found"], together[1]["resumed"]):
        for name, runs in expected.items():
            for (curve, weights), (other, others) in zip(runs, found[name], strict=True):
                assert curve == other
                assert all(torch.equal(tensor, others[key]) for key, tensor in weights.items()), name


def test_what_several_processes_cannot_share_is_refused_by_name(together: list[dict[str, Any]]) -> None:
    said = together[1]["refusals"]
    assert "FSDP" in said["sharded"]
    assert "pytorch/issues/172543" in said["sharded"]
    assert "`model.module`" in said["wrapped"]
    assert "a batch of 1 has no sample for each of 2 processes" in said["last batch"]
    assert "runs in one process" in said["objective"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage train reads: 200 pictures and a small residual network, for two processes."""
    folder = tmp_path_factory.mktemp("inputs")
    yaml = YAML(pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["compute"] |= {"threads": 1, "processes": 2}
    params["train"] |= {"model": "small_resnet", "hidden": 4, "epochs": 8, "batch_size": 48}
    yaml.dump(params, folder / "params.yaml")
    prepare(folder / "params.yaml", folder / "all.zarr", folder / "all.parquet", folder / "masks.zarr")
    samples = read_samples(folder / "all.parquet")
    kept = np.concatenate([rows_of_split(samples, "train")[:190], rows_of_split(samples, "val")[:30]])
    kept.sort()
    write_table(folder / "samples.parquet", samples.iloc[kept])
    pixels = read_images(folder / "all.zarr", kept)
    write_arrays(folder / "images.zarr", {"images": pixels}, read_attrs(folder / "all.zarr"))
    return folder


def _train(inputs: Path, out: Path) -> subprocess.Popen[str]:
    options = {
        "params": inputs / "params.yaml",
        "images": inputs / "images.zarr",
        "samples": inputs / "samples.parquet",
        "own": inputs,
        "base": out / "base.safetensors",
        "train-metrics": out / "train.json",
        "train-curve": out / "train.csv",
    }
    command = [sys.executable, "-m", "stages.train"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "LVLMVA_STORE": str(out / "store")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def _children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in listed.read_text().split()]


@pytest.mark.long
def test_a_killed_process_ends_the_stage_which_goes_on_when_repeated(
    inputs: Path, tmp_path: Path, one_thread: None
) -> None:
    if sys.platform != "linux":
        pytest.skip("looks for the processes in /proc")
    killed = _train(inputs, tmp_path)
    while killed.poll() is None and not list((tmp_path / "store").glob("resume/??/*.pt")):
        time.sleep(0.01)
    workers = _children(killed.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    said = killed.communicate(timeout=120)[1]
    assert killed.returncode == 1
    assert said.splitlines()[-1].startswith("error: train: process 1 of 2 was ended by SIGKILL"), said
    assert not (tmp_path / "base.safetensors").exists()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)

    again = _train(inputs, tmp_path)
    assert "goes on from the checkpoint" in again.communicate(timeout=300)[1]
    assert again.returncode == 0
    assert not list((tmp_path / "store").glob("resume/??/*.pt"))

    samples, cpu = read_samples(inputs / "samples.parquet"), torch.device("cpu")
    training, validation = (read_split(inputs / "images.zarr", samples, split, cpu) for split in ("train", "val"))
    config = load_params(inputs / "params.yaml").train
    spec = initial_spec(config.model, training.images.shape[1:], 10, config.hidden)
    model = build_model(spec, config.seed)
    settings = config.model_dump(include={"learning_rate", "weight_decay", "batch_size", "epochs", "seed"})
    curve = train_classifier(model, training, validation, **settings)
    written = pd.read_csv(tmp_path / "train.csv")
    assert len(written) == config.epochs
    np.testing.assert_allclose(written["loss"], curve["loss"], rtol=1e-2)  # float32: Adam enlarges rounding
    assert read_json(tmp_path / "train.json")["train"]["loss"] == written["loss"].iloc[-1]
