"""What a stage or a command imports where it has nothing to compute, and that its keys are the same either way."""

import functools
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import nn

from lvlmva.pipeline import paths
from lvlmva_core.arrays import read_attrs, write_arrays, write_table
from lvlmva_core.attribution_maps import rows_of_alignment_set
from lvlmva_core.attribution_methods.gradient import Gradient
from lvlmva_core.checkpoints import read_weights_digest
from lvlmva_core.compute import set_up_compute
from lvlmva_core.models import ModelSpec, build_model, load_checkpoint, save_checkpoint, weights_digest
from lvlmva_core.samples import read_samples, to_unit_range
from lvlmva_core.splits import read_sample_rows
from lvlmva_core.store import digest
from stages.attribute import attribute
from stages.segment import segment

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SPEC = ModelSpec("mlp", 2, 5, 5, 3, 16)
MODELS = [
    SPEC,
    replace(SPEC, mean=(0.1, 0.2), std=(1.0, 0.5)),  # behind a normalisation of its own
    replace(SPEC, head="appended"),
    ModelSpec("mlp", 1, 4, 4, 2, 3, head="split", logits=1),
    ModelSpec("small_resnet", 3, 16, 16, 2, 4),
    ModelSpec("efficientnet_lite0", 1, 32, 32, 2, 0),
    ModelSpec("shufflenet_v2_x0_5", 3, 32, 32, 2, 0),
    ModelSpec("torchvision:mobilenet_v3_small", 1, 32, 32, 2, 0, mean=(0.5,), std=(0.25,), net_channels=1),
    ModelSpec("timm:test_vit", 3, 160, 160, 2, 0),
]


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: f"{spec.name}-{spec.head}")
def test_the_digest_of_weights_is_the_same_without_torch(tmp_path: Path, spec: ModelSpec) -> None:
    """The oracle is the digest of the model that is built from the file, as stores have it."""
    if spec.name.startswith("timm:"):
        pytest.importorskip("timm")
    file = tmp_path / "m.safetensors"
    model = build_model(spec, seed=1)
    with torch.no_grad():  # subnormal and negative zero: flushed, they would be other bytes
        next(model.parameters()).view(-1)[:3] = torch.tensor([1e-42, -1e-42, -0.0])
    save_checkpoint(file, spec, model)
    set_up_compute("cpu", torch.get_num_threads())
    loaded = load_checkpoint(file, CPU)
    assert read_weights_digest(file) == (spec, weights_digest(loaded[0])) == (loaded[1], weights_digest(model))


class Kinds(nn.Module):
    """A buffer of each type that a model keeps as it is, scalars, empty ones, and one that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 4).T)  # not contiguous
        for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
            name = str(kind).removeprefix("torch.")
            self.register_buffer(name, (torch.arange(-3, 3) % 5).to(kind))
            self.register_buffer(f"{name}.scalar".replace(".", "_"), torch.tensor(1).to(kind))
        self.register_buffer("nothing", torch.zeros(0, 2))
        self.register_buffer("not_kept", torch.rand(2), persistent=False)


def test_every_type_that_models_hold_and_none_that_they_do_not(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    model = Kinds()
    save_checkpoint(file, SPEC, model)
    assert read_weights_digest(file)[1] == weights_digest(model)
    about = {"lvlmva": json.dumps({"format": 1, "spec": SPEC.facts()})}
    for kind in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.uint16):
        save_file({"weight": torch.zeros(2).to(kind)}, str(file), metadata=about)
        assert read_weights_digest(file) == (SPEC, None)  # as float32 in the model: only it tells


def test_a_model_by_the_users_own_code_is_asked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code may share a tensor under two names, or change what is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "startup_own:build"
    Path("startup_own.py").write_text(
        "from torch import nn\n"
        "class Tied(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.flatten = nn.Flatten()\n"
        "        self.first = nn.Linear(50, 50)\n"
        "        self.second = nn.Linear(50, 50)\n"
        "        self.second.weight = self.first.weight\n"
        "        self.head = nn.Linear(50, 3)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.second(self.first(self.flatten(x)).relu()).relu())\n"
        "def build():\n"
        "    return Tied()\n"
    )
    spec, file = replace(SPEC, name=name), tmp_path / "base.safetensors"
    model = build_model(spec, 0, name)
    save_checkpoint(file, spec, model)
    assert weights_digest(load_checkpoint(file, CPU, name)[0]) == weights_digest(model)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors["first.weight"] += 1  # the file holds two, the model keeps the one that is loaded last
    save_file(tensors, str(file), metadata={"lvlmva": json.dumps({"format": 1, "spec": spec.facts()})})
    assert read_weights_digest(file) == (spec, None)
    _write_data(tmp_path, np.random.default_rng(0), 5, 2)
    found = _rows(tmp_path, base=file, own_model=name)
    assert found.rows.keys() == _keys_by_torch(tmp_path, load_checkpoint(file, CPU, name), found.baseline_ids)


@pytest.mark.parametrize(("side", "channels"), [(5, 2), (16, 1), (16, 3)])  # 16 x 16 holds each value of a byte
@pytest.mark.parametrize("mean", [None, 0.5])
def test_keys_of_maps_are_the_same_without_torch(tmp_path: Path, side: int, channels: int, mean: float | None) -> None:
    spec = ModelSpec("mlp", channels, side, side, 3, 8)
    if mean is not None:
        spec = replace(spec, mean=(mean,) * channels, std=(0.3,) * channels)
    save_checkpoint(tmp_path / "base.safetensors", spec, build_model(spec, 0))
    _write_data(tmp_path, np.random.default_rng(1), side, channels)
    found = _rows(tmp_path, base=tmp_path / "base.safetensors", own_model=None)
    set_up_compute("cpu", torch.get_num_threads())
    of_torch = _keys_by_torch(tmp_path, load_checkpoint(tmp_path / "base.safetensors", CPU), found.baseline_ids)
    assert found.rows.keys() == of_torch
    assert len(set(of_torch)) == len(of_torch)


def test_pictures_have_the_same_digest_without_torch() -> None:
    """All values of a byte, divided by torch; and in other shapes."""
    every = np.arange(256, dtype=np.uint8)
    for shape in ((1, 16, 16), (4, 8, 8), (256, 1, 1), (2, 1, 128)):
        pixels = every.reshape(shape)
        by_torch = torch.from_numpy(pixels).to(torch.float32) / 255
        assert digest(to_unit_range(pixels)) == digest(by_torch.numpy()) == digest(by_torch.clone().cpu().numpy())


def _write_data(folder: Path, draws: np.random.Generator, side: int, channels: int) -> None:
    images = draws.integers(0, 256, (12, channels, side, side), dtype=np.uint8)
    images[0].flat = np.arange(images[0].size) % 256
    ids = [f"s{n:02d}" for n in range(12)]
    table = pd.DataFrame({"id": ids, "split": ["train"] * 10 + ["test"] * 2, "label": draws.integers(0, 3, 12)})
    write_arrays(folder / "images.zarr", {"images": images}, {"class_names": ["a", "b", "c"]})
    write_table(folder / "samples.parquet", table.assign(spurious=False, group="0/0", source="", sha256=""))
    write_table(folder / "alignment_set.parquet", pd.DataFrame({"id": ids[:6]}))


def _rows(folder: Path, *, base: Path, own_model: str | None) -> Any:
    named = {name: folder / f"{name}.parquet" for name in ("samples", "alignment_set")}
    return rows_of_alignment_set(
        Gradient(n_baselines=4, batch_size=10),
        images=folder / "images.zarr",
        **named,
        base=base,
        own_model=own_model,
        device=functools.partial(set_up_compute, "cpu", torch.get_num_threads()),
    )


def _keys_by_torch(folder: Path, loaded: tuple[nn.Module, ModelSpec], baseline_ids: list[str]) -> list[str]:
    """Keys as stores have them, by tensors and the model."""
    table = read_samples(folder / "samples.parquet")
    shown, baselines = (
        read_sample_rows(folder / "images.zarr", table, ids, CPU)
        for ids in (pd.read_parquet(folder / "alignment_set.parquet")["id"].tolist(), baseline_ids)
    )
    model, spec = loaded
    common = digest(
        {
            "method": "gradient",
            "version": 1,
            "settings": {},
            "model": spec.facts(),
            "weights": weights_digest(model),
            "baselines": baselines.images.numpy(),
        }
    )
    pairs = zip(shown.images, shown.labels, strict=True)
    return [digest({"common": common, "image": image.numpy(), "target": int(label)}) for image, label in pairs]


RUN = """
import json, runpy, sys
sys.argv = json.loads(sys.argv[1])
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
asked = json.loads(sys.stdin.read())
print("imported", json.dumps([name for name in asked if name in sys.modules]))
"""
SLOW = ["torch", "torchvision", "timm", "captum", "matplotlib", "sklearn", "scipy.stats", "dvc.repo", "openai"]


def imported(folder: Path, arguments: list[str], asked: list[str]) -> tuple[list[str], str]:
    """Which of `asked` a module has imported when it is done, and what it said."""
    environment = {**os.environ, "LVLMVA_STORE": str(folder / "store"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)],
        cwd=folder,
        env=environment,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1].removeprefix("imported ")), done.stderr


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose store holds the maps and segmentations of its alignment set."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    yaml = YAML(pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["compute"] = {"device": "cpu", "threads": 1}
    params["attribute"]["n_baselines"] = 4
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    (folder / "data").mkdir()
    _write_data(folder / "data", np.random.default_rng(2), 8, 2)
    spec = ModelSpec("mlp", 2, 8, 8, 3, 16)
    save_checkpoint(folder / "models" / "base.safetensors", spec, build_model(spec, 0))
    known = {name: folder / path for name, path in paths(ROOT / "dvc.yaml").items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LVLMVA_STORE", str(folder / "store"))
        for stage in (attribute, segment):
            stage(**{name: known[name] for name in inspect.signature(stage).parameters if name in known})
    return folder


@pytest.mark.parametrize(("stage", "output"), [("attribute", "attributions.zarr"), ("segment", "segments.zarr")])
@pytest.mark.parametrize("more", [[], ["--shard", "1/1"]])
def test_a_stage_whose_records_are_kept_needs_no_torch(kept: Path, stage: str, output: str, more: list[str]) -> None:
    before = read_attrs(kept / "data" / output)
    found, said = imported(kept, [f"stages.{stage}", *more], [*SLOW, "scipy", "pandas", "zarr"])
    assert found == ["zarr"]  # it reads arrays
    assert " 0 to compute" in said
    assert read_attrs(kept / "data" / output) == before


def test_what_needs_no_model_starts_without_what_is_slow() -> None:
    names = ("attribute", "segment", "prepare", "settings", "critique", "judge", "mask", "compare")
    modules = ", ".join(["lvlmva.cli", *(f"stages.{name}" for name in names)])
    slow = [*SLOW, "scipy", "zarr", "pandas"]
    script = f"import sys, {modules}; print([name for name in {slow!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
