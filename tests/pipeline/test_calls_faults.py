"""What a server can do to a paid run, through the real openai client: nothing is lost, bought twice or unbooked."""

import base64
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.budget import BudgetSpentError
from lvlmva_core.lvlm.calls import CallStore
from lvlmva_core.store import Store, digest
from tests.pipeline.calls import (
    COUNT,
    CRITIQUE,
    KEY,
    Server,
    critique_here,
    environment,
    judge_here,
    project,
    rows,
    run,
    write_params,
)

WORST = 0.0057  # USD that a critique may cost by the estimate: about 700 tokens in, 500 out
COST = 0.002  # that one costs: 1000 tokens in, 100 out


def _store(folder: Path) -> CallStore:
    return CallStore(Store(folder.parent / "store"))


def _kept(folder: Path) -> int:
    return sum(1 for _ in _store(folder).records())


def _booked(said: str) -> tuple[int, float]:
    found = re.findall(r"(\d+) calls \(.*?([0-9.]+) USD, [0-9.]+ s", said)
    return int(found[-1][0]), float(found[-1][1])


# what is answered under status 200 and is no answer; each is paid


def _whole(server: Server) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": "red: no"}, "finish_reason": "stop"}]}


UNREADABLE: dict[str, dict[str, Any]] = {
    "no choices": {"response": {"choices": []}},
    "server-sent events": {"text": 'data: {"choices": [{"delta": {"content": "red"}}]}\n\ndata: [DONE]\n\n'},
    "infinite number": {"text": '{"choices": [{"message": {"content": "red"}}], "x": 1e400}'},
    "half a surrogate": {"message": {"content": "red \ud83d"}},
    "cut off": {"text": '{"choices": [{"message": {"content": "re'},
    "Latin-1": {"base64": base64.b64encode('{"choices": [{"message": {"content": "ré"}}]}'.encode("latin-1")).decode()},
    "deep": {"text": "[" * 50_000},
    "text": {"text": "OK"},
    "an error": {"text": '{"error": {"message": "overloaded", "code": 502}, "choices": null}'},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_comes_under_200_is_booked_before_it_is_read(
    folder: Path, server: Server, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    any_share = {"max_failed_share": 1.0}
    write_params(folder, server, critique=any_share, endpoint={"max_cost_usd": 0.05, "retries": 6, "concurrency": 2})
    server.set(always=UNREADABLE[name])
    with pytest.raises(BudgetSpentError, match=r"max_cost_usd = 0\.05"):
        critique_here()
    calls, usd = _booked(capsys.readouterr().err)
    assert calls == server.paid()
    assert 0.03 < usd <= 0.05
    assert server.paid() * COST <= 0.05
    server.set(always=UNREADABLE[name])
    write_params(folder, server, critique=any_share, endpoint={"max_calls": 4, "retries": 6, "concurrency": 4})
    with pytest.raises(BudgetSpentError, match="max_calls = 4"):
        critique_here()
    assert server.paid() == 4


@pytest.mark.parametrize("status", [200, 201, 299])
def test_a_byte_order_mark_and_other_statuses_of_success_are_read(folder: Path, server: Server, status: int) -> None:
    completion = {
        "choices": [{"message": {"content": "red: yes, blue: no, yellow: no"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
    }
    marked = base64.b64encode(b"\xef\xbb\xbf" + json.dumps(completion).encode()).decode()
    server.set(always={"status": status, "base64": marked})
    critique_here()
    assert len(server.log()) == COUNT
    assert all(row["failure"] is None for row in rows(folder, "critiques"))


@pytest.mark.parametrize("concurrency", [1, 32])
@pytest.mark.parametrize("usage", [(26_000, 100), (1000, 9000)])
def test_usage_above_the_estimate_is_learnt_and_the_budget_holds(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    usage: tuple[int, int],
    concurrency: int,
) -> None:
    here = project(tmp_path / "project", server, 64, endpoint={"max_cost_usd": 0.5, "concurrency": concurrency})
    monkeypatch.chdir(here)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LVLMVA_TEST_API_KEY", KEY)
    server.set(usage={"prompt_tokens": usage[0], "completion_tokens": usage[1]}, latency_s=0.05, keep=False)
    each = (usage[0] * 1 + usage[1] * 10) / 1e6
    with pytest.raises(BudgetSpentError, match=r"max_cost_usd = 0\.5"):
        critique_here()
    calls, usd = _booked(capsys.readouterr().err)
    assert calls == server.paid()
    assert usd == pytest.approx(calls * each, abs=1e-4)
    in_flight = 1 if concurrency == 1 else int(0.5 / (4 * WORST))  # that four times the estimate lets through
    assert usd <= (0.5 if concurrency == 1 else max(0.5, in_flight * each)), calls


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": True, "completion_tokens": True},
        {"prompt_tokens": 1, "completion_tokens": 1},
        {"prompt_tokens": -5, "completion_tokens": -5},
        {"prompt_tokens": 10**400, "completion_tokens": 10**400},
        {"prompt_tokens": "7", "completion_tokens": None},
        {"prompt_tokens": [1], "completion_tokens": {}},
    ],
    ids=str,
)
def test_a_usage_that_is_none_books_the_estimate(
    folder: Path, server: Server, usage: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    server.set(usage=usage)
    critique_here()
    said = capsys.readouterr().err
    assert _kept(folder) == COUNT
    planned = re.search(r"at most ([0-9.]+) USD", said)
    assert planned
    assert _booked(said)[1] >= float(planned[1]) - 1e-4


def test_too_few_tokens_in_are_said_once_and_counted(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """As servers count that drop pictures, or cut the prompt off; one that states nothing is not accused."""
    shorter = {"usage": {"prompt_tokens": 300, "completion_tokens": 100}}
    server.set(always={"response": shorter, "only": 'the class "3"'})
    critique_here()
    said = capsys.readouterr().err
    assert said.count("tokens in than what was sent must take") == 1
    assert f"warning: critique.endpoint: 1 of {COUNT} answers state fewer" in said
    text = server.log()[0]["body"]["messages"][0]["content"][0]["text"]
    assert len(text) / 4 > 300  # so that what it says is true
    for usage in ({}, {"usage": None}, {"usage": {"prompt_tokens": 0}}):
        shutil.rmtree(folder.parent / "store")
        server.set(always={"response": usage}, usage=False)
        critique_here()
        assert "must take" not in capsys.readouterr().err
    server.set(usage={"prompt_tokens": 3, "completion_tokens": 20})  # a template that drops the critique
    judge_here()
    assert "judge.endpoint: 2 of 2 answers state fewer" in capsys.readouterr().err


def test_requests_that_get_no_answer_are_booked_since_they_may_be_charged(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(folder, server, endpoint={"timeout_s": 0.4, "concurrency": 1})
    server.set(faults=["hang:3"])
    critique_here()
    said = capsys.readouterr().err
    assert "1 requests got no answer, may be charged, and were booked as paid" in said
    assert _booked(said) == (COUNT + 1, pytest.approx(COUNT * COST + WORST, abs=0.001))


ODD: dict[str, dict[str, Any]] = {
    "a date that no calendar has": {
        "status": 429,
        "text": "{}",
        "headers": {"Retry-After": "Fri, 31 Dec 99999 00:00:00 GMT"},
    },
    "charset=hex": {"status": 500, "text": "{}", "headers": {"Content-Type": "application/json; charset=hex"}},
    "charset=idna": {"status": 400, "text": "é", "headers": {"Content-Type": "text/plain; charset=idna"}},
    "charset=hex under 200": {"headers": {"Content-Type": "application/json; charset=hex"}},
    "usage without end": {"response": {"usage": {"prompt_tokens": 10**400, "completion_tokens": 1}}},
    "broken gzip": {
        "base64": base64.b64encode(gzip.compress(b"{}")[:-6]).decode(),
        "headers": {"Content-Encoding": "gzip"},
    },
    "no gzip": {"text": "{}", "headers": {"Content-Encoding": "gzip"}},
}


@pytest.mark.parametrize("name", ODD)
def test_an_oddity_is_the_failure_of_one_call_at_most(folder: Path, server: Server, name: str) -> None:
    write_params(folder, server, critique={"max_failed_share": 0.2}, endpoint={"retries": 0})
    server.set(always={**ODD[name], "only": 'the class "3"'})
    critique_here()
    failed = [row for row in rows(folder, "critiques") if row["failure"]]
    assert [row["class_name"] for row in failed] in ([], ["3"])
    assert _kept(folder) == COUNT - len(failed)


def _refusal(status: int, message: str, code: str = "") -> dict[str, Any]:
    return {"status": status, "text": json.dumps({"error": {"message": message, "code": code}})}


OF_ONE: dict[str, Any] = {
    "a flagged picture": _refusal(403, "picture flagged by moderation"),
    "too long": _refusal(400, "This model's maximum context length is 8192 tokens", "context_length_exceeded"),
    "content policy": _refusal(400, "rejected by the safety system", "content_policy_violation"),
    "content policy through litellm": _refusal(400, "litellm.ContentPolicyViolationError: rejected", "400"),
    "too large": _refusal(413, "payload too large"),
    "not processable": _refusal(422, "unprocessable"),
    "a web page": {"text": "<html>Sorry</html>", "headers": {"Content-Type": "text/html"}},
    "unavailable": {"status": 502, "text": "HTTP 502: bad gateway"},
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OF_ONE)
def test_a_failure_of_one_sample_stays_with_it_where_others_succeed(
    folder: Path, server: Server, name: str, first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    concerned = "0" if first else "4"
    write_params(folder, server, critique={"max_failed_share": 0.2}, endpoint={"retries": 0, "concurrency": 1})
    server.set(always={**OF_ONE[name], "only": f'the class "{concerned}"'})
    critique_here()
    failed = [row for row in rows(folder, "critiques") if row["failure"]]
    assert [row["class_name"] for row in failed] == [concerned]
    assert "HTTP 502: HTTP 502" not in failed[0]["failure"]
    assert _kept(folder) == COUNT - 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("critique: 1 of 6 samples failed and are left out")
    assert "`lvlmva calls retry` and `dvc repro` ask again" in last


def test_a_reset_connection_stays_with_its_sample(folder: Path, server: Server) -> None:
    write_params(folder, server, critique={"max_failed_share": 0.2}, endpoint={"retries": 0, "concurrency": 1})
    server.set(faults=[None, "disconnect"])
    critique_here()
    assert sum(row["failure"] is not None for row in rows(folder, "critiques")) == 1


def test_a_key_that_stops_working_ends_the_run_before_all_have_failed(tmp_path: Path, server: Server) -> None:
    here = project(tmp_path / "p", server, 60, critique={"max_failed_share": 1.0}, endpoint={"concurrency": 2})
    server.set(faults=[None] * 5, always="unauthorized", keep=False)
    said = run(here, CRITIQUE, environment(tmp_path / "store"), code=1)
    assert "refuses the API key" in said.splitlines()[-1]
    # five answers and ten refusals in a row; the last answer may be slow and come among them, as late as after the
    # ninth, which begins the row anew; and one call may be under way beside the last refusal
    assert 15 <= len(server.log()) <= 5 + 9 + 10 + 1


def test_litellms_wrong_key_is_told_as_one(folder: Path, server: Server) -> None:
    server.set(always=_refusal(400, "Authentication Error, Invalid proxy server token passed", "400"))
    with pytest.raises(InputError, match=r"see the variable that critique\.endpoint\.api_key_variable names"):
        critique_here()


@pytest.mark.parametrize("fault", ["finish:length", "refusal", "finish:content_filter", "empty"])
def test_an_unusable_critique_is_bought_once_a_run_and_no_more_than_said(
    folder: Path, server: Server, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(folder, server, critique={"max_failed_share": 1.0, "max_attempts": 2})
    server.set(always=fault)
    for run_, bought in enumerate((COUNT, COUNT, 0)):
        server.set(always=fault)
        critique_here()
        assert server.paid() == bought, run_
    reasons = {row["failure"] for row in rows(folder, "critiques")}
    assert len(reasons) == 1
    assert "none of 2 answers is usable (critique.max_attempts)" in reasons.pop()
    write_params(folder, server, critique={"max_attempts": 3})
    server.set()
    capsys.readouterr()
    critique_here()
    assert server.paid() == COUNT
    assert f"{COUNT} answers were asked for beyond unusable ones" in capsys.readouterr().err
    before = Path("data/critiques.jsonl").read_bytes()
    write_params(folder, server, critique={"max_attempts": 3, "critic": "replay"})
    critique_here()
    assert Path("data/critiques.jsonl").read_bytes() == before
    assert _kept(folder) == COUNT


def test_replay_repeats_a_failure_that_was_paid(folder: Path, server: Server) -> None:
    write_params(folder, server, critique={"max_failed_share": 1.0})
    server.set(faults=["refusal", "finish:length"])
    critique_here()
    before = Path("data/critiques.jsonl").read_bytes()
    server.set()
    write_params(folder, server, critique={"max_failed_share": 1.0, "critic": "replay"})
    critique_here()
    assert Path("data/critiques.jsonl").read_bytes() == before
    assert server.log() == []


def test_a_text_that_names_no_region_is_no_critique(folder: Path, server: Server) -> None:
    write_params(folder, server, critique={"max_failed_share": 1.0})
    server.set(say="I'm sorry, but I can't assist with that request.")
    critique_here()
    assert {row["failure"] for row in rows(folder, "critiques")} == {"no critique: it names no region"}
    assert _kept(folder) == 0
    server.set()
    judge_here()
    assert server.log() == []  # no Judge makes verdicts of it


@pytest.mark.parametrize("kind", ["finish:length", "refusal", "finish:content_filter", "empty"])
def test_an_answer_of_the_judge_that_is_none_is_one_of_its_attempts(folder: Path, server: Server, kind: str) -> None:
    critique_here()
    write_params(folder, server, endpoint={"concurrency": 1})
    server.set(faults=[kind])
    judge_here()
    assert all(row["failure"] is None for row in rows(folder, "verdicts"))
    again = [entry["body"]["messages"] for entry in server.log() if len(entry["body"]["messages"]) > 1]
    assert [message["role"] for message in again[0]] == ["user", "assistant", "user"]
    server.set()
    judge_here()
    assert server.log() == []


def test_invalid_answers_in_the_store_are_gone_beyond_within_a_limit(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.set(say="red: yes, blue: no, yellow: no")
    critique_here()  # one critique for all, so that the Judge has one question
    write_params(folder, server, judge={"max_attempts": 3, "max_failed_share": 1.0})
    asked = []
    for _ in range(5):
        server.set(always="bad:maybe")
        judge_here()
        asked.append(server.paid())
    assert asked == [3, 3, 3, 1, 0]  # ten in all
    assert {row["failure"] for row in rows(folder, "verdicts")} == {
        "no verdict: no valid answer in 10 attempts (the verdict of red is neither yes nor no)"
    }
    shutil.rmtree(folder.parent / "store")
    server.set(say="red: yes, blue: no, yellow: no", always=None)
    critique_here()
    server.set(always="bad:maybe")
    judge_here()
    server.set()  # mended
    capsys.readouterr()
    judge_here()
    assert server.paid() == 1
    assert all(row["failure"] is None for row in rows(folder, "verdicts"))
    assert "answers were asked for beyond unusable ones in the store" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bare_list", "think", "words", "loud", "true", "more"])
def test_what_can_be_read_in_one_way_is_bought_once(folder: Path, server: Server, kind: str) -> None:
    critique_here()
    server.set()
    judge_here()
    expected = [row["verdicts"] for row in rows(folder, "verdicts")]
    bought = server.paid()
    for record in list(_store(folder).records()):
        if "response_format" in record["request"]["body"]:
            _store(folder).store.path("calls", record["key"], "json").unlink()
    server.set(always=f"bad:{kind}")
    judge_here()
    assert server.paid() == bought
    assert [row["verdicts"] for row in rows(folder, "verdicts")] == expected


def test_another_model_than_the_one_asked_for_is_said(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.set(always={"response": {"model": "gpt-3.5-\x1b[2Jcheap"}})
    critique_here()
    said = capsys.readouterr().err
    assert f"warning: critique.endpoint: {COUNT} answers came from 'gpt-3.5-\\u001b[2Jcheap'" in said
    assert "'tester' was asked for" in said
    server.set()
    shutil.rmtree(folder.parent / "store")
    critique_here()  # tester-served is the tester
    assert "warning" not in capsys.readouterr().err


def test_an_answer_in_parts_is_read(folder: Path, server: Server) -> None:
    parts = [{"type": "text", "text": "red: yes\nblue: no\n"}, {"type": "text", "text": "yellow: no"}]
    server.set(always={"message": {"content": parts}})
    critique_here()
    assert {row["critique"] for row in rows(folder, "critiques")} == {"red: yes\nblue: no\nyellow: no"}
    assert server.paid() == COUNT


def _disguises() -> dict[str, str]:
    escaped = "".join(f"\\u{ord(each):04x}" for each in KEY)
    return {
        "JSON escapes": escaped,
        "percent": "".join(f"%{ord(each):02X}" for each in KEY),
        "percent, slashes only": KEY.replace("/", "%2F"),
        "base64": base64.b64encode(KEY.encode()).decode(),
        "base64 of the header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
        "base64 with a user": base64.urlsafe_b64encode(f"me:{KEY}:x".encode()).decode(),
        "hex": KEY.encode().hex(),
        "HTML": "".join(f"&#x{ord(each):x};" for each in KEY),
    }


def _readable(text: str) -> list[str]:
    """A text, and what is in it where it is decoded by other means than the code's."""
    import html
    from urllib.parse import unquote

    found = [text, unquote(text), html.unescape(text), re.sub(r"\\+u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text)]
    for word in re.findall(r"[A-Za-z0-9+/_=-]{12,}", text):
        for start in range(4):
            body = word[start:].replace("-", "+").replace("_", "/").rstrip("=")
            whole = body[:-1] if len(body) % 4 == 1 else body
            found.append(base64.b64decode(whole + "=" * (-len(whole) % 4)).decode("latin-1"))
        if re.fullmatch(r"[0-9a-f]+", word):
            found.append(bytes.fromhex(word[: len(word) // 2 * 2]).decode("latin-1"))
    return found


@pytest.mark.parametrize("name", _disguises())
def test_a_key_in_disguise_is_found_where_it_is_kept_or_said(
    folder: Path, server: Server, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert any(KEY in found for found in _readable(_disguises()[name]))
    quoted = f"red blue yellow; your key: {_disguises()[name]} end"
    answer = json.dumps(_whole(server)).replace("red: no", quoted)  # escapes in JSON's own way where there are some
    server.set(always={"text": answer})
    critique_here()
    write_params(folder, server, critique={"max_failed_share": 1.0}, endpoint={"model": "other", "retries": 0})
    server.set(always={"status": 500, "text": json.dumps({"error": {"message": "@"}}).replace("@", quoted)})
    critique_here()
    server.set(always={"status": 400, "text": quoted})
    with pytest.raises(InputError, match="refuses the request") as caught:
        critique_here()
    captured = capsys.readouterr()
    texts = [captured.out, captured.err, str(caught.value)]
    texts += [path.read_text(errors="replace") for path in folder.parent.rglob("*.json*") if path.is_file()]
    assert len(texts) > COUNT + 3
    for text in texts:
        assert not [found for found in _readable(text) if KEY in found]


def test_a_key_that_cannot_be_sent_is_told_before_anything_is(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("sk-ü", "sk 1", "sk\u200b1", "sk\n1"):
        monkeypatch.setenv("LVLMVA_TEST_API_KEY", key)
        with pytest.raises(InputError, match="LVLMVA_TEST_API_KEY holds a character that no API key has"):
            critique_here()
    assert server.log() == []


def test_a_wait_without_end_is_said_in_words(folder: Path, server: Server) -> None:
    server.set(always="retry_after:1e99")
    with pytest.raises(InputError, match=r"asks to wait more than a week, longer than"):
        critique_here()


def test_what_was_paid_is_kept_elsewhere_where_the_store_cannot_be_written(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "calls").touch()  # where the folder of the records belongs
    with pytest.raises(InputError, match=r"cannot be written .*; answers that were paid are kept in .*unsaved"):
        critique_here()
    paid = server.paid()
    saved = next(tmp_path.glob("lvlmva-unsaved-*.jsonl"))
    assert 0 < paid == len(saved.read_text().splitlines()) <= 4
    (tmp_path / "store" / "calls").unlink()
    run(folder, f"lvlmva.cli calls import {saved}", environment(tmp_path / "store"))
    critique_here()
    assert server.paid() == COUNT


LONG = {"message": {"content": "red blue yellow: I go on and on. " * 2000}}  # 66 KB


def test_an_answer_that_no_file_can_take_is_said_to_be_lost_and_not_said_to_be_kept(
    tmp_path: Path, server: Server
) -> None:
    """With the kernel's own limit on the size of a file: writing stops in the middle of a record."""
    here, variables = project(tmp_path / "p", server, 6, endpoint={"concurrency": 1}), environment(tmp_path / "store")
    server.set(always={**LONG, "only": 'the class "3"'})
    words = ["prlimit", "--fsize=32768", sys.executable, "-m", *CRITIQUE.split()]
    done = subprocess.run(words, cwd=here, env={**variables, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    said = done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said
    assert "warning: critique.endpoint: 1 answers were paid and could be kept nowhere; they are lost" in said
    assert "could be kept nowhere" in said.splitlines()[-1]
    assert "are kept in" not in said
    assert server.paid() == 4
    assert _whole_records(tmp_path / "store") == 3
    assert [path.stat().st_size for path in tmp_path.glob("lvlmva-unsaved-*")] == [0]
    server.set()
    run(here, CRITIQUE, variables)
    assert server.paid() == 3  # the lost one, and two that were not asked about


def test_an_output_that_does_not_fit_is_one_line_and_costs_nothing_again(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 6), environment(tmp_path / "store")
    server.set(
        always={"message": {"content": "red blue yellow: I go on. " * 200}}
    )  # 5 KB, of which the limit takes six
    words = ["prlimit", "--fsize=32768", sys.executable, "-m", *CRITIQUE.split()]
    done = subprocess.run(words, cwd=here, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == (
        "error: critique: an output cannot be written (File too large); make room and repeat the command; what was "
        "paid for is in the store"
    )
    assert _whole_records(tmp_path / "store") == server.paid() == 6
    run(here, CRITIQUE, variables)
    assert server.paid() == 6


def _whole_records(store: Path) -> int:
    """Records in a store; none of them, and nothing half written, is anything else."""
    files = [path for path in (store / "calls").glob("??/*") if path.is_file()]
    for path in files:
        assert json.loads(path.read_bytes())["response"]["choices"]
    return len(files)


NO_MOUNT = subprocess.run(
    ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
).returncode


@pytest.mark.skipif(NO_MOUNT != 0, reason="no file system of one's own can be mounted here (unshare -rm)")
def test_a_disk_that_fills_up_loses_nothing_and_is_told_as_full(tmp_path: Path, server: Server) -> None:
    """A store on a disk of 160 KB: what does not fit is kept elsewhere, and taken in when there is room."""
    here, variables = project(tmp_path / "p", server, 6, endpoint={"concurrency": 2}), environment(tmp_path / "store")
    (tmp_path / "store").mkdir()
    server.set(always=LONG)
    script = (
        f"mount -t tmpfs -o size=160k tmpfs {tmp_path}/store; {sys.executable} -m {CRITIQUE}; code=$?; "
        f"cp -r {tmp_path}/store {tmp_path}/copy; exit $code"
    )
    words = ["unshare", "-rm", "bash", "-c", script]
    done = subprocess.run(words, cwd=here, env={**variables, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    said = done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said
    assert "the store cannot be written (No space left on device)" in said.splitlines()[-1]
    kept = _whole_records(tmp_path / "copy")
    saved = next(tmp_path.glob("lvlmva-unsaved-*.jsonl"))
    elsewhere = len(saved.read_bytes().splitlines())
    assert elsewhere > 0
    assert kept > 0
    assert kept + elsewhere == server.paid() < 6
    assert f"{elsewhere} answers were paid and are kept in {saved}" in said
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(tmp_path / "copy", tmp_path / "store")
    paid = server.paid()
    assert f"{elsewhere} new records" in run(here, f"lvlmva.cli calls import {saved}", variables)
    run(here, CRITIQUE, variables)
    assert server.paid() == 6 > paid


def test_records_without_an_answer_are_found_by_check_and_bought_anew_by_the_stage(
    folder: Path, server: Server
) -> None:
    """Whole by their digests, and no answers; one is nested so deeply that reading it is an error."""
    critique_here()
    variables = environment(folder.parent / "store")
    files = sorted((folder.parent / "store" / "calls").glob("??/*.json"))
    odd: list[Any] = [
        {"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": "red", "refusal": "I can't"}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": "red"}, "finish_reason": "length"}]},
        {},
    ]
    lines = []
    for file, response in zip(files, odd, strict=False):
        content = {**json.loads(file.read_bytes()), "response": response}
        content.pop("meta")
        content["sha256"] = digest({name: value for name, value in content.items() if name != "sha256"})
        lines.append(json.dumps(content))
        file.write_text(lines[-1])
    files[4].write_text("[" * 100_000)
    (folder / "odd.jsonl").write_text("\n".join(lines) + "\n")
    assert "4 records were refused" in run(folder, "lvlmva.cli calls import odd.jsonl", variables, code=1)
    assert "1 records are whole, 5 damaged" in run(folder, "lvlmva.cli calls check", variables, code=1)
    server.set()
    critique_here()
    assert server.paid() == 5
    assert all(row["failure"] is None and row["critique"] != "None" for row in rows(folder, "critiques"))


def test_an_address_with_a_key_in_it_is_refused_without_showing_it(folder: Path, server: Server) -> None:
    write_params(folder, server, endpoint={"base_url": f"{server.url}/v1?api_key=sk-1234abcd"})
    said = run(folder, CRITIQUE, environment(folder.parent / "store"), code=1)
    assert "base_url: api_key looks like a credential; name its variable in api_key_variable" in said
    assert "sk-1234abcd" not in said
    assert server.log() == []


FLEX = {
    "service_tier": "flex",
    "tier_usd_per_million_input_tokens": 0.5,
    "tier_usd_per_million_output_tokens": 5.0,
}


def test_the_flex_tier_is_asked_for_at_its_price_and_leaves_the_key_alone(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(folder, server, endpoint=FLEX)
    critique_here()
    assert {entry["body"]["service_tier"] for entry in server.log()} == {"flex"}
    said = capsys.readouterr().err
    assert _booked(said)[1] == pytest.approx(COUNT * COST / 2)
    assert "if all are served as 'flex'" in said
    for record in _store(folder).records():
        assert "service_tier" not in record["request"]["body"]
        assert record["meta"]["service_tier"] == "flex"
        assert record["response"]["service_tier"] == "flex"
    server.set()
    write_params(folder, server)
    critique_here()
    assert server.log() == []


def test_a_tier_that_the_server_does_not_confirm_is_booked_at_the_dearer_price(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(folder, server, endpoint=FLEX)
    for tier in ("default", None):
        shutil.rmtree(folder.parent / "store", ignore_errors=True)
        server.set(always={"response": {"service_tier": tier}})
        critique_here()
        assert _booked(capsys.readouterr().err)[1] == pytest.approx(COUNT * COST)


def test_without_capacity_it_waits_or_goes_on_at_the_standard_tier_as_set(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(folder, server, endpoint={**FLEX, "retries": 0, "concurrency": 1})
    server.set(faults=["no_capacity", "no_capacity"])
    critique_here()  # two waits are no failure, though no retry is allowed
    assert len(server.log()) == COUNT + 2
    assert all(row["failure"] is None for row in rows(folder, "critiques"))
    shutil.rmtree(folder.parent / "store")
    write_params(folder, server, endpoint={**FLEX, "without_capacity": "standard", "retries": 0})
    server.set(faults=["no_capacity", "no_capacity"])
    capsys.readouterr()
    critique_here()
    tiers = [entry["body"]["service_tier"] for entry in server.log() if entry["paid"]]
    assert sorted(tiers) == ["default"] * 2 + ["flex"] * (COUNT - 2)
    said = capsys.readouterr().err
    assert "2 requests went to the standard tier at its price, since 'flex' had no capacity" in said
    assert _booked(said)[1] == pytest.approx(2 * COST + (COUNT - 2) * COST / 2)
    bought = sorted(record["meta"]["service_tier"] for record in _store(folder).records())
    assert bought == sorted(tiers)


def test_an_endpoint_needs_an_address_and_a_model_only(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((folder / "params.yaml").read_text())
    short = {"base_url": f"{server.url}/v1", "model": "tester"}
    content["critique"] = {"critic": "model", "prompts": "decoy_digits", "endpoint": short}
    content["judge"] = {"judge": "model", "prompts": "decoy_digits", "endpoint": short}
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    critique_here()
    judge_here()
    assert all(row["failure"] is None for row in rows(folder, "verdicts"))
    assert np.unique([entry["headers"]["authorization"] for entry in server.log()]).tolist() == ["Bearer none"]
    assert "unknown price" not in capsys.readouterr().err  # of this machine


def test_an_unknown_price_is_said_before_anything_is_sent(folder: Path, server: Server) -> None:
    no_price = {"usd_per_million_input_tokens": None, "base_url": "https://models.invalid/v1"}
    write_params(folder, server, endpoint=no_price)
    said = run(folder, CRITIQUE + " --dry-run", environment(folder.parent / "store"))
    assert "at an unknown price (critique.endpoint.usd_per_million_input_tokens" in said
    assert "max_cost_usd cannot hold, max_calls = 1000 does" in said
