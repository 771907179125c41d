"""Time of 256 critiques against a server that takes a second for each, beside a plain loop over the openai client.

python -m benchmarks.critique [--rounds 3]      prints the markdown table of benchmarks/critique.md
"""

import argparse
import asyncio
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import openai

from lvlmva_core.arrays import read_array
from lvlmva_core.config import Critique, load_params
from lvlmva_core.lvlm.calls import Call
from lvlmva_core.lvlm.critic import critic_call
from lvlmva_core.lvlm.prompts import load_critic_prompts
from stages.critique import critique
from tests.pipeline.calls import KEY, project, running_server, write_data

SAMPLES, LARGER, LATENCY_S, CONCURRENCY = 256, 300, 1.0, 32


def stage() -> float:
    """Seconds of the whole critique stage: reading, rendering, plan, calls, store, output."""
    data, started = Path("data"), time.perf_counter()
    names = ("images.zarr", "samples.parquet", "segments.zarr", "attributions.zarr", "spurious_masks.zarr")
    critique(Path("params.yaml"), *(data / name for name in names), Path("prompts"), data / "critiques.jsonl")
    return time.perf_counter() - started


def plain_loop() -> float:
    """Seconds of the peer: AsyncOpenAI with a semaphore over the same requests; no store, no retries, no budget."""
    config, started = load_params(Path("params.yaml")).critique, time.perf_counter()
    assert config.endpoint is not None
    calls = _calls(config)

    async def run() -> None:
        gate = asyncio.Semaphore(CONCURRENCY)
        async with openai.AsyncOpenAI(api_key=KEY, base_url=config.endpoint.base_url) as client:

            async def one(call: Call) -> None:
                async with gate:
                    body = call.body()
                    own = {name: value for name, value in body.items() if name not in ("model", "messages")}
                    await client.chat.completions.create(model=body["model"], messages=body["messages"], extra_body=own)

            await asyncio.gather(*(one(call) for call in calls))

    asyncio.run(run())
    return time.perf_counter() - started


def _calls(config: Critique) -> list[Call]:
    prompts = load_critic_prompts(Path("prompts") / config.prompts, [str(k) for k in range(10)])
    images, segments = (
        read_array(Path("data/images.zarr"), "images"),
        read_array(Path("data/segments.zarr"), "segments"),
    )
    assert config.endpoint is not None
    return [
        critic_call(config.endpoint, prompts, str(n % 10), images[n], segments[n], name_spurious_feature=False)
        for n in range(len(images))
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {"plain loop": [], "stage": [], "again": [], "larger": []}
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        for n in range(rounds):
            here = project(Path(folder) / f"round{n}", server, SAMPLES, endpoint={"concurrency": CONCURRENCY})
            os.chdir(here)
            os.environ |= {"LVLMVA_STORE": str(here / "store"), "LVLMVA_TEST_API_KEY": KEY}
            server.set(latency_s=LATENCY_S)
            times["plain loop"].append(plain_loop())
            times["stage"].append(stage())
            times["again"].append(stage())
            write_data(here, LARGER)
            server.set(latency_s=LATENCY_S)
            times["larger"].append(stage())
            assert len(server.log()) == LARGER - SAMPLES
        os.chdir("/")
    least = SAMPLES * LATENCY_S / CONCURRENCY
    rows = {
        f"limit: {SAMPLES} x {LATENCY_S:g} s / {CONCURRENCY}": (least, "1.00"),
        f"openai {version('openai')}, plain loop": _row(times["plain loop"], least),
        "critique stage, empty store": _row(times["stage"], least),
        "critique stage, everything in the store": _row(times["again"], least),
        f"critique stage, N from {SAMPLES} to {LARGER}: {LARGER - SAMPLES} calls": _row(times["larger"], least),
    }
    lines = ["| | seconds (median) | of the limit |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.1f} | {share} |" for name, (seconds, share) in rows.items()]
    sys.stdout.write("\n".join(lines) + "\n\n")
    sys.stdout.write(f"{rounds} rounds; Python {platform.python_version()}, {os.cpu_count()} cores, {_cpu()}\n")


def _row(seconds: list[float], least: float) -> tuple[float, str]:
    middle = statistics.median(seconds)
    return middle, f"{middle / least:.2f}"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
