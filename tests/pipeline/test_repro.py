"""The real pipeline through the real DVC: what runs, what does not, and that the bytes are the same.

Stages find the libraries in memory, as with `lvlmva repro`, but for those that are killed.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lvlmva.warm import SOCKET
from tests.pipeline.project import Project

CHAIN = ["prepare", "train", "rank", "attribute", "segment", "critique", "judge", "mask"]
ALIGNED = ["lvlm_va", "lambda_zero", "random_masks"]
RETRAINED = ["subg"]
OTHERS = [f"{stage}@{name}" for stage in ("align", "evaluate") for name in ALIGNED]
OTHERS += [f"{stage}@{name}" for stage in ("retrain", "evaluate_retrained") for name in RETRAINED]
OTHERS += ["exchange", "settings", "explain", "evaluate_base"]

pytestmark = pytest.mark.usefixtures("warm_stages")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, warm_stages: None) -> tuple[Project, list[str]]:
    project = Project(tmp_path_factory.mktemp("project"))
    return project, project.repro()


def test_every_stage_runs_once_and_the_second_time_none(finished: tuple[Project, list[str]]) -> None:
    project, ran = finished
    assert sorted(ran) == sorted([*CHAIN, *OTHERS, "compare", "report"])
    assert [stage for stage in ran if stage in CHAIN] == CHAIN
    assert project.repro() == []


def test_the_stand_in_is_named_wherever_its_verdicts_are_used(finished: tuple[Project, list[str]]) -> None:
    folder = finished[0].folder
    critiques = [json.loads(line) for line in (folder / "data/critiques.jsonl").read_text().splitlines()]
    verdicts = [json.loads(line) for line in (folder / "data/verdicts.jsonl").read_text().splitlines()]
    assert {row["critic"] for row in critiques} == {"rules"}
    assert {(row["critic"], row["judge"]) for row in verdicts} == {("rules", "rules")}
    assert json.loads((folder / "metrics/evaluate.json").read_text())["verdicts"]["critic"] == ["rules"]
    assert json.loads((folder / "metrics/mask.json").read_text())["mask"]["critic"] == ["rules"]
    page = (folder / "reports/report.html").read_text()
    assert "No vision-language model was asked" in page
    assert "rules (a stand-in" in page


def test_figures_metrics_and_plots_come_out(finished: tuple[Project, list[str]]) -> None:
    project, _ = finished
    for name in ("outcome.png", "panel.png", "curves.png"):
        assert (project.folder / "reports" / name).read_bytes().startswith(b"\x89PNG")
    shown = project.run("dvc", "metrics", "show", "--json").stdout
    metrics = json.loads(shown)[""]["data"]["metrics/evaluate.json"]["data"]
    assert set(metrics["methods"]) == {"base", *ALIGNED, *RETRAINED}
    plots = json.loads(project.run("dvc", "plots", "show", "--json").stdout)
    assert {"training", "alignment"} <= set(plots["data"])
    table = project.run("lvlmva", "results").stdout
    assert "LVLM-VA" in table
    assert "stand-in" in table


def test_a_new_lambda_reruns_align_evaluate_and_report_only(
    finished: tuple[Project, list[str]], tmp_path: Path
) -> None:
    project = _copy(finished[0], tmp_path)
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "before")
    project.set_params({"align.rrr_lambda": 2.0})
    ran = project.repro()
    followers = {"lvlm_va", "random_masks"}  # lambda_zero has a λ of its own
    expected = {f"{stage}@{name}" for stage in ("align", "evaluate") for name in followers}
    assert set(ran) == {"settings", "explain", "compare", "report", *expected}
    difference = json.loads(project.run("dvc", "metrics", "diff", "--json").stdout)
    changed = [key for key in difference["metrics/evaluate.json"] if key.startswith("methods.")]
    assert changed
    assert all(key.split(".")[1] in followers for key in changed)


def test_an_expert_changes_a_verdict_and_only_what_follows_reruns(
    finished: tuple[Project, list[str]], tmp_path: Path
) -> None:
    project = _copy(finished[0], tmp_path)
    row = json.loads((project.folder / "data/verdicts.jsonl").read_text().splitlines()[0])
    region, verdict = row["verdicts"][0]["region"], row["verdicts"][0]["verdict"]
    with (project.folder / "overrides/verdicts.csv").open("a") as file:
        file.write(f"{row['sample']},{row['segmentation']},{region},{'yes' if verdict == 'no' else 'no'}\n")
        file.write(f"{row['sample']},{'0' * 64},0,no\n")
    done = project.run("dvc", "repro", "mask")
    assert f"stale override: overrides: region 0 of '{row['sample']}' by verdicts: it is of another" in done.stderr
    summary = json.loads((project.folder / "metrics/mask.json").read_text())["mask"]
    assert (summary["verdicts_overridden"], summary["stale_overrides"]) == (1, 1)


def test_killed_at_any_moment_and_repeated_the_bytes_are_the_same(
    finished: tuple[Project, list[str]], tmp_path: Path
) -> None:
    project = Project(tmp_path / "killed")
    cold = {name: value for name, value in project.environment.items() if name != SOCKET}  # dvc's stages die with it
    lock = project.folder / "dvc.lock"
    for n_stages in (2, 6):
        process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=project.folder,
            env=cold,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not lock.exists() or lock.read_text(encoding="utf-8").count("    cmd: ") < n_stages:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1.5)  # in the middle of a stage, of DVC's own work, or of nothing
        os.killpg(process.pid, signal.SIGKILL)  # dvc and the stage that it runs
        process.wait()
    done = project.run("dvc", "repro", check=False)
    if done.returncode:  # DVC does not write it in one piece; the store and DVC's cache have what was done
        assert "dvc.lock' " in done.stderr
        lock.unlink()
        project.repro()
    assert project.outputs() == finished[0].outputs()


@pytest.mark.parametrize(
    ("changes", "stage", "message"),
    [
        ({"rank.n_samples": 5000}, "rank", "rank.n_samples = 5000 is larger than the training set (1000 samples)"),
        ({"segment.n_regions": 40}, "segment", "'segment.n_regions' = 40"),
        ({"prepare.dataset": "decoy_mnist"}, "prepare", "prepare.root is null"),
        ({"compute.device": "tpu"}, "train", "'compute.device' = 'tpu'"),
    ],
)
def test_a_users_mistake_is_one_line_and_destroys_nothing(
    finished: tuple[Project, list[str]], tmp_path: Path, changes: dict[str, object], stage: str, message: str
) -> None:
    project = _copy(finished[0], tmp_path)
    before = project.outputs()
    project.set_params(changes)
    done = project.run("dvc", "repro", stage, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert project.outputs() == before


def test_damaged_files_are_named(finished: tuple[Project, list[str]], tmp_path: Path) -> None:
    project = _copy(finished[0], tmp_path)
    checkpoint = project.folder / "models/base.safetensors"
    content = checkpoint.read_bytes()
    checkpoint.unlink()  # a link into DVC's cache, perhaps
    checkpoint.write_bytes(b"damaged")
    command = (
        "python -m stages.rank --entropies entropies.parquet --alignment-set rank.parquet --rank-metrics rank.json"
    )
    done = project.run(*command.split(), check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: rank: models/base.safetensors: damaged checkpoint")
    checkpoint.write_bytes(content)
    shutil.rmtree(project.folder / "data/images.zarr/images")
    done = project.run(*command.split(), check=False)
    assert "Traceback" not in done.stderr
    assert "data/images.zarr: no zarr group with an array 'images' there" in done.stderr


def _copy(project: Project, folder: Path) -> Project:
    copy = Project.__new__(Project)
    copy.folder = folder / "copy"
    shutil.copytree(project.folder, copy.folder, symlinks=True)
    return copy
