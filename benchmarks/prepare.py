"""Time and memory of `prepare.dataset: folder` at 1,000, 5,000 and 20,000 pictures.

python -m benchmarks.prepare [--counts 1000 5000 20000]      prints the markdown table of benchmarks/prepare.md
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from lvlmva_core.datasets.folder import Folder

SIDE, SIZE, DISTINCT = 160, 112, 100


def write_pictures(folder: Path, count: int) -> int:
    """JPEGs of 160x160 smooth colours with grain in two classes, no two alike; returns their bytes."""
    rng = np.random.default_rng(0)
    scenes = [
        np.asarray(Image.fromarray(rng.integers(0, 255, (12, 12, 3)).astype(np.uint8)).resize((SIDE, SIDE)))
        for _ in range(DISTINCT)
    ]
    lines = ["path,label"]
    for place in range(count):
        pixels = scenes[place % DISTINCT].copy()
        pixels[:16, :16] = rng.integers(0, 255, (16, 16, 3))
        Image.fromarray(pixels).save(folder / f"{place:06d}.jpg", quality=90)
        lines.append(f"{place:06d}.jpg,{'ab'[place % 2]}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return sum(file.stat().st_size for file in folder.glob("*.jpg"))


def measure(folder: str) -> tuple[float, float, float]:
    """Seconds, seconds of processor time, and peak resident memory in MiB, of one run in a process of its own."""
    before = time.perf_counter()
    out = Path(folder) / "out"
    chosen = Folder(root=folder, table="table.csv", image_size=SIZE, seed=0)
    chosen.write(out / "images.zarr", out / "samples.parquet", out / "masks.zarr")
    seconds = time.perf_counter() - before
    used = resource.getrusage(resource.RUSAGE_SELF)
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 5000, 20_000])
    arguments = parser.parse_args()
    rows = []
    for count in arguments.counts:
        with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
            size = write_pictures(Path(folder), count)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, processor, peak = pool.apply(measure, (folder,))
        rows.append(
            f"| {count} | {size / 2**20:.0f} | {count * 3 * SIZE**2 / 2**20:.0f} | {seconds:.0f} "
            f"| {processor:.0f} | {1000 * processor / count:.1f} | {peak:.0f} |"
        )
    columns = ["pictures", "MiB of JPEG", "MiB of prepared pixels", "seconds", "processor seconds"]
    columns += ["the same, ms a picture", "peak resident MiB"]
    sys.stdout.write(
        f"JPEGs of {SIDE}x{SIDE} pixels to {SIZE}x{SIZE}, from the table to the last shard, a process each."
        f"\n{platform.machine()}, {os.cpu_count()} CPUs; Pillow {version('pillow')}, zarr {version('zarr')}.\n\n"
        f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
