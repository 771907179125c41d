"""What the tests of calls start from: a model server as a process, and a small project of alignment samples."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

from lvlmva_core.arrays import write_arrays, write_table
from stages.critique import critique
from stages.judge import judge
from tests.pipeline.warm_process import run_module

ROOT = Path(__file__).parents[2]
KEY = "sk-loopback/9f8e7d6c5b4a"
COUNT = 6  # samples of a small project


class Server:
    """A running model server; `set` tells it how to behave, `log` is what it was asked."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def set(self, **control: Any) -> None:
        """Behave so from now on; what is not given goes back to the default."""
        default = {"latency_s": 0.0, "faults": [], "always": None, "usage": True, "say": None, "keep": True}
        default |= {"forget": True, "distinct": False, "batch": {}}
        data = json.dumps({**default, **control}).encode()
        urllib.request.urlopen(urllib.request.Request(self.url + "/control", data), timeout=10).close()

    def log(self) -> list[dict[str, Any]]:
        """All requests since `set`, oldest first."""
        log: list[dict[str, Any]] = self._state()["log"]
        return log

    def paid(self) -> int:
        """Answers that were sent whole under a status of success since `set`."""
        return sum(entry["paid"] for entry in self.log())

    def most_at_once(self) -> int:
        """Most requests under way at the same time since `set`."""
        return int(self._state()["most_at_once"])

    def count(self) -> tuple[int, int]:
        """Requests since `set`, and those that are under way now."""
        found = self._state("/count")
        return int(found["asked"]), int(found["at_once"])

    def _state(self, path: str = "/log") -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)


@contextmanager
def running_server(*arguments: str) -> Iterator[Server]:
    """Start a server process, with arguments for its command line, and end it afterwards."""
    command = [sys.executable, str(ROOT / "tests" / "server.py"), *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout is not None
        try:
            yield Server(int(process.stdout.readline()))
        finally:
            process.kill()


def sample_arrays(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures uint8 (N,1,28,28) of a stroke and a decoy, three regions uint8 (N,28,28), masks of the decoys bool."""
    images = np.zeros((count, 1, 28, 28), np.uint8)
    segments = np.zeros((count, 28, 28), np.uint8)
    masks = np.zeros((count, 28, 28), bool)
    for n in range(count):
        column = 9 + n % 10
        images[n, 0, 6:22, column : column + 2] = 120 + n % 100
        images[n, 0, 10 + n // 100, 8:20] = 130 + n // 100
        images[n, 0, 24:28, 24:28] = 40 + n % 200
        masks[n, 24:28, 24:28] = True
        segments[n, 14:] = 1
        segments[n, 22:, 22:] = 2
        if n % 3 == 0:
            images[n, 0, 14:22] = 0  # nothing in the second region
    return images, segments, masks


def write_data(folder: Path, count: int, segments: np.ndarray | None = None) -> None:
    """Write what the critique stage reads, for `count` samples."""
    images, regions, masks = sample_arrays(count)
    regions = regions if segments is None else segments
    ids = [f"patient-{n:04d}" for n in range(count)]
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_arrays(data / "images.zarr", {"images": images}, {"class_names": [str(k) for k in range(10)], "dataset": "t"})
    table = {
        "id": ids,
        "split": ["train"] * count,
        "label": np.arange(count) % 10,
        "spurious": [True] * count,
        "group": ["g"] * count,
        "source": ["secret_file.png"] * count,
        "sha256": [""] * count,
    }
    write_table(data / "samples.parquet", pd.DataFrame(table))
    write_arrays(data / "segments.zarr", {"segments": regions}, {"ids": ids, "status": ["ok"] * count})
    effects = masks.astype(np.float32)
    write_arrays(data / "attributions.zarr", {"attributions": effects}, {"ids": ids})
    write_arrays(data / "spurious_masks.zarr", {"spurious_masks": masks, "known": np.ones(count, bool)}, {})


def endpoint(server: Server, **changes: Any) -> dict[str, Any]:
    """Settings of an endpoint on the server."""
    return {
        "base_url": server.url + "/v1",
        "model": "tester",
        "revision": "1",
        "api_key_variable": "LVLMVA_TEST_API_KEY",
        "token_limit_name": "max_tokens",
        "token_limit": 500,
        "temperature": 0.0,
        "seed": 1,
        "image_detail": "low",
        "extra_body": {},
        "concurrency": 4,
        "timeout_s": 20.0,
        "retries": 1,
        "max_wait_s": 30.0,
        "usd_per_million_input_tokens": 1.0,
        "usd_per_million_output_tokens": 10.0,
        "max_calls": 1000,
        "max_cost_usd": 100.0,
        "allow_upload": False,
        "allow_unhydrated": False,
    } | changes


def write_params(folder: Path, server: Server, **changes: Any) -> Path:
    """params.yaml with the server as Critic and Judge. Changes: critique={...}, judge={...}, endpoint={...} of both."""
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((ROOT / "params.yaml").read_text())
    for section, role in (("critique", "critic"), ("judge", "judge")):
        settings = endpoint(server, **changes.get("endpoint", {}))
        content[section] |= {role: "model", "endpoint": settings} | changes.get(section, {})
    file = folder / "params.yaml"
    with file.open("w") as stream:
        yaml.dump(content, stream)
    return file


CRITIQUE = (
    "stages.critique --params params.yaml --images data/images.zarr --samples data/samples.parquet "
    "--segments data/segments.zarr --attributions data/attributions.zarr --spurious-masks data/spurious_masks.zarr "
    "--reliance data/reliance.zarr --prompts prompts --critiques data/critiques.jsonl"
)
JUDGE = (
    "stages.judge --params params.yaml --critiques data/critiques.jsonl --prompts prompts "
    "--verdicts data/verdicts.jsonl --judge-metrics metrics/judge.json"
)


def environment(store: Path | None, **more: str) -> dict[str, str]:
    """Variables of a stage process: the API key, and a store of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LVLMVA_", "OPENAI_"))}
    own = {"PYTHONPATH": str(ROOT), "LVLMVA_TEST_API_KEY": KEY, "COLUMNS": "200"}
    return {**kept, **own, **({"LVLMVA_STORE": str(store)} if store else {}), **more}


def start(folder: Path, command: str, variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start a stage as a process, one that Ctrl-C ends even where the tests run in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # which a process hands down to those that it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, command: str, variables: dict[str, str], code: int = 0) -> str:
    """Run a stage or a command to its end, in a copy of a process that has the libraries; says what it printed."""
    done = run_module(command.split(), folder, variables, together=True)
    assert done.returncode == code, done.stdout
    return done.stdout


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of data/<name>.jsonl."""
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().split("\n") if line]


def project(folder: Path, server: Server, count: int, **changes: Any) -> Path:
    """A folder with data, prompts and params."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, count)
    if not (folder / "prompts").exists():
        (folder / "prompts").symlink_to(ROOT / "prompts")
    write_params(folder, server, **changes)
    return folder


def critique_here(dry_run: bool = False) -> None:
    """The stage critique in this process, in the current folder."""
    data = Path("data")
    names = ("images.zarr", "samples.parquet", "segments.zarr", "attributions.zarr", "spurious_masks.zarr")
    inputs = (data / name for name in (*names, "reliance.zarr"))
    critique(Path("params.yaml"), *inputs, Path("prompts"), data / "critiques.jsonl", dry_run=dry_run)


def judge_here() -> None:
    """The stage judge in this process, in the current folder."""
    data = Path("data")
    judge(Path("params.yaml"), data / "critiques.jsonl", Path("prompts"), data / "verdicts.jsonl", Path("metrics.json"))
