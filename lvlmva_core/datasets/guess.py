"""What a folder of pictures and its table probably mean: guesses for a person to confirm (an extension)."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lvlmva_core.datasets.tables import PICTURE_SUFFIXES, USUAL

LOOKED_AT = 20  # rows and pictures that a guess is made from
MOST_FILES = 200_000
MOST_CLASSES = 20
SIZES = (32, 64, 96, 128, 224)


@dataclass(frozen=True)
class ColumnGuess:
    """Columns of a table, None where nothing fits. pattern: what stands around the value of `file`, None = nothing."""

    file: str | None
    label: str | None
    pattern: str | None


def guess_table(root: Path) -> Path | None:
    """The only CSV or parquet file at the top of a folder, or None."""
    if not root.is_dir():
        return None
    found = [entry for entry in sorted(root.iterdir()) if entry.suffix.lower() in (".csv", ".tsv", ".parquet", ".pq")]
    return found[0] if len(found) == 1 else None


def guess_columns(cells: pd.DataFrame, root: Path) -> ColumnGuess:
    """Which column leads to files below `root`, and which holds the classes: the usual names first, then by content.

    Args:
        cells: text. root: of the pictures; where it is an archive, only the usual names are tried.
    """
    files = _files_below(root)
    file, pattern = _usual(cells, "file"), None
    for name in ([file] if file else []) + [name for name in cells.columns if name != file]:
        found = _pattern(cells[name].head(LOOKED_AT).tolist(), files)
        if found is not None:
            file, pattern = name, None if found == "{}" else found
            break
    label = _usual(cells, "label")
    if label is None:
        taken = {file} | {name for role in USUAL for name in cells.columns if name.casefold() in USUAL[role]}
        counts = {name: cells[name].value_counts() for name in cells.columns if name not in taken}
        fit = {n: len(each) for n, each in counts.items() if 2 <= len(each) <= MOST_CLASSES and each.min() > 1}
        label = min(fit, key=lambda name: fit[name]) if fit else None
    return ColumnGuess(file, label, pattern)


def guess_size(root: Path, at_most: int) -> int:
    """The largest usual side that the first pictures need not be enlarged for, `at_most` where none can be read."""
    from PIL import Image

    sides = []
    for path in itertools.islice(_files_below(root).values(), LOOKED_AT):
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # named by the data set's own checks
    fit = [size for size in SIZES if size <= min([at_most, *sides])]
    return fit[-1] if fit else SIZES[0]


def _usual(cells: pd.DataFrame, role: str) -> str | None:
    found = [name for word in USUAL[role] for name in cells.columns if name.casefold() == word]
    return found[0] if len(found) == 1 else None


def _files_below(root: Path) -> dict[str, Path]:
    """Path below `root`, with /, -> file, of pictures."""
    if not root.is_dir():
        return {}
    found = (entry for entry in root.rglob("*") if entry.suffix.lower() in PICTURE_SUFFIXES and entry.is_file())
    return {entry.relative_to(root).as_posix(): entry for entry in itertools.islice(found, MOST_FILES)}


def _pattern(values: list[str], files: dict[str, Path]) -> str | None:
    """What stands around these values in paths, None where they lead to no files; half of them suffice."""
    first = next((value.replace("\\", "/") for value in values if value), "")
    if not first or not files:
        return None
    ends = (file for file in files if Path(file).stem == first or file == first or file.endswith("/" + first))
    for file in ends:
        before, _, after = file.rpartition(first)
        if sum(before + value.replace("\\", "/") + after in files for value in values) * 2 > len(values):
            return f"{before}{{}}{after}"
    return None
