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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import openai

from benchmarks.machine import cpu_model
from lvlmva.params import Critique, load_params
from lvlmva_core.arrays import read_array
from lvlmva_core.lvlm.calls import Call
from lvlmva_core.lvlm.critic import critic_call
from lvlmva_core.lvlm.prompts import load_critic_prompts
from tests.pipeline.calls import KEY, critique_here, project, running_server, write_data

SAMPLES, LARGER, LATENCY_S, CONCURRENCY = 256, 300, 1.0, 32


def plain_loop() -> None:
    """The peer: AsyncOpenAI with a semaphore over the same requests; no store, no retries, no budget."""
    config = load_params(Path("params.yaml")).critique
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


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds that pass, and seconds of this process on the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


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
    times: dict[str, list[tuple[float, float]]] = {"plain loop": [], "stage": [], "again": [], "larger": []}
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        for n in range(rounds):
            here = project(Path(folder) / f"round{n}", server, SAMPLES, endpoint={"concurrency": CONCURRENCY})
            os.chdir(here)
            os.environ |= {"LVLMVA_STORE": str(here / "store"), "LVLMVA_TEST_API_KEY": KEY}
            server.set(latency_s=LATENCY_S)
            times["plain loop"].append(measure(plain_loop))
            times["stage"].append(measure(critique_here))
            times["again"].append(measure(critique_here))
            write_data(here, LARGER)
            server.set(latency_s=LATENCY_S)
            times["larger"].append(measure(critique_here))
            assert len(server.log()) == LARGER - SAMPLES
        os.chdir("/")
    least = SAMPLES * LATENCY_S / CONCURRENCY
    names = {
        f"openai {version('openai')}, plain loop": "plain loop",
        "critique stage, empty store": "stage",
        "critique stage, everything in the store": "again",
        f"critique stage, N from {SAMPLES} to {LARGER}: {LARGER - SAMPLES} calls": "larger",
    }
    peer = statistics.median(wall for wall, _ in times["plain loop"])
    lines = ["| | seconds | of the plain loop | CPU seconds |", "|---|---|---|---|"]
    lines.append(f"| limit: {SAMPLES} x {LATENCY_S:g} s / {CONCURRENCY} | {least:.1f} | {least / peer:.2f} | |")
    for name, key in names.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[key], strict=True))
        lines.append(f"| {name} | {wall:.1f} | {wall / peer:.2f} | {cpu:.1f} |")
    sys.stdout.write("\n".join(lines) + "\n\n")
    load = os.getloadavg()[0]
    sys.stdout.write(
        f"Medians of {rounds} rounds; Python {platform.python_version()}, {os.cpu_count()} cores ({cpu_model()}), "
        f"load average {load:.1f} at the end.\n"
    )


if __name__ == "__main__":
    main()
