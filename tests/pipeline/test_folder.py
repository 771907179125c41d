"""Pictures that nobody prepared, through the real pipeline as a user would run it, with and without groups."""

import json
import re
from typing import Any

import pandas as pd
import pytest

from tests.pictures import write_excel_csv, write_folder
from tests.pipeline.project import Project

QUICK: dict[str, Any] = {
    "prepare": {
        "dataset": "folder",
        "root": "pictures",
        "table": "pictures/Tabelle.csv",
        "image_size": 32,
        "channels": "grey",
        "seed": 0,
    },
    "train.hidden": 16,
    "train.epochs": 6,
    "rank.n_samples": 16,
    "attribute.n_baselines": 5,
    "align.epochs": 1,
    "align.seeds": [0],
    "align.training_batch": 16,
    "evaluate.robustness": False,
}


pytestmark = pytest.mark.usefixtures("warm_stages")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp("folder"), QUICK)
    rows = write_folder(made.folder / "pictures", 48)
    for name, content in (("leer.png", b""), ("kaputt.jpg", b"\xff\xd8\xff\xe0"), ("notes.png", b"not a picture")):
        (made.folder / "pictures" / name).write_bytes(content)
        rows.append({"filename": name, "label": "böse", "spurious": "0", "patient": name})
    rows.append({"filename": "fehlt.png", "label": "böse", "spurious": "0", "patient": "x"})
    write_excel_csv(made.folder / "pictures/Tabelle.csv", rows, ["filename", "label", "patient"])
    write_excel_csv(made.folder / "pictures/grouped.csv", rows, ["filename", "label", "patient", "spurious"])
    return made


def _error(project: Project) -> str:
    done = project.run("dvc", "repro", check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.long
def test_from_bad_files_to_a_report_without_groups_or_masks(project: Project) -> None:
    line = _error(project)
    for name in ("leer.png: empty file", "kaputt.jpg: not a", "notes.png: not a picture", "fehlt.png: no such file"):
        assert name in line
    assert "4 of 100 files cannot be used" in line
    assert "on_bad_file: leave_out" in line
    project.set_params({"prepare.on_bad_file": "leave_out"})
    assert _error(project).startswith("error: settings: methods.rrr_gt needs true masks")
    project.set_params({"methods": {"lvlm_va": {}, "random_masks": {}}})
    project.set_params({"retrained": {"jtt": {"first_epochs": 1, "up": 3, "epochs": 1}}})
    project.set_params({"align.selection": {"rule": "pseudo_group", "rrr_lambdas": []}, "rank.stratify": True})
    assert "report" in project.repro()
    assert project.repro() == []

    table = pd.read_parquet(project.folder / "data/samples.parquet")
    assert len(table) == 96
    assert table["spurious"].isna().all()
    assert set(table["group"]) == {"gut artig", "böse"}
    per_patient = table.assign(patient=table["id"].str[5:8].astype(int) // 2).groupby("patient")["split"].nunique()
    assert (per_patient == 1).all()
    content = json.loads((project.folder / "metrics/evaluate.json").read_text(), parse_constant=_no_nan)
    assert set(content["left_out"]) == {
        "AGA, WGA and the accuracy of each group",
        "AUROC of the entropy",
        "μ_align",
        "precision and recall of the verdicts",
        "reliance, true",
    }
    assert content["methods"]["lvlm_va"]["test"].keys() == {"accuracy", "reliance"}  # neither needs groups or masks
    assert "entropy" not in content
    assert (project.folder / "metrics/groups.csv").read_text() == "label,spurious,count,accuracy,method,seed\n"
    page = (project.folder / "reports/report.html").read_text()
    for what in content["left_out"]:
        assert what in page
    said = re.sub(r'src="data:[^"]*"', "", page.partition("<body")[2].split("<pre ")[0])
    for absent in ("WGA the worst", "Verdicts against", "training samples with and without the spurious feature"):
        assert absent not in said
    assert not re.search(r"\b(nan|none|null)\b", said.lower())
    assert not (project.folder / "reports/entropy.png").exists()
    shown = project.run("lvlmva", "results").stdout
    assert "left out: μ_align: no true mask of a test picture is known" in shown
    assert "WGA" not in shown.split("left out")[0]
    assert "| Δ accuracy |" in project.run("lvlmva", "results", "--markdown").stdout


@pytest.mark.long
def test_with_groups_and_without_masks(project: Project) -> None:
    project.set_params({"prepare.table": "pictures/grouped.csv", "prepare.on_bad_file": "leave_out"})
    project.set_params({"methods": {"lvlm_va": {}, "lambda_zero": {"rrr_lambda": 0.0}}, "align.selection": None})
    project.set_params({"retrained": {"dfr": DFR, "subg": {"epochs": 1}}})
    assert "report" in project.repro()
    content = json.loads((project.folder / "metrics/evaluate.json").read_text(), parse_constant=_no_nan)
    assert set(content["left_out"]) == {"μ_align", "precision and recall of the verdicts", "reliance, true"}
    assert {"accuracy", "aga", "wga"} <= content["methods"]["dfr"]["test"].keys()
    groups = pd.read_csv(project.folder / "metrics/groups.csv")
    table = pd.read_parquet(project.folder / "data/samples.parquet")
    test = table[table["split"] == "test"]
    counts = groups[groups["method"] == "base"].set_index(["label", "spurious"])["count"]
    assert counts.to_dict() == test.groupby(["label", "spurious"]).size().to_dict()
    assert (project.folder / "reports/entropy.png").exists()


DFR = {"split": "train", "c": 0.1, "n_refits": 1}


def _no_nan(name: str) -> None:
    raise AssertionError(f"{name} in a metrics file")
