"""Critique and judge killed at random moments, with a server that counts what it was paid.

python -m benchmarks.kills [--kills 1000] [--samples 64] [--seed 0]     prints the markdown table of benchmarks/kills.md

A round is one project from an empty store to both outputs. A stage is a process (forked from one that has imported
everything, since starting Python would take most of the time); it is killed (SIGKILL) after a random time, and started
again, until it comes to its end by itself. At every end, killed or not, it is checked from the server's log and the
store that no question was sent whose answer lay in the store when the stage started, and that no answer which was sent
once stands in the store twice. When both are done, each question has one answer, and the outputs are those of a round
without a kill.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pipeline.calls import KEY, Server, critique_here, judge_here, project, running_server

CONCURRENCY = 8
IMPORTED = [  # by the process that the others are forked from
    *("stages.critique", "stages.judge", "filelock", "httpx2", "jinja2.sandbox", "openai", "pandas", "PIL.Image"),
    *("pyarrow.parquet", "ruamel.yaml", "zarr"),
]
STAGES = ("critique", "judge")


def run_stage(here: Path, name: str) -> None:
    """Run a stage in a project, as a process of its own."""
    os.chdir(here)
    os.environ |= {"LVLMVA_STORE": str(here / "store"), "LVLMVA_TEST_API_KEY": KEY}
    with open(here / "said.txt", "ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    {"critique": critique_here, "judge": judge_here}[name]()


def _start(here: Path, name: str) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=run_stage, args=(here, name))
    process.start()
    return process


@dataclass
class Tally:
    """What happened. lost: answers that were paid and in flight when a stage was killed, so that they never arrived."""

    kills: int = 0
    rounds: int = 0
    kept: int = 0
    paid: int = 0
    lost: int = 0
    most_lost_at_once: int = 0
    bought_twice: int = 0


def kill_rounds(kills: int, samples: int, generator: random.Random) -> Tally:
    """Rounds until there were so many kills. Raises AssertionError where anything was bought twice or went missing."""
    tally = Tally()
    with running_server() as server, tempfile.TemporaryDirectory() as name:
        whole = _whole(Path(name) / "whole", server, samples)
        while tally.kills < kills:
            _round(Path(name) / f"round{tally.rounds}", server, samples, generator, tally, whole)
            tally.rounds += 1
    return tally


def _whole(here: Path, server: Server, samples: int) -> dict[str, Any]:
    project(here, server, samples, endpoint={"concurrency": CONCURRENCY})
    server.set(keep=False)
    for name in STAGES:
        process = _start(here, name)
        process.join()
        assert process.exitcode == 0, (here / "said.txt").read_text()
    return _content(here)


def _content(here: Path) -> dict[str, Any]:
    """What was said of each sample: all of the outputs but the records, which hold times and numbers of answers."""
    found = {}
    for name, keys in (("critiques", ("critique", "failure")), ("verdicts", ("verdicts", "failure"))):
        lines = (here / "data" / f"{name}.jsonl").read_text().splitlines()
        found[name] = [{key: row[key] for key in ("sample", *keys)} for row in map(json.loads, lines)]
    return found


def _round(
    here: Path, server: Server, samples: int, generator: random.Random, tally: Tally, whole: dict[str, Any]
) -> None:
    project(here, server, samples, endpoint={"concurrency": CONCURRENCY})
    store = here / "store"
    server.set(keep=False, latency_s=0.03)
    questions: dict[str, str] = {}  # id of an answer -> digest of what was asked
    kept: dict[str, str] = {}  # file of the store -> id of its answer
    for name in STAGES:
        finished = False
        while not finished:
            known = {questions[answer] for answer in kept.values()}
            before = len(questions)
            process = _start(here, name)
            # one in five anywhere, the others once a random number of questions was asked
            moment = before + generator.randint(1, 3 * CONCURRENCY)
            deadline = time.monotonic() + (generator.uniform(0.0, 1.0) if generator.random() < 0.2 else 60.0)
            while process.is_alive() and server.count()[0] < moment and time.monotonic() < deadline:
                time.sleep(0.005)
            process.join(generator.uniform(0.0, 0.1))
            if process.is_alive():
                process.kill()
            process.join()
            finished = process.exitcode == 0
            tally.kills += process.exitcode == -signal.SIGKILL
            assert process.exitcode in (0, -signal.SIGKILL), (here / "said.txt").read_text()
            _settle(server)
            log = server.log()
            asked = [entry["sha256"] for entry in log[before:]]
            questions |= {entry["id"]: entry["sha256"] for entry in log}
            paid = sum(entry["paid"] for entry in log[before:])
            now = _kept(store)
            assert kept.items() <= now.items(), "an answer that was kept has gone or changed"
            new = len(now) - len(kept)
            kept = now
            tally.bought_twice += len(known.intersection(asked)) + len(asked) - len(set(asked))
            tally.paid += paid
            tally.kept += new
            tally.lost += paid - new
            tally.most_lost_at_once = max(tally.most_lost_at_once, paid - new)
            assert 0 <= paid - new <= CONCURRENCY, f"{paid} paid, {new} kept"
    assert len({questions[answer] for answer in kept.values()}) == len(kept)
    assert _content(here) == whole
    assert tally.bought_twice == 0


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
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    tally = kill_rounds(chosen.kills, chosen.samples, random.Random(chosen.seed))
    lines = [
        "| kills | rounds | answers paid | kept | bought twice | in flight at a kill and lost | most at one kill |",
        "|---|---|---|---|---|---|---|",
        f"| {tally.kills} | {tally.rounds} | {tally.paid} | {tally.kept} | {tally.bought_twice} | {tally.lost} | "
        f"{tally.most_lost_at_once} |",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
