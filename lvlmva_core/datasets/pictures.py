"""Pictures from a folder or an archive that somebody else packed: names checked, sizes bounded, decoded once."""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

MAX_PIXELS = 100_000_000  # of one picture, before it is decoded
MAX_FILES = 200_000  # of one archive
MAX_BYTES = 40 * 2**30  # of all files of one archive


@contextmanager
def opened(root: Path) -> Iterator[Path]:
    """Yield the folder of a data set: `root` itself, or a temporary one into which the tar archive `root` is unpacked.

    Archives are unpacked with `filter="data"` (no absolute names, no `..`, no links outward, no devices). A single
    folder at the top is entered.

    Raises:
        InputError: nothing is there, it is no tar archive, or the archive is unsafe or too large.
    """
    if root.is_dir():
        yield _top(root)
        return
    with tempfile.TemporaryDirectory(prefix="lvlmva-") as folder:
        try:
            with tarfile.open(root) as archive:
                members = archive.getmembers()
                size = sum(member.size for member in members)
                if len(members) > MAX_FILES or size > MAX_BYTES:
                    raise InputError(
                        f"{root}: {len(members)} files of {size} bytes in all, above the bounds of {MAX_FILES} and "
                        f"{MAX_BYTES}; unpack it yourself and set prepare.root to the folder"
                    )
                archive.extractall(folder, filter="data")
        except FileNotFoundError as error:
            raise InputError(f"{root}: no such folder or archive; set prepare.root (see docs/data.md)") from error
        except tarfile.FilterError as error:
            raise InputError(f"{root}: unsafe archive ({error}); fetch it again from where you trust it") from error
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"{root}: neither a folder nor a readable tar archive ({error})") from error
        yield _top(Path(folder))


def inside(folder: Path, name: str) -> Path:
    """The file that a table names, below `folder`. Raises InputError for an absolute name or one with `..`."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise InputError(f"{folder}: the table names '{name}'; expected a path inside the folder, without '..'")
    return folder.joinpath(*pure.parts)


def read_csv(path: Path, columns: list[str]) -> "pd.DataFrame":
    """Read a CSV table as text and check that it has `columns` and no empty value in them.

    Raises:
        InputError: it has not; the message names the file and the columns.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable CSV table ({' '.join(str(error).split())})") from error
    absent = [column for column in columns if column not in table.columns]
    if absent:
        raise InputError(f"{path}: lacks the columns {', '.join(absent)} (see docs/data.md)")
    for column in columns:
        if (table[column] == "").any():
            line = int(np.flatnonzero(table[column] == "")[0]) + 2
            raise InputError(f"{path}, line {line}: no value for '{column}'")
    return table


def read_picture(path: Path, size: int, *, colour: bool) -> np.ndarray:
    """Decode a picture, crop it to its central square and resize it.

    Returns:
        uint8 (C, size, size): 3 channels (RGB) or 1 (grey).

    Raises:
        InputError: the file is missing, damaged, or has more than MAX_PIXELS pixels.
    """
    from PIL import Image

    square = np.asarray(_decode(path, "RGB" if colour else "L", size, Image.Resampling.LANCZOS))
    return np.atleast_3d(square).transpose(2, 0, 1)


def read_coverage(path: Path, size: int) -> np.ndarray:
    """Decode a mask like `read_picture`: float64 (size, size), the share 0..1 of each pixel that is covered."""
    from PIL import Image

    return np.asarray(_decode(path, "L", size, Image.Resampling.BOX), dtype=np.float64) / 255


def _decode(path: Path, mode: str, size: int, resampling: "Image.Resampling") -> "Image.Image":
    from PIL import Image

    try:
        with Image.open(path) as opened_image:
            width, height = opened_image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{path}: {width}x{height} pixels, more than {MAX_PIXELS}; make it smaller")
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            square = opened_image.convert(mode).crop((left, top, left + side, top + side))
            return square if side == size else square.resize((size, size), resampling)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such picture, though the data set names it; fetch the set again") from error
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture ({error}); fetch it again") from error


def _top(folder: Path) -> Path:
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
