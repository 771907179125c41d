"""`lvlmva work`: what a stage would compute or buy, put into the store beforehand by many workers (an extension).

A worker is the stage's own command with `--shard i/n`: it finds the same keys, and writes nothing but records. Then the
stage finds them all, and its output is what it would have been without workers.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from lvlmva.engines import Task, run_tasks
from lvlmva.hydrate import open_store
from lvlmva.kept import RecordsIn, compute_some, found_nowhere, missing
from lvlmva.params import load_params
from lvlmva.pipeline import command_of
from lvlmva.several import JudgeSettings, criticise_all, name_of
from lvlmva.shared import exchange_arrays
from lvlmva_core.leases import LEASE_S, Leases
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.settings import ModelCritic, ModelJudge, Several
from lvlmva_core.progress import track
from lvlmva_core.rows import Rows
from lvlmva_core.settings import Settings
from lvlmva_core.shares import Share, read_share
from lvlmva_core.store import Store

Asked = TypeVar("Asked", bound=Settings)
LEASES = "leases"  # folder of the store: who is at work on what
LOGS = "work"  # folder of the store: what workers of this machine's command said
POLL_S = 0.5  # how often it is looked whether another worker is done


def work(
    stage: Annotated[Literal["attribute", "segment", "critique"], typer.Option(help="whose records")],
    shard: Annotated[str | None, typer.Option(help="i/n: only this part of the samples, in this process")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="all parts, by so many workers [execution.workers]")
    ] = None,
    params: Annotated[Path, typer.Option(help="the params to work for")] = Path("params.yaml"),
) -> None:
    """Put the records that a stage needs into the store, by several workers; `dvc repro` then finds them there.

    Without --shard, workers are started on what `execution` of params.yaml names: processes of this machine, Slurm or
    Ray. With it, this process is one of them: start it wherever the project and its store are seen. Any of them may be
    killed; repeating the command goes on. Each may buy its part of max_calls and max_cost_usd.
    """
    execution = load_params(params).execution
    command = ["python", *command_of(stage)[1:], "--params", str(params)]
    if shard is not None:
        read_share(shard)
        # not a child: whoever ends this process, ends the work
        os.execv(sys.executable, [sys.executable, *command[1:], "--shard", shard])
    if workers is not None:
        execution = execution.model_copy(update={"workers": workers})
    count, store = execution.workers, open_store()
    tasks = [
        Task(
            f"{stage}-{number}-of-{count}",
            (*command, "--shard", f"{number}/{count}"),
            environment={"LVLMVA_STORE": str(store.root)},
        )
        for number in range(1, count + 1)
    ]
    run_tasks(tasks, execution, store.root / LOGS, f"{stage} by {count} workers")
    typer.echo(f"{stage}: {count} workers are done; what they made is in {store.root}; go on with `dvc repro`")


def fill(
    rows: Rows,
    out: Path,
    *,
    records_in: RecordsIn,
    stage: str,
    share: str,
    lease_s: float = LEASE_S,
) -> None:
    """Put the records of a share of the rows into the store, computed here or by whoever is at work on the same.

    Args:
        out, records_in, stage: as for `kept_or_computed`. share: "i/n". lease_s: after so long without a sign of life
            of whoever is at work on some rows, they are taken over.

    Raises:
        InputError: there is no such share.
    """
    mine = read_share(share)
    part = _part(rows, mine.places(len(rows.ids)))
    store, keys = open_store(), part.keys()
    absent = found_nowhere(store, part.kind, keys, out, records_in, stage)
    said = f"{len(keys)} of {len(rows.ids)} samples, {len(keys) - len(absent)} {part.kind} are there"
    sys.stderr.write(f"{stage} {mine}: {said}, {len(absent)} to compute\n")
    computed = 0
    chunks = dict.fromkeys(place // part.chunk for place in absent)
    for number in track(_worked(store, part, keys, list(chunks), lease_s), f"{stage} {mine}", total=len(chunks)):
        computed += number
    exchange_arrays(store, part.kind, [keys[place] for place in absent], stage, must=False)
    sys.stderr.write(f"{stage} {mine}: {computed} computed here, {len(absent) - computed} by others\n")


def _part(rows: Rows, places: range) -> Rows:
    """A run of the samples, as rows of their own."""
    return replace(
        rows,
        ids=rows.ids[places.start : places.stop],
        keys_of=lambda some: rows.keys_of([places[n] for n in some]),
        compute=lambda some: rows.compute([places[n] for n in some]),
    )


def _worked(store: Store, rows: Rows, keys: list[str], chunks: list[int], lease_s: float) -> Iterator[int]:
    """Work off chunks of rows, each under a lease; of each, how many records were computed here."""
    leases, waits = Leases(store.root / LEASES, lease_s), False
    while chunks:
        later = []
        for number in chunks:
            places = range(number * rows.chunk, min((number + 1) * rows.chunk, len(keys)))
            name = f"{rows.kind}-{keys[places[0]]}"
            if not missing(store, rows.kind, keys, places):
                yield 0
                continue
            lease = leases.take(name)
            if lease is None:
                later.append(number)
                continue
            with lease:
                absent = missing(store, rows.kind, keys, places)  # whoever held it before may have done it
                compute_some(store, rows, keys, absent)
            yield len(absent)
        if later == chunks:
            if not waits:
                sys.stderr.write(f"{len(later)} chunks are with others ({leases.holder(name)}); waits for them\n")
            waits = True
            time.sleep(POLL_S)
        chunks = later


def buy(
    critic: Several,
    judge: JudgeSettings,
    cases: Sequence[Case],
    class_names: list[str],
    prompts: Path,
    out: Path,
    *,
    share: str,
) -> None:
    """Buy what critics are asked about a share of the cases, with the share's part of every limit.

    The parts of `max_calls` and `max_cost_usd` of all shares add up to what params say. Where no model is asked there
    is nothing to do: what stand-ins and detectors say is not kept in the store.

    Args:
        critic, judge, class_names, prompts, out: as for `criticise_all`. cases: of all shares. share: "i/n".

    Raises:
        InputError: there is no such share, or as `criticise_all` does.
    """
    mine = read_share(share)
    part = [cases[place] for place in mine.places(len(cases), 1)]
    if not any(isinstance(each, ModelCritic) for each in critic.all_critics()):
        sys.stderr.write(f"critique {mine}: '{name_of(critic)}' is no model; nothing to buy\n")
        return
    sys.stderr.write(f"critique {mine}: {len(part)} of {len(cases)} samples, and 1/{mine.of} of each limit\n")
    criticise_all(_limited(critic, mine), _limited(judge, mine), part, class_names, prompts, out, dry_run=False)


def _limited(config: Asked, share: Share) -> Asked:
    changes: dict[str, object] = {}
    if isinstance(config, ModelCritic | ModelJudge):
        limits = {
            "max_calls": share.of_calls(config.endpoint.max_calls),
            "max_cost_usd": share.of_cost(config.endpoint.max_cost_usd),
        }
        changes["endpoint"] = config.endpoint.model_copy(update=limits)
    if isinstance(config, Several):
        changes["critics"] = [_limited(each, share) for each in config.critics]
    return config.model_copy(update=changes)
