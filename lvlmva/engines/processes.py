"""Tasks as processes on this machine."""

import subprocess
from collections.abc import Iterator, Sequence

from lvlmva.engines import Ended, Execution, Job, wait
from lvlmva_core.errors import InputError

PATIENCE_S = 10.0  # that a process is given to end before it is killed


def run(jobs: Sequence[Job], execution: Execution) -> Iterator[Ended | None]:
    """See `lvlmva.engines.Engine`."""
    if execution.options:
        raise InputError("execution.options: the backend 'processes' has none; remove them")
    waiting = list(jobs)
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < execution.workers:
                job = waiting.pop(0)
                try:
                    running.append((job, job.start()))
                except OSError as error:  # no such command, or no room for a process
                    yield Ended(job, None, str(error))
            wait()
            for job, process in list(running):
                if process.poll() is not None:
                    running.remove((job, process))
                    yield Ended(job, process.returncode)
            yield None
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
