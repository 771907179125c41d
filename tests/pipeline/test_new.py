"""A folder that nobody prepared and a network trained elsewhere: new, check, repro, explain, export, gate."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from tests.pictures import CLASSES, scene, write_excel_csv, write_folder
from tests.pipeline.project import Project

PER_CLASS = 36
NETWORK = """from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 2)
    )
"""
QUICK = {
    "prepare.channels": "grey",
    "attribute.n_baselines": 5,
    "segment.n_starts": 4,
    "segment.n_regions": 3,
    "rank.n_samples": 16,
    "exchange.n_donors": 2,
    "exchange.n_held_out": 20,
    "align.epochs": 1,
    "align.seeds": [0],
    "align.selection": None,
    "align.alignment_batch": 8,
    "methods": {"lvlm_va": {}},
}


pytestmark = pytest.mark.usefixtures("warm_stages")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp("new"), {})
    pictures = made.folder / "pictures"
    rows = write_folder(pictures, PER_CLASS)
    (pictures / "kaputt.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    rows.append({"filename": "kaputt.jpg", "label": CLASSES[0], "spurious": "0", "patient": "P999"})
    named = [{"Bild": row["filename"], "Befund": row["label"], "patient": row["patient"]} for row in rows]
    write_excel_csv(pictures / "Tabelle.csv", named, ["Bild", "Befund", "patient"])
    (made.folder / "own/tiny.py").write_text(NETWORK, encoding="utf-8")
    _train_elsewhere(made.folder / "own/tiny.pth")
    return made


def _train_elsewhere(path: Path) -> None:
    """A network that knows the scenes, trained without any code of the project; its state dict in a file."""
    names: dict[str, object] = {}
    exec(NETWORK, names)
    pictures, labels = [], []
    for place in range(PER_CLASS):
        for label in range(2):
            image = scene(label, place).convert("L")
            width, height = image.size
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.LANCZOS)
            pictures.append(np.asarray(square, dtype=np.float32) / 255)
            labels.append(label)
    images, truth = torch.from_numpy(np.stack(pictures))[:, None], torch.tensor(labels)
    torch.manual_seed(0)
    network = names["build"]()  # type: ignore[operator]
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(images), truth).backward()
        optimiser.step()
    assert float((network(images).argmax(1) == truth).double().mean()) > 0.9
    torch.save(network.state_dict(), path)


@pytest.mark.timeout(1800)  # thirty commands, each a process
def test_from_a_folder_to_a_gate(project: Project) -> None:
    asked = project.run("lvlmva", "new", "scans", "--images", "pictures", check=False)
    assert asked.returncode == 1
    assert asked.stderr.startswith("error: there is no terminal to ask on: give --table, --size, --model, --checkpoint")
    options = ["--table", "Tabelle.csv", "--size", "32", "--model", "own.tiny:build", "--checkpoint", "own/tiny.pth"]
    command = ["lvlmva", "new", "scans", "--images", "pictures", *options, "--classes", ",".join(CLASSES), "--yes"]
    before = (project.folder / "params.yaml").read_bytes()
    wrong = project.run(*command[:-2], "gut,böse", "--yes", check=False)
    assert "--classes gut,böse: the table has böse, gut artig" in wrong.stderr
    assert (project.folder / "params.yaml").read_bytes() == before
    assert not (project.folder / "presets/scans.yaml").exists()
    made = project.run(*command).stdout
    assert '+  dataset: "folder"' in made
    assert "normalisation none is a guess" in made
    columns = YAML(typ="safe").load((project.folder / "presets/scans.yaml").read_text("utf-8"))["prepare"]["columns"]
    assert columns == {"file": "Bild", "label": "Befund"}
    assert [each.name for each in (project.folder / "prompts/scans").iterdir()] == ["specification.yaml"]
    again = project.run(*command, check=False)
    assert "presets/scans.yaml exists; choose another name, or write over it with --force" in again.stderr

    project.set_params(QUICK)
    first = project.run("lvlmva", "check", check=False)
    assert first.returncode == 1
    assert "1 of 73 files cannot be used" in first.stdout
    assert "kaputt.jpg: not a" in first.stdout
    assert "'picture': nothing is said here; write a description" in first.stdout

    project.set_params({"prepare.on_bad_file": "leave_out"})
    said = "picture: drawings\nclasses:\n  gut artig: a disc in the middle\n  böse: a cross in the middle\n"
    (project.folder / "prompts/scans/specification.yaml").write_text(said + "spurious_features: []\n", encoding="utf-8")
    done = project.run("lvlmva", "check", "--json", check=False)
    found = json.loads(done.stdout)
    assert found["passed"], [row for row in found["checks"] if row["status"] == "fail"]
    assert done.returncode == 0
    names = {row["name"] for row in found["checks"]}
    assert {"pictures", "splits", "model", "layers", "accuracy", "reading", "attribution", "prompts", "disk"} <= names
    assert {row["name"] for row in found["checks"] if row["status"] == "warn"} >= {"critic", "remote"}
    stages = {each["stage"]: each for each in found["estimates"]}
    assert {"prepare", "attribute", "segment", "exchange", "align", "evaluate"} <= stages.keys()
    assert stages["align"]["how"].startswith("1 runs, 3 steps")
    assert not (project.folder / "data/images.zarr").exists()

    early = project.run("lvlmva", "explain", "anything", check=False)
    assert "data/samples.parquet: not made yet; run `dvc repro prepare`" in early.stderr
    assert "report" in project.repro()
    table = pd.read_parquet(project.folder / "data/samples.parquet")
    assert len(table) == 2 * PER_CLASS
    sample = sorted(pd.read_parquet(project.folder / "data/alignment_set.parquet")["id"])[0]
    shown = json.loads(project.run("lvlmva", "explain", sample, "--json").stdout)
    assert shown["critic"] == "rules"
    assert sum(each["area"] for each in shown["regions"]) <= 1
    assert sum(each["attribution"] for each in shown["regions"]) <= 1 + 1e-6
    with Image.open(project.folder / shown["picture"]) as picture:
        assert picture.size[0] > 1000

    _reject_first_regions(project)
    assert "mask" in project.repro()
    project.run("lvlmva", "export", "--out", "export", "--format", "safetensors")
    assert "rules" in (project.folder / "export/README.md").read_text(encoding="utf-8")
    gate = ["lvlmva", "gate", "--model", "export/model.safetensors", "--reliance-at-most"]
    models = {row["model"]: row for row in json.loads(project.run(*gate, "1000", "--json").stdout)["models"]}
    exported, aligned = models["export/model.safetensors"], models["aligned (seed=0)"]
    assert {**exported, "model": ""} == {**aligned, "model": ""}  # it is the same network
    relies = exported["reliance"] > 0
    strict = project.run(*gate, str(exported["reliance"] / 2 if relies else 0), check=False)
    assert strict.returncode == (1 if relies else 0), strict.stderr
    assert ("FAILED: more than" if relies else "passed: at most 0") in strict.stdout


def _reject_first_regions(project: Project) -> None:
    """An expert rejects a region of each sample: the stand-in, which knows digits alone, may reject none."""
    rows = [json.loads(line) for line in (project.folder / "data/verdicts.jsonl").read_text("utf-8").splitlines()]
    with (project.folder / "overrides/verdicts.csv").open("a", encoding="utf-8") as file:
        for row in rows:
            for verdict in row["verdicts"][:1]:
                file.write(f"{row['sample']},{row['segmentation']},{verdict['region']},no\n")


def test_a_folder_without_templates_takes_the_shared_ones(project: Project) -> None:
    """DVC must see a change of the shared template: the digest that stage settings writes covers it."""
    from lvlmva_core.lvlm.prompts import CRITIC_FILES, prompts_digest

    prompts = project.folder / "prompts"
    before = prompts_digest(prompts / "scans", *CRITIC_FILES)
    other = prompts_digest(prompts / "skin", *CRITIC_FILES)
    with (prompts / "generic/critic.j2").open("a", encoding="utf-8") as file:
        file.write("\nOne more line.\n")
    assert prompts_digest(prompts / "scans", *CRITIC_FILES) != before
    assert prompts_digest(prompts / "skin", *CRITIC_FILES) == other
