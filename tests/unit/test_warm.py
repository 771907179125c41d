"""Stages as copies of a warm process: what a user sees must be what `python -m` shows without one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lvlmva.warm import SOCKET, warm

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")

STAGE = """
import json, os, sys, time
import stages.words
if "wait" in sys.argv:
    print(os.getpid(), flush=True)
    time.sleep(600)
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("WORD"), os.environ.get("LVLMVA_WARM"), stages.words.WORD,
                  "torch" in sys.modules, __name__, sys.stdin.read()]))
sys.stderr.write("a line of errors\\n")
if "fail" in sys.argv:
    raise ValueError("the reason")
if "words" in sys.argv:
    sys.exit("said at the end")
if "killed" in sys.argv:
    os.kill(os.getpid(), 9)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def served() -> Iterator[None]:
    with warm():
        while not Path(os.environ[SOCKET]).exists():  # without it a stage runs by itself
            time.sleep(0.02)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stages = tmp_path / "stages"
    stages.mkdir()
    (stages / "__init__.py").write_text("from lvlmva.warm import hand_over\nhand_over()\n")
    (stages / "say.py").write_text(STAGE)
    (stages / "words.py").write_text("WORD = 'one'\n")
    return tmp_path


def _say(folder: Path, *arguments: str, warm: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if warm or name != SOCKET} | {"WORD": "grün"}
    command = [sys.executable, "-m", "stages.say", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, input="typed", capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("arguments", [["0"], ["3"], ["fail"], ["words"], ["killed"]])
def test_a_copy_says_and_ends_as_the_stage_itself(served: None, folder: Path, arguments: list[str]) -> None:
    copy, itself = _say(folder, *arguments), _say(folder, *arguments, warm=False)
    assert copy.returncode == itself.returncode
    if arguments == ["killed"]:
        return
    said, expected = json.loads(copy.stdout), json.loads(itself.stdout)
    assert said[5] is True  # it is a copy of what has torch
    assert expected[5] is False
    assert said[:5] + said[6:] == expected[:5] + expected[6:]
    assert said[3] is None
    assert copy.stderr.splitlines()[0] == itself.stderr.splitlines()[0] == "a line of errors"
    assert copy.stderr.splitlines()[-1] == itself.stderr.splitlines()[-1]


def test_code_that_was_changed_since_is_what_runs(served: None, folder: Path) -> None:
    assert json.loads(_say(folder, "0").stdout)[4] == "one"
    (folder / "stages" / "words.py").write_text("WORD = 'another'\n")
    assert json.loads(_say(folder, "0").stdout)[4] == "another"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_copy_does_not_outlive_the_command_that_waits_for_it(served: None, folder: Path, sent: int) -> None:
    command = [sys.executable, "-m", "stages.say", "wait"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout
        copy = int(waiting.stdout.readline())
        assert copy != waiting.pid
        waiting.send_signal(sent)
        waiting.wait(timeout=60)
        ends = time.monotonic() + 60
        while Path(f"/proc/{copy}").exists():
            assert time.monotonic() < ends, "the copy lives on"
            time.sleep(0.02)
    assert _say(folder, "0").returncode == 0  # and others are served as before


def test_ctrl_c_ends_a_copy_as_it_ends_a_stage(served: None, folder: Path) -> None:
    command = [sys.executable, "-m", "stages.say", "wait"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout
        copy = int(waiting.stdout.readline())
        waiting.send_signal(signal.SIGINT)  # a terminal sends it to both
        os.kill(copy, signal.SIGINT)
        assert waiting.wait(timeout=60) == 130


def test_another_python_and_a_warm_process_that_is_gone_are_done_without(
    served: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = folder / "python"
    other.symlink_to(sys.executable)
    # by its own path Python takes this link for another installation, without what is installed beside the first
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [str(other), "-m", "stages.say", "0"]
    done = subprocess.run(command, cwd=folder, env=environment, input="", capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)[5] is False, done.stderr
    monkeypatch.setenv(SOCKET, str(folder / "nobody"))
    assert json.loads(_say(folder, "0").stdout)[5] is False
