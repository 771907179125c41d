"""Tasks on a Ray cluster, or on Ray started on this machine for as long as they run."""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lvlmva.engines import POLL_S, Ended, Execution, Job
from lvlmva_core.errors import InputError

OPTIONS = ("num_cpus", "num_gpus", "memory")  # what a task needs, as Ray counts


def run(jobs: Sequence[Job], execution: Execution) -> Iterator[Ended | None]:
    """See `lvlmva.engines.Engine`."""
    try:
        import ray
    except ImportError as error:
        raise InputError("ray is not installed; run `pip install 'lvlmva[ray]'`") from error
    options = dict(execution.options)
    address = options.pop("address", None)
    for name in options:
        if name not in OPTIONS:
            raise InputError(f"execution.options.{name}: expected address, {', '.join(OPTIONS)}")
    start: dict[str, Any] = {"address": address}
    if address is None:  # Ray's CPUs are tickets here; threads are compute.threads'
        start = {"address": "local", "num_cpus": execution.workers, "include_dashboard": False}
        options.setdefault("num_cpus", 1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **start)
    except Exception as error:  # some of what it raises has no type of its own
        where = "on this machine" if address is None else f"at execution.options.address '{address}'"
        raise InputError(f"Ray cannot be started or reached {where}: {error}") from error
    # a task that is lost is not begun anew by itself: its log would be overwritten
    task = ray.remote(_run).options(max_retries=0, **options)
    waiting = list(jobs)
    running: dict[Any, Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < execution.workers:
                job = waiting.pop(0)
                running[task.remote(job)] = job
            for reference in ray.wait(list(running), timeout=POLL_S)[0]:
                yield _ended(running.pop(reference), reference)
            yield None
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _run(job: Job) -> int:
    return job.run()


def _ended(job: Job, reference: Any) -> Ended:
    import ray

    try:
        return Ended(job, ray.get(reference))
    except ray.exceptions.RayError as error:
        return Ended(job, None, str(error).strip().splitlines()[0][:200])
