"""Nothing that was paid is paid again: kills, Ctrl-C, larger N, and several processes on one store."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.calls import (
    CRITIQUE,
    JUDGE,
    KEY,
    ROOT,
    Server,
    environment,
    project,
    rows,
    run,
    running_server,
    start,
    write_data,
)

CONCURRENCY = 16


def _bought(store: Path) -> int:
    return len(list((store / "calls").glob("??/*.json")))


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_256_calls_ended_at_200_go_on_where_they_stopped(tmp_path: Path, ending: signal.Signals, code: int) -> None:
    with running_server() as server:  # of its own, since requests go on hanging in it
        _end_at_200(tmp_path, server, ending, code)


def _end_at_200(tmp_path: Path, server: Server, ending: signal.Signals, code: int) -> None:
    here, store = project(tmp_path / "p", server, 256, endpoint={"concurrency": CONCURRENCY}), tmp_path / "store"
    server.set(faults=[None] * 216 + ["hang:60"] * CONCURRENCY)  # so that it cannot finish before it is ended
    process = start(here, CRITIQUE, environment(store))
    while _bought(store) < 200:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(ending)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    assert "Traceback" not in said
    bought = _bought(store)
    assert 200 <= bought < 256
    assert len(server.log()) - bought <= CONCURRENCY  # those in flight are all that is lost
    assert not (here / "data" / "critiques.jsonl").exists()
    server.set()
    run(here, CRITIQUE, environment(store))
    assert len(server.log()) == 256 - bought
    assert len(rows(here, "critiques")) == 256


def test_a_larger_alignment_set_asks_about_what_is_new(tmp_path: Path, server: Server) -> None:
    here, store = project(tmp_path / "p", server, 256, endpoint={"concurrency": CONCURRENCY}), tmp_path / "store"
    run(here, CRITIQUE, environment(store))
    assert len(server.log()) == 256
    before = rows(here, "critiques")
    write_data(here, 300)
    server.set()
    said = run(here, CRITIQUE, environment(store))
    assert "256 answers in the store, 44 calls to buy" in said
    assert len(server.log()) == 44
    assert rows(here, "critiques")[:256] == before


def test_processes_on_one_store_buy_each_call_once(tmp_path: Path, server: Server) -> None:
    server.set(latency_s=0.3)
    store = tmp_path / "store"
    folders = [project(tmp_path / name, server, 40) for name in "abc"]
    processes = [start(folder, CRITIQUE, environment(store)) for folder in folders]
    for process in processes:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
    assert len(server.log()) == 40
    outputs = {(folder / "data" / "critiques.jsonl").read_bytes() for folder in folders}
    assert len(outputs) == 1
    assert not list((store / "locks").iterdir())


def test_concurrency_is_what_params_say(tmp_path: Path, server: Server) -> None:
    here = project(tmp_path / "p", server, 24, endpoint={"concurrency": 6})
    server.set(latency_s=0.2)
    run(here, CRITIQUE, environment(tmp_path / "store"))
    assert len(server.log()) == 24
    assert server.most_at_once() == 6


def test_a_users_mistake_is_one_line_without_a_traceback_or_the_key(tmp_path: Path, server: Server) -> None:
    here = project(tmp_path / "p", server, 4)
    server.set(always="unauthorized")
    said = run(here, CRITIQUE, environment(tmp_path / "store"), code=1)
    assert said.splitlines()[-1].startswith("error: critique: ")
    assert "Traceback" not in said
    assert KEY not in said


def test_the_command_lists_shows_checks_moves_and_plans_calls(tmp_path: Path, server: Server) -> None:
    here, store = project(tmp_path / "p", server, 4), tmp_path / "store"
    variables = environment(store)
    run(here, CRITIQUE, variables)
    run(here, JUDGE, variables)
    listed = run(here, "lvlmva.cli calls list --model tester", variables).splitlines()
    assert len(listed) == _bought(store)
    one = run(here, "lvlmva.cli calls list --sample patient-0002", variables).split()
    assert one[1] == "tester"
    shown = run(here, f"lvlmva.cli calls show {one[0]}", variables)
    assert '"finish_reason": "stop"' in shown
    assert KEY not in shown
    assert "0 calls" not in run(here, "lvlmva.cli calls check", variables)
    run(here, f"lvlmva.cli calls pack {tmp_path / 'a.jsonl.gz'}", variables)
    other = environment(tmp_path / "other")
    run(here, f"lvlmva.cli calls import {tmp_path / 'a.jsonl.gz'}", other)
    run(here, f"lvlmva.cli calls pack {tmp_path / 'b.jsonl.gz'}", other)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    run(here, f"lvlmva.cli calls export {tmp_path / 'c.jsonl'} --sample patient-0002", variables)
    exported = (tmp_path / "c.jsonl").read_text()
    assert exported.count("\n") >= 1
    assert "patient" not in exported
    (tmp_path / "c.jsonl").write_text(exported.replace("I looked", "I did not look"))
    assert "1 records were refused" in run(here, f"lvlmva.cli calls import {tmp_path / 'c.jsonl'}", other, code=1)
    path = next((store / "calls").glob("??/*.json"))
    path.write_bytes(b"{}")
    assert "1 records were damaged" in run(here, "lvlmva.cli calls check", variables, code=1)
    assert "1 damaged" not in run(here, "lvlmva.cli calls check", variables)
    allowed = environment(store, XDG_CONFIG_HOME=str(tmp_path / "config"))
    run(here, "lvlmva.cli calls allow https://models.example.org --variable EXAMPLE_API_KEY", allowed)
    hosts = (tmp_path / "config" / "lvlmva" / "hosts").read_text()
    assert hosts == "https://models.example.org EXAMPLE_API_KEY\n"


def test_a_run_on_a_terminal_shows_rate_time_and_cost(tmp_path: Path, server: Server) -> None:
    import pty

    here = project(tmp_path / "p", server, 8, endpoint={"concurrency": 2})
    server.set(latency_s=0.3)
    child, descriptor = pty.fork()
    if child == 0:
        os.chdir(here)
        os.execve(
            sys.executable, [sys.executable, "-m", *CRITIQUE.split()], environment(tmp_path / "store", TERM="xterm")
        )
    said = b""
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:
            break
        if not chunk:
            break
        said += chunk
    assert os.waitpid(child, 0)[1] == 0
    text = said.decode("utf-8", "replace")
    assert "8/8" in text
    assert "/s" in text
    assert "0.0160 USD" in text
    assert ROOT.name not in text
