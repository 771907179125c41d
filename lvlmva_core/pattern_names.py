"""What experts call patterns: a CSV file a reviewer, each name tied to a region (an extension)."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lvlmva_core.errors import InputError
from lvlmva_core.overrides import PATTERNS, Key, locked, reviewer_file
from lvlmva_core.patterns import Pattern
from lvlmva_core.spreadsheet import write_csv

COLUMNS = ["sample", "segmentation", "region", "name", "reviewer"]
LONGEST = 80  # characters


class Segmented(Protocol):
    """Samples and the digests of their segmentations, by row."""

    @property
    def ids(self) -> list[str]:
        """Of the samples."""

    @property
    def digests(self) -> list[str]:
        """Of their label maps."""


def read_names(overrides: Path) -> dict[Key, str]:
    """(sample, segmentation, region) -> name, of all reviewers' files in `<overrides>/patterns`, later files winning.

    Raises:
        InputError: a file is malformed; the line is named.
    """
    found: dict[Key, str] = {}
    for path in sorted((overrides / PATTERNS).glob("*.csv")):
        found |= _read(path)
    return found


def give_name(overrides: Path, key: Key, name: str, reviewer: str) -> str:
    """Write what a reviewer calls the pattern around a region to `<overrides>/patterns/<reviewer>.csv`.

    Returns:
        The name as it is kept: spaces in one line.

    Raises:
        InputError: the name or the reviewer's cannot be kept.
    """
    name = " ".join(name.split())
    if not 0 < len(name) <= LONGEST:
        raise InputError(f"the pattern's name has {len(name)} characters; between 1 and {LONGEST} are kept")
    folder = overrides / PATTERNS
    folder.mkdir(exist_ok=True)
    path = reviewer_file(folder, reviewer)
    with locked(overrides):
        names = {**(_read(path) if path.exists() else {}), key: name}
        rows = [[each[0], each[1], str(each[2]), names[each], path.stem] for each in sorted(names)]
        write_csv(path, [COLUMNS, *rows])
    return name


def with_names(patterns: Sequence[Pattern], gallery: Segmented, names: Mapping[Key, str]) -> list[Pattern]:
    """The patterns under the names that experts gave to one of their regions; of several, to the one nearest the
    middle of the pattern's list, so that the anchor's own name wins."""
    named = []
    for pattern in patterns:
        keys = [(gallery.ids[n], gallery.digests[n], region) for n, region in (pattern.anchor, *pattern.members)]
        given = [names[key] for key in keys if key in names]
        named.append(replace(pattern, name=given[0]) if given else pattern)
    return named


def _read(path: Path) -> dict[Key, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable CSV ({' '.join(str(error).split())}); mend or delete it") from error
    if not rows or rows[0] != COLUMNS:
        raise InputError(f"{path}: the first line must be '{','.join(COLUMNS)}'; mend or delete the file")
    found: dict[Key, str] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(COLUMNS) or not row[2].isdecimal() or not row[3].strip():
            raise InputError(f"{path}, row {line}: expected {','.join(COLUMNS)} with a region's number and a name")
        found[row[0], row[1], int(row[2])] = " ".join(row[3].split())[:LONGEST]
    return found
