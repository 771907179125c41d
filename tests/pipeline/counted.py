"""A worker whose every computation is a line of a file: `python -m tests.pipeline.counted SHARE SAMPLES LEASE_S`."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lvlmva.work import fill
from lvlmva_core.rows import Rows
from lvlmva_core.store import Record, digest

KIND, CHUNK = "counted", 4
STEP_S = 0.01  # of work a record


def key_of(place: int) -> str:
    return digest({"counted": place})


def _compute(places: Sequence[int]) -> list[Record]:
    for place in places:
        descriptor = os.open("computed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{place}\n".encode())
        os.close(descriptor)
        time.sleep(STEP_S)
    return [{"place": np.array(place)} for place in places]


def work_off(share: str, samples: int, lease_s: float) -> None:
    rows = Rows(KIND, [str(n) for n in range(samples)], CHUNK, lambda some: [key_of(n) for n in some], _compute)
    fill(rows, Path("no_output"), records_in=lambda _: [], stage="trial", share=share, lease_s=lease_s)


if __name__ == "__main__":
    work_off(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
