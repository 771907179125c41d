"""Tasks as jobs of a Slurm cluster by submitit, one array for all; or on this machine, by its local executor.

What a task needs is in `execution.options`. Its process starts in the folder and with the environment from which the
jobs were sent, as Slurm has it; the folder, the store and the Python must be there on every node.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lvlmva.engines import Ended, Execution, Job, wait
from lvlmva_core.errors import InputError

LONGEST_MIN = 24 * 60  # of a task, unless timeout_min says otherwise; submitit's own would be five minutes


def run(jobs: Sequence[Job], execution: Execution) -> Iterator[Ended | None]:
    """See `lvlmva.engines.Engine`."""
    try:
        import submitit
    except ImportError as error:
        raise InputError("submitit is not installed; run `pip install 'lvlmva[slurm]'`") from error
    options = {"timeout_min": LONGEST_MIN, "name": "lvlmva", **execution.options}
    cluster = options.pop("cluster", "slurm")
    for name in options:
        if name.endswith(("setup", "teardown", "srun_args")):  # shell commands
            raise InputError(f"execution.options.{name}: commands are not taken from params; remove it")
    try:
        executor = submitit.AutoExecutor(jobs[0].log.parent / "submitit" / "%j", cluster=str(cluster))
        if cluster == "slurm":
            options["slurm_array_parallelism"] = execution.workers
        executor.update_parameters(**options)
    except (ValueError, NameError, AssertionError, RuntimeError) as error:
        raise InputError(f"execution.options: submitit says: {error}") from error
    waiting = list(jobs)
    running: list[tuple[Job, Any]] = []
    try:
        while waiting or running:
            # Slurm holds the number of workers itself; all are sent at once
            room = len(waiting) if cluster == "slurm" else execution.workers - len(running)
            if some := waiting[:room]:
                with executor.batch():
                    sent = [executor.submit(job.run) for job in some]
                running += zip(some, sent, strict=True)
                del waiting[: len(some)]
            wait()
            for job, handle in list(running):
                if handle.done():
                    running.remove((job, handle))
                    yield _ended(job, handle)
            yield None
    finally:
        for _, handle in running:
            handle.cancel(check=False)


def _ended(job: Job, handle: Any) -> Ended:
    error = handle.exception()  # of the job, or what became of it
    if error is None:
        return Ended(job, handle.result())
    return Ended(job, None, f"job {handle.job_id}, {handle.state}: {str(error).strip().splitlines()[-1][:200]}")
