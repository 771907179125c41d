"""Two machines that share a store over S3 and ask at once, killed at random moments, one of them on a bad connection.

python -m benchmarks.shared_kills [--kills 200] [--samples 24] [--seed 0]     prints the table of shared_kills.md

A round is one project, on two machines with a store each, from empty stores to both critiques. Both run the stage at
once; one of them, chosen at random, is killed (SIGKILL) at a random moment and started again, until both come to their
end. One machine reaches the S3 server through a proxy that breaks connections off at random. Every process has an API
key of its own, so that the model server's log says who asked.

At the end of a round: each question has one answer in the shared store, and both outputs are the same bytes; of the
processes that asked one question, all but one at most were killed or stopped for want of the connection; and no process
had more such questions than it may have in flight.
"""

import argparse
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kills import IMPORTED, run_stage
from lvlmva_core import shared_store
from tests.pipeline.calls import Server, project, running_server
from tests.s3 import S3, Proxy, running_s3

CONCURRENCY = 4
LATENCY_S = 0.3
CLAIM_S = 10.0  # not 60, so that a round takes minutes
MOST_KILLS = 6  # of one round


@dataclass
class Tally:
    """What happened. again: questions asked once more since the first who asked was killed or cut off."""

    rounds: int = 0
    kills: int = 0
    stopped: int = 0
    broken: int = 0
    questions: int = 0
    asked: int = 0
    again: int = 0
    most_again: int = 0
    needlessly: int = 0


def _run(here: Path, store: Path, variables: dict[str, str]) -> None:
    shared_store.CLAIM_S = CLAIM_S
    run_stage(here, store, "critique", own_python=False, **variables)


def _start(here: Path, variables: dict[str, str], key: str) -> Any:
    (here / "data" / "critiques.jsonl").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, "boto3", "lvlmva_core.shared_store"])
    store = here.parent / f"store-{here.name}"
    process = context.Process(target=_run, args=(here, store, {**variables, "LVLMVA_TEST_API_KEY": key}))
    process.start()
    return process


def _disturb(proxy: Proxy, done: threading.Event, seed: int) -> None:
    generator = random.Random(seed)
    while not done.wait(generator.uniform(0.05, 0.6)):
        proxy.fail(generator.choice(["request", "answer", "refuse"]), generator.randrange(1500), times=1)


def kill_rounds(kills: int, samples: int, generator: random.Random) -> Tally:
    """Rounds until there were so many kills. Raises AssertionError where anything is not as said above."""
    tally = Tally()
    with running_s3() as s3, running_server() as server:
        proxy, done = Proxy(s3.port), threading.Event()
        disturbing = threading.Thread(target=_disturb, args=(proxy, done, generator.randrange(2**32)))
        disturbing.start()
        try:
            while tally.kills < kills:
                with tempfile.TemporaryDirectory() as name:
                    _round(Path(name), s3, server, proxy, samples, generator, tally)
                sys.stderr.write(f"{asdict(tally)}\n")
        finally:
            done.set()
            disturbing.join()
        tally.broken = proxy.lost
    return tally


def _round(
    folder: Path, s3: S3, server: Server, proxy: Proxy, samples: int, generator: random.Random, tally: Tally
) -> None:
    server.set(keep=False, latency_s=LATENCY_S)
    prefix = f"round{tally.rounds}"
    ways = {"one": s3.variables(prefix), "two": s3.variables(prefix, proxy.port)}
    machines = {name: project(folder / name, server, samples, endpoint={"concurrency": CONCURRENCY}) for name in ways}
    lives: Counter[str] = Counter()
    ended: set[str] = set()  # keys of processes that did not come to their end
    running: dict[str, Any] = {}

    def begin(name: str) -> None:
        lives[name] += 1
        running[name] = _start(machines[name], ways[name], f"key-{name}-{lives[name]}")

    for name in machines:
        begin(name)
    left = generator.randint(1, MOST_KILLS)
    moment = _moment(server, generator)
    while running:
        for name, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[name]
            if process.exitcode:
                if process.exitcode != -signal.SIGKILL:
                    said = (machines[name] / "said.txt").read_text()
                    assert process.exitcode == 1, said
                    assert "cannot be reached" in said.splitlines()[-1], said
                    tally.stopped += 1
                ended.add(f"key-{name}-{lives[name]}")
                begin(name)
        if left and running and moment():
            running[generator.choice(sorted(running))].kill()
            left, moment = left - 1, _moment(server, generator)
            tally.kills += 1
        time.sleep(0.02)
    _check(s3, prefix, server, machines, samples, ended, tally)
    tally.rounds += 1


def _moment(server: Server, generator: random.Random) -> Callable[[], bool]:
    """Says whether a random moment has come: after some time, or soon after some more questions were sent."""
    if generator.random() < 1 / 4:
        then = time.monotonic() + generator.uniform(0.0, 4.0)
        return lambda: time.monotonic() > then
    enough, pause = server.count()[0] + generator.randint(1, 2 * CONCURRENCY), generator.uniform(0.0, 2 * LATENCY_S)
    reached: list[float] = []

    def come() -> bool:
        if not reached and server.count()[0] >= enough:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() > reached[0] + pause

    return come


def _check(
    s3: S3, prefix: str, server: Server, machines: dict[str, Path], samples: int, ended: set[str], tally: Tally
) -> None:
    asked: dict[str, list[str]] = defaultdict(list)
    for entry in server.log():
        asked[entry["sha256"]].append(entry["headers"]["authorization"].removeprefix("Bearer "))
    kinds = Counter(key.partition("/")[0] for key in s3.keys(prefix))
    assert len(asked) == kinds["calls"] == samples, (len(asked), kinds)
    one, two = ([_said(line) for line in _lines(here)] for here in machines.values())
    assert one == two
    again: Counter[str] = Counter()
    for who in asked.values():
        lost = [key for key in who if key in ended]
        tally.needlessly += max(0, len(who) - len(lost) - 1)
        again.update(lost[: len(who) - 1])
    assert tally.needlessly == 0, asked
    most = max(again.values(), default=0)
    assert most <= CONCURRENCY, again
    tally.questions += samples
    tally.asked += sum(map(len, asked.values()))
    tally.again += again.total()
    tally.most_again = max(tally.most_again, most)


def _lines(here: Path) -> list[str]:
    return (here / "data" / "critiques.jsonl").read_text().splitlines()


def _said(line: str) -> tuple[str, str]:
    row = json.loads(line)
    return row["sample"], row["record"]["response"]["id"]


def main() -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    tally = asdict(kill_rounds(chosen.kills, chosen.samples, random.Random(chosen.seed)))
    lines = ["| | |", "|---|---|", *(f"| {LABELS[name]} | {count} |" for name, count in tally.items())]
    sys.stdout.write("\n".join(lines) + "\n")


LABELS = {
    "rounds": "rounds from empty stores to both machines' critiques",
    "kills": "kills",
    "stopped": "processes that stopped for want of a connection, and were started again",
    "broken": "connections that were refused or broken off",
    "questions": "questions",
    "asked": "times that the model was asked",
    "again": "of these again, since who had asked was killed or cut off with the answer in flight or not shared yet",
    "most_again": "the most of them of one process (concurrency is 4)",
    "needlessly": "of these again for no such reason",
}


if __name__ == "__main__":
    main()
