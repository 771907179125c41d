"""A table that somebody else wrote, or a tree of class folders: pictures, classes, splits, groups, masks, patients."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


USUAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "file": ("file_name", "path", "filename", "file", "image_path", "img_filename", "image"),
        "label": ("label", "y", "class", "class_name", "target"),
        "split": ("split", "subset", "partition"),
        "spurious": ("spurious", "group", "a"),
        "mask": ("mask_path", "spurious_mask", "mask"),
        "patient": ("patient", "group_id", "patient_id", "subject_id"),
    }
)
SPLIT_WORDS: Mapping[str, str] = MappingProxyType(
    {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
    | {"test": "test", "testing": "test"}
)
SPLIT_NUMBERS: Mapping[str, str] = MappingProxyType({"0": "train", "1": "val", "2": "test"})  # as WILDS numbers them
PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".jp2", ".dcm", ".dicom"}
)
ENOUGH = 20  # mistakes of one kind that a message lists


@dataclass(frozen=True)
class Listed:
    """What a table says of N pictures, as text.

    table: columns file (path below the folder, with /), label, and split, spurious, mask, patient where they are known;
    where: of each row, for messages; notes: what was guessed, for the user. by_text: whether classes that are numbers
    are sorted as text, as torchvision sorts folders: 10 before 2.
    """

    table: "pd.DataFrame"
    where: list[str]
    notes: list[str] = field(default_factory=list)
    by_text: bool = False

    def has(self, column: str) -> bool:
        """Whether a column is known."""
        return column in self.table.columns


def read_listed(path: Path, columns: Mapping[str, str | bool | None]) -> Listed:
    """Read a table: CSV in any usual dialect (commas, semicolons or tabs; UTF-8, UTF-16 or Latin-1), or parquet.

    Args:
        columns: role (a key of USUAL) -> name of the column, None to look for the usual names, False for none.

    Raises:
        InputError: it cannot be read, a column is missing or might be several, or a cell is empty that must not be.
    """
    import pandas as pd

    raw, lines, notes = _rows(path)
    names: dict[str, str] = {}
    for role, usual in USUAL.items():
        found = _column(path, role, columns.get(role), usual, list(raw.columns))
        if found is not None:
            names[role] = found
    doubled = [name for name in names.values() if list(names.values()).count(name) > 1]
    if doubled:
        raise InputError(f"{path}: the column '{doubled[0]}' stands for two things; mend prepare.columns")
    absent = [role for role in USUAL if role not in names]
    said = ", ".join(f"{role} = '{name}'" for role, name in names.items())
    notes.append(f"{path}: {said}; not there: {', '.join(absent) or 'nothing'} (prepare.columns changes it)")
    where = [f"{path}, row {line}" for line in lines]
    table = pd.DataFrame({role: raw[name] for role, name in names.items()})
    may_be_empty = ("mask", "patient")
    for role in (role for role in names if role not in may_be_empty):
        empty = np.flatnonzero(table[role].to_numpy() == "")
        if len(empty):
            rows = ", ".join(str(lines[row]) for row in empty[:ENOUGH])
            raise InputError(
                f"{path}: no value for '{names[role]}' in row {rows}{_more(len(empty))}; fill it in, or remove the row"
            )
    return Listed(table, where, notes)


def read_cells(path: Path) -> "pd.DataFrame":
    """All cells of a table as text, under their header. Raises InputError where it cannot be read."""
    return _rows(path)[0]


def listed_tree(root: Path) -> Listed:
    """Class folders as torchvision's ImageFolder reads them, below folders of the splits where these are there.

    Raises:
        InputError: there are no class folders, one of them is empty, or pictures lie beside them.
    """
    import pandas as pd

    folders = _subfolders(root)
    splits = {folder: SPLIT_WORDS.get(folder.name.casefold()) for folder in folders}
    if folders and all(splits.values()):
        of_split = {str(split): folder for folder, split in splits.items()}
        if len(of_split) < len(folders):
            raise InputError(
                f"{root}: two folders stand for one split ({', '.join(f.name for f in folders)}); keep one"
            )
    elif any(splits.values()):
        odd = next(folder.name for folder, split in splits.items() if split is None)
        raise InputError(
            f"{root}: folders of splits and others ('{odd}') lie side by side; expected train, val and test, or classes"
        )
    else:
        of_split = {"": root}
    rows = []
    for split, folder in of_split.items():
        loose = [entry.name for entry in sorted(folder.iterdir()) if _is_picture(entry)]
        classes = _subfolders(folder)
        if not classes:
            raise InputError(
                f"{folder}: no class folders in it{' but pictures' if loose else ''}; expected <class>/<picture>, or "
                "name a table in prepare.table"
            )
        if loose:
            raise InputError(f"{folder / loose[0]}: lies beside the class folders; move it into one of them")
        for one in classes:
            pictures = sorted(entry for entry in one.rglob("*") if _is_picture(entry))
            if not pictures:
                raise InputError(f"{one}: the folder of this class holds no picture; add some or remove it")
            rows += [(picture.relative_to(root).as_posix(), one.name, split) for picture in pictures]
    table = pd.DataFrame(rows, columns=["file", "label", "split"])
    where = [f"{root}: '{file}'" for file in table["file"]]
    note = f"{root}: class folders{' below folders of splits' if '' not in of_split else ''}"
    return Listed(table.drop(columns="split") if "" in of_split else table, where, [note], by_text=True)


def files_below(root: Path, listed: Listed, pattern: str | None) -> "pd.Series":
    """Path of each row's picture relative to `root`, with /.

    Args:
        pattern: what stands around the value in the table, e.g. "images/{}.jpg"; None = the value is the path.

    Raises:
        InputError: a path leaves the folder, or two rows name the same file.
    """
    import pandas as pd

    files = pd.Series([_below(root, value, pattern, where) for value, where in _pairs(listed, "file")], dtype=str)
    doubled = files[files.duplicated(keep=False)]
    if len(doubled):
        first = doubled.iloc[0]
        rows = [row for row in doubled.index if files[row] == first]
        labels = sorted(set(listed.table["label"].iloc[rows]))
        differ = f", with the labels {' and '.join(repr(label) for label in labels)}" if len(labels) > 1 else ""
        raise InputError(
            f"{listed.where[rows[0]]} and {listed.where[rows[1]].rsplit(', ', 1)[-1]}: both name '{first}'{differ} "
            f"({int(files.duplicated().sum())} rows repeat a file); keep one row a picture"
        )
    return files


def masks_below(root: Path, listed: Listed) -> list[str | None]:
    """Path of each row's mask relative to `root`, None where the cell is empty. Raises like `files_below`."""
    if not listed.has("mask"):
        return [None] * len(listed.table)
    return [_below(root, value, None, where) if value else None for value, where in _pairs(listed, "mask")]


def splits_of(listed: Listed) -> tuple[np.ndarray | None, list[str]]:
    """Split of each row, None where no column says it, and a note where numbers were read as splits.

    Raises:
        InputError: a value is none of the usual words, nor begins with test_.
    """
    if not listed.has("split"):
        return None, []
    values = listed.table["split"].str.strip().str.casefold().to_numpy(dtype=str)
    notes = []
    words: Mapping[str, str] = SPLIT_WORDS
    if set(values) <= SPLIT_NUMBERS.keys():
        words = SPLIT_NUMBERS
        notes.append("splits are numbers: 0 was read as train, 1 as val, 2 as test")
    splits = [words.get(value, value if value.startswith("test_") else "") for value in values]
    if "" in splits:
        row = splits.index("")
        raise InputError(
            f"{listed.where[row]}: '{values[row]}' is no split; expected train, val, test, or a further one that "
            "begins with test_"
        )
    return np.array(splits, dtype=str), notes


def spurious_of(listed: Listed, value: str | None) -> np.ndarray | None:
    """Whether the spurious feature is in each picture, bool; None where no column says it.

    Args:
        value: the one value that means that it is; None = 1, true or yes, against 0, false or no.

    Raises:
        InputError: other values.
    """
    if not listed.has("spurious"):
        return None
    values = listed.table["spurious"].str.strip().str.casefold()
    if value is not None:
        has = values == value.strip().casefold()
        if not has.any():
            raise InputError(f"prepare.spurious_value = '{value}' stands in no row; values: {_some(values)}")
        return has.to_numpy()
    words = {"1": True, "true": True, "yes": True, "1.0": True, "0": False, "false": False, "no": False, "0.0": False}
    odd = np.flatnonzero(~values.isin(list(words)).to_numpy())
    if len(odd):
        raise InputError(
            f"{listed.where[odd[0]]}: '{listed.table['spurious'].iloc[odd[0]]}' does not say whether the spurious "
            f"feature is in the picture (values: {_some(values)}); write 1 or 0, set prepare.spurious_value, or "
            "prepare.columns.spurious: false"
        )
    return values.map(words).to_numpy(dtype=bool)


def classes_of(listed: Listed, wanted: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """Names of the classes in the order of the logits, and the label of each row, int64.

    Args:
        wanted: the names in their order; None = sorted, numbers by value (or by text, see `Listed`).

    Raises:
        InputError: fewer than two classes, one without a picture or not wanted, or nearly as many as pictures.
    """
    values = np.array([_label(value) for value in listed.table["label"]], dtype=str)
    found = sorted(set(values))
    if not listed.by_text and all(name.lstrip("-").isdecimal() for name in found):
        found.sort(key=int)
    names = found if wanted is None else list(wanted)
    odd = [row for row, value in enumerate(values) if value not in names]
    if odd:
        raise InputError(
            f"{listed.where[odd[0]]}: the label '{values[odd[0]]}' is none of prepare.classes ({_some(names)}); add it "
            "there, or remove the rows"
        )
    empty = [name for name in names if name not in found]
    if empty:
        raise InputError(f"prepare.classes: no picture has the label '{empty[0]}' (labels: {_some(found)}); remove it")
    if len(names) < 2:
        raise InputError(f"{listed.where[0]}: all pictures have the label '{names[0]}'; two classes are needed")
    alike = {name.casefold() for name in names}
    if len(alike) < len(names):
        folded = [name.casefold() for name in names]
        twins = [name for name in names if folded.count(name.casefold()) > 1][:2]
        raise InputError(f"the labels '{twins[0]}' and '{twins[1]}' differ in case alone; write them alike")
    if len(names) > max(10, len(values) // 2):
        raise InputError(
            f"{len(names)} different labels in {len(values)} rows ({_some(names)}): is it the label that "
            "prepare.columns.label names?"
        )
    place = {name: k for k, name in enumerate(names)}
    return names, np.array([place[value] for value in values], dtype=np.int64)


def _label(value: str) -> str:
    """A label as a name: 3.0, which a table makes of 3 beside an empty cell, is 3."""
    number, dot, zeros = value.partition(".")
    return number if dot and not zeros.strip("0") and number.lstrip("-").isdecimal() else value


def _rows(path: Path) -> "tuple[pd.DataFrame, list[int], list[str]]":
    """Cells as text without blanks around them, the line of each row as an editor counts, and notes."""
    import pandas as pd

    suffix = path.suffix.lower()
    if suffix in (".xls", ".xlsx", ".ods"):
        raise InputError(f"{path}: a spreadsheet; save it as CSV and name that in prepare.table")
    if not path.is_file():
        raise InputError(f"{path}: no such table; set prepare.table to a CSV or parquet file")
    notes: list[str] = []
    if suffix in (".parquet", ".pq"):
        try:
            table = pd.read_parquet(path, engine="pyarrow")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable parquet table ({' '.join(str(error).split())[:200]})") from error
        table.columns = table.columns.map(str)
        text = pd.DataFrame({name: [_text(value, pd.NA) for value in table[name]] for name in table.columns})
        lines = list(range(1, len(text) + 1))
    else:
        text, lines = _csv(path, _decoded(path, notes))
    if text.empty:
        raise InputError(f"{path}: no rows below the header; one row a picture is expected")
    return text, lines, notes


def _text(value: object, nothing: object) -> str:
    """nothing: what pandas has in an empty cell."""
    missing = value is None or value is nothing or (isinstance(value, float) and np.isnan(value))
    return "" if missing else str(value).strip()


def _decoded(path: Path, notes: list[str]) -> str:
    content = path.read_bytes()
    if not content.strip():
        raise InputError(f"{path}: empty file; save the table again")
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark):
            try:
                return content.decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: damaged {encoding} text ({error.reason}); save it as UTF-8") from error
    if b"\0" in content:
        raise InputError(f"{path}: not text (it holds zero bytes); save the table as CSV in UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        notes.append(f"{path}: not UTF-8, so read as Windows-1252 (Latin-1); save it as UTF-8 if names look wrong")
        return content.decode("cp1252", errors="replace")


def _csv(path: Path, text: str) -> "tuple[pd.DataFrame, list[int]]":
    import pandas as pd

    lines = text.lstrip().splitlines()
    first = lines[0]
    separator = ""
    if first.lower().startswith("sep=") and len(first) == 5:  # Excel's own hint
        separator, text = first[4], text.lstrip().split("\n", 1)[-1]
        first = lines[1] if len(lines) > 1 else ""
    separator = separator or max(",;\t|", key=first.count)
    skipped = 1 if lines[0].lower().startswith("sep=") else 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, numbers = [], []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append([cell.strip() for cell in cells])
                numbers.append(reader.line_num + skipped)
    except csv.Error as error:
        raise InputError(
            f"{path}, row {reader.line_num + skipped}: not valid CSV ({error}); mend its quotes"
        ) from error
    header, *body = rows
    doubled = [name for name in header if header.count(name) > 1 and name]
    if doubled:
        raise InputError(f"{path}: two columns are named '{doubled[0]}'; rename one")
    for cells, number in zip(body, numbers[1:], strict=True):
        if len(cells) != len(header):
            raise InputError(
                f"{path}, row {number}: {len(cells)} values for {len(header)} columns; quote values that hold "
                f"'{separator}'"
            )
    return pd.DataFrame(body, columns=header, dtype=str), numbers[1:]


def _column(path: Path, role: str, chosen: str | bool | None, usual: Sequence[str], there: Sequence[str]) -> str | None:
    if chosen is False:
        return None
    if chosen is not None:
        if chosen not in there:
            raise InputError(f"{path}: prepare.columns.{role}: no column '{chosen}'; there are: {', '.join(there)}")
        return str(chosen)
    found = [name for word in usual for name in there if name.casefold() == word]
    if len(found) > 1:
        raise InputError(
            f"{path}: the columns {' and '.join(repr(name) for name in found)} could each be the {role}; name one in "
            f"prepare.columns.{role}"
        )
    if not found and role in ("file", "label"):
        raise InputError(
            f"{path}: no column for the {role} (one of {', '.join(usual)}); there are: {', '.join(there)}; name one in "
            f"prepare.columns.{role}"
        )
    return found[0] if found else None


def _pairs(listed: Listed, column: str) -> list[tuple[str, str]]:
    return list(zip(listed.table[column], listed.where, strict=True))


def _below(root: Path, value: str, pattern: str | None, where: str) -> str:
    name = (value if pattern is None else pattern.replace("{}", value)).replace("\\", "/")
    pure = PurePosixPath(name)
    if pure.is_absolute() and pure.is_relative_to(root.absolute().as_posix()):
        pure = pure.relative_to(root.absolute().as_posix())
    drive = len(name) > 1 and name[1] == ":"
    if pure.is_absolute() or drive or ".." in pure.parts or not pure.parts or "\0" in name:
        raise InputError(f"{where}: '{value}' leaves the folder {root}; write a path below it, without '..'")
    return pure.as_posix()


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))
    )


def _is_picture(entry: Path) -> bool:
    return entry.is_file() and entry.suffix.lower() in PICTURE_SUFFIXES and not entry.name.startswith(".")


def _some(values: "Sequence[str] | pd.Series") -> str:
    distinct = list(dict.fromkeys(values))
    return ", ".join(distinct[:8]) + (f" and {len(distinct) - 8} more" if len(distinct) > 8 else "")


def _more(count: int) -> str:
    return f" and {count - ENOUGH} more" if count > ENOUGH else ""
