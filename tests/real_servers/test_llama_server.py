"""The client against a server and a model that nobody here wrote: llama.cpp's own, with Gemma 3 270M.

What the model says is not tested, only what becomes of it: each answer is booked, checked and kept once. The Critic's
vision part has random weights, so that its critiques are blind.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.calls import CRITIQUE, JUDGE, Server, endpoint, environment, project, rows, run
from tests.pipeline.project import QUICK, Project
from tests.real_servers.servers import FOLDER, Proxy, counting_proxy, llama_server, needs_servers

pytestmark = [pytest.mark.real_server, needs_servers, pytest.mark.timeout(1800)]
COUNT = 6
LOCAL = {
    "model": "gemma-3-270m",
    "api_key_variable": None,
    "image_detail": None,
    "timeout_s": 600.0,
    "concurrency": 2,
    "usd_per_million_input_tokens": 0.0,
    "usd_per_million_output_tokens": 0.0,
}
# A model that was never taught to chat goes on for ever; this is an end for it. Blind all the same. The letters make
# each critique its own, and so each question to the Judge.
SHORT = {
    "extra_body": {
        "grammar": 'root ::= [a-z]{8,16} "\\nred: " word "\\nblue: " word "\\nyellow: " word\nword ::= "yes" | "no"'
    },
    "temperature": 1.0,
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    eyes = FOLDER / "random-eyes.gguf"
    with llama_server(log, "--mmproj", str(eyes), "-c", "16384", "--parallel", "2", "--threads", "1") as url:
        yield url


@pytest.fixture
def server(address: str) -> Iterator[Proxy]:
    with counting_proxy(address) as proxy:
        yield proxy


def _url(proxy: Proxy) -> Server:
    return Server(int(proxy.url.rpartition(":")[2]))


def _kept(store: Path, *kinds: str) -> list[dict[str, Any]]:
    files = [file for kind in kinds or ("calls",) for file in sorted((store / kind).glob("??/*.json"))]
    return [json.loads(file.read_text()) for file in files]


def _usage(proxy: Proxy) -> tuple[int, int]:
    used = [answer.response["usage"] for answer in proxy.paid()]
    return sum(u["prompt_tokens"] for u in used), sum(u["completion_tokens"] for u in used)


def _booked(store: Path) -> tuple[int, int]:
    runs = [json.loads(line) for line in (store / "runs.jsonl").read_text().splitlines()]
    return sum(run["input_tokens"] for run in runs), sum(run["output_tokens"] for run in runs)


@pytest.mark.parametrize("answer_format", ["json_schema", "prompt"])
def test_a_trained_judge_s_answers_are_all_booked_and_each_sample_has_verdicts_or_a_reason(
    tmp_path: Path, server: Proxy, answer_format: str
) -> None:
    store = tmp_path / "store"
    settings = {"answer_format": answer_format, "max_failed_share": 1.0, "max_attempts": 2}
    here = project(
        tmp_path / "p",
        _url(server),
        COUNT,
        critique={"critic": "rules", "endpoint": None},
        judge=settings,
        endpoint={**LOCAL, "token_limit": 120},
    )
    run(here, CRITIQUE, environment(store))
    run(here, JUDGE, environment(store))
    assert _booked(store) == _usage(server)
    judged = rows(here, "verdicts")
    assert len(judged) == COUNT
    for row in judged:
        assert (row["failure"] is None) == (len(row["verdicts"]) == 3)
    responses = [answer.response["choices"][0]["message"]["content"] for answer in server.paid()]
    assert {record["response"]["choices"][0]["message"]["content"] for record in _kept(store)} <= set(responses)
    asked = len(server.delivered)
    run(here, JUDGE, environment(store, LVLMVA_OFFLINE="0"))
    again = server.paid()[asked:]
    failed = sum(row["failure"] is not None for row in judged)
    assert len(again) <= 2 * failed  # what has verdicts is not asked again


def test_three_pictures_reach_a_blind_critic(tmp_path: Path, server: Proxy) -> None:
    store = tmp_path / "store"
    here = project(
        tmp_path / "p",
        _url(server),
        3,
        critique={"max_failed_share": 1.0},
        endpoint={**LOCAL, "model": "gemma-3-270m-random-eyes", "token_limit": 150},
    )
    run(here, CRITIQUE, environment(store))
    assert [answer.status for answer in server.delivered] == [200] * len(server.delivered)
    assert [answer.pictures for answer in server.paid()] == [3] * len(server.paid())
    assert len({answer.body for answer in server.paid()}) == 3
    assert _booked(store) == _usage(server)
    for answer in server.paid():
        assert answer.response["usage"]["prompt_tokens"] > 3 * 16  # tokens of the pictures, besides the words
    for row in rows(here, "critiques"):
        assert (row["critique"] is None) == (row["failure"] is not None)


def test_a_server_without_a_vision_part_is_told_in_one_line(tmp_path: Path) -> None:
    with llama_server(tmp_path / "log", "-c", "4096") as url, counting_proxy(url) as proxy:
        here = project(tmp_path / "p", _url(proxy), 2, endpoint={**LOCAL, "token_limit": 50})
        said = run(here, CRITIQUE, environment(tmp_path / "store"), code=1)
        assert {answer.status for answer in proxy.delivered} == {500}
        assert "image input is not supported" in said
        assert "Traceback" not in said


def test_kills_of_dvc_repro_lose_nothing_and_buy_nothing_twice(tmp_path: Path, server: Proxy) -> None:
    """The whole process group is killed at random moments; what was paid is kept, but for what was under way."""
    clone = Project(tmp_path, {**QUICK, "rank.n_samples": 12})
    clone.repro("segment")
    settings = {**endpoint(_url(server)), **LOCAL}
    clone.set_params(
        {
            "critique.critic": "model",
            "critique.max_failed_share": 1.0,
            "critique.endpoint": {**settings, "model": "gemma-3-270m-random-eyes", **SHORT},
            "judge.judge": "model",
            "judge.max_failed_share": 1.0,
            "judge.max_attempts": 1,
            "judge.endpoint": {**settings, "token_limit": 120},
        }
    )
    draw, kills, after_answers = random.Random(0), [], 0
    for number in range(6):
        process = subprocess.Popen(
            ["dvc", "repro", "judge"],
            cwd=clone.folder,
            env=clone.environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # every third time anywhere, else once some answers came
        before, answers = len(server.delivered), 0 if number % 3 == 0 else draw.randint(1, 4)
        while process.poll() is None and len(server.delivered) < before + answers:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0.0, 2.0 if answers else 15.0))
        if process.poll() is None:
            kills.append(time.monotonic())
            after_answers += len(server.delivered) > before
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    clone.repro("judge")
    assert after_answers
    kept = {record["response"]["id"] for record in _kept(clone.folder / ".dvc" / "lvlmva-store", "calls", "unusable")}
    assert server.lost(kept, kills)[1] == 0
    critiques, verdicts = rows(clone.folder, "critiques"), rows(clone.folder, "verdicts")
    used = [row["record"] for row in critiques if row["record"]] + [
        row["records"][-1] for row in verdicts if row["verdicts"]
    ]
    assert used
    assert server.bought_after({record["response"]["id"] for record in used}) == 0
