"""`lvlmva work`: the same outputs with any number of workers, nothing twice, whoever is killed."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

from lvlmva.warm import SOCKET
from lvlmva.work import work
from lvlmva_core.arrays import write_arrays, write_table
from lvlmva_core.errors import InputError
from lvlmva_core.models import ModelSpec, build_model, save_checkpoint
from lvlmva_core.store import Store
from tests.pipeline import counted
from tests.pipeline.calls import COUNT, CRITIQUE, Server, environment, project, rows, run, start, write_data
from tests.pipeline.project import Project

SAMPLES = 200  # of the alignment set: four shards, the last one not full
CONCURRENCY = 4  # of the endpoint in tests
SHORT_S = 1.0  # a lease that one waits for here

# --- records that are computed -------------------------------------------------------------------------------------


def counted_worker(folder: Path, share: str, samples: int, lease_s: float = 60.0) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.counted", share, str(samples), str(lease_s)],
        cwd=folder,
        env=environment(folder / "store"),
        stderr=subprocess.DEVNULL,
    )


def computed(folder: Path) -> list[int]:
    file = folder / "computed"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def all_kept(folder: Path, samples: int) -> bool:
    store = Store(folder / "store")
    found = [store.get_arrays(counted.KIND, counted.key_of(place)) for place in range(samples)]
    return [None if each is None else int(each["place"]) for each in found] == list(range(samples))


def test_workers_on_the_same_share_compute_nothing_twice(tmp_path: Path) -> None:
    workers = [counted_worker(tmp_path, "1/1", 60) for _ in range(2)]
    assert [worker.wait(300) for worker in workers] == [0, 0]
    assert sorted(computed(tmp_path)) == list(range(60))
    assert all_kept(tmp_path, 60)
    assert not list((tmp_path / "store" / "leases").iterdir())


def test_a_killed_worker_loses_what_was_in_flight_and_another_takes_over(tmp_path: Path) -> None:
    first = counted_worker(tmp_path, "1/1", 60)
    while len(computed(tmp_path)) < 30:
        time.sleep(0.002)
    first.kill()
    first.wait()
    before = computed(tmp_path)
    assert counted_worker(tmp_path, "1/1", 60, SHORT_S).wait(300) == 0
    times = Counter(computed(tmp_path))
    twice = [place for place, number in times.items() if number > 1]
    assert set(times) == set(range(60))
    assert max(times.values()) <= 2
    assert set(twice) <= set(before[-counted.CHUNK :])
    assert all_kept(tmp_path, 60)


def test_shares_divide_the_work_and_meet_in_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(counted, "STEP_S", 0.0)
    for number in (1, 3):
        counted.work_off(f"{number}/3", 130, SHORT_S)
    assert sorted(computed(tmp_path)) == [*range(64), *range(128, 130)]
    counted.work_off("2/3", 130, SHORT_S)
    assert all_kept(tmp_path, 130)
    assert len(computed(tmp_path)) == 130


# --- the stages' outputs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project as it is before attribute: pictures, a model, an alignment set."""
    folder = tmp_path_factory.mktemp("project")
    changes = {"compute.threads": 1, "attribute.n_baselines": 3, "segment.n_starts": 2, "rank.n_samples": SAMPLES}
    found = Project(folder, changes)
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (SAMPLES, 1, 6, 6), dtype=np.uint8)
    ids = np.array([f"s{n:03d}" for n in range(SAMPLES)])
    table = pd.DataFrame({"id": ids, "split": "train", "label": draws.integers(0, 3, SAMPLES)})
    (folder / "data").mkdir()
    write_arrays(folder / "data/images.zarr", {"images": images}, {"class_names": ["a", "b", "c"]})
    write_table(folder / "data/samples.parquet", table.assign(spurious=False, group="0/0", source="", sha256=""))
    write_table(folder / "data/alignment_set.parquet", pd.DataFrame({"id": ids}))
    spec = ModelSpec("mlp", 1, 6, 6, 3, 8)
    (folder / "models").mkdir()
    save_checkpoint(folder / "models/base.safetensors", spec, build_model(spec, 0).eval())
    return found


def stage(folder: Path, name: str, store: Path) -> str:
    return run(folder, f"stages.{name} --params params.yaml", variables_of(store))


OUTPUTS = {"attribute": "data/attributions.zarr", "segment": "data/segments.zarr"}


def output(of: Project, name: str) -> dict[str, str]:
    folder = of.folder / OUTPUTS[name]
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    assert len(files) > 4
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def alone(made: Project, warm_stages: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Outputs without workers."""
    store = tmp_path_factory.mktemp("store")
    for name in OUTPUTS:
        assert f"{SAMPLES} to compute" in stage(made.folder, name, store)
    return {name: output(made, name) for name in OUTPUTS}


BOTH = tuple(OUTPUTS)
ENGINES: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "one": (1, BOTH[:1], {}),
    "two": (2, BOTH, {}),
    "four": (4, BOTH[:1], {}),
    "submitit": (2, BOTH[1:], {"backend": "submitit", "options": {"cluster": "local"}}),
    "ray": (2, BOTH[1:], {"backend": "ray"}),
}


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning", "ignore:.*:pytest.PytestUnraisableExceptionWarning")  # Ray's
@pytest.mark.parametrize("engine", list(ENGINES))
def test_the_outputs_are_those_without_workers(
    made: Project,
    alone: dict[str, dict[str, str]],
    engine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    workers, stages, execution = ENGINES[engine]
    if "backend" in execution:
        pytest.importorskip(execution["backend"], reason="Ray's wheel has 80 MB: not in requirements.lock")
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    made.set_params({"execution": execution})
    for name in stages:
        work(name, None, workers, Path("params.yaml"))  # type: ignore[arg-type]
        assert "workers are done" in capfd.readouterr().out
        assert "0 to compute" in stage(made.folder, name, tmp_path / "store")
        assert output(made, name) == alone[name]
        logs = sorted((tmp_path / "store" / "work").glob(f"{name}-*.log"))
        assert len(logs) == workers
        done = [int(log.read_text().split(" computed here")[0].split()[-1]) for log in logs]
        assert sum(done) == SAMPLES
        assert all(number % 64 == 0 for number in done[:-1])


def test_a_share_that_is_none_is_refused(made: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.folder)
    with pytest.raises(InputError, match=r"--shard '3/2': expected i/n with i from 1 to n"):
        work("attribute", "3/2", None, Path("params.yaml"))


# --- calls ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("asking"))


@pytest.fixture
def asking(cloned: Project, server: Server, warm_stages: None) -> Path:
    """A project that asks the server about COUNT samples."""
    (cloned.folder / "data/critiques.jsonl").unlink(missing_ok=True)
    return project(cloned.folder, server, COUNT)


def variables_of(store: Path) -> dict[str, str]:
    return {**environment(store), SOCKET: os.environ[SOCKET]}


def _params(folder: Path, **changes: Any) -> None:
    yaml = YAML(typ="safe", pure=True)
    file = folder / "params.yaml"
    content = yaml.load(file.read_text())
    content["critique"]["endpoint"] |= changes
    with file.open("w") as out:
        yaml.dump(content, out)


def _share(share: str) -> str:
    return f"{CRITIQUE} --shard {share}"


def _but_for_the_answers_number(folder: Path) -> str:
    """The output, but for number and time that the server gives each answer, and the digest that is taken over them."""
    text = (folder / "data/critiques.jsonl").read_text()
    return re.sub(r'("id": "chatcmpl-)\d+|("created": )\d+|("sha256": ")[0-9a-f]{64}', r"\1\2\3", text)


def test_two_workers_on_one_share_buy_no_call_twice(asking: Path, server: Server, tmp_path: Path) -> None:
    server.set(latency_s=0.05)
    variables = variables_of(tmp_path / "store")
    workers = [start(asking, _share("1/1"), variables) for _ in range(2)]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert server.paid() == COUNT
    assert not (asking / "data/critiques.jsonl").exists()
    run(asking, CRITIQUE, variables)
    assert server.paid() == COUNT
    with_workers = _but_for_the_answers_number(asking)
    run(asking, CRITIQUE, variables_of(tmp_path / "another"))
    assert _but_for_the_answers_number(asking) == with_workers


def test_a_killed_buyer_is_followed_by_another(asking: Path, server: Server, tmp_path: Path) -> None:
    samples = 24
    write_data(asking, samples)
    server.set(latency_s=0.05)
    variables = variables_of(tmp_path / "store")
    workers = [start(asking, _share("1/1"), environment(tmp_path / "store")) for _ in range(2)]
    while server.count()[0] < 10:
        time.sleep(0.005)
    workers[0].kill()
    said = workers[1].communicate(timeout=300)[0]
    workers[0].communicate(timeout=300)
    assert workers[1].returncode == 0, said
    run(asking, CRITIQUE, variables)
    assert len(rows(asking, "critiques")) == samples
    asked = Counter(entry["asked"] for entry in server.log())
    assert len(asked) == samples
    assert max(asked.values()) <= 2  # what the killed one was waiting for is not known to anybody
    assert asked.total() <= samples + CONCURRENCY


def test_shares_spend_together_what_params_allow(asking: Path, server: Server, tmp_path: Path) -> None:
    _params(asking, max_calls=5, concurrency=4)
    variables = variables_of(tmp_path / "store")
    said = [run(asking, _share(f"{number}/2"), variables, code=number - 1) for number in (1, 2)]
    assert "critique 1/2: 3 of 6 samples, and 1/2 of each limit" in said[0]
    assert "max_calls = 2; all answers are kept; raise critique.endpoint.max_calls" in said[1]
    assert server.paid() == 5
    _params(asking, max_calls=1)
    run(asking, _share("2/2"), variables, code=1)
    assert server.paid() == 5
    run(asking, _share("1/2"), variables_of(tmp_path / "another"), code=1)
    assert server.paid() == 6


def test_shares_cost_together_what_params_allow(asking: Path, server: Server, tmp_path: Path) -> None:
    run(asking, CRITIQUE, variables_of(tmp_path / "whole"))
    price = _cost_of_all(tmp_path / "whole")
    limit = price * 0.75
    _params(asking, max_cost_usd=limit, concurrency=1, token_limit=1)
    server.set()
    for number in (1, 2):
        said = run(asking, _share(f"{number}/2"), variables_of(tmp_path / "store"), code=1)
        assert "max_cost_usd" in said
    assert 0 < _cost_of_all(tmp_path / "store") <= limit


def _cost_of_all(store: Path) -> float:
    spent = [json.loads(line) for line in (store / "runs.jsonl").read_text().splitlines()]
    return float(sum(each.get("cost_usd", 0.0) for each in spent))


def test_where_no_model_is_asked_there_is_nothing_to_buy(asking: Path, server: Server, tmp_path: Path) -> None:
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((asking / "params.yaml").read_text())
    content["critique"]["critic"] = "rules"
    with (asking / "params.yaml").open("w") as out:
        yaml.dump(content, out)
    assert "'rules' is no model; nothing to buy" in run(asking, _share("1/2"), variables_of(tmp_path / "store"))
    assert server.paid() == 0
