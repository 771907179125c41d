"""The commands `lvlmva calls`: what was bought, what would be, and what is to be asked again."""

import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from lvlmva.ask import allow_host
from lvlmva.changes import apply_changes, content_bytes, read_content
from lvlmva.hydrate import open_store
from lvlmva.pipeline import command_of, paths
from lvlmva.shared import share_calls
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.calls import KIND, CallStore, Record, check_record, created
from lvlmva_core.lvlm.records import NO_CRITIQUE, NO_VERDICT, CritiqueRow, Row, VerdictRow, read_rows
from lvlmva_core.lvlm.redact import printable
from lvlmva_core.lvlm.shared_calls import SharedCalls
from lvlmva_core.store import canonical_json

calls = typer.Typer(no_args_is_help=True, help="Calls to models: what was bought, and what would be.")

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
        usage, when = record["response"].get("usage"), created(record)
        date = "-" if when is None else time.strftime("%Y-%m-%d", time.gmtime(when))
        counts = usage if isinstance(usage, dict) else {}
        tokens = [str(counts.get(name, "-"))[:20] for name in ("prompt_tokens", "completion_tokens")]
        line = [record["key"][:12], _model(record), date, *tokens, str(record.get("meta", {}).get("sample", "-"))]
        typer.echo("\t".join(printable(word) for word in line))


@calls.command()
def show(key: Annotated[str, typer.Argument(help="a key, or its first digits")]) -> None:
    """Show a record: what was sent, the answer, and where it came from."""
    store = _store()
    found = [each for each in store.store.keys(KIND, "json") if each.startswith(key)]
    if len(found) != 1:
        raise InputError(f"{len(found)} keys begin with '{key}'; see `lvlmva calls list`")
    text = json.dumps(store.get_with_meta(found[0]), indent=2, sort_keys=True, ensure_ascii=False)
    # escaped as in JSON: what a model wrote must not steer the terminal
    typer.echo("\n".join(printable(line) for line in text.split("\n")))


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
    new, refused = _store().take_in(_read(file), file.name, keep_present=True)
    typer.echo(f"{new} new records")
    for reason in refused:
        typer.echo(printable(f"refused: {reason}"), err=True)
    if refused:
        raise InputError(f"{file}: {len(refused)} records were refused; ask for a new export")


@calls.command()
def push() -> None:
    """Put all answers of this machine into the shared store; where another stands there, it is taken in its place."""
    _exchange(_shared().push())


@calls.command()
def pull() -> None:
    """Take all answers of the shared store in."""
    _exchange(_shared().pull())


def _shared() -> SharedCalls:
    shared = share_calls(_store())
    if shared is None:
        raise InputError("there is no shared store; set LVLMVA_SHARED_STORE to s3://bucket/prefix")
    return shared


def _exchange(done: Mapping[str, int]) -> None:
    typer.echo(f"{done.get('put', 0)} answers put into the shared store, {done.get('taken', 0)} taken from it")
    if done.get("damaged"):
        raise InputError(f"{done['damaged']} answers are damaged there; a machine that has them mends them by a push")


@calls.command()
def plan(
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="section.key=value, as if changed")] = None,
    params: Annotated[Path, typer.Option(help="the params to plan for")] = Path("params.yaml"),
) -> None:
    """Say what critique and judge would buy with the current data, with params changed as given; nothing is sent.

    The judge's plan is for the critiques that are there: new critiques need new verdicts, one call each or more.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = changed_params(params, Path(folder), changes or [])
        for stage in ("critique", "judge"):
            words = [sys.executable, *command_of(stage)[1:], "--params", str(copy), "--dry-run"]
            done = subprocess.run(words, check=False)
            if done.returncode:
                raise typer.Exit(done.returncode)


@calls.command()
def retry(
    params: Annotated[Path, typer.Option(help="the params to change")] = Path("params.yaml"),
) -> None:
    """Have `dvc repro` ask again about the samples that failed, and about no others.

    Counts asked_again up in params.yaml, which DVC follows: critique or judge runs anew, finds the answers that are
    there in the store, and asks for those that are missing.
    """
    from lvlmva.params import load_params

    load_params(params)
    known = paths()
    rows: dict[str, list[Row]] = {
        "critique": list(_rows(known, "critiques", CritiqueRow)),
        "judge": list(_rows(known, "verdicts", VerdictRow)),
    }
    prefixes = {"critique": NO_CRITIQUE, "judge": NO_VERDICT}
    failed = {
        section: [row for row in found if row.failure is not None and row.failure.startswith(prefixes[section])]
        for section, found in rows.items()
    }
    if not any(failed.values()):
        typer.echo("no sample failed in a way that asking again can mend")
        return
    _count_up(params, [section for section, found in failed.items() if found])
    for section, found in failed.items():
        for row in found:
            typer.echo(printable(f"{section}: {row.sample}: {row.failure}"))
    total = sum(len(found) for found in failed.values())
    typer.echo(f"{total} samples; `dvc repro` asks again about them (asked_again in {params} was counted up)")


def _rows(known: dict[str, str], name: str, kind: type[Any]) -> Iterator[Row]:
    file = Path(known.get(name, f"data/{name}.jsonl"))
    if file.is_file():
        yield from read_rows(file, kind)


def _count_up(params: Path, sections: list[str]) -> None:
    from ruamel.yaml import YAML

    yaml = YAML(pure=True)  # keeps comments
    yaml.width = 1000
    yaml.preserve_quotes = True
    content = yaml.load(params.read_text(encoding="utf-8"))
    for section in sections:
        content[section]["asked_again"] = content[section].get("asked_again", 0) + 1
    with params.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)


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


def changed_params(params: Path, folder: Path, changes: list[str]) -> Path:
    """A copy of params with changes laid over it."""
    content = read_content(params)
    apply_changes(content, changes)
    copy = folder / "params.yaml"
    copy.write_bytes(content_bytes(content))
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
                except (ValueError, RecursionError):
                    yield None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); expected what `export` or `pack` wrote") from error
