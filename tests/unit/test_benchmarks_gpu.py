"""The runner of what waits for a GPU: order, limits, resumption and pages, on parts that are small commands."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu
from benchmarks.alignment import Case, deviations, ours, plain, plain_resident
from benchmarks.gpu import Part, Record, Step, read_records, run, steps_of

ROOT = Path(__file__).parents[2]
PINS = ROOT / "benchmarks/gpu_wheels.txt"

MEASURES = """
import json, pathlib, sys
rows = [{"way": "ours, one", "ms": 2.0}, {"way": "peer, other", "ms": 5.0, "remark": "a | b"}]
pathlib.Path(sys.argv[1]).write_text(json.dumps({"rows": rows, "notes": ["A note."]}))
print("measured", file=sys.stderr)
"""
HANGS = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(json.dumps({"rows": [{"way": "so far", "child": child.pid}], "notes": []}))
print("hanging", flush=True)
time.sleep(600)
"""


def part(name: str, script: str, **more: object) -> Part:
    return Part(name, (sys.executable, "-c", script, "{json}"), **more)  # type: ignore[arg-type]


def steps(counter: Path) -> list[Step]:
    """A part of each kind of end; the first writes a line a run."""
    counts = f"open({str(counter)!r}, 'a').write('x\\n')\n"
    return [
        Step("one", "Title one", "Milliseconds.", "1.5", [part("good", counts + MEASURES)], ("ms", "peer")),
        Step(
            "two",
            "Title two",
            "What fails.",
            "none",
            [
                part("fails", "print('a line'); raise SystemExit('the reason')"),
                part("lacks", "import numpy, not_there_at_all.inner"),
                part("no data", MEASURES, needs=(("the archive", None), ("the file", counter.with_name("absent")))),
                part("silent", "pass"),
            ],
        ),
        Step("three", "Title three", "What hangs.", "none", [part("hangs", HANGS), part("after", MEASURES)]),
        Step("four", "Title four", "What comes last.", "none", [part("last", MEASURES)]),
    ]


def ends(records: list[Record]) -> dict[str, str]:
    return {record["part"]: record["end"] for record in records}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record], float]:
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "ENOUGH", 0.5)
        patch.setattr(gpu, "describe_machine", lambda: {"gpu": "a stand-in", "python": "3"})
        started = time.monotonic()
        records = run(steps(folder / "counter"), folder / "out", again=False, limit=3.0, total=None)
        return folder, records, time.monotonic() - started


def test_every_part_ends_in_its_own_way_and_costs_no_other(first: tuple[Path, list[Record], float]) -> None:
    _, records, seconds = first
    by_name = {record["part"]: record for record in records}
    assert list(ends(records).items()) == [
        *(("good", "done"), ("fails", "failed"), ("lacks", "not run"), ("no data", "not run"), ("silent", "failed")),
        *(("hangs", "cut"), ("after", "not run"), ("last", "done")),
    ]
    assert by_name["fails"]["why"] == "exit code 1: the reason"
    assert by_name["fails"]["log"] == ["a line", "the reason"]
    assert by_name["lacks"]["why"] == "missing: module not_there_at_all"
    assert re.fullmatch(r"missing: the archive: not given; the file: .*absent", by_name["no data"]["why"])
    assert by_name["silent"]["why"] == "it ended well and left no result"
    assert by_name["hangs"]["log"] == ["hanging"]
    assert by_name["after"]["why"].startswith("no time left of the step's limit")
    assert seconds < 30


def test_what_a_cut_part_had_left_is_kept_and_all_it_started_is_ended(first: tuple[Path, list[Record], float]) -> None:
    (hung,) = [record for record in first[1] if record["part"] == "hangs"]
    (row,) = hung["result"]["rows"]
    assert row["way"] == "so far"
    state = Path(f"/proc/{row['child']}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_json_and_markdown_say_the_same(first: tuple[Path, list[Record], float]) -> None:
    folder, records, _ = first
    out = folder / "out"
    assert sorted(file.name for file in out.iterdir()) == ["gpu.json", "gpu.md"]
    assert json.loads((out / "gpu.json").read_text()) == {"parts": records}
    page = (out / "gpu.md").read_text()
    for record in records:
        assert f"| {record['step']} | {record['part']} | {record['end']}" in page
    assert "- Machine 1: gpu a stand-in, python 3." in page
    assert "| way | ms | x peer | remark |\n|---|---|---|---|\n| ours, one | 2 | 2.5 |  |" in page
    assert "| peer, other | 5 | 1 | a \\| b |" in page
    assert "A note." in page
    assert "The last that fails said:\n\n```\na line\nthe reason\n```" in page
    assert page.count("Not measured yet.") == 1  # of step two nothing was
    assert str(sys.executable) not in page


def test_what_is_done_is_passed_over_and_the_rest_is_run(
    first: tuple[Path, list[Record], float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, records, _ = first
    counter = folder / "counter"
    known = steps(counter)
    monkeypatch.setattr(gpu, "describe_machine", lambda: {"gpu": "another", "python": "3"})
    assert counter.read_text() == "x\n"
    again = run(known[:1], folder / "out", again=False, limit=30, total=None, known=known)
    assert counter.read_text() == "x\n"
    assert capsys.readouterr().out == "good: done before\n"
    assert again == records
    run(known[:1], folder / "out", again=True, limit=30, total=None, known=known)
    assert counter.read_text() == "x\nx\n"
    # without time a part is not begun, and what it had left before stays
    later = run(known[2:], folder / "out", again=False, limit=30, total=0.0, known=known)
    assert ends(later)["hangs"] == "cut"
    assert ends(later)["after"] == "not run"
    page = (folder / "out/gpu.md").read_text()
    assert "- Machine 2:" in page
    # another command is another measurement, whatever its name
    changed = [known[0]._replace(parts=[part("good", MEASURES)])]
    run(changed, folder / "out", again=False, limit=30, total=None, known=known)
    assert read_records(folder / "out")[("one", "good")]["command"] != records[0]["command"]


def test_a_runner_that_is_told_to_end_ends_its_part(tmp_path: Path) -> None:
    script = f"""
import signal, sys
from pathlib import Path
from benchmarks import gpu
signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
part = gpu.Part("hangs", (sys.executable, "-c", {HANGS!r}, {str(tmp_path / "answer.json")!r}))
gpu.run([gpu.Step("s", "t", "m", "a", [part])], Path({str(tmp_path / "out")!r}), again=False, limit=60, total=None)
"""
    running = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "answer.json").exists():
        assert running.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)  # the answer may be half written
    child = json.loads((tmp_path / "answer.json").read_text())["rows"][0]["child"]
    running.terminate()
    running.wait(30)
    time.sleep(0.2)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def _options(tmp_path: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    environment = {name: value for name, value in os.environ.items() if name != "LVLMVA_DATA"}
    return subprocess.run(
        [*command, "--device", "cpu", "--tiny", *more],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def test_a_real_part_runs_at_its_smallest_size(tmp_path: Path) -> None:
    done = _options(tmp_path, "--steps", "segmentation")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "out/gpu.json").read_text())["parts"]
    assert record["end"] == "done"
    cpu, device = record["result"]["rows"]
    assert device["pixels in the same region"] == 1.0  # the device is the processor here
    assert device["log-likelihood"] == cpu["log-likelihood"]
    page = (tmp_path / "out/gpu.md").read_text()
    assert page.count("Not measured yet.") == 6  # every other step is named
    assert "Their figures measure nothing." in page
    assert "| attribution | attribution.graph | not run yet |" in page
    assert "no step nowhere; expected some of tests, attribution" in _options(tmp_path, "--steps", "nowhere").stderr


def test_every_part_is_there_and_the_docs_name_every_step() -> None:
    from argparse import Namespace

    from benchmarks.gpu_parts import PARTS

    options = Namespace(device="cuda", tiny=False, out=Path("o"), work=Path("w"), data=None, weights=None)
    listed = steps_of(options)
    assert sorted(part.name for step in listed for part in step.parts) == sorted(PARTS)
    docs = (ROOT / "docs/gpu.md").read_text()
    for step in listed:
        assert f"| `{step.name}` |" in docs, step.name


@pytest.mark.parametrize("case", [Case(4), Case(4, True, "bfloat16")])
def test_the_plain_loop_takes_the_same_steps_wherever_its_batches_come_from(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((128, 3, 6, 6), generator=generator)
    masks = torch.rand((32, 6, 6), generator=generator) < 0.5
    work = {"images": images, "labels": torch.arange(128) % 2, "masks": masks}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader, resident, own = (way(case, model, work, [(0.5, 0), (2.0, 1)]) for way in (plain, plain_resident, ours))
    assert deviations(resident, loader, start) == (0.0, 0.0)
    assert deviations(own, loader, start)[1] < (0.05 if case.precision == "bfloat16" else 1e-4)
    assert any(not torch.equal(loader[0][0][name], tensor) for name, tensor in start.items())


def test_wheels_are_of_the_locked_versions() -> None:
    locked = set(re.findall(r"^([\w.-]+==[\w.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    pins = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    assert len(pins) > 30
    assert [pin for pin in pins if pin not in locked] == []
    groups = re.findall(r"^# group: (\w+)$", PINS.read_text(), re.MULTILINE)
    recipe = re.search(r"for group in ([\w ]+); do", (ROOT / "Makefile").read_text())
    assert recipe is not None
    assert recipe[1].split() == groups


def test_the_command_for_a_machine_without_a_network_is_short_enough() -> None:
    docs = (ROOT / "docs/gpu.md").read_text()
    (command,) = re.findall(r"```sh\n(python3 -m pip install .*?)\n```", docs, re.DOTALL)
    assert len(command) < 2000
    assert "python3 -m benchmarks.gpu" in command
