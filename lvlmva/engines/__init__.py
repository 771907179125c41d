"""Many commands, some at a time, on what `execution.backend` names: a module of this package each.

What a task makes lies in files, in the store or in outputs; an engine only starts commands and says how they ended.
"""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.redact import printable
from lvlmva_core.progress import FILE, bar, share_done
from lvlmva_core.settings import Count, Settings

POLL_S = 0.2  # how often an engine looks
CARRIED = ("LVLMVA_STORE", "LVLMVA_OFFLINE", "LVLMVA_ALLOW_HOSTS")  # of the environment: nothing that is secret
NAMED_AT_MOST = 5  # failed tasks in a message

Option = str | int | float | bool


class Execution(Settings):
    """Where workers and the many runs of a study run. No stage depends on it.

    workers: tasks at a time. options: of submitit, what its AutoExecutor takes (timeout_min, cpus_per_task, mem_gb,
    gpus_per_node, slurm_partition, ...), and `cluster: local` for this machine; of ray, `address` of a cluster, and
    what a task needs (num_cpus, num_gpus, memory).
    """

    backend: Literal["processes", "submitit", "ray"] = "processes"
    workers: Count = 1
    options: dict[str, Option] = Field(default_factory=dict)


class TasksFailedError(InputError):
    """Some tasks failed; the others were run to their end."""


@dataclass(frozen=True)
class Task:
    """A command to run.

    name: what messages and the files of its log are called: letters, digits and "._=-". command: its words; "python"
    as the first stands for the interpreter of whoever runs it. folder: where it runs. environment: what is set beside
    what the worker has; no secrets, since engines write it into files.
    """

    name: str
    command: tuple[str, ...]
    folder: Path = field(default_factory=Path.cwd)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A task with the file that its output goes to, stdout and stderr together; made anew."""

    task: Task
    log: Path

    @property
    def progress(self) -> Path:
        """The file in which it says how far it is."""
        return self.log.with_suffix(".progress")

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the command where this is called."""
        first, *rest = self.task.command
        words = [sys.executable if first == "python" else first, *rest]
        environment = {**os.environ, **self.task.environment, FILE: str(self.progress)}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                words,
                cwd=self.task.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def run(self) -> int:
        """Run the command to its end; its exit code, or minus the signal that killed it."""
        with self.start() as process:
            try:
                return process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()


@dataclass(frozen=True)
class Ended:
    """How a task ended. code: its exit code, minus the signal that killed it, or None where the engine lost it.

    reason: what the engine says of a task that it lost.
    """

    job: Job
    code: int | None
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it did what it was to do."""
        return self.code == 0

    def why(self) -> str:
        """Why it failed, in a line: the last line of its output that says something."""
        lines = [line for line in _tail(self.job.log) if line.strip()]
        last = next((line for line in reversed(lines) if "error: " in line), lines[-1] if lines else "no output")
        how = f"exit code {self.code}"
        if self.code is None:
            how = f"lost ({self.reason})"
        elif self.code < 0:
            how = f"killed by signal {-self.code}"
        return printable(f"{how}: {last.strip()[:300]}")


class Engine(Protocol):
    """A module of this package."""

    def run(self, jobs: Sequence[Job], execution: Execution) -> Iterator[Ended | None]:
        """Run the jobs, at most `execution.workers` at a time: yield each that ended, and None every POLL_S or so.

        Who closes the iterator stops what runs.

        Raises:
            InputError: its library is not installed, or what `execution.options` say is wrong.
        """


def run_tasks(tasks: Sequence[Task], execution: Execution, logs: Path, description: str) -> list[Ended]:
    """Run all tasks, however many of them fail, with one bar (or lines) for all; failures are said as they come.

    Args:
        tasks: each with a name of its own. logs: folder for a `<name>.log` each, which every worker must see.
        description: of the bar.

    Returns:
        How each ended, in the order of `tasks`; all well.

    Raises:
        TasksFailedError: some failed; names them, and where their output lies. What the others did is done.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError("two tasks have one name")
    if not tasks:
        return []
    engine: Engine = importlib.import_module(f"{__name__}.{execution.backend}")
    logs.mkdir(parents=True, exist_ok=True)
    carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
    jobs = []
    for task in tasks:
        whole = Task(task.name, task.command, task.folder.resolve(), {**carried, **task.environment})
        jobs.append(Job(whole, logs.resolve() / f"{task.name}.log"))
        jobs[-1].progress.unlink(missing_ok=True)
        jobs[-1].log.unlink(missing_ok=True)
    ended: dict[str, Ended] = {}
    running = engine.run(jobs, execution)
    with bar(description, len(jobs)) as show:
        try:
            for each in running:
                if each is not None:
                    ended[each.job.task.name] = each
                    if not each.ok:
                        sys.stderr.write(f"{description}: {each.job.task.name} failed, {each.why()}\n")
                going = (share_done(job.progress) for job in jobs if job.task.name not in ended)
                show(len(ended) + sum(going))
        finally:
            running.close()  # type: ignore[attr-defined]
    for job in jobs:
        job.progress.unlink(missing_ok=True)
    failed = [task.name for task in tasks if not ended[task.name].ok]
    if failed:
        named = ", ".join(failed[:NAMED_AT_MOST]) + (", ..." if len(failed) > NAMED_AT_MOST else "")
        raise TasksFailedError(
            f"{len(failed)} of {len(tasks)} tasks failed ({named}); what they said lies in {logs}; mend it and repeat "
            "the command: what was done stays done"
        )
    return [ended[task.name] for task in tasks]


def wait() -> None:
    """What an engine does between two looks."""
    time.sleep(POLL_S)


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            return file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
