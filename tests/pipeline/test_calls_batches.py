"""Batches: exported, submitted once whatever is killed, fetched in any order, each answer checked and bought once."""

import base64
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lvlmva.batches import fetch, submit
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.batches import export_calls, read_ledger
from lvlmva_core.lvlm.calls import Call, Message
from lvlmva_core.lvlm.client import Question
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.store import Store
from stages.judge import judge
from tests.pipeline.calls import (
    CRITIQUE,
    JUDGE,
    KEY,
    Server,
    critique_here,
    environment,
    judge_here,
    project,
    rows,
    run,
    running_server,
    start,
)
from tests.pipeline.test_calls_shared import _first as first_clone

ENDPOINT = Endpoint(base_url="http://127.0.0.1:1/v1", model="m")


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


@pytest.mark.long
def test_1000_calls_half_of_them_lost_are_each_bought_once(tmp_path: Path, server: Server) -> None:
    here = project(tmp_path / "p", server, 1000, endpoint={"concurrency": 16, "max_calls": 2000, "timeout_s": 200.0})
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


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("upload", marks=pytest.mark.long),
        pytest.param("before_create", marks=pytest.mark.long),
        "after_create",
    ],
)
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


def test_second_attempts_of_the_judge_go_into_the_next_batch(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    critique_here()
    data = Path("data")

    def one_batch(said: str | None) -> list[dict[str, Any]]:
        """Export what the Judge is to be asked, submit, fetch; the requests."""
        shutil.rmtree("out", ignore_errors=True)
        judge(
            Path("params.yaml"), data / "critiques.jsonl", Path("prompts"), data / "v", data / "m", False, Path("out")
        )
        (file,) = Path("out").glob("judge-*.jsonl")
        submit([file], Path("params.yaml"))
        server.set(batch={"say": said})
        fetch(Path("params.yaml"))
        return [json.loads(line)["body"] for line in file.read_text().splitlines()]

    first = one_batch("It is hard to say.")  # paid, kept, and no verdicts
    second = one_batch(None)
    assert [len(body["messages"]) for body in first] == [1] * len(first)
    assert [[turn["role"] for turn in body["messages"]] for body in second] == [["user", "assistant", "user"]] * len(
        first
    )
    assert {body["messages"][1]["content"] for body in second} == {"It is hard to say."}
    server.set()
    judge_here()
    assert server.log() == []
    assert all(row["failure"] is None and len(row["records"]) == 2 for row in rows(folder, "verdicts"))


def test_a_batch_that_is_cancelled_keeps_what_was_answered(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 6), environment(tmp_path / "store")
    run(here, f"lvlmva.cli calls submit {_export(here, variables)}", variables)
    server.set(batch={"status": "in_progress", "lose": 3, "errors": 1})
    assert "no batch 'batch_9' is under way" in run(here, "lvlmva.cli calls cancel batch_9", variables, code=1)
    assert "batch_0: cancelling" in run(here, "lvlmva.cli calls cancel batch_0", variables)
    assert "under way in a batch" in run(here, CRITIQUE, variables, code=1)
    assert "1 failed, 3 lost, 2 stored" in run(here, "lvlmva.cli calls fetch", variables)
    assert "no batch is under way" in run(here, "lvlmva.cli calls cancel", variables)
    assert "2 answers in the store, 4 calls to buy" in run(here, CRITIQUE, variables)
    assert sorted(_asked(server).values()) == [1] * 6


def test_cancelling_what_has_ended_is_no_error(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 2), environment(tmp_path / "store")
    run(here, f"lvlmva.cli calls submit {_export(here, variables)}", variables)
    assert "batch_0: completed" in run(here, "lvlmva.cli calls cancel", variables)
    assert "2 stored" in run(here, "lvlmva.cli calls fetch", variables)


def test_the_key_is_removed_from_all_that_goes_wrong_with_a_batch(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 4), environment(tmp_path / "store")
    files = _export(here, variables)
    disguised = base64.b64encode(KEY.encode()).decode()
    message = f"bad key {{key}}, that is {disguised}"
    server.set(batch={"refuse": 401, "message": message})
    said = run(here, f"lvlmva.cli calls submit {files}", variables, code=1)
    assert "HTTP 401: bad key [API key removed], that is [API key removed]; the ledger is kept" in said
    server.set(batch={"status": "failed", "errors": 4, "message": message})
    run(here, f"lvlmva.cli calls submit {files}", variables)
    told = run(here, "lvlmva.cli calls status", variables)
    assert "failed, 0 answered, 4 failed of 4; bad key [API key removed], that is" in told
    said = run(here, "lvlmva.cli calls fetch", variables)
    assert "4 failed" in said
    failures = (tmp_path / "store" / "failures.jsonl").read_text()
    assert failures.count("batch_expired bad key [API key removed], that is [API key removed]") == 4
    texts = [said, told, *(path.read_text(errors="replace") for path in tmp_path.rglob("*.json*") if path.is_file())]
    assert not [text for text in texts if KEY in text or disguised in text]


def test_a_user_buys_in_batches_from_a_project_under_dvc(tmp_path: Path, server: Server) -> None:
    one = first_clone(tmp_path, server, {"critique": CRITIQUE, "judge": JUDGE})
    said = one.run("lvlmva calls export-batch out -S critique.endpoint.max_calls=4")
    assert "4 calls exported" in said
    assert "2 calls are left out: beyond max_calls = 4" in said
    for file in (one.folder / "out").iterdir():
        file.unlink()
    assert "6 calls exported" in one.run("lvlmva calls export-batch out")
    (file,) = (one.folder / "out").glob("critique-*.jsonl")
    one.run(f"lvlmva calls submit {file}")
    assert "6 stored" in one.run("lvlmva calls fetch")
    one.run("dvc repro --quiet critique")
    assert "2 calls exported" in one.run("lvlmva calls export-batch judged --stage judge")
    (file,) = (one.folder / "judged").glob("judge-*.jsonl")
    one.run(f"lvlmva calls submit {file}")
    assert "2 stored" in one.run("lvlmva calls fetch")
    server.set()
    one.run("dvc repro --quiet")
    assert server.log() == []
    assert all(row["failure"] is None for row in rows(one.folder, "verdicts"))


def _questions(count: int, changes: dict[str, str] | None = None) -> list[Question]:
    """Questions of 100 or so bytes more each, and one of `changes` in the place of its number."""
    calls = [
        Call(
            "m", "1", (Message("user", ((changes or {}).get(str(n), f"{n} " + "x" * 100 * n),)),), {"max_tokens": 9}, 0
        )
        for n in range(count)
    ]
    return [Question(call.keys(), lambda call=call: call, f"sample {n}") for n, call in enumerate(calls)]  # type: ignore[misc]


@pytest.mark.parametrize(("most_requests", "most_bytes"), [(3, 10**6), (50, 1500), (2, 1500), (50, 10**6)])
def test_files_are_split_at_the_limits_of_the_service(tmp_path: Path, most_requests: int, most_bytes: int) -> None:
    asked = _questions(10)
    limits = {"most_requests": most_requests, "most_bytes": most_bytes}
    store = Store(tmp_path / "store")
    found = export_calls(store, [*asked, asked[0]], ENDPOINT, "critique.endpoint", tmp_path / "out", rate=1.0, **limits)
    lines = [file.read_bytes().splitlines(keepends=True) for file in found.files]
    for part, after in zip(lines, [*lines[1:], None], strict=True):
        assert len(part) <= most_requests
        assert sum(map(len, part)) <= most_bytes
        if after:  # none is smaller than it has to be
            assert len(part) == most_requests or sum(map(len, part)) + len(after[0]) > most_bytes
    ids = [json.loads(line)["custom_id"] for part in lines for line in part]
    assert ids == [question.keys[0] for question in asked]  # each once, in order
    assert [sorted(batch.keys) for batch in read_ledger(store)] == sorted(
        [sorted(json.loads(line)["custom_id"] for line in part) for part in lines],
        key=lambda keys: next(batch.digest for batch in found.batches if batch.keys == keys),
    )
    assert sorted(tmp_path.joinpath("out").iterdir()) == sorted(found.files)


def test_one_request_that_no_file_can_hold_is_named_and_leaves_no_half_file(tmp_path: Path) -> None:
    asked = _questions(4, {"2": "y" * 5000})
    with pytest.raises(InputError, match="a request about sample 2 is larger than 2000 bytes"):
        export_calls(
            Store(tmp_path / "s"), asked, ENDPOINT, "judge.endpoint", tmp_path / "out", rate=1.0, most_bytes=2000
        )
    assert list((tmp_path / "out").iterdir()) == []
