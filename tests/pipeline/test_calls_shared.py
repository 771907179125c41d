"""Calls shared through git and a DVC remote: clones, merges, experiments, segmentations that differ by a pixel."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lvlmva.warm import SOCKET
from tests.pipeline.calls import COUNT, CRITIQUE, JUDGE, ROOT, Server, environment, project, rows
from tests.pipeline.warm_process import address, run_program
from tests.s3 import BUCKET, S3

SEGMENT = (
    "stages.segment --params params.yaml --attributions data/attributions.zarr --images data/images.zarr "
    "--samples data/samples.parquet --segments data/segments.zarr --segment-metrics metrics/segment.json"
)
DATA = ["data/images.zarr", "data/samples.parquet", "data/attributions.zarr", "data/spurious_masks.zarr"]


class Clone:
    """A clone with a call store of its own (where no LVLMVA_STORE is set: beside its DVC cache)."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        identity = {
            f"GIT_{who}_{what}": "tester@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        config = str(folder.parent / "config")
        warm = {SOCKET: address()}  # for the stages that DVC starts
        self.variables = environment(None, PATH=path, XDG_CONFIG_HOME=config, **identity, **warm, **variables)

    def run(self, command: str, code: int = 0) -> str:
        """Run a command; says what it printed."""
        done = run_program(command.split(), self.folder, self.variables, together=True)
        assert done.returncode == code, f"{command}\n{done.stdout}"
        return done.stdout

    def commit(self) -> None:
        """Commit everything that git does not ignore."""
        self.run("git add --all")
        self.run("git commit --quiet --message step")

    def share(self) -> None:
        """Push data to the DVC remote and commits to origin."""
        self.commit()
        self.run("dvc push --quiet")
        self.run("git push --quiet origin HEAD")

    def again(self) -> str:
        """Run critique and judge whatever DVC remembers of them."""
        return self.run("dvc repro --force --no-run-cache")

    @property
    def store(self) -> Path:
        """Where its calls are kept."""
        return self.folder / ".dvc" / "lvlmva-store"

    def answers(self) -> set[str]:
        """Keys of the calls that it has."""
        return {path.stem for path in (self.store / "calls").glob("??/*.json")}


def _pipeline(stages: dict[str, str]) -> dict[str, Any]:
    """dvc.yaml of the stages, given as name -> command."""
    outs = {"segment": "data/segments.zarr", "critique": "data/critiques.jsonl", "judge": "data/verdicts.jsonl"}
    deps = {"segment": DATA, "critique": [*DATA, "data/segments.zarr", "prompts"], "judge": ["data/critiques.jsonl"]}
    return {
        "stages": {
            name: {
                "cmd": f"python -m {command}",
                "deps": deps[name],
                "params": [name],
                "outs": [outs[name]],
                **({"metrics": [f"metrics/{name}.json"]} if name != "critique" else {}),
            }
            for name, command in stages.items()
        }
    }


def _first(tmp_path: Path, server: Server, stages: dict[str, str], **variables: str) -> Clone:
    """The first clone: a project under git and DVC with a folder as the remote and a bare repository as origin."""
    made = tmp_path.parent / f"first-{server.url.rpartition(':')[2]}-{'-'.join(stages)}"
    if not made.exists():  # once; each test takes a copy
        _make_first(made, server, stages)
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    one = Clone(tmp_path / "one", **variables)
    config = one.folder / ".dvc" / "config"  # not relative: `dvc push --all-commits` would miss it
    config.write_text(config.read_text().replace("/REMOTE", str(tmp_path / "remote")))
    one.commit()
    return one


def _make_first(place: Path, server: Server, stages: dict[str, str]) -> None:
    place.mkdir()
    one = Clone(project(place / "one", server, COUNT))
    (one.folder / "prompts").unlink()
    if "segment" in stages:
        shutil.rmtree(one.folder / "data" / "segments.zarr")
    shutil.copytree(ROOT / "prompts" / "decoy_digits", one.folder / "prompts" / "decoy_digits")
    one.run("git init --quiet --initial-branch=main")
    one.run("dvc init --quiet")
    one.run("dvc config core.analytics false")
    (place / "remote").mkdir()
    one.run("dvc remote add --default shared /REMOTE")
    with (one.folder / ".dvc" / ".gitignore").open("a") as ignored:
        ignored.write("/lvlmva-store\n")
    with (one.folder / "dvc.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(_pipeline(stages), file)
    one.run("dvc add --quiet " + " ".join([*DATA, *(["data/segments.zarr"] if "segment" not in stages else [])]))
    one.run("dvc config core.autostage true")
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", place / "origin"], check=True)
    one.run("git remote add origin ../origin")
    one.commit()


def _clone(tmp_path: Path, name: str, **variables: str) -> Clone:
    """A fresh clone of origin with its input data and nothing else."""
    subprocess.run(["git", "clone", "--quiet", tmp_path / "origin", tmp_path / name], check=True)
    clone = Clone(tmp_path / name, **variables)
    tracked = [str(path.relative_to(clone.folder)) for path in (clone.folder / "data").glob("*.dvc")]
    clone.run("dvc pull --quiet " + " ".join(tracked))
    return clone


BOTH = {"critique": CRITIQUE, "judge": JUDGE}


def _describe(clone: Clone, before: str, after: str) -> None:
    """An expert rewords a class in the specification."""
    file = clone.folder / "prompts" / "decoy_digits" / "specification.yaml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_a_fresh_clone_buys_nothing_and_writes_the_same(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    one.run("dvc repro")
    assert len(server.log()) > COUNT
    assert "lvlmva-store" not in one.run("git status --short --untracked-files=all")
    one.share()
    server.set()
    two = _clone(tmp_path, "two")
    said = two.again()
    assert server.log() == []
    assert f"{COUNT} answers taken from data/critiques.jsonl as committed" in said
    assert two.run("git status --short") == ""
    assert two.answers() == one.answers()
    shutil.rmtree(two.store)
    shutil.rmtree(tmp_path / "remote")  # not needed any more: the cache has it
    two.again()
    assert server.log() == []


def test_an_earlier_commit_and_a_dropped_branch_of_a_merge_still_count(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    one.run("dvc repro")
    one.commit()
    one.run("git checkout --quiet -b side")
    _describe(one, "A two is", "The two is")
    one.run("dvc repro")
    one.commit()
    one.run("git checkout --quiet main")
    one.run("git merge --quiet --strategy ours --message dropped side")
    one.run("git branch --quiet -D side")
    one.run("dvc push --quiet --all-commits")
    one.run("git push --quiet origin HEAD")
    server.set()
    two = _clone(tmp_path, "two")
    _describe(two, "A two is", "The two is")
    two.run("dvc repro")
    assert server.log() == []


def test_two_clones_merge_and_pay_nothing_twice(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    one.run("dvc repro")
    one.share()
    two = _clone(tmp_path, "two")
    two.run("dvc pull --quiet")
    server.set()
    _describe(one, "A zero is", "The zero is")
    one.run("dvc repro")
    _describe(two, "A five is", "The five is")
    two.run("dvc repro")
    assert len(server.log()) == 2  # one new critique each; their verdicts were bought before
    one.share()
    two.commit()
    bought = one.answers() | two.answers()
    assert "CONFLICT" in two.run("git pull --quiet --no-rebase --no-edit origin main", code=1)
    assert two.run("git diff --name-only --diff-filter=U").split() == ["dvc.lock"]
    assert "conflict" in two.run("dvc repro", code=255).lower()
    server.set()
    two.run("git checkout --ours dvc.lock")
    two.run("dvc repro")
    assert server.log() == []
    two.share()
    assert two.answers() == bought
    one.run("git pull --quiet origin main")
    one.run("dvc repro")
    assert server.log() == []
    assert one.answers() == bought
    assert one.run("git status --short") == ""
    texts = json.dumps([row["record"]["request"] for row in rows(one.folder, "critiques")])
    assert "The zero is" in texts
    assert "The five is" in texts


def test_what_head_has_stands_where_both_bought_the_same(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    one.run("git push --quiet origin HEAD")
    one.run("dvc push --quiet")
    two = _clone(tmp_path, "two")
    server.set(say="red: yes\nblue: yes\nyellow: no")
    two.run("dvc repro")  # first, so that its answers are the older ones
    server.set(say="I had a second thought.\nred: yes\nblue: no\nyellow: no")
    one.run("dvc repro")
    assert len(server.log()) == COUNT + 1
    expected = (one.folder / "data" / "critiques.jsonl").read_bytes()
    assert (two.folder / "data" / "critiques.jsonl").read_bytes() != expected
    one.share()
    two.run("git fetch --quiet origin")
    two.run("git reset --quiet --hard origin/main")
    server.set()
    two.again()
    assert (two.folder / "data" / "critiques.jsonl").read_bytes() == expected
    assert two.run("git status --short") == ""
    assert server.log() == []


def test_an_unreachable_remote_stops_before_paying_unless_told_otherwise(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    one.run("dvc repro")
    one.share()
    two = _clone(tmp_path, "two")
    (tmp_path / "remote").rename(tmp_path / "elsewhere")
    server.set()
    command = f"python -m {CRITIQUE}"
    said = two.run(command, code=1)
    assert "DVC remote 'shared' cannot be reached" in said
    assert "allow_unhydrated: true" in said
    (tmp_path / "remote").mkdir()  # reachable, but nobody pushed
    said = two.run(command, code=1)
    assert "in neither DVC's cache nor the remote; ask whoever made it for a `dvc push`" in said
    assert server.log() == []
    params = two.folder / "params.yaml"
    params.write_text(params.read_text().replace("allow_unhydrated: false", "allow_unhydrated: true"))
    said = two.run(command)
    assert "what it holds may be computed again" in said
    assert len(server.log()) == COUNT


@pytest.mark.long
def test_experiments_share_the_store(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    one.run("dvc repro")
    one.commit()
    server.set()
    one.run("dvc exp run --temp --set-param critique.endpoint.retries=2 --set-param judge.endpoint.retries=2")
    assert server.log() == []
    one.run("dvc exp run --queue --set-param critique.endpoint.retries=3")
    one.run("dvc exp run --queue --set-param critique.name_spurious_feature=true")
    one.run("dvc queue start")
    _wait_for_queue(one)
    assert len(server.log()) == COUNT  # the changed prompt, once
    server.set()
    params = one.folder / "params.yaml"
    params.write_text(params.read_text().replace("name_spurious_feature: false", "name_spurious_feature: true"))
    one.run("dvc repro --no-run-cache")
    assert server.log() == []


def _wait_for_queue(clone: Clone) -> None:
    while True:
        status = clone.run("dvc queue status")
        if "Failed" in status:
            raise AssertionError(status)
        if status.count("Success") == 2:
            return
        time.sleep(0.5)


def test_an_experiment_in_a_fresh_clone_hydrates_from_the_main_repository(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    one.run("dvc repro")
    one.share()
    two = _clone(tmp_path, "two")
    server.set()
    two.run("dvc exp run --temp --set-param critique.endpoint.retries=2")
    assert server.log() == []
    assert two.answers() == one.answers()


SHIM = """
import numpy as np

from lvlmva_core.segmenters import SEGMENTERS

for segmenter in SEGMENTERS.values():
    def shifted(self, maps, *rest, _inner=segmenter.segment):
        found = _inner(self, maps, *rest)
        segments = found["segments"].copy()
        segments[:, 0, 0] = (segments[:, 0, 0] + 1) % 2
        return {**found, "segments": segments}
    segmenter.segment = shifted
from lvlmva.entry import run
from stages.segment import segment

run(segment)
"""


def test_a_machine_that_would_segment_otherwise_pays_nothing(tmp_path: Path, server: Server) -> None:
    stages = {"segment": SEGMENT, **BOTH}
    one = _first(tmp_path, server, stages)
    one.run("dvc repro")
    one.share()
    # the same stage on a machine where one pixel of each map comes out in another region
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "segment_elsewhere.py").write_text(SHIM)
    path = f"{ROOT}{os.pathsep}{tmp_path / 'shim'}"
    two = _clone(tmp_path, "two", PYTHONPATH=path)
    del two.variables[SOCKET]  # its stages are not those of the others
    server.set()
    elsewhere = SEGMENT.replace("stages.segment", "segment_elsewhere")
    two.run(f"python -m {elsewhere}")
    two.run(f"python -m {CRITIQUE}")
    assert server.log() == []
    # the control: without what is committed it differs, and would pay
    two.variables["LVLMVA_STORE"] = str(tmp_path / "empty")
    two.run("git checkout --quiet --orphan alone")
    two.run("git remote remove origin")
    (two.folder / "dvc.lock").unlink()
    two.run("git add --all")
    two.run("git commit --quiet --message alone")
    two.run("git branch --quiet -D main")
    two.run(f"python -m {elsewhere}")
    two.variables.pop("LVLMVA_STORE")
    two.run(f"python -m {CRITIQUE}")
    assert len(server.log()) == COUNT


def test_the_plan_of_changed_params_is_said_and_nothing_is_sent(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    one.run("dvc repro")
    server.set()
    said = one.run("python -m lvlmva.cli calls plan")
    assert f"critique.endpoint: {COUNT} answers in the store, 0 calls to buy" in said
    said = one.run("python -m lvlmva.cli calls plan -S critique.endpoint.model=larger -S judge.endpoint.retries=0")
    assert f"critique.endpoint: 0 answers in the store, {COUNT} calls to buy from larger" in said
    assert "0 calls to buy" in said.splitlines()[-1]
    assert server.log() == []
    assert one.run("dvc status --quiet") == ""


@pytest.mark.long
def test_a_remote_on_an_object_store_serves_like_a_folder(tmp_path: Path, server: Server, s3: S3) -> None:
    variables = s3.variables()
    del variables["LVLMVA_SHARED_STORE"]
    one = _first(tmp_path, server, BOTH, **variables)
    one.run(f"dvc remote modify shared url s3://{BUCKET}/{tmp_path.name}")
    one.run("dvc repro critique")
    one.share()
    server.set()
    two = _clone(tmp_path, "two", **variables)
    said = two.run(f"python -m {CRITIQUE}")
    assert f"{COUNT} answers taken from data/critiques.jsonl as committed" in said
    assert server.log() == []
    assert two.answers() == one.answers()
