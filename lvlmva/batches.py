"""The commands of `lvlmva calls` that buy in batches: export, submit, status, cancel, fetch, import."""

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from lvlmva.ask import confirm_host, short_inputs
from lvlmva.calls import changed_params
from lvlmva.hydrate import open_store
from lvlmva.params import load_params
from lvlmva.pipeline import command_of
from lvlmva.shared import exchange_calls, share_calls
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.batches import (
    Batch,
    Host,
    Results,
    batch_of_file,
    check_budget,
    is_settled,
    key_of,
    read_ledger,
    read_lines,
    settle,
    submitting_alone,
    take_results,
    why_not_submit,
)
from lvlmva_core.lvlm.calls import CallStore, note
from lvlmva_core.lvlm.client import check_endpoint, host_of
from lvlmva_core.lvlm.settings import Endpoint, ModelCritic, ModelJudge

batches = typer.Typer()
Params = Annotated[Path, typer.Option(help="the params with the endpoint")]
PARAMS = Path("params.yaml")


@batches.command("export-batch")
def export_batch(
    folder: Annotated[Path, typer.Argument(help="where the files go")],
    stage: Annotated[Literal["critique", "judge"], typer.Option(help="whose missing calls")] = "critique",
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="section.key=value, as if changed")] = None,
    params: Params = PARAMS,
) -> None:
    """Write the calls that the store lacks as files for a Batch API or `vllm run-batch`; nothing is sent."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = changed_params(params, Path(temporary), changes or [])
        words = [sys.executable, *command_of(stage)[1:], "--params", str(copy), "--export-batch", str(folder)]
        done = subprocess.run(words, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


@batches.command()
def submit(
    files: Annotated[list[Path], typer.Argument(help="what `export-batch` wrote")], params: Params = PARAMS
) -> None:
    """Send files to the Batch API of the endpoint's host; what was sent already is found again, never sent twice."""
    calls = CallStore(open_store())
    with submitting_alone(calls.store):
        found = [(batch_of_file(calls.store, file), file) for file in files]
        for batch, file in found:
            if batch.state == "exported":  # what another machine has bought since is not asked again
                exchange_calls(share_calls(calls), batch.keys, str(file), put=True, must=True)
        for batch, file in found:
            if batch.state == "exported" and (reason := why_not_submit(calls, batch)) is not None:
                raise InputError(f"{file}: {reason}; write it anew with `lvlmva calls export-batch`")
        todo = [(batch, file) for batch, file in found if batch.state in ("exported", "submitting")]
        for section in sorted({batch.section for batch, _ in todo}):
            own = [batch for batch, _ in todo if batch.section == section]
            check_budget(_endpoint(params, section), section, own)
        for batch, file in found:
            if (batch, file) in todo:
                host = _host(params, batch)
                batch = asyncio.run(host.submit(calls.store, batch, file))
            typer.echo(f"{file}: {batch.state} as {batch.batch_id}, {len(batch.keys)} calls")


@batches.command()
def status(params: Params = PARAMS) -> None:
    """Say how far the batches are."""
    for batch in read_ledger(open_store()):
        told = str(batch.state)
        if batch.state == "submitted":
            told = ", ".join(asyncio.run(_host(params, batch).status(batch)))
        if batch.counts is not None:
            told += ": " + _counted(batch.counts)
        typer.echo(f"{batch.digest[:12]}\t{batch.batch_id or '-'}\t{len(batch.keys)} calls\t{told}")


@batches.command()
def cancel(
    names: Annotated[list[str] | None, typer.Argument(help="ids of batches as `status` says them; all if none")] = None,
    params: Params = PARAMS,
) -> None:
    """Have batches end early; `fetch` takes in what was answered, and what was not may be asked again."""
    with submitting_alone(open_store()):
        found = [batch for batch in read_ledger(open_store()) if batch.state == "submitted"]
        unknown = set(names or []) - {str(batch.batch_id) for batch in found}
        if unknown:
            raise InputError(f"no batch '{min(unknown)}' is under way; see `lvlmva calls status`")
        for batch in found:
            if not names or batch.batch_id in names:
                typer.echo(f"{batch.batch_id}: {asyncio.run(_host(params, batch).cancel(batch))}")
    typer.echo("`lvlmva calls fetch` takes in what was answered" if found else "no batch is under way")


@batches.command()
def fetch(params: Params = PARAMS) -> None:
    """Take the answers of batches that have ended into the store; what they did not answer may be asked again."""
    calls = CallStore(open_store())
    with submitting_alone(calls.store):
        for batch in read_ledger(calls.store):
            if batch.state not in ("submitting", "submitted"):
                continue
            host = _host(params, batch)
            if batch.state == "submitting":
                batch = asyncio.run(host.find_again(calls.store, batch))
            if batch.state == "submitting":
                typer.echo(f"{batch.digest[:12]}: the host has no such batch; `lvlmva calls submit` its file again")
                continue
            lines = asyncio.run(host.fetch(batch))
            if lines is None:
                typer.echo(f"{batch.batch_id}: under way")
                continue
            results = take_results(calls, [batch], lines, host.endpoint, host.api_key)
            exchange_calls(share_calls(calls), batch.keys, str(batch.batch_id), put=True, must=False)
            settle(calls.store, batch, results)
            _say(calls, str(batch.batch_id), batch, results)


@batches.command("import-batch")
def import_batch(
    files: Annotated[list[Path], typer.Argument(help="results: what `vllm run-batch` wrote, or a host's files")],
    params: Params = PARAMS,
) -> None:
    """Take results in from files, each answer checked as a single call's."""
    calls = CallStore(open_store())
    lines = [line for file in files for line in read_lines(file)]
    with submitting_alone(calls.store):
        taken = 0
        for batch in read_ledger(calls.store):
            keys = {*batch.keys}
            own = [line for line in lines if key_of(line) in keys]
            if not own or batch.state == "done":
                continue
            endpoint = _endpoint(params, batch.section)
            key = os.environ.get(endpoint.api_key_variable or "", "").strip()
            results = take_results(calls, [batch], own, endpoint, key)
            exchange_calls(share_calls(calls), batch.keys, batch.digest[:12], put=True, must=False)
            if is_settled(batch, results):
                settle(calls.store, batch, results)
            _say(calls, batch.digest[:12], batch, results)
            taken += len(own)
    if taken < len(lines):
        raise InputError(
            f"{len(lines) - taken} of {len(lines)} lines are results of no batch that waits for them; the others were "
            "taken in; were these files exported from this store?"
        )


def _endpoint(params: Path, section: str) -> Endpoint:
    name = section.partition(".")[0]
    config = getattr(load_params(params), name)
    if not isinstance(config, ModelCritic | ModelJudge):
        raise InputError(f"{params}: {section} is not there; batches go to the endpoint of a model")
    return config.endpoint


def _host(params: Path, batch: Batch) -> Host:
    endpoint = _endpoint(params, batch.section)
    if batch.state == "submitted" and batch.host != host_of(endpoint):
        raise InputError(f"{batch.batch_id} was sent to {batch.host}; set {batch.section}.base_url back to it")
    key = check_endpoint(endpoint, os.environ, pictures=batch.section.startswith("critique"))
    confirm_host(endpoint)
    return Host(endpoint, key)


def _say(calls: CallStore, name: str, batch: Batch, results: Results) -> None:
    spent = results.spent
    typer.echo(f"{name}: {_counted(results.counts)}; {spent.cost_usd:.4f} USD")
    if spent.short:
        typer.echo(f"warning: {name}: {short_inputs(spent)}", err=True)
    note(
        calls.store,
        "runs.jsonl",
        {"section": batch.section, "model": batch.model, "batch": name, "calls": spent.calls, "usd": spent.cost_usd},
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items()) if number) or "nothing"
