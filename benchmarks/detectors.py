"""The text detector on prepared pictures: its settings chosen on the validation split, measured on the test split.

    python -m benchmarks.detectors [--data data] [--pictures 40]

Found: half of the marker or more lies under a piece of text, on pictures that have one. False alarm: a piece of text
on pictures that have none. Chosen is what has the largest difference of the two on the validation split; of equal
ones the first.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lvlmva_core.arrays import read_array
from lvlmva_core.found_text import Text, find_text
from lvlmva_core.samples import read_sample_columns

SIDES = (640, 384, 512, 800, 960)  # the default first
PROBABILITIES = (0.4, 0.2, 0.3, 0.5, 0.6, 0.7)
LEAST = min(PROBABILITIES)


class Rates(NamedTuple):
    """Of marked pictures whose marker was found, of plain ones with a false alarm; box over marker, mean of found."""

    found: float
    alarms: float
    area: float

    @property
    def difference(self) -> float:
        """Youden's index."""
        return self.found - self.alarms


def rates(texts: list[list[Text]], markers: np.ndarray, least_probability: float) -> Rates:
    """texts: of each picture, found at `LEAST`. markers: bool (N, H, W), empty on plain pictures."""
    found, alarms, areas = [], [], []
    for pieces, marker in zip(texts, markers, strict=True):
        kept = [piece.mask for piece in pieces if piece.probability >= least_probability]
        if not marker.any():
            alarms.append(bool(kept))
            continue
        covering = [mask for mask in kept if (mask & marker).sum() * 2 >= marker.sum()]
        found.append(bool(covering))
        areas += [mask.sum() / marker.sum() for mask in covering[:1]]
    return Rates(float(np.mean(found)), float(np.mean(alarms)), float(np.mean(areas)) if areas else float("nan"))


def main() -> None:
    """Print the tables of docs/critics.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with what the stage prepare made")
    parser.add_argument("--pictures", type=int, default=40, help="validation pictures with a marker, and without")
    options = parser.parse_args()
    table = read_sample_columns(options.data / "samples.parquet", "split", "spurious")

    def read(split: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
        rows = [np.flatnonzero((table["split"] == split) & (table["spurious"] == has)) for has in (True, False)]
        draws = np.random.default_rng(0)
        chosen = np.sort(np.concatenate([draws.permutation(part)[:most] for part in rows]))
        return (
            read_array(options.data / "images.zarr", "images", chosen),
            read_array(options.data / "spurious_masks.zarr", "spurious_masks", chosen),
        )

    pictures, markers = read("val", options.pictures)
    sys.stdout.write(f"validation: {markers.any((1, 2)).sum()} with a marker, {(~markers.any((1, 2))).sum()} without\n")
    sys.stdout.write("\n| enlarged to | least probability | found | false alarms | box over marker | s a picture |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    tried = {}
    for side in SIDES:
        started = time.process_time()
        texts = [find_text(picture, side, LEAST) for picture in pictures]
        seconds = (time.process_time() - started) / len(pictures)
        for least in PROBABILITIES:
            tried[side, least] = rates(texts, markers, least)
        for came, same in itertools.groupby(PROBABILITIES, key=lambda least: tried[side, least]):
            alike = list(same)
            shown = " to ".join(f"{value:.1f}" for value in sorted({min(alike), max(alike)}))
            sys.stdout.write(
                f"| {side} | {shown} | {came.found:.2f} | {came.alarms:.2f} | {came.area:.2f} | {seconds:.2f} |\n"
            )
        sys.stdout.flush()
    side, least_probability = max(tried, key=lambda choice: tried[choice].difference)
    pictures, markers = read("test", None)
    measured = rates([find_text(picture, side, least_probability) for picture in pictures], markers, least_probability)
    sys.stdout.write(
        f"\nchosen: side {side}, least_probability {least_probability}\n"
        f"test: {markers.any((1, 2)).sum()} with a marker, {(~markers.any((1, 2))).sum()} without: "
        f"found {measured.found:.3f}, false alarms {measured.alarms:.3f}, box over marker {measured.area:.2f}\n"
    )


if __name__ == "__main__":
    main()
