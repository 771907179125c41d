"""Critique and judge killed at random moments, with a server that counts what it was paid.

python -m benchmarks.kills [--kills 1000] [--samples 40] [--seed 0]     prints the markdown table of benchmarks/kills.md

A round is one project from an empty store to both outputs. A stage runs as DVC starts it, `python -m stages.critique`
and its options; most are forked from a process that has imported everything, since starting Python would take most of
the time, and one in twenty is a Python of its own. Its outputs are removed first, as DVC does. It is killed (SIGKILL)
at a random moment and started again, until it comes to its end by itself. Where a moment lies is drawn first: before
the first question, among the questions, or after the last one, when answers are kept and outputs written; then it is
uniform there.

At every end, killed or not, it is checked from the server's log and the store that no question was sent whose answer
lay in the store when the stage started, that none was sent twice, that no more answers are missing than were in flight,
and that nothing that was kept has changed. When both are done, each question has one answer, and the outputs are those
of a round without a kill.
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.pipeline.calls import CRITIQUE, JUDGE, Server, environment, project, running_server

CONCURRENCY = 8
LATENCY_S = 0.1
OWN_PYTHON = 1 / 20  # share of the processes
COMMANDS = {"critique": CRITIQUE.split(), "judge": JUDGE.split()}
OUTPUTS = {"critique": ("data/critiques.jsonl",), "judge": ("data/verdicts.jsonl", "metrics/judge.json")}
IMPORTED = [  # by the process that the others are forked from
    *("stages.critique", "stages.judge", "anyio._backends._asyncio", "filelock", "h11", "httpcore2", "httpx2"),
    *("jinja2.sandbox", "openai", "pandas", "PIL.PngImagePlugin", "pyarrow.parquet", "ruamel.yaml", "scipy.ndimage"),
    *("tests.pipeline.calls", "truststore", "typer", "zarr"),
]
Moment = Literal["start", "questions", "end", "never"]
MOMENTS: tuple[Moment, ...] = ("start", "start", *["questions"] * 5, "end", "never")


def run_stage(here: Path, store: Path, name: str, own_python: bool, **more: str) -> None:
    """Run a stage in a project, as a process of its own. more: environment variables."""
    os.chdir(here)
    os.environ |= environment(store, **more)
    with open(here / "said.txt", "ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    command = COMMANDS[name]
    if own_python:
        os.execv(sys.executable, [sys.executable, "-m", *command])
    sys.argv = command
    sys.modules.pop(command[0])
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _start(here: Path, store: Path, name: str, own_python: bool) -> Any:
    for output in OUTPUTS[name]:
        (here / output).unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=run_stage, args=(here, store, name, own_python))
    process.start()
    return process


@dataclass
class Tally:
    """What happened.

    before_first, among, after_last: kills, by how many of the questions were sent. own_python: kills of a Python of
    its own. half_kept: kills between the two steps of keeping a record. lost: answers that were paid and in flight at
    a kill, so that they were never kept; longest_way_s: the longest time between the sending of such an answer and
    the kill.
    """

    rounds: int = 0
    kills: int = 0
    before_first: int = 0
    among: int = 0
    after_last: int = 0
    own_python: int = 0
    half_kept: int = 0
    paid: int = 0
    kept: int = 0
    bought_twice: int = 0
    lost: int = 0
    most_lost_at_once: int = 0
    longest_way_s: float = 0.0


@dataclass(frozen=True)
class Life:
    """Seconds of a stage that nothing kills: to its first question, and from the last one to its end."""

    start: float
    end: float


def kill_rounds(kills: int, samples: int, generator: random.Random) -> Tally:
    """Rounds until there were so many kills. Raises AssertionError where anything was bought twice or went missing."""
    tally = Tally()
    with running_server() as server, tempfile.TemporaryDirectory() as name:
        here = project(Path(name) / "project", server, samples, endpoint={"concurrency": CONCURRENCY})
        lives, whole = _whole(here, server)
        while tally.kills < kills:
            store = here / f"store{tally.rounds}"
            _round(here, store, server, samples, generator, tally, lives)
            assert _content(here) == whole
            tally.rounds += 1
            if tally.rounds % 10 == 0:
                sys.stderr.write(f"{asdict(tally)}\n")
    return tally


def _whole(here: Path, server: Server) -> tuple[dict[tuple[str, bool], Life], dict[str, Any]]:
    """How long each stage takes, forked or a Python of its own, and what comes out."""
    lives = {}
    for own_python in (True, False):
        server.set(keep=False, distinct=True, latency_s=LATENCY_S)
        for name in COMMANDS:
            before = server.count()[0]
            began = time.monotonic()
            process = _start(here, here / f"whole{own_python}", name, own_python)
            while process.is_alive() and server.count()[0] == before:
                time.sleep(0.01)
            first = time.monotonic() - began
            process.join()
            assert process.exitcode == 0, (here / "said.txt").read_text()
            last = max(entry["sent"] for entry in server.log()[before:])
            lives[name, own_python] = Life(first, time.monotonic() - last)
    return lives, _content(here)


def _content(here: Path) -> dict[str, Any]:
    """What was said of each sample: all of the outputs but the records, which hold times and numbers of answers."""
    found = {}
    for name, keys in (("critiques", ("critique", "failure")), ("verdicts", ("verdicts", "failure"))):
        lines = (here / "data" / f"{name}.jsonl").read_text().splitlines()
        found[name] = [{key: row[key] for key in ("sample", *keys)} for row in map(json.loads, lines)]
    return found


def _round(
    here: Path,
    store: Path,
    server: Server,
    samples: int,
    generator: random.Random,
    tally: Tally,
    lives: dict[tuple[str, bool], Life],
) -> None:
    server.set(keep=False, distinct=True, latency_s=LATENCY_S)
    questions: dict[str, str] = {}  # id of an answer -> digest of what was asked
    kept: dict[str, str] = {}  # file of the store -> id of its answer
    half_kept: set[Path] = set()
    for number, name in enumerate(COMMANDS, start=1):
        finished = False
        while not finished:
            known = {questions[answer] for answer in kept.values()}
            before = len(questions)
            missing = number * samples - len(known)
            own_python = generator.random() < OWN_PYTHON
            process = _start(here, store, name, own_python)
            _wait(process, server, generator, lives[name, own_python], before, missing)
            killed_at = time.monotonic()
            if process.is_alive():
                process.kill()
            process.join()
            finished = process.exitcode == 0
            assert process.exitcode in (0, -signal.SIGKILL), (here / "said.txt").read_text()
            _settle(server)
            log = server.log()
            new = log[before:]
            asked = [entry["sha256"] for entry in new]
            questions |= {entry["id"]: entry["sha256"] for entry in log}
            now = _kept(store)
            assert kept.items() <= now.items(), "an answer that was kept has gone or changed"
            missed = [entry for entry in new if entry["paid"] and entry["id"] not in now.values()]
            assert len(missed) <= CONCURRENCY, f"{len(missed)} answers were paid and not kept"
            assert not (finished and missed), "an answer was not kept though nothing was killed"
            tally.paid += sum(entry["paid"] for entry in new)
            tally.kept += len(now) - len(kept)
            tally.lost += len(missed)
            tally.most_lost_at_once = max(tally.most_lost_at_once, len(missed))
            tally.longest_way_s = max([tally.longest_way_s, *(killed_at - entry["sent"] for entry in missed)])
            tally.bought_twice += len(known.intersection(asked)) + len(asked) - len(set(asked))
            temporary = set(store.glob("calls/??/.*.tmp"))
            if not finished:
                tally.kills += 1
                tally.own_python += own_python
                tally.half_kept += temporary > half_kept
                tally.before_first += not asked
                tally.among += 0 < len(asked) < missing
                tally.after_last += bool(asked) and len(asked) >= missing
            kept, half_kept = now, temporary
    assert len({questions[answer] for answer in kept.values()}) == len(kept) == 2 * samples
    assert tally.bought_twice == 0


def _wait(process: Any, server: Server, generator: random.Random, life: Life, before: int, missing: int) -> None:
    """Wait until a random moment of a process's life, or its end. missing: how many answers it has to buy."""
    moment = generator.choice(MOMENTS)
    if moment == "never":
        process.join()
    elif moment == "start" or missing == 0:
        process.join(generator.uniform(0.0, life.start + (life.end if missing == 0 else 0.0)))
    else:
        asked = missing if moment == "end" else generator.randint(1, min(missing, 2 * CONCURRENCY))
        while process.is_alive() and server.count()[0] < before + asked:
            time.sleep(0.005)
        process.join(generator.uniform(0.0, LATENCY_S + life.end if moment == "end" else 2 * LATENCY_S))


def _settle(server: Server) -> None:
    """Wait until the server has answered what was under way."""
    while server.count()[1]:
        time.sleep(0.01)


def _kept(store: Path) -> dict[str, str]:
    return {path.name: json.loads(path.read_bytes())["response"]["id"] for path in store.glob("calls/??/*.json")}


def main() -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    tally = asdict(kill_rounds(chosen.kills, chosen.samples, random.Random(chosen.seed)))
    tally["longest_way_s"] = f"{tally['longest_way_s']:.2f}"
    lines = ["| | |", "|---|---|", *(f"| {LABELS[name]} | {count} |" for name, count in tally.items())]
    sys.stdout.write("\n".join(lines) + "\n")


LABELS = {
    "rounds": "rounds from an empty store to both outputs",
    "kills": "kills",
    "before_first": "of these before a question was sent",
    "among": "of these while some questions were sent and some not",
    "after_last": "of these after the last question was sent",
    "own_python": "of these of a Python of its own",
    "half_kept": "of these while a record was being written",
    "paid": "answers paid",
    "kept": "answers kept",
    "bought_twice": "answers bought though they lay in the store, or twice in one run",
    "lost": "answers in flight at a kill, paid and not kept",
    "most_lost_at_once": "the most of them at one kill",
    "longest_way_s": "the longest time from the sending of one of them to the kill, s",
}


if __name__ == "__main__":
    main()
