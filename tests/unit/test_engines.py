"""Tasks on each engine: processes, submitit's local executor, and Ray where it is installed (it is not in the lock)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lvlmva import engines
from lvlmva.engines import Execution, Job, Task, processes, run_tasks
from lvlmva_core import progress
from lvlmva_core.errors import InputError
from lvlmva_core.progress import track

SUBMITIT = Execution(backend="submitit", workers=2, options={"cluster": "local"})


# Ray leaves processes of its own to the end of this one
RAY = pytest.param("ray", marks=pytest.mark.filterwarnings("ignore"))


@pytest.fixture(params=["processes", "submitit", RAY])
def execution(request: pytest.FixtureRequest) -> Execution:
    if request.param == "processes":
        return Execution(workers=2)
    if request.param == "submitit":
        pytest.importorskip("submitit")
        return SUBMITIT
    pytest.importorskip("ray", reason="Ray's wheel has 80 MB: not in requirements.lock")
    return Execution(backend="ray", workers=2)


def python(code: str) -> tuple[str, ...]:
    return ("python", "-S", "-c", code)


AT_ONCE = """
import os, pathlib, time
here = pathlib.Path("running"); here.mkdir(exist_ok=True)
mine = here / str(os.getpid()); mine.touch()
time.sleep(0.3)
(pathlib.Path("most") / str(len(list(here.iterdir())))).touch()
mine.unlink()
"""


def test_failures_lose_no_other_task_and_are_named_at_the_end(
    execution: Execution, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVLMVA_STORE", "a store")
    (tmp_path / "most").mkdir()
    codes = {
        "bad": "import sys; print('first'); sys.exit('error: bad: no such thing')",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "store": "import os; print(os.environ['LVLMVA_STORE'], os.environ['OWN'], os.getcwd())",
        **{f"good-{n}": AT_ONCE for n in range(4)},
    }
    tasks = [Task(name, python(code), tmp_path, {"OWN": "mine"}) for name, code in codes.items()]
    logs = tmp_path / "logs"
    with pytest.raises(InputError, match=r"^2 of 7 tasks failed \(bad, killed\); what they said lies in .*repeat the"):
        run_tasks(tasks, execution, logs, "trial")
    said = capfd.readouterr().err
    assert "trial: bad failed, exit code 1: error: bad: no such thing\n" in said
    assert "trial: killed failed, killed by signal 9: no output\n" in said
    assert (logs / "bad.log").read_text().splitlines() == ["first", "error: bad: no such thing"]
    assert (logs / "store.log").read_text() == f"a store mine {tmp_path}\n"
    assert {int(each.name) for each in (tmp_path / "most").iterdir()} <= {1, 2}
    assert not list((tmp_path / "running").iterdir())
    assert [file.name for file in logs.glob("*.progress")] == []
    ended = run_tasks(tasks[3:4], execution, logs, "trial")
    assert [(each.job.task.name, each.code) for each in ended] == [("good-0", 0)]


def test_who_stops_waiting_stops_the_tasks(tmp_path: Path) -> None:
    sleeping = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    jobs = [Job(Task(name, python(sleeping), tmp_path), tmp_path / f"{name}.log") for name in ("a", "b", "c")]
    running = processes.run(jobs, Execution(workers=2))
    assert next(running) is None
    while not all(job.log.exists() and job.log.read_text() for job in jobs[:2]):
        next(running)
    found = [int(job.log.read_text()) for job in jobs[:2]]
    assert isinstance(running, Iterator)
    running.close()  # type: ignore[attr-defined]
    for process in found:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert not jobs[2].log.exists()


def test_tasks_say_how_far_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bar for all: a task that tracks its steps counts by the share of them that is done."""
    monkeypatch.setattr(progress, "TOLD_S", 0.0)
    monkeypatch.setenv(progress.FILE, str(tmp_path / "file"))
    assert progress.share_done(tmp_path / "file") == 0
    seen = [progress.share_done(tmp_path / "file") for _ in track(range(4), "steps")]
    assert seen == [0, 0.25, 0.5, 0.75]
    assert progress.share_done(tmp_path / "file") == 1
    (tmp_path / "file").write_text("")  # just opened by the task
    assert progress.share_done(tmp_path / "file") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Execution(options={"partition": "a"}), "'processes' has none"),
        (Execution(backend="submitit", options={"slurm_setup": "curl a | sh"}), "commands are not taken from params"),
        (Execution(backend="submitit", options={"cluster": "local", "minutes": 1}), "submitit says: "),
        (Execution(backend="submitit", options={"cluster": "cloud"}), "submitit says: "),
        (Execution(backend="ray", options={"runtime_env": "a"}), "expected address, num_cpus"),
    ],
)
def test_wrong_options_are_named(options: Execution, message: str, tmp_path: Path) -> None:
    pytest.importorskip({"processes": "sys"}.get(options.backend, options.backend))
    with pytest.raises(InputError, match=message):
        run_tasks([Task("a", python("pass"))], options, tmp_path, "trial")


def test_a_library_that_is_not_there_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, extra in (("submitit", "slurm"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, backend, None)
        with pytest.raises(InputError, match=rf"{backend} is not installed; run `pip install 'lvlmva\[{extra}\]'`"):
            run_tasks([Task("a", python("pass"))], Execution(backend=backend), tmp_path, "trial")


def test_a_job_is_sent_to_slurm_as_an_array_with_so_many_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With commands of Slurm's names that run what they are sent: what submitit needs of them, and no more."""
    pytest.importorskip("submitit")
    commands = {
        "sbatch": 'cp "$1" "$SLURM_TRIAL/sent"; echo "Submitted batch job 7"\n'
        "for n in 0 1 2; do (export SLURM_JOB_ID=1$n SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$n SLURM_NTASKS=1 "
        "SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0; bash $1); "
        'touch "$SLURM_TRIAL/over"; done >> "$SLURM_TRIAL/said" 2>&1 &',
        "srun": 'while [ "${1#-}" != "$1" ]; do case "$1" in --*=*|--unbuffered) shift;; *) shift 2;; esac; done; "$@"',
        "sacct": 'echo "JobID|State|NodeList"; test -e "$SLURM_TRIAL/over" && state=FAILED || state=RUNNING; '
        'for n in 0 1 2; do echo "7_$n|$state|here"; done',
        "scancel": "",
    }
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_TRIAL", str(tmp_path))
    execution = Execution(backend="submitit", workers=2, options={"slurm_partition": "gpu", "timeout_min": 30})
    tasks = [Task(f"t{n}", python(f"print({n})"), tmp_path) for n in range(3)]
    ended = run_tasks(tasks, execution, tmp_path / "logs", "trial")
    assert [each.job.log.read_text() for each in ended] == ["0\n", "1\n", "2\n"]
    sent = (tmp_path / "sent").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--time=30"):
        assert f"#SBATCH {line}\n" in sent


def test_names_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one name"):
        run_tasks([Task("a", ("true",)), Task("a", ("true",))], Execution(), tmp_path, "trial")


def test_a_task_that_cannot_start_is_one_that_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"1 of 2 tasks failed \(a\)"):
        run_tasks([Task("a", ("no_such_command",)), Task("b", python("pass"))], Execution(), tmp_path, "trial")
    assert "a failed, lost ([Errno 2] No such file or directory: 'no_such_command')" in capfd.readouterr().err


def test_the_command_line_needs_none_of_the_libraries() -> None:
    code = "import lvlmva.cli, sys; print([name for name in ('torch', 'ray', 'submitit') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert engines.POLL_S < 1
