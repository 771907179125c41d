"""`lvlmva experiments bases=0..4 seeds=0..2 methods=...`: many experiments, pooled into one table and figure (an
extension; the paper has one base model a data set)."""

import contextlib
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from lvlmva.changes import apply_changes, read_content
from lvlmva.engines import Execution, Task, TasksFailedError, run_tasks
from lvlmva.experiments_folder import (
    Job,
    Piece,
    Study,
    has_lambda,
    is_done,
    of_one_base,
    seconds_of,
    set_up,
)
from lvlmva.params import load_params, params_of
from lvlmva.pipeline import paths
from lvlmva.warm import warm
from lvlmva_core.errors import InputError
from lvlmva_core.methods import METHODS, in_order
from lvlmva_core.outputs import BASE
from lvlmva_core.study import MEASURES, measures_of

T = TypeVar("T")

WORDS = ("bases", "seeds", "methods", "lambdas")
MOST = 1000  # numbers of a range
ROWS = "rows.csv"
DECLARED = "declared.json"
NAMED_AT_MOST = 5


def experiments(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="WORD=VALUES...",
            help="bases=0..4 seeds=0..2 methods=lvlm_va,lambda_zero lambdas=0.01,0.1: all but bases may be left out",
            show_default=False,
        ),
    ],
    changes: Annotated[
        list[str] | None, typer.Option("--set", "-S", help="section.key=value, laid over params")
    ] = None,
    folder: Annotated[Path, typer.Option(help="of the study; the same command goes on in it")] = Path("study"),
    primary: Annotated[
        str | None,
        typer.Option(help=f"the measure that decides ({', '.join(MEASURES)}), declared before the first run"),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="at a time [execution.workers of params]")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="buy until max_cost_usd or max_calls is reached, unasked")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run; write nothing")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="only write the tables of what is complete")] = False,
    params: Annotated[Path, typer.Option(help="of the project")] = Path("params.yaml"),
) -> None:
    """Train several base models and run every method on each, once a seed; pool them into one table and figure.

    `lvlmva study bases=0..4 ...` is the same; without such words `lvlmva study` is the user study, with people.

    bases: seeds of the base model's training (train.seed), each with alignment set, regions and verdicts of its own.
    seeds: of the methods. 0..4 are the five numbers from 0 to 4. methods: by default those of params. lambdas: values
    of rrr_lambda, each a run of the methods that have a penalty.

    The same command goes on where it was killed, and takes in more bases, seeds, methods and λ: what is there is not
    done again. A task that fails does not stop the others. What models are paid is planned over all bases, and
    max_cost_usd and max_calls hold for all of them together.
    """
    if not paths():
        raise InputError("no dvc.yaml here; run it in the project's folder")
    asked = parse_words(words)
    content = asked_params(params, changes or [], asked)
    study, execution = study_of(folder.resolve(), params, content, asked, workers)
    if dry_run:
        for line in describe(study, content, params):
            typer.echo(line)
        return
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the stages lie in the project's folder; they are not installed
    study.folder.mkdir(parents=True, exist_ok=True)
    declare(study.folder, primary)
    set_up(study, content)
    failed = [] if tables else run_study(study, execution, yes=yes)
    conclude(study.folder)
    if failed:
        named = ", ".join(failed[:NAMED_AT_MOST]) + (", ..." if len(failed) > NAMED_AT_MOST else "")
        raise InputError(
            f"not done: {named}, as said above; mend it and repeat the command: what was done stays done, and the "
            "tables hold what is complete"
        )


# ------------------------------------------------------------------------------------------------------ what is asked


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """bases, seeds: lists of numbers; methods: of names; lambdas: of numbers. What is not said is not there.

    Raises:
        InputError: naming the word.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, sign, values = word.partition("=")
        if name not in WORDS or not sign:
            close = difflib.get_close_matches(name, WORDS, n=1)
            raise InputError(
                f"'{word}': "
                + (f"did you mean '{close[0]}=...'?" if close else f"expected one of {', '.join(WORDS)}=...")
            )
        if name in found:
            raise InputError(f"'{word}': {name} stands there twice")
        found[name] = _PARSED[name](word, values)
    if "bases" not in found:
        raise InputError("say which base models, e.g. bases=0..4 for five, trained with the seeds 0 to 4")
    return found


def _numbers(word: str, values: str) -> list[int]:
    found: list[int] = []
    for part in values.split(","):
        match = re.fullmatch(r"(\d{1,10})(?:\.\.(\d{1,10}))?", part.strip())
        if match is None:
            raise InputError(f"'{word}': '{part}' is no number and no range; write 0..4 or 0,2,5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"'{word}': '{part}' ends before it begins; write {last}..{first}")
        if last - first >= MOST or last >= 2**31:
            raise InputError(f"'{word}': '{part}' is too much; a range has {MOST} numbers at most, below 2**31")
        found += range(first, last + 1)
    return sorted(_once(word, found))


def _names(word: str, values: str) -> list[str]:
    known = [name for name in METHODS if name != BASE]
    found = [name.strip() for name in values.split(",")]
    for name in found:
        if name == BASE:
            raise InputError(f"'{word}': the base model itself is always there; leave '{BASE}' out")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"'{word}': no method '{name}'; "
                + (f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}")
            )
    return in_order(_once(word, found))


def _lambdas(word: str, values: str) -> list[str]:
    found = []
    for part in values.split(","):
        try:
            value = float(part)
        except ValueError:
            raise InputError(f"'{word}': '{part}' is no number; write lambdas=0.01,0.1") from None
        if not 0 < value < float("inf"):
            raise InputError(f"'{word}': '{part}' is no weight of a penalty; for 0 there is the method lambda_zero")
        found.append(value)
    return [short if float(short := f"{value:g}") == value else repr(value) for value in sorted(_once(word, found))]


def _once(word: str, values: list[T]) -> list[T]:
    twice = [value for place, value in enumerate(values) if value in values[:place]]
    if twice:
        raise InputError(f"'{word}': {twice[0]} stands there twice; copies of a run would pass for spread")
    return values


_PARSED: dict[str, Callable[[str, str], Any]] = {
    "bases": _numbers,
    "seeds": _numbers,
    "methods": _names,
    "lambdas": _lambdas,
}


def asked_params(params: Path, changes: Sequence[str], asked: dict[str, Any]) -> dict[str, Any]:
    """Content of the project's params with the changes, and with the seeds and methods that are asked for.

    Raises:
        InputError: they are wrong, a method has seeds of its own, or there is no such range of bases or λ.
    """
    load_params(params)
    content: dict[str, Any] = read_content(params)
    apply_changes(content, changes)
    params_of(content, params)
    if "seeds" in asked:
        content["align"]["seeds"] = asked["seeds"]
    for name in asked.get("methods", []):
        section = "methods" if METHODS[name].kind == "penalty" else "retrained"
        content[section].setdefault(name, {})
    for section in ("methods", "retrained"):
        for name, own in content[section].items():
            if "seeds" in (own or {}):
                raise InputError(
                    f"{section}.{name}.seeds: all methods of a study have the same; remove it, say seeds=..."
                )
    return content


def study_of(
    folder: Path, params: Path, content: dict[str, Any], asked: dict[str, Any], workers: int | None
) -> tuple[Study, Execution]:
    """The study that is asked for, and how it is run.

    Raises:
        InputError: a base model that was brought along has one base, and λ need a method with a penalty.
    """
    from lvlmva.experiments_paid import is_paid

    loaded = params_of(content, params)
    methods = asked.get("methods") or in_order([*loaded.methods, *loaded.retrained])
    if of_one_base(loaded) and len(asked["bases"]) > 1:
        raise InputError(
            f"{params}: the base model is brought along (train.from: checkpoint), so that there is one; say bases=0"
        )
    lambdas = asked.get("lambdas", [])
    if lambdas and not any(map(has_lambda, methods)):
        raise InputError(f"lambdas: none of {', '.join(methods)} has a penalty whose weight could be chosen; remove it")
    execution = loaded.execution if workers is None else loaded.execution.model_copy(update={"workers": workers})
    spares = loaded.critique.independent_at_most is not None
    study = Study(folder, tuple(asked["bases"]), tuple(methods), tuple(lambdas), spares, is_paid(loaded))
    return study, execution


def declare(folder: Path, primary: str | None) -> None:
    """Keep which measure decides, said before the first run or never.

    Raises:
        InputError: there is no such measure, or another was declared.
    """
    from lvlmva_core.store import replace_file

    if primary is not None and primary not in MEASURES:
        raise InputError(f"--primary {primary}: expected one of {', '.join(MEASURES)}")
    file = folder / DECLARED
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))["primary"]
        if primary not in (None, before):
            raise InputError(
                f"--primary {primary}: {file} says that "
                + (f"'{before}' was declared" if before else "none was declared")
                + " before the first run; another folder is another study"
            )
        return
    replace_file(file, (json.dumps({"primary": primary}) + "\n").encode())


def describe(study: Study, content: dict[str, Any], params: Path) -> list[str]:
    """What would run, in lines."""
    from lvlmva.experiments_paid import endpoints, limits_of, most_calls

    loaded = params_of(content, params)
    pieces = pieces_of(study)
    done = [piece for piece in pieces if is_done(study.folder, piece)]
    models = sum(len(list(study.of_methods(base))) for base in study.bases)
    lines = [
        f"{study.folder}: {len(study.bases)} bases, {models * len(loaded.align.seeds)} models of "
        f"{len(study.methods)} methods ({', '.join(study.methods)})",
        f"{len(done)} of {len(pieces)} pieces of work are done{_left(study, pieces)}",
    ]
    if study.lambdas:
        fixed = [name for name in study.methods if not has_lambda(name)]
        lines.append(
            f"λ = {', '.join(study.lambdas)}" + (f"; without one, once each: {', '.join(fixed)}" if fixed else "")
        )
    for stage, those in endpoints(loaded).items():
        if those:
            most = most_calls(loaded, len(study.bases))[stage]
            lines.append(f"{limits_of(stage, those)}; {most} first calls can come, less what is in the store")
    if not study.paid:
        lines.append("nothing is bought: critic and judge are no models")
    return lines


# ------------------------------------------------------------------------------------------------------------ running


def pieces_of(study: Study) -> list[Piece]:
    """Every piece of work, in order; `critique` and `judge` of models among them."""
    found = [piece for job in study.jobs() for piece in (*job.after, *job.pieces)]
    return list(dict.fromkeys(found))


def run_study(
    study: Study, execution: Execution, *, yes: bool = False, rows_each_base: Path | None = None
) -> list[str]:
    """Do what is not done.

    Args:
        yes: as for `lvlmva.experiments_paid.ask_models`. rows_each_base: where rows and comparisons are written each
            time that a base is complete.

    Returns:
        Names of what could not be done.

    Raises:
        InputError: the engine can't run, or more may be paid than a limit allows and nobody agreed.
    """
    jobs = study.jobs()
    tried: set[str] = set()
    run_jobs(study, execution, jobs, tried, rows_each_base)
    if study.paid:
        from lvlmva.experiments_paid import ask_models

        ask_models(study, yes=yes)
        run_jobs(study, execution, jobs, tried, rows_each_base)
    return [job.name for job in jobs if not _is_done(study, job)]


def run_jobs(study: Study, execution: Execution, jobs: Sequence[Job], tried: set[str], rows: Path | None) -> None:
    """Run every job whose forerunners are done, those too that become ready meanwhile; each once.

    One at a time in the order of `jobs` where there is one worker on this machine, so that one base is complete before
    the next begins; else all that are ready, with a bar for them together.
    """
    here = execution.backend == "processes"
    one_by_one = here and execution.workers == 1
    libraries = False
    with contextlib.ExitStack() as stack:
        while ready := [
            job
            for job in jobs
            if job.name not in tried
            and not _is_done(study, job)
            and all(is_done(study.folder, piece) for piece in job.after)
        ]:
            if here and not libraries:
                stack.enter_context(warm())
                libraries = True
            ready = ready[:1] if one_by_one else ready
            before = _complete(study)
            tried |= {job.name for job in ready}
            tasks = [_task(study, job) for job in ready]
            called = ready[0].name if one_by_one else "experiments"
            with contextlib.suppress(TasksFailedError):  # each was said; what does not need it goes on
                run_tasks(tasks, execution, study.folder / "logs", called)
            for job in ready:
                if _is_done(study, job):
                    typer.echo(_account(study, job))
            if rows is not None and _complete(study) > before:
                write_tables(study.folder, rows)


def _task(study: Study, job: Job) -> Task:
    pieces = (piece.name for piece in job.pieces if not is_done(study.folder, piece))
    return Task(job.name, ("python", "-m", "lvlmva.experiments_piece", str(study.folder), *pieces))


def _is_done(study: Study, job: Job) -> bool:
    return all(is_done(study.folder, piece) for piece in job.pieces)


def _complete(study: Study) -> int:
    """How many bases have all that is asked for."""
    return sum(
        all(is_done(study.folder, piece) for pieces in study.of_methods(base) for piece in pieces)
        and is_done(study.folder, Piece("evaluate", base, method=BASE))
        for base in study.bases
    )


def _account(study: Study, job: Job) -> str:
    pieces = pieces_of(study)
    done = sum(is_done(study.folder, piece) for piece in pieces)
    return f"{job.name}: {done} of {len(pieces)}{_left(study, pieces)}"


def _left(study: Study, pieces: Sequence[Piece]) -> str:
    """How long the rest takes on one worker, from how long each stage took here before."""
    took = seconds_of(study.folder)
    every = [seconds for those in took.values() for seconds in those]
    if not every:
        return ""
    means = {stage: sum(those) / len(those) for stage, those in took.items()}
    rest = [piece for piece in pieces if not is_done(study.folder, piece)]
    left = sum(means.get(piece.stage, sum(every) / len(every)) for piece in rest)
    return f", about {left / 60:.0f} min of work left"


def write_tables(folder: Path, rows: Path) -> None:
    """Write the rows, and beside them the comparisons, of what is complete."""
    from lvlmva.experiments_results import read_study, write_rows

    write_rows(read_study(folder), rows)


def conclude(folder: Path) -> None:
    """Write rows, comparisons, the page and the figure of what is complete; say what they say."""
    from lvlmva.experiments_results import read_study, write_page, write_rows

    if not any(folder.glob(f"done/base=*-evaluate-{BASE}")):
        return
    found, rows = read_study(folder), folder / ROWS
    write_rows(found, rows)
    known = list(measures_of(found.samples))
    primary = json.loads((folder / DECLARED).read_text(encoding="utf-8"))["primary"] or known[0]
    if primary not in known:
        raise InputError(
            f"'{primary}' was declared, and the data set does not hold what it needs; the rows are written to {rows}; "
            f"remove {folder / DECLARED}, and '{known[0]}' decides"
        )
    for line in write_page(found, rows, primary):
        typer.echo(line)
    typer.echo(f"written to {rows}, {rows.stem}_compared.csv, {rows.stem}.md and {rows.stem}.png")
