"""docs/adding.md: its code is taken from the page, held to its suite, and used as the pipeline does."""

import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

from lvlmva.params import load_params
from lvlmva_core import controls, corruptions, methods, metrics, penalties
from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import align_ensemble
from lvlmva_core.arrays import read_array, read_json, write_arrays, write_json, write_table
from lvlmva_core.attribution_methods import AttributionMethod
from lvlmva_core.comparison import measure, over_seeds
from lvlmva_core.controls import MASK_SOURCES, Given
from lvlmva_core.datasets import write_dataset
from lvlmva_core.evaluation import Rejected, evaluate_models
from lvlmva_core.exchange_settings import Exchange
from lvlmva_core.lvlm import offline
from lvlmva_core.models import ModelSpec, build_model, save_checkpoint
from lvlmva_core.report.tables import before_and_after
from lvlmva_core.samples import Split, read_samples
from lvlmva_core.segmenters import Segmenter
from stages.retrain import retrain
from tests.unit.conformance import complaints
from tests.unit.test_attribution_stage import Workspace
from tests.unit.test_segmentation_methods import Workplace

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## Adding a")[1:]}
SPEC = ModelSpec("mlp", 1, 8, 8, 2, 6)


def blocks(kind: str, language: str = "python") -> list[str]:
    """The code of a section, e.g. " segmenter"."""
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[kind], flags=re.DOTALL)


def run_page(kind: str, name: str = "example") -> types.ModuleType:
    """A module that holds what the section's code defines."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec("\n".join(blocks(kind)), module.__dict__)
    return module


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What the page enters is taken out again."""
    registries: list[dict[str, Any]] = [
        corruptions.CORRUPTIONS,
        AttributionMethod.kinds,
        Segmenter.kinds,
        penalties.PENALTIES,
        metrics.METRICS,
        offline.CRITICS,
        controls.MASK_SOURCES,
        methods.METHODS,
    ]
    before = [dict(registry) for registry in registries]
    modules = set(sys.modules)
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in set(sys.modules) - modules:
        if name == "example" or name.endswith(".class_balanced"):
            del sys.modules[name]


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_code_of_each_section_passes_its_suite(kind: str) -> None:
    if not blocks(kind):
        pytest.skip("this kind is a change of code, not an entry")
    module = run_page(kind)
    suites = [found for name, found in vars(module).items() if name.startswith("Test")]
    assert len(suites) == (0 if kind in (" control", " baseline") else 1)
    for suite in suites:
        assert complaints(suite) == set()


def split(n: int, seed: int, name: str) -> Split:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"id": [f"{name}-{k:02d}" for k in range(n)], "split": name, "label": np.arange(n) % 2})
    table = table.assign(spurious=np.arange(n) % 4 < 2, source="", sha256="")
    table["group"] = [
        f"{k}/{'spurious' if s else 'plain'}" for k, s in zip(table["label"], table["spurious"], strict=True)
    ]
    images = torch.from_numpy(rng.random((n, 1, 8, 8), dtype=np.float32))
    return Split(images, torch.from_numpy(table["label"].to_numpy(copy=True)), table)


def evaluated() -> tuple[Any, pd.DataFrame]:
    training, test = split(12, 0, "train"), split(16, 1, "test")
    models = {"": build_model(SPEC, 0).eval()}
    masks = torch.zeros(12, 8, 8, dtype=torch.bool)
    masks[:, :2, :2] = True
    rejected = Rejected(training, masks, Exchange(n_donors=2, n_held_out=4))
    outputs = evaluate_models(models, {"test": test}, None, training.images, rejected, batch_size=8, robustness=True)
    return outputs, pd.concat([test.table, training.table]).sort_values("id", ignore_index=True)


def test_a_corruption_is_evaluated() -> None:
    run_page(" corruption")
    outputs, table = evaluated()
    assert outputs.corrupted["pixelate"].shape == (16, 1, 5)
    runs, _ = measure({"base": outputs}, table, None)
    assert 0 <= runs["base"][""]["robustness.pixelate"] <= 1


def test_a_metric_stands_in_the_metrics_and_in_the_table() -> None:
    run_page(" metric")
    outputs, table = evaluated()
    runs, groups = measure({"base": outputs}, table, None)
    of_groups = groups["accuracy"]
    assert runs["base"][""]["test.gap"] == of_groups.max() - of_groups.min()
    columns, rows = before_and_after({"methods": over_seeds(runs)})
    assert rows[0][columns.index("gap")] == f"{of_groups.max() - of_groups.min():.3f}"


def test_an_attribution_method_runs_in_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    run_page("n attribution method")
    workspace = Workspace(tmp_path)
    workspace.set_params(method="smooth_grad", n_draws=2)
    assert workspace.run([3, 5])["method"] == "smooth_grad"
    assert np.isfinite(read_array(workspace.out, "attributions")).all()


def test_a_segmenter_runs_in_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = run_page(" segmenter")
    workplace = Workplace(tmp_path, monkeypatch)
    section = module.Stripes(n_regions=3, height=6)
    assert workplace.run(**section.model_dump())["method"] == "stripes"
    found = read_array(tmp_path / "segments.zarr", "segments")
    assert (found == found[:, :, :1]).all()
    assert len(np.unique(found[0])) == 3


def test_a_critic_is_chosen_in_params_and_named_as_a_stand_in(tmp_path: Path) -> None:
    run_page(" critic")
    chosen = load_params(params_with(tmp_path, critique={"critic": "bright"})).critique
    assert chosen.critic == "bright"
    assert offline.is_stand_in("bright")


def test_a_data_set_is_written_and_read(tmp_path: Path) -> None:
    module = run_page(" data set")
    built = module.Bars(seed=1).prepare()
    write_dataset(built, tmp_path / "images.zarr", tmp_path / "samples.parquet", tmp_path / "masks.zarr")
    assert len(read_samples(tmp_path / "samples.parquet")) == 240
    assert read_array(tmp_path / "images.zarr", "images").shape == (240, 1, 16, 16)


def aligned(settings: AlignSettings, masks: torch.Tensor | None = None) -> Any:
    alignment = split(8, 3, "train")
    given = torch.ones((8, 8, 8), dtype=torch.bool) if masks is None else masks
    model = build_model(SPEC, 0)
    return align_ensemble(model, split(12, 0, "train"), alignment, given, split(6, 2, "val"), settings)[0]


def test_a_penalty_aligns_alone_and_in_a_stack() -> None:
    run_page(" penalty")
    settings = AlignSettings(
        rrr_lambda=5.0,
        learning_rate=1e-2,
        epochs=20,
        alignment_batch=4,
        training_batch=8,
        seeds=[0],
        penalty="own_logit",
    )
    run = aligned(settings)
    assert run.curve["penalty"].iloc[-1] < 0.5 * run.curve["penalty"].iloc[0]
    entered = penalties.PENALTIES["own_logit"]
    penalties.PENALTIES["own_logit"] = penalties.Penalty(entered.measure)  # double backward
    other = aligned(settings)
    np.testing.assert_allclose(other.curve["penalty"], run.curve["penalty"], rtol=1e-3)


def params_with(tmp_path: Path, **sections: Any) -> Path:
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for name, changes in sections.items():
        content[name].update(changes)
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(content, file)
    return tmp_path / "params.yaml"


def test_a_control_inherits_and_makes_its_masks(tmp_path: Path) -> None:
    run_page(" control")
    loaded = load_params(params_with(tmp_path, methods={"mirrored_masks": {}}, align={"rrr_lambda": 7.0}))
    settings = loaded.chosen_methods()["mirrored_masks"]
    assert isinstance(settings, AlignSettings)
    assert settings.rrr_lambda == 7.0
    masks = np.zeros((8, 8, 8), dtype=bool)
    masks[:, :, 0] = True
    given = Given(
        lambda: (["a"] * 8, masks),
        lambda: (_ for _ in ()).throw(AssertionError("the truth is not asked for")),
        lambda ids: np.zeros(len(ids), dtype=np.int64),
    )
    _, made = MASK_SOURCES["mirrored_masks"](given, [0])
    assert made[:, :, -1].all()
    assert made.sum() == masks.sum()
    short = settings.model_copy(update={"epochs": 1, "alignment_batch": 4, "training_batch": 8, "seeds": [0]})
    assert len(aligned(short, torch.from_numpy(made)).curve) == 1
    assert methods.in_order(["mirrored_masks", "base"]) == ["base", "mirrored_masks"]


def test_a_baseline_runs_in_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(" baseline", "lvlmva_core.baselines.class_balanced")
    path = params_with(tmp_path, retrained={"class_balanced": {"epochs": 1}})
    settings = load_params(path).chosen_methods()["class_balanced"]
    write_json(tmp_path / "settings" / "class_balanced.json", settings.model_dump())
    parts = [split(12, 0, "train"), split(8, 2, "val"), split(8, 1, "test")]
    table = pd.concat([part.table for part in parts]).sort_values("id", ignore_index=True)
    write_table(tmp_path / "samples.parquet", table)
    images = np.random.default_rng(0).integers(0, 256, (len(table), 1, 8, 8), dtype=np.uint8)
    write_arrays(tmp_path / "images.zarr", {"images": images}, {"class_names": ["a", "b"]})
    save_checkpoint(tmp_path / "base.safetensors", SPEC, build_model(SPEC, 0))
    retrain(
        path,
        "class_balanced",
        *(
            tmp_path / name
            for name in (
                *("settings", "images.zarr", "samples.parquet", "masks.zarr", "base.safetensors", "models", "out"),
            )
        ),
    )
    assert sorted(file.name for file in (tmp_path / "models" / "class_balanced").iterdir()) == [
        f"seed={seed}.safetensors" for seed in (0, 1, 2)
    ]
    assert read_json(tmp_path / "out" / "class_balanced.json")["class_balanced"]["samples"] == 12


CHECK = """
import sys
sys.path.insert(0, {root!r})
import numpy as np, pandas as pd, torch
from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import align_ensemble
from lvlmva_core.lvlm import offline
from lvlmva_core.models import ModelSpec, build_model
from lvlmva_core.samples import Split
import lvlmva_core
assert lvlmva_core.__file__.startswith({root!r})
rng = np.random.default_rng(0)
data = Split(torch.from_numpy(rng.random((8, 1, 4, 4), dtype=np.float32)), torch.arange(8) % 2, pd.DataFrame())
def weights(**changes):
    settings = AlignSettings(rrr_lambda=1.0, learning_rate=1e-2, epochs=2, alignment_batch=4, training_batch=4,
                             seeds=[0], learning_rate_schedule="linear", **changes)
    masks = torch.ones((8, 4, 4), dtype=torch.bool)
    return align_ensemble(build_model(ModelSpec("mlp", 1, 4, 4, 2, 5), 0), data, data, masks, data, settings)[0].weights
before, same, other = weights(), weights(last_learning_rate=0.0), weights(last_learning_rate=1e-2)
assert all(torch.equal(before[name], same[name]) for name in before)
assert not all(torch.equal(before[name], other[name]) for name in before)
"""


def test_an_alignment_setting_is_obeyed(tmp_path: Path) -> None:
    """The page's change is made in a copy of the library, and decides the weights there."""
    shutil.copytree(ROOT / "lvlmva_core", tmp_path / "lvlmva_core", ignore=shutil.ignore_patterns("__pycache__"))
    (change,) = blocks("n alignment setting", "diff")
    parts = re.split(r"^--- a/(\S+)\n\+\+\+ b/\S+\n@@\n", change, flags=re.MULTILINE)[1:]
    for name, lines in zip(parts[::2], parts[1::2], strict=True):
        old = "".join(line[1:] + "\n" for line in lines.splitlines() if line[0] in " -")
        new = "".join(line[1:] + "\n" for line in lines.splitlines() if line[0] in " +")
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} is not what docs/adding.md changes"
        (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(root=str(tmp_path))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_kind_has_a_section() -> None:
    expected = ["corruption", "attribution method", "segmenter", "critic", "data set", "penalty", "metric", "control"]
    assert sorted(name.strip().removeprefix("n ") for name in SECTIONS) == sorted(
        [*expected, "baseline", "alignment setting"]
    )
