"""A copy of the project in a folder of its own, with params that make its pipeline quick."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.pipeline.warm_process import run_program

ROOT = Path(__file__).parents[2]
QUICK: Mapping[str, Any] = {
    "compute.threads": 1,
    "train.epochs": 4,
    # few, since DVC reads and writes all of dvc.lock for every stage
    "methods": {"lvlm_va": {}, "lambda_zero": {"rrr_lambda": 0.0}, "random_masks": {}},
    "retrained": {"subg": {"epochs": 1}},
    "rank.n_samples": 24,
    "align.epochs": 1,
    "align.seeds": [0],
    "evaluate.attribution_samples": 20,
}


class Project:
    """A clone of the working tree (tracked files, and untracked ones that git does not ignore) with its own history."""

    def __init__(self, folder: Path, params: Mapping[str, Any] = QUICK) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
        ).stdout.decode()
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((ROOT / name).read_bytes())
        self.set_params(params)
        self.run("git", "init", "--quiet", "--initial-branch=main")
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "start")

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with our interpreter first on PATH, an identity for git, and no store but the clone's own."""
        environment = {key: value for key, value in os.environ.items() if key not in ("LVLMVA_STORE", "PYTHONPATH")}
        identity = {
            f"GIT_{who}_{what}": "tester@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        return {**environment, **identity, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}

    def set_params(self, changes: Mapping[str, Any]) -> None:
        """Change keys of params.yaml, given as "section.key"."""
        yaml = YAML(pure=True)
        file = self.folder / "params.yaml"
        content = yaml.load(file.read_text(encoding="utf-8"))
        for key, value in changes.items():
            *path, last = key.split(".")
            section = content
            for part in path:
                section = section[part]
            section[last] = value
        with file.open("w", encoding="utf-8") as out:
            yaml.dump(content, out)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone; its output is in the result, and in the failure where it fails."""
        done = run_program(command, self.folder, self.environment)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def repro(self, *arguments: str) -> list[str]:
        """`dvc repro`; returns the stages that ran, in order."""
        output = self.run("dvc", "repro", *arguments).stdout
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]

    def outputs(self) -> dict[str, str]:
        """md5 of every output in dvc.lock."""
        lock = YAML(typ="safe", pure=True).load((self.folder / "dvc.lock").read_text(encoding="utf-8"))
        return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", [])}
