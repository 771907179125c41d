"""Stage attribute: what it writes, what it never computes twice, and when it fails."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

from lvlmva import kept
from lvlmva_core import attribution_maps
from lvlmva_core.arrays import read_array, read_attrs, read_json, write_arrays, write_table
from lvlmva_core.attribution import deep_lift_shap, gradient
from lvlmva_core.attribution_methods import ATTRIBUTION_METHODS
from lvlmva_core.attribution_methods.deep_lift_shap import DeepLiftShap
from lvlmva_core.errors import InputError
from lvlmva_core.models import ModelSpec, build_model, save_checkpoint
from lvlmva_core.samples import to_unit_range
from lvlmva_core.segmentation import fit_weighted_gmm
from lvlmva_core.store import Store
from stages import attribute as stage

SPEC = ModelSpec("mlp", 2, 5, 5, 3, 16)
N_BASELINES = 4


class Workspace:
    """Prepared data, a model and params in a folder; runs the stage there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draws = np.random.default_rng(0)
        self.images = draws.integers(0, 256, (40, 2, 5, 5), dtype=np.uint8)
        self.labels = draws.integers(0, 3, 40)
        self.ids = np.array([f"s{n:02d}" for n in range(40)])
        write_arrays(folder / "images.zarr", {"images": self.images}, {"class_names": ["a", "b", "c"]})
        table = pd.DataFrame({"id": self.ids, "split": ["train"] * 30 + ["test"] * 10, "label": self.labels})
        write_table(folder / "samples.parquet", table.assign(spurious=False, group="0/0", source="", sha256=""))
        self.set_params()
        self.set_model(seed=0)

    def set_params(self, **changes: Any) -> None:
        yaml = YAML(typ="safe", pure=True)
        content = yaml.load((Path(__file__).parents[2] / "params.yaml").read_text(encoding="utf-8"))
        content["compute"] = {"device": "cpu", "threads": torch.get_num_threads()}
        content["attribute"].update({"n_baselines": N_BASELINES, **changes})
        with (self.folder / "params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(content, file)

    def set_model(self, seed: int) -> None:
        self.model = build_model(SPEC, seed).eval()
        save_checkpoint(self.folder / "model.safetensors", SPEC, self.model)

    def run(self, rows: list[int]) -> dict[str, Any]:
        """Explain some samples; returns the metrics."""
        write_table(self.folder / "alignment_set.parquet", pd.DataFrame({"id": self.ids[rows]}))
        stage.attribute(
            params=self.folder / "params.yaml",
            images=self.folder / "images.zarr",
            samples=self.folder / "samples.parquet",
            alignment_set=self.folder / "alignment_set.parquet",
            base=self.folder / "model.safetensors",
            attributions=self.out,
            attribute_metrics=self.folder / "attribute.json",
        )
        return read_json(self.folder / "attribute.json")["attribute"]  # type: ignore[no-any-return]

    @property
    def out(self) -> Path:
        return self.folder / "attributions.zarr"

    def pixels(self, rows: list[int] | np.ndarray) -> torch.Tensor:
        return torch.from_numpy(to_unit_range(self.images[rows]))

    def baselines(self) -> torch.Tensor:
        return self.pixels(np.searchsorted(self.ids, read_attrs(self.out)["baseline_ids"]))


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    return Workspace(tmp_path)


def bytes_of(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_what_is_written(workspace: Workspace) -> None:
    """Maps of the ground-truth logit, channels summed, rows by id, with all that they were made from."""
    rows = [7, 3, 31, 12]
    metrics = workspace.run(rows)
    attrs = read_attrs(workspace.out)
    assert attrs["ids"] == sorted(workspace.ids[rows])
    assert attrs["targets"] == workspace.labels[sorted(rows)].tolist()
    assert attrs["method"] == "deep_lift_shap"
    assert attrs["method_version"] == DeepLiftShap.version
    assert len(set(attrs["keys"])) == 4
    assert len(set(attrs["baseline_ids"])) == N_BASELINES
    assert set(attrs["baseline_ids"]) <= set(workspace.ids[:30])  # the training split
    maps = read_array(workspace.out, "attributions")
    assert maps.shape == (4, 5, 5)
    assert maps.dtype == np.float32
    wanted = deep_lift_shap(
        workspace.model, workspace.pixels(sorted(rows)), workspace.baselines(), torch.tensor(attrs["targets"])
    )
    np.testing.assert_allclose(maps, wanted.sum(1).numpy(), rtol=0, atol=1e-6 * float(wanted.abs().max()))
    errors = read_array(workspace.out, "completeness_error")
    assert errors.dtype == np.float64
    assert metrics == {
        "method": "deep_lift_shap",
        "n_samples": 4,
        "max_completeness_error": float(errors.max()),
        "mean_completeness_error": float(errors.mean()),
        "n_without_positive_attribution": int((maps <= 0).all((1, 2)).sum()),
    }


def test_more_samples_cost_their_own_maps_only(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """From 6 samples to 9: 3 maps; and a sample's map has the same bits in either set."""
    workspace.run(list(range(10, 16)))
    assert "0 attributions are there, 6 to compute" in capsys.readouterr().err
    few = read_array(workspace.out, "attributions")
    workspace.run(list(range(8, 17)))
    assert "6 attributions are there, 3 to compute" in capsys.readouterr().err
    extended = bytes_of(workspace.out)
    np.testing.assert_array_equal(read_array(workspace.out, "attributions")[2:8], few)
    assert len(list(Store(workspace.folder / "store").keys("attributions", "arrays"))) == 9
    workspace.run(list(range(8, 17)))
    assert "9 attributions are there, 0 to compute" in capsys.readouterr().err
    assert bytes_of(workspace.out) == extended


def test_same_bytes_from_an_empty_store(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output does not tell what was in the store."""
    workspace.run([1, 2])
    workspace.run([1, 2, 3])
    first = bytes_of(workspace.out)
    monkeypatch.setenv("LVLMVA_STORE", str(workspace.folder / "other"))
    workspace.run([3, 2, 1])
    assert bytes_of(workspace.out) == first


def test_a_killed_run_goes_on(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunks that were computed are kept."""
    monkeypatch.setattr(attribution_maps, "CHUNK", 2)
    calls, explain = [], DeepLiftShap.explain

    def killed(self: DeepLiftShap, *args: Any) -> Any:
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return explain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DeepLiftShap, "explain", killed)
        with pytest.raises(KeyboardInterrupt):
            workspace.run(list(range(7)))
    assert not workspace.out.exists()
    capsys.readouterr()
    workspace.run(list(range(7)))
    assert "4 attributions are there, 3 to compute" in capsys.readouterr().err


def test_maps_come_back_from_a_committed_output(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an empty store and an earlier output, nothing is computed."""
    workspace.run([4, 5, 6])
    first, committed = bytes_of(workspace.out), workspace.out.rename(workspace.folder / "committed.zarr")
    monkeypatch.setenv("LVLMVA_STORE", str(workspace.folder / "other"))
    monkeypatch.setattr(kept, "committed_versions", lambda out, store: iter([committed]))
    capsys.readouterr()
    workspace.run([4, 5, 6])
    assert "3 attributions are there, 0 to compute" in capsys.readouterr().err
    assert bytes_of(workspace.out) == first


@pytest.mark.parametrize("change", ["weights", "baselines", "image", "target", "method", "architecture"])
def test_whatever_changes_a_map_changes_its_key(workspace: Workspace, change: str) -> None:
    workspace.run([1, 2])
    before = read_attrs(workspace.out)["keys"]
    if change == "weights":
        workspace.set_model(seed=1)
    elif change == "architecture":
        save_checkpoint(workspace.folder / "model.safetensors", replace(SPEC, height=1, width=25), workspace.model)
    elif change == "baselines":
        workspace.set_params(seed=1)
    elif change == "method":
        workspace.set_params(method="gradient")
    elif change == "image":
        write_arrays(workspace.folder / "images.zarr", {"images": 255 - workspace.images}, {})
    else:
        table = pd.read_parquet(workspace.folder / "samples.parquet")
        write_table(workspace.folder / "samples.parquet", table.assign(label=(table["label"] + 1) % 3))
    workspace.run([1, 2])
    assert not set(before) & set(read_attrs(workspace.out)["keys"])


def test_what_does_not_change_a_map_keeps_its_key(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """How many pairs are held at once, tolerances, and settings of other methods."""
    workspace.run([1, 2])
    capsys.readouterr()
    workspace.set_params(batch_size=3, completeness_tolerance=1e-3, integration_steps=7)
    workspace.run([1, 2])
    assert "2 attributions are there, 0 to compute" in capsys.readouterr().err


def test_the_tolerance_is_enforced(workspace: Workspace) -> None:
    """The worst samples are named with their errors, and nothing is written."""
    workspace.set_params(completeness_tolerance=1e-300)
    with pytest.raises(
        InputError, match=r"of 5 maps .*completeness_tolerance 1e-300 .*worst: 's\d\d' \(\d\.\de-\d\d\)"
    ):
        workspace.run([1, 2, 3, 4, 5])
    assert not workspace.out.exists()


def test_more_baselines_than_training_samples(workspace: Workspace) -> None:
    workspace.set_params(n_baselines=31)
    with pytest.raises(InputError, match=r"n_baselines is 31, the training split has 30"):
        workspace.run([1])


@pytest.mark.parametrize("method", sorted(ATTRIBUTION_METHODS))
def test_regions_can_be_cut_from_every_method(workspace: Workspace, method: str) -> None:
    """One interface: maps of the same shape, from which PPEPS-WGM finds regions."""
    workspace.set_params(method=method, integration_steps=16)
    rows = [2, 9]
    assert workspace.run(rows)["method"] == method
    maps = read_array(workspace.out, "attributions")
    found = fit_weighted_gmm(np.maximum(maps, 0), 2)
    assert found.labels.shape == (2, 5, 5)
    pixels, targets = workspace.pixels(rows), torch.from_numpy(workspace.labels[rows])
    slope = gradient(workspace.model, pixels, targets)
    with torch.no_grad():
        expected = workspace.model(workspace.baselines()).mean(0)[targets]
        change = workspace.model(pixels).gather(1, targets[:, None])[:, 0] - expected
    if method == "gradient":
        np.testing.assert_allclose(maps, slope.sum(1).numpy(), atol=1e-7)
    elif method == "gradient_x_input":
        np.testing.assert_allclose(maps, (slope * pixels).sum(1).numpy(), atol=1e-7)
    else:  # both are complete, integrated gradients but for the error of integration
        np.testing.assert_allclose(maps.sum((1, 2)), change.numpy(), atol=0.02 * float(np.abs(maps).sum(0).max()))
