"""A cascade of several answers and critics, killed at random moments: nothing is lost, nothing is bought twice."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kinds import apart
from tests.pipeline.calls import KEY, Server, critique_here, endpoint, judge_here, project, rows, running_server

COUNT, CONCURRENCY, KILLS = 8, 4, 20
IMPORTED = [  # by the process that the others are forked from
    *("tests.pipeline.calls", "anyio._backends._asyncio", "filelock", "h11", "httpx2", "jinja2.sandbox", "openai"),
    *("pandas", "PIL.PngImagePlugin", "pyarrow.parquet", "ruamel.yaml", "scipy.ndimage", "zarr"),
]


def _run(here: Path, name: str) -> None:
    os.chdir(here)
    os.environ |= {"LVLMVA_STORE": str(here / "store"), "LVLMVA_TEST_API_KEY": KEY}
    with open(here / "said.txt", "ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    {"critique": critique_here, "judge": judge_here}[name]()


def _start(here: Path, name: str) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(here, name))
    process.start()
    return process


def _cascade(here: Path, server: Server) -> Path:
    """Two answers of one critic, one of another, and two of a last one where these disagree."""
    models = {name: endpoint(server, model=name, concurrency=CONCURRENCY) for name in ("one", "other", "last")}
    critics = [
        {"critic": "model", "endpoint": models["other"]},
        {"critic": "model", "endpoint": models["last"], "samples": 2},
    ]
    critique = {"samples": 2, "endpoint": models["one"], "critics": critics, "cascade": {"disagreement": True}}
    judge = {"endpoint": endpoint(server, model="judge", concurrency=CONCURRENCY)}
    server.set(latency_s=0.02)
    return project(here, server, COUNT, critique=critique, judge=judge)


def _said(here: Path) -> list[Any]:
    """What came out, without records, which hold times and numbers of answers."""
    found = [*rows(here, "critiques"), *rows(here, "verdicts")]
    for row in found:
        for each in row["answers"]:
            for name in ("record", "records", "judged"):
                each.pop(name, None)
    return found


def _may_ask(model: str) -> int:
    """How many answers to one question are wanted: their numbers are not sent, so that they look alike."""
    return {"one": 2, "last": 2}.get(model, 1)


@pytest.mark.long
def test_a_cascade_that_is_killed_again_and_again_buys_each_answer_once(tmp_path: Path) -> None:
    generator, kills, rounds = random.Random(3), 0, 0
    with running_server("--decide", f"{apart.__module__}:{apart.__name__}") as server:
        whole = _cascade(tmp_path / "whole", server)
        for name in ("critique", "judge"):
            process = _start(whole, name)
            process.join()
            assert process.exitcode == 0, (whole / "said.txt").read_text()
        expected, without_kills = _said(whole), server.paid()
        further = [bool(row.get("further")) for row in expected[:COUNT]]
        assert 0 < sum(further) < COUNT  # else it is no cascade
        while kills < KILLS:
            here = _cascade(tmp_path / f"round{rounds}", server)
            kept: dict[str, str] = {}
            lost = 0
            for name in ("critique", "judge"):
                finished = False
                while not finished:
                    before = len(server.log())
                    process = _start(here, name)
                    moment = before + generator.randint(0, 4 * CONCURRENCY)
                    while process.is_alive() and server.count()[0] < moment:
                        time.sleep(0.005)
                    process.join(generator.uniform(0.0, 0.1))
                    if process.is_alive():
                        process.kill()
                    process.join()
                    finished = process.exitcode == 0
                    assert finished or process.exitcode == -signal.SIGKILL, (here / "said.txt").read_text()
                    kills += not finished
                    while server.count()[1]:
                        time.sleep(0.01)
                    log = server.log()
                    of_question = {entry["id"]: (entry["sha256"], entry["body"]["model"]) for entry in log}
                    there = Counter(of_question[answer] for answer in kept.values())
                    asked = Counter((entry["sha256"], entry["body"]["model"]) for entry in log[before:])
                    for question, number in asked.items():
                        assert there[question] + number <= _may_ask(question[1]), "bought though it was there"
                    now = {
                        path.name: json.loads(path.read_bytes())["response"]["id"]
                        for path in (here / "store").glob("calls/??/*.json")
                    }
                    assert kept.items() <= now.items(), "an answer that was kept has gone or changed"
                    missing = sum(entry["paid"] for entry in log[before:]) - (len(now) - len(kept))
                    assert 0 <= missing <= (0 if finished else CONCURRENCY)
                    lost, kept = lost + missing, now
            assert _said(here) == expected
            assert server.paid() - lost == len(kept) == without_kills
            rounds += 1
