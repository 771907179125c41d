"""CSV as people's spreadsheets save it: read with the line of each row, and written so that any of them reads it."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from lvlmva_core.errors import InputError
from lvlmva_core.store import replace_file


def read_spreadsheet(path: Path) -> tuple[Iterator[tuple[int, list[str]]], list[str]]:
    """Rows of a CSV file that are not empty, each with its line; and notes on what was guessed, for the user.

    Commas or semicolons, a byte order mark or none, any line ends, UTF-8 or Windows-1252.

    Raises:
        InputError: the file cannot be read; or, while the rows are taken, a row is no CSV.
    """
    text, notes = _decoded(path)
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return _rows(path, reader), notes


def write_csv(path: Path, rows: Iterable[Iterable[str]]) -> None:
    """Write rows beside the file and rename: they are on the disk when this returns, and the file is never half."""
    text = "".join(",".join(map(_quoted, row)) + "\n" for row in rows)
    replace_file(path, text.encode())


def _quoted(cell: str) -> str:
    """As csv does, and also around a carriage return alone, which csv.writer leaves bare before Python 3.13."""
    doubled = cell.replace('"', '""')
    return f'"{doubled}"' if any(each in cell for each in ',"\r\n') else cell


def _decoded(path: Path) -> tuple[str, list[str]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; restore it with `git checkout {path}`") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); look at its rights") from error
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        pass
    try:
        return data.decode("cp1252"), [f"{path}: not UTF-8, read as Windows-1252; save it as 'CSV UTF-8' to be sure"]
    except UnicodeDecodeError:
        raise InputError(f"{path}: neither UTF-8 nor Windows-1252; save it anew as 'CSV UTF-8'") from None


def _rows(path: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not empty."""
    while True:
        line = reader.line_num + 1  # type: ignore[attr-defined]  # where the row begins; a quoted cell may have several
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: not CSV ({error}); mend the row's quotes") from None
        if any(cell.strip() for cell in cells):
            yield line, cells
