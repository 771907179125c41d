"""A folder of pictures that nobody prepared: all formats, modes and sizes, turned, 16-bit, with odd names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["gut artig", "böse"]


def scene(label: int, place: int) -> Image.Image:
    """A disc or a cross in the middle of noise, RGB, no two alike in size; a square in a corner of most crosses."""
    rng = np.random.default_rng([label, place])
    height, width = 40 + int(rng.integers(0, 24)), 40 + int(rng.integers(0, 24))
    pixels = rng.integers(0, 20, (height, width, 3)).astype(np.uint8)
    rows, columns = np.indices((height, width))
    away = np.abs(np.stack([rows - height / 2, columns - width / 2]))
    shape = np.hypot(*away) < 12 if label == 0 else (away.min(axis=0) < 4) & (away.max(axis=0) < 14)
    pixels[shape] = rng.integers(140, 255, 3)
    if has_square(label, place):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2  # of the central square, to which pictures are cropped
        pixels[top + 1 : top + 8, left + 1 : left + 8] = 220
    return Image.fromarray(pixels)


def has_square(label: int, place: int) -> bool:
    """Whether the shortcut is in a scene: on most of the second class, on few of the first."""
    return place % 4 != 0 if label else place % 4 == 0


def _turned(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def _sixteen_bit(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def _with_alpha(image: Image.Image, path: Path) -> None:
    image.putalpha(255)
    image.save(path)


WRITERS: list[tuple[str, Callable[[Image.Image, Path], None]]] = [
    (".png", lambda image, path: image.save(path)),
    (".png", lambda image, path: image.convert("L").save(path)),
    (".png", _with_alpha),
    (".png", lambda image, path: image.convert("LA").save(path)),
    (".png", lambda image, path: image.quantize(64).save(path)),
    (".png", _sixteen_bit),
    (".tif", _sixteen_bit),
    (".tif", lambda image, path: image.save(path, compression="tiff_lzw")),
    (".jpg", lambda image, path: image.save(path, quality=95)),
    (".jpg", lambda image, path: image.convert("CMYK").save(path, quality=95)),
    (".JPG", _turned),
    (".webp", lambda image, path: image.save(path, lossless=True)),
]


def write_folder(folder: Path, per_class: int) -> list[dict[str, str]]:
    """Write pictures of both classes in turn of the WRITERS; returns the rows of a table of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for place in range(per_class):
        for label, name in enumerate(CLASSES):
            suffix, write = WRITERS[(place * 2 + label) % len(WRITERS)]
            file = f"Bild {place:03d} {'é' if place % 2 else 'e'}{label}{suffix}"
            write(scene(label, place), folder / file)
            square = "1" if has_square(label, place) else "0"
            rows.append({"filename": file, "label": name, "spurious": square, "patient": f"P{place // 2}"})
    return rows


def write_excel_csv(path: Path, rows: list[dict[str, str]], columns: list[str]) -> None:
    """A table as Excel saves it in most of Europe: a BOM, semicolons, CRLF."""
    lines = [";".join(columns), *(";".join(row[column] for column in columns) for row in rows)]
    path.write_bytes(b"\xef\xbb\xbf" + ("\r\n".join(lines) + "\r\n").encode("utf-8"))
