"""`lvlmva repro`: what `dvc repro` does, with stages that do not wait for each other run side by side.

DVC runs one stage at a time, but lets several of its commands work on one project: each stage is run here by DVC's own
`repro --single-item`, in a process of its own, as soon as the stages that it depends on are there. What is written, and
what counts as changed, is DVC's. Stages find the libraries in memory (`lvlmva.warm`).
"""

import contextlib
import io
import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import typer

from lvlmva.warm import warm
from lvlmva_core.errors import InputError


def repro(
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="stages at a time")] = 2,
) -> None:
    """Run the pipeline as `dvc repro` does, independent stages side by side.

    Worth its while where one stage leaves cores idle: the methods of the default are aligned and evaluated on one
    thread each. On one GPU, or where memory is short, take `--jobs 1` or `dvc repro`.
    """
    with warm():
        _run_all(changed_stages(), jobs)


def _run_all(waiting: dict[str, set[str]], jobs: int) -> None:
    if not waiting:
        typer.echo("Data and pipelines are up to date.")
        return
    # a copy of this process has DVC in memory; where copying is not safe, each imports it anew
    forked = sys.platform == "linux"
    start = multiprocessing.get_context("fork").Process if forked else multiprocessing.get_context("spawn").Process
    running: dict[str, BaseProcess] = {}
    failed: list[str] = []
    while running or (waiting and not failed):
        ready = [stage for stage, needed in waiting.items() if not needed]
        for stage in [] if failed else ready[: jobs - len(running)]:
            del waiting[stage]
            running[stage] = start(target=_run, args=(stage,))
            running[stage].start()
        multiprocessing.connection.wait([process.sentinel for process in running.values()])
        for stage, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[stage]
            if process.exitcode:
                failed.append(stage)
            for needed in waiting.values():
                needed.discard(stage)
    if failed:
        raise InputError(
            f"stage {', '.join(failed)} failed, as said above; mend it and go on: what was done stays done"
        )


def changed_stages() -> dict[str, set[str]]:
    """Stages that `dvc repro` would look at, each with those of them that must run before it; in DVC's order.

    A stage that depends on a changed one is among them: what it finds may be as before, and then DVC leaves it out.

    Raises:
        InputError: the current folder is not in a DVC project, or its dvc.yaml or params.yaml cannot be read.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import get_active_graph

    try:
        with Repo() as repo:
            graph = get_active_graph(repo.index.graph)  # from a stage to those that it depends on
            found = repo.status()
    except DvcException as error:
        raise InputError(f"{Path.cwd()}: {error}") from error
    changed = [stage for stage in graph if stage.addressing in found]
    chosen = set(changed).union(*(networkx.ancestors(graph, stage) for stage in changed))
    return {
        stage.addressing: {other.addressing for other in graph.successors(stage) if other in chosen}
        for stage in networkx.dfs_postorder_nodes(graph)
        if stage in chosen
    }


def _run(stage: str) -> None:
    from dvc.cli import main

    logging.getLogger("dvc.repo.scm_context").setLevel(logging.WARNING)  # how to `git add` dvc.lock, after every stage
    with contextlib.redirect_stdout(io.StringIO()):  # DVC's last line; that a stage runs, and all it says, is not held
        # another stage's DVC may hold the project's lock for a moment: wait, instead of failing after three seconds
        code = main(["--wait-for-lock", "repro", "--single-item", stage])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
