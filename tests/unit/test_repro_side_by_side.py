import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from lvlmva.repro import changed_stages
from lvlmva.warm import SOCKET
from lvlmva_core.errors import InputError
from tests.pipeline.warm_process import address, run_program

# Each of the two writes its name and waits for the other's: they end only if both run at the same time.
MEET = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:3])
own.write_text("here")
ends = time.monotonic() + 60
while not other.exists():
    if time.monotonic() > ends:
        sys.exit(f"{other} never came")
    time.sleep(0.01)
"""
COPY = """
import pathlib, sys
*sources, target = map(pathlib.Path, sys.argv[1:])
target.write_text("".join(source.read_text() for source in sources))
"""


def _project(folder: Path, stages: Mapping[str, Mapping[str, object]]) -> Path:
    folder.mkdir()
    subprocess.run(["dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True)
    (folder / "meet.py").write_text(MEET)
    (folder / "copy.py").write_text(COPY)
    (folder / "source").write_text("s")
    with (folder / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": stages}, file)
    return folder


def _copies(sources: list[str], target: str) -> dict[str, object]:
    return {"cmd": f"{sys.executable} copy.py {' '.join(sources)} {target}", "deps": sources, "outs": [target]}


def _diamond() -> dict[str, dict[str, object]]:
    return {
        "last": _copies(["left", "right"], "end"),
        "left": _copies(["first"], "left"),
        "right": _copies(["first"], "right"),
        "first": _copies(["source"], "first"),
    }


def _repro(folder: Path, *options: str, command: str = "lvlmva") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", SOCKET: address()}
    return run_program([command, "repro", *options], folder, environment)


def test_stages_that_do_not_depend_on_each_other_run_at_the_same_time(tmp_path: Path) -> None:
    def meets(own: str, other: str) -> dict[str, object]:
        return {"cmd": f"{sys.executable} meet.py {own} {other}", "deps": ["source"], "outs": [own]}

    folder = _project(tmp_path / "p", {"a": meets("one", "two"), "b": meets("two", "one")})
    done = _repro(folder, "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "one").exists()
    assert (folder / "two").exists()


def test_what_is_written_is_what_dvc_writes(tmp_path: Path) -> None:
    ours, theirs = (_project(tmp_path / name, _diamond()) for name in ("ours", "theirs"))
    done = _repro(ours, "--jobs", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert _repro(theirs, command="dvc").returncode == 0
    locks = [YAML(typ="safe").load((folder / "dvc.lock").read_text()) for folder in (ours, theirs)]
    assert locks[0] == locks[1]
    assert (ours / "end").read_text() == "ss"
    assert "up to date" in _repro(ours).stdout
    assert "up to date" in _repro(ours, command="dvc").stdout
    (ours / "right").unlink()  # as `dvc repro`, it comes back from the cache
    assert _repro(ours).returncode == 0
    assert (ours / "right").read_text() == "s"


def test_a_failed_stage_stops_what_needs_it_and_keeps_what_is_done(tmp_path: Path) -> None:
    stages = _diamond()
    stages["right"] = {"cmd": f"{sys.executable} copy.py none right", "deps": ["first"], "outs": ["right"]}
    folder = _project(tmp_path / "p", stages)
    done = _repro(folder, "--jobs", "1")
    assert done.returncode == 1
    assert "stage right failed" in done.stderr
    assert (folder / "first").exists()
    assert not (folder / "end").exists()
    with (folder / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": _diamond()}, file)
    assert "first" not in "".join(line for line in _repro(folder).stdout.splitlines() if line.startswith("Running"))
    assert (folder / "end").read_text() == "ss"


@pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # what DVC calls of pygtrie
def test_only_what_changed_and_what_follows_it_is_looked_at_in_an_order_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _project(tmp_path / "p", _diamond())
    monkeypatch.chdir(folder)
    everything = changed_stages()
    assert everything == {"first": set(), "left": {"first"}, "right": {"first"}, "last": {"left", "right"}}
    assert next(iter(everything)) == "first"
    assert list(everything)[-1] == "last"
    assert _repro(folder, command="dvc").returncode == 0
    assert changed_stages() == {}
    (folder / "left").write_text("other")
    assert changed_stages() == {"left": set(), "last": {"left"}}


def test_a_folder_that_is_no_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="you are not inside of a DVC repository"):
        changed_stages()
