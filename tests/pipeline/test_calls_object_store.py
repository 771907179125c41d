"""Answers shared over S3: machines that ask at once, lost connections, kills, and what stands where two differ."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lvlmva.calls import pull, push
from lvlmva_core import shared_store
from lvlmva_core.errors import InputError
from lvlmva_core.shared_store import UnreachableError
from tests.pipeline.calls import COUNT, CRITIQUE, KEY, Server, critique_here, environment, project, rows
from tests.s3 import BUCKET, S3, SECRET, Proxy, running_s3

Be = Callable[..., Path]


@pytest.fixture
def be(tmp_path: Path, s3: S3, server: Server, monkeypatch: pytest.MonkeyPatch) -> Be:
    """Be one of several machines that share a store: each has a project and a local store of its own."""

    def become(name: str, *, port: int | None = None, shares: bool = True) -> Path:
        folder = project(tmp_path / name, server, COUNT, critique={"max_failed_share": 1.0})
        variables = environment(tmp_path / f"store-{name}", **s3.variables(tmp_path.name, port))
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.delenv("LVLMVA_OFFLINE", raising=False)
        if not shares:
            monkeypatch.delenv("LVLMVA_SHARED_STORE")
        monkeypatch.chdir(folder)
        return folder

    return become


def _kinds(s3: S3, prefix: str) -> Counter[str]:
    """How many objects of each kind lie there."""
    return Counter(key.partition("/")[0] for key in s3.keys(prefix))


def _kept(store: Path) -> dict[str, str]:
    """key -> id of its answer, of what a machine has."""
    return {path.stem: json.loads(path.read_bytes())["response"]["id"] for path in store.glob("calls/??/*.json")}


def _start(folder: Path, claim_s: float) -> "subprocess.Popen[bytes]":
    """The stage as a process, with claims that run out sooner than usual."""
    code = (
        f"import sys, runpy, lvlmva_core.shared_store as shared; shared.CLAIM_S = {claim_s}; "
        f"sys.argv = {CRITIQUE.split()!r}; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen([sys.executable, "-c", code], cwd=folder, stderr=said)


def test_two_machines_at_once_buy_each_call_once_and_write_the_same(
    be: Be, s3: S3, server: Server, tmp_path: Path
) -> None:
    server.set(latency_s=0.3)
    machines = [_start(be(name), shared_store.CLAIM_S) for name in ("one", "two")]
    codes = [machine.wait(timeout=300) for machine in machines]
    said = "".join((tmp_path / name / "said.txt").read_text() for name in ("one", "two"))
    assert codes == [0, 0], said
    assert len(server.log()) == COUNT, said
    one, two = ((tmp_path / name / "data" / "critiques.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    assert _kinds(s3, tmp_path.name) == {"calls": COUNT, "conditional": 1}  # and no claim is left


def test_nothing_of_a_patient_or_a_secret_reaches_the_shared_store(be: Be, s3: S3, tmp_path: Path) -> None:
    be("one")
    critique_here()
    client = s3.client()
    names = s3.keys(tmp_path.name)
    content = b"".join(client.get_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{key}")["Body"].read() for key in names)
    assert content.count(b'"choices"') == COUNT
    for word in ("patient-", "secret_file", KEY, SECRET):
        assert word.encode() not in content
    assert b"patient-" in b"".join(path.read_bytes() for path in tmp_path.glob("store-one/calls/??/*"))


def test_after_a_kill_another_machine_buys_again_no_more_than_was_in_flight(
    be: Be, s3: S3, server: Server, tmp_path: Path
) -> None:
    server.set(latency_s=0.4)
    machine = _start(be("one"), 1.0)
    while server.paid() < 1 or not server.count()[1]:
        time.sleep(0.01)
    machine.send_signal(signal.SIGKILL)
    machine.wait()
    while server.count()[1]:
        time.sleep(0.01)
    before = [entry["sha256"] for entry in server.log()]
    shared = _kinds(s3, tmp_path.name)["calls"]
    be("two")
    critique_here()
    asked = Counter(entry["sha256"] for entry in server.log())
    assert len(asked) == COUNT
    assert sum(asked.values()) - COUNT == len(before) - shared <= 4  # concurrency
    assert _kinds(s3, tmp_path.name) == {"calls": COUNT, "conditional": 1}


def test_without_a_connection_nothing_is_bought_and_what_is_here_still_serves(
    be: Be, s3: S3, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = Proxy(s3.port)
    proxy.fail("refuse")
    be("one", port=proxy.port)
    with pytest.raises(
        UnreachableError, match=r"cannot be reached \(\w+\); mend the connection, or unset LVLMVA_SHARED"
    ):
        critique_here()
    assert server.log() == []
    proxy.fail("")
    critique_here()
    assert len(server.log()) == COUNT
    proxy.fail("refuse")
    capsys.readouterr()
    critique_here()
    said = capsys.readouterr().err
    assert "warning: critique.endpoint: s3://" in said
    assert "0 calls to buy" in said
    assert SECRET not in said


@pytest.mark.long
def test_an_answer_that_was_paid_when_the_connection_broke_is_kept_and_shared_later(
    be: Be, s3: S3, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.set(latency_s=0.5)
    proxy = Proxy(s3.port)
    be("one", port=proxy.port)

    def break_while_asked() -> None:
        while not server.count()[0]:
            time.sleep(0.01)
        proxy.fail("refuse")

    breaking = threading.Thread(target=break_while_asked)
    breaking.start()
    with pytest.raises(UnreachableError, match="cannot be reached"):
        critique_here()
    breaking.join()
    paid = server.paid()
    assert 0 < paid < COUNT
    assert len(_kept(tmp_path / "store-one")) == paid
    assert _kinds(s3, tmp_path.name)["calls"] == 0
    assert f"{paid} answers are on this machine and did not reach the shared store" in capsys.readouterr().err
    proxy.fail("")
    critique_here()
    assert len(server.log()) == COUNT
    assert f"{paid} answers put into s3://" in capsys.readouterr().err
    be("two")
    critique_here()
    assert len(server.log()) == COUNT


@pytest.mark.long
def test_connections_that_break_off_in_the_middle_cost_nothing(be: Be, s3: S3, server: Server) -> None:
    proxy, stopped, generator = Proxy(s3.port), threading.Event(), random.Random(0)
    be("one", port=proxy.port)

    def disturb() -> None:
        while True:
            proxy.fail(generator.choice(["request", "answer"]), generator.randrange(1500), times=1)
            if stopped.wait(0.5):
                return

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        critique_here()
    finally:
        stopped.set()
        disturbing.join()
    assert proxy.lost > 0
    assert Counter(entry["sha256"] for entry in server.log()).most_common(1)[0][1] == 1
    be("two")
    critique_here()
    assert len(server.log()) == COUNT


def test_what_was_shared_first_stands_for_both(be: Be, server: Server, tmp_path: Path) -> None:
    one = be("one", shares=False)
    server.set(say="red: yes\nblue: yes\nyellow: no")
    critique_here()
    alone = [row["critique"] for row in rows(one, "critiques")]
    two = be("two")
    server.set(say="I had a second thought.\nred: yes\nblue: no\nyellow: no")
    critique_here()
    server.set()
    be("one")
    critique_here()
    assert server.log() == []
    assert rows(one, "critiques") == rows(two, "critiques")
    assert [row["critique"] for row in rows(one, "critiques")] != alone
    assert _kept(tmp_path / "store-one") == _kept(tmp_path / "store-two")


def test_refusals_are_shared_as_on_one_machine(
    be: Be, s3: S3, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    be("one")
    server.set(faults=["refusal"] * 2)
    critique_here()
    asked, kinds = len(server.log()), _kinds(s3, tmp_path.name)
    assert kinds["unusable"] == 2
    assert kinds["unusable"] + kinds["calls"] == asked == kinds.total() - 1
    be("two")
    critique_here()
    assert len(server.log()) == asked + 2  # another answer is asked for, as it would be on machine one
    assert "2 answers were asked for beyond unusable ones in the store" in capsys.readouterr().err


def test_a_plan_puts_nothing_and_replay_finds_what_others_bought(
    be: Be, s3: S3, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be("one", shares=False)
    critique_here()
    be("one")
    critique_here(dry_run=True)
    assert _kinds(s3, tmp_path.name)["calls"] == 0
    critique_here()
    server.set()
    be("two")
    monkeypatch.setenv("LVLMVA_OFFLINE", "1")
    critique_here()
    assert server.log() == []


def test_push_mends_what_is_damaged_there_and_pull_takes_all(
    be: Be,
    s3: S3,
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    be("one")
    critique_here()
    damaged = min(s3.keys(f"{tmp_path.name}/calls"))
    s3.client().put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/calls/{damaged}", Body=b'{"choices": []}')
    be("two")
    server.set()
    critique_here()
    assert len(server.log()) == 1  # bought anew, and put in the place of the damaged one
    assert "is damaged there" in caplog.text
    be("one")
    push()
    assert capsys.readouterr().out == "0 answers put into the shared store, 1 taken from it\n"
    be("three")
    pull()
    assert capsys.readouterr().out == f"0 answers put into the shared store, {COUNT} taken from it\n"
    assert _kept(tmp_path / "store-one") == _kept(tmp_path / "store-two") == _kept(tmp_path / "store-three")


def test_mistakes_are_named_before_anything_is_bought(
    be: Be, s3: S3, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    be("one")
    for address, told in (
        ("gs://bucket/x", r"lies on S3 \(s3://bucket/prefix\), not on 'gs://'"),
        ("somewhere", "lies on S3"),
        (f"s3://user:{SECRET}@bucket/x", "and nothing else; no user, no key"),
        ("s3://absent/x", "no such bucket"),
    ):
        monkeypatch.setenv("LVLMVA_SHARED_STORE", address)
        with pytest.raises(InputError, match=told) as caught:
            critique_here()
        assert SECRET not in str(caught.value)
    be("one")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(UnreachableError, match="no credentials; see AWS_PROFILE"):
        critique_here()
    be("one")
    monkeypatch.setenv("LVLMVA_STORE", "s3://bucket/x")
    with pytest.raises(InputError, match="named by LVLMVA_SHARED_STORE"):
        critique_here()
    assert server.log() == []


def test_a_server_without_conditional_writes_is_refused(be: Be, server: Server) -> None:
    with running_s3("--without-conditions") as other:
        be("one", port=other.port)
        with pytest.raises(UnreachableError, match="ignores If-None-Match or If-Match"):
            critique_here()
    assert server.log() == []
