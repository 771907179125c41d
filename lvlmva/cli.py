"""The command `lvlmva`: presets, and what is in the call store."""

import gzip
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from lvlmva.ask import allow_host
from lvlmva.check_model import check_model_command
from lvlmva.export import export as export_model
from lvlmva.gate import gate
from lvlmva.hydrate import open_store
from lvlmva.pipeline import deps
from lvlmva.preset import preset
from lvlmva.results import results
from lvlmva.sweep import sweep
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.calls import KIND, CallStore, Record, check_record
from lvlmva_core.store import canonical_json


class App(typer.Typer):
    """A command whose user mistakes are one line on stderr and exit code 1."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except InputError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise SystemExit(1) from None


app = App(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
calls = typer.Typer(no_args_is_help=True, help="Calls to models: what was bought, and what would be.")
app.add_typer(calls, name="calls")
app.command()(preset)
app.command()(results)
app.command()(sweep)
app.command()(deps)
app.command("check-model")(check_model_command)
app.command("export")(export_model)
app.command()(gate)

OLD_S = 3600  # a temporary file this old belongs to a killed process


@calls.command("list")
def list_calls(
    model: Annotated[str | None, typer.Option(help="only calls to this model")] = None,
    sample: Annotated[
        str | None, typer.Option(help="only calls about this sample, as far as this machine knows")
    ] = None,
) -> None:
    """List calls: key, model, date, tokens in and out, sample."""
    for record in _chosen(model, sample):
        usage, meta = record["response"].get("usage") or {}, record.get("meta", {})
        created = record["response"].get("created")
        date = time.strftime("%Y-%m-%d", time.gmtime(created)) if isinstance(created, int) else "-"
        tokens = [str(usage.get(name, "-")) for name in ("prompt_tokens", "completion_tokens")]
        typer.echo("\t".join([record["key"][:12], _model(record), date, *tokens, str(meta.get("sample", "-"))]))


@calls.command()
def show(key: Annotated[str, typer.Argument(help="a key, or its first digits")]) -> None:
    """Show a record: what was sent, the answer, and where it came from."""
    store = _store()
    found = [each for each in store.store.keys(KIND, "json") if each.startswith(key)]
    if len(found) != 1:
        raise InputError(f"{len(found)} keys begin with '{key}'; see `lvlmva calls list`")
    typer.echo(json.dumps(store.get_with_meta(found[0]), indent=2, sort_keys=True, ensure_ascii=False))


@calls.command()
def check() -> None:
    """Verify every record; damaged ones are set aside. Removes what killed processes left half written."""
    store = _store()
    total = sum(1 for _ in store.store.keys(KIND, "json"))
    whole = sum(1 for _ in store.records())
    left_over = [path for path in store.store.root.glob("*/??/.*.tmp") if time.time() - path.stat().st_mtime > OLD_S]
    for path in left_over:
        path.unlink(missing_ok=True)
    typer.echo(f"{whole} records are whole, {total - whole} damaged; {len(left_over)} left-over files removed")
    if whole < total:
        raise InputError(
            f"{total - whole} records were damaged and are set aside; repeating the stage brings them back"
        )


@calls.command()
def export(
    file: Annotated[Path, typer.Argument(help="JSON lines to write")],
    model: Annotated[str | None, typer.Option(help="only calls to this model")] = None,
    sample: Annotated[str | None, typer.Option(help="only calls about this sample")] = None,
) -> None:
    """Write records as JSON lines. Sample ids, which only this machine knows, are left out."""
    typer.echo(f"{_write(file.open('wb'), model, sample)} records written to {file}")


@calls.command()
def pack(file: Annotated[Path, typer.Argument(help="one file to write, e.g. calls.jsonl.gz")]) -> None:
    """Write all records into one compressed file; the same records give the same bytes."""
    with file.open("wb") as raw:
        count = _write(gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0), None, None)
    typer.echo(f"{count} records packed into {file}")


@calls.command("import")
def import_calls(file: Annotated[Path, typer.Argument(help="what `export` or `pack` wrote")]) -> None:
    """Take records in, each checked as a whole; records that are there already stay."""
    new, refused = _store().take_in(_read(file), file.name)
    typer.echo(f"{new} new records")
    for reason in refused:
        typer.echo(f"refused: {reason}", err=True)
    if refused:
        raise InputError(f"{file}: {len(refused)} records were refused; ask for a new export")


@calls.command()
def plan(
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="section.key=value, as if changed")] = None,
    params: Annotated[Path, typer.Option(help="the params to plan for")] = Path("params.yaml"),
) -> None:
    """Say what critique and judge would buy with the current data, with params changed as given; nothing is sent.

    The judge's plan is for the critiques that are there: new critiques need new verdicts, one call each or more.
    """
    from dvc.repo import Repo

    with tempfile.TemporaryDirectory() as folder:
        copy = _changed(params, Path(folder), changes or [])
        with Repo() as repo:
            commands = [str(repo.stage.load_one(name=stage).cmd) for stage in ("critique", "judge")]
        for command in commands:
            words = [str(copy) if word == "params.yaml" else word for word in shlex.split(command)]
            done = subprocess.run([sys.executable, *words[1:], "--dry-run"], check=False)
            if done.returncode:
                raise typer.Exit(done.returncode)


@calls.command()
def allow(
    host: Annotated[str, typer.Argument(help="e.g. https://api.openai.com")],
    variable: Annotated[str | None, typer.Option(help="the environment variable with its API key")] = None,
) -> None:
    """Agree once, on this machine, that a host may get pictures and the API key in a variable."""
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"'{host}' is no address; expected https://host or http://host:port")
    address = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    allow_host(f"{address} {variable}")
    typer.echo(f"{address} may be used with {variable or 'no API key'}")


def _changed(params: Path, folder: Path, changes: list[str]) -> Path:
    """A copy of params with changes laid over it."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    # through JSON, so that sections which share an anchor change one by one
    content = json.loads(json.dumps(yaml.load(params.read_text(encoding="utf-8"))))
    for change in changes:
        path, separator, value = change.partition("=")
        *sections, key = path.split(".")
        place = content
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not separator or not isinstance(place, dict):
            raise InputError(f"--set {change}: expected section.key=value with a section of {params}")
        place[key] = yaml.load(value)
    copy = folder / "params.yaml"
    with copy.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)
    return copy


def _store() -> CallStore:
    return CallStore(open_store())


def _chosen(model: str | None, sample: str | None) -> Iterator[Record]:
    for record in _store().records():
        if model in (None, _model(record)) and sample in (None, record.get("meta", {}).get("sample")):
            yield record


def _model(record: Record) -> str:
    return str(record["request"]["body"]["model"])


def _write(file: Any, model: str | None, sample: str | None) -> int:
    count = 0
    with file:
        for record in _chosen(model, sample):
            file.write(canonical_json(check_record(record)) + b"\n")
            count += 1
    return count


def _read(file: Path) -> Iterator[Any]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    yield None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); expected what `export` or `pack` wrote") from error


if __name__ == "__main__":
    app()
