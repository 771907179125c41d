"""Batches: exported, submitted once whatever is killed, fetched in any order, each answer checked and bought once."""

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.calls import CRITIQUE, JUDGE, Server, environment, project, rows, run, running_server, start


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        server.set()
        yield server


def _asked(server: Server) -> Counter[str]:
    return Counter(entry["asked"] for entry in server.log() if entry["paid"])


def _export(here: Path, variables: dict[str, str], stage: str = CRITIQUE) -> str:
    said = run(here, f"{stage} --export-batch out", variables)
    assert "nothing was sent" in said
    return " ".join(str(file.relative_to(here)) for file in sorted((here / "out").glob("*.jsonl")))


def test_1000_calls_half_of_them_lost_are_each_bought_once(tmp_path: Path, server: Server) -> None:
    here = project(tmp_path / "p", server, 1000, endpoint={"concurrency": 16, "max_calls": 2000})
    variables = environment(tmp_path / "store")
    files = _export(here, variables)
    lines = [json.loads(line) for line in (here / files).read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == 1000
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    run(here, f"lvlmva.cli calls submit {files}", variables)
    said = run(here, CRITIQUE, variables, code=1)
    assert "1000 of the calls to buy are under way in a batch" in said
    batch = {"status": "expired", "lose": 400, "errors": 100, "twice": 9, "strange": 7, "shuffle": True}
    server.set(batch=batch)
    said = run(here, "lvlmva.cli calls fetch", variables)
    assert "100 failed, 400 lost, 9 repeated, 500 stored, 7 strangers; 1.0000 USD" in said  # 1000 in, 100 out each
    bought = _asked(server)
    said = run(here, CRITIQUE, variables)
    assert "500 answers in the store, 500 calls to buy" in said
    total = _asked(server)
    assert len(total) == 1000
    assert set(total.values()) == {1}
    assert len(bought) == 500
    assert len(rows(here, "critiques")) == 1000


def test_a_batch_with_all_answers_leaves_nothing_to_buy_for_critic_and_judge(tmp_path: Path, server: Server) -> None:
    prices = {"batch_usd_per_million_input_tokens": 0.5, "batch_usd_per_million_output_tokens": 5.0}
    here, variables = project(tmp_path / "p", server, 6, endpoint=prices), environment(tmp_path / "store")
    for stage in (CRITIQUE, JUDGE):
        files = _export(here, variables, stage)
        run(here, f"lvlmva.cli calls submit {files}", variables)
        server.set(batch={"status": "in_progress"})
        assert "under way" in run(here, "lvlmva.cli calls fetch", variables)
        assert "in_progress" in run(here, "lvlmva.cli calls status", variables)
        server.set()
        count = len((here / files).read_bytes().splitlines())  # critiques of one text need one verdict
        said = run(here, "lvlmva.cli calls fetch", variables)
        assert f"{count} stored; {count * 0.001:.4f} USD" in said  # half of what single calls cost
        (here / files).unlink()
        server.set()
        assert " 0 calls to buy" in run(here, stage, variables)
        assert server.log() == []
    records = [json.loads(file.read_text()) for file in (tmp_path / "store" / "calls").glob("??/*.json")]
    assert all(record["meta"]["batch"].startswith("batch_") for record in records)
    assert all(row["failure"] is None for row in rows(here, "verdicts"))


@pytest.mark.parametrize("place", ["upload", "before_create", "after_create"])
def test_a_submit_that_is_killed_submits_nothing_twice(tmp_path: Path, server: Server, place: str) -> None:
    here, variables = project(tmp_path / "p", server, 4), environment(tmp_path / "store")
    files = _export(here, variables)
    server.set(batch={"hang": place})
    process = start(here, f"lvlmva.cli calls submit {files}", variables)
    while not server.log():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    server.set()
    assert "under way in a batch" in run(here, CRITIQUE, variables, code=1)
    run(here, f"lvlmva.cli calls submit {files}", variables)
    run(here, f"lvlmva.cli calls submit {files}", variables)
    assert "4 stored" in run(here, "lvlmva.cli calls fetch", variables)
    assert sorted(_asked(server).values()) == [1, 1, 1, 1]


def test_a_fetch_that_is_killed_loses_nothing(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 4), environment(tmp_path / "store")
    run(here, f"lvlmva.cli calls submit {_export(here, variables)}", variables)
    server.set(batch={"hang": "content"})
    process = start(here, "lvlmva.cli calls fetch", variables)
    while not any(entry["path"] == "content" for entry in server.log()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    server.set()
    assert "4 stored" in run(here, "lvlmva.cli calls fetch", variables)
    assert server.log() == []


def test_answers_of_a_batch_are_checked_as_single_ones(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 4), environment(tmp_path / "store")
    run(here, f"lvlmva.cli calls submit {_export(here, variables)}", variables)
    server.set(batch={"say": "I see nothing."})
    assert "4 unusable" in run(here, "lvlmva.cli calls fetch", variables)
    assert not list((tmp_path / "store" / "calls").glob("??/*.json"))


def test_the_budget_holds_for_what_is_exported(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 6, endpoint={"max_calls": 2}), environment(tmp_path / "store")
    said = run(here, f"{CRITIQUE} --export-batch out", variables)
    assert "2 calls exported" in said
    assert "4 calls are left out: beyond max_calls = 2" in said


def test_results_of_a_run_without_a_host_are_imported(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 4), environment(tmp_path / "store")
    asked = [json.loads(line) for line in (here / _export(here, variables)).read_text().splitlines()]
    body = {"choices": [{"message": {"content": "red: yes"}, "finish_reason": "stop"}]}
    results = [
        {"custom_id": each["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}
        for each in asked[:3]
    ]
    (here / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in results))
    assert "1 lost, 3 stored" in run(here, "lvlmva.cli calls import-batch results.jsonl", variables)
    assert "3 answers in the store, 1 calls to buy" in run(here, CRITIQUE, variables)
