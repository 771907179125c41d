"""Any picture file to pixels of one size: grey, RGB, RGBA, palette, CMYK, 16-bit, EXIF-turned, DICOM."""

import struct
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lvlmva_core.datasets.pictures import MAX_PIXELS
from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Fit = Literal["crop", "pad", "stretch"]
SixteenBit = Literal["full_range", "per_picture"] | tuple[float, float]

MAX_SIDE = 30_000  # pixels; what is wider is a strip, a slide or a mistake
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")  # none that starts a program
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
DICOM_SUFFIXES = (".dcm", ".dicom")
DAMAGED = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)  # what decoders raise on bytes that are not what they seem


class BadFileError(InputError):
    """One file cannot be used: the message says why and what to do, without its name."""


@dataclass(frozen=True)
class Decoding:
    """How a file becomes uint8 (C, size, size).

    size: pixels a side. fit: "crop" (the central square), "pad" (the whole picture, `background` beside it) or
    "stretch" (both sides to `size`, whatever they were).

    colour: RGB, else grey. sixteen_bit: see `to_eight_bits`. background: 0..255, behind what is transparent.
    """

    size: int
    fit: Fit = "crop"
    colour: bool = False
    sixteen_bit: SixteenBit = "full_range"
    background: int = 0


@dataclass(frozen=True)
class Picture:
    """pixels: uint8 (C, size, size). mask: bool (size, size), or None. largest: value of a 16-bit picture, else 0."""

    pixels: np.ndarray
    mask: np.ndarray | None
    largest: float


def read_any(path: Path, how: Decoding, mask: Path | None = None) -> Picture:
    """Decode a picture, turn it as its EXIF says, and bring it to its size (Lanczos); its mask alike (see `_mask`).

    Raises:
        BadFileError: missing, empty, damaged, no picture, several pictures, too large, or a mask of another size.
    """
    whole, largest = _opened(path, how)
    pixels = np.asarray(_fitted(whole, how, how.background))
    if pixels.dtype != np.uint8:
        pixels = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
    return Picture(
        np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1)),
        None if mask is None else _mask(mask, whole.size, how),
        largest,
    )


def resized(pixels: np.ndarray, how: Decoding) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) to (C, size, size), as `read_any` does it."""
    from PIL import Image

    image = Image.fromarray(pixels).convert("RGB" if how.colour else "L")
    return np.ascontiguousarray(np.atleast_3d(np.asarray(_fitted(image, how, how.background))).transpose(2, 0, 1))


def to_eight_bits(values: np.ndarray, how: SixteenBit) -> np.ndarray:
    """Values of more than 8 bits to float32 0..255, not yet rounded.

    Args:
        values: (H, W) of any numbers.
        how: "full_range": 0..65535 becomes 0..255, the same for every picture; "per_picture": the picture's own least
            and largest value become 0 and 255; (low, high): these two do, what lies outside is cut off.

    Raises:
        BadFileError: values do not fit, or are not finite.
    """
    if not np.isfinite(values).all():
        raise BadFileError("holds values that are not finite; write it anew without them")
    low, high = (0.0, 65535.0) if isinstance(how, str) else how
    least, largest = float(values.min()), float(values.max())
    if how == "per_picture":
        low, high = least, max(largest, least + 1)
    elif how == "full_range" and (values.dtype.kind == "f" or least < low or largest > high):
        raise BadFileError(
            f"values {least:g} to {largest:g} are not a 16-bit picture's; set prepare.sixteen_bit to [low, high] or "
            "per_picture"
        )
    return np.clip((values.astype(np.float64) - low) * (255 / (high - low)), 0, 255).astype(np.float32)


def has_colour(path: Path) -> bool | None:
    """Whether a file holds colour, by its header alone; None where it cannot be read."""
    from PIL import Image

    if is_dicom(path):
        from lvlmva_core.datasets.dicom import has_colour as dicom_has_colour

        return dicom_has_colour(path)
    try:
        with Image.open(existing(path), formats=FORMATS) as image:
            if image.mode in ("P", "PA"):
                palette = np.array(image.getpalette() or [0, 1, 2]).reshape(-1, 3)
                return bool((palette != palette[:, :1]).any())
            return not (image.mode in GREY_MODES or image.mode.startswith("I;16"))
    except (*DAMAGED, Image.DecompressionBombError):
        return None


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its ending, or by the letters DICM where it has none of a picture."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if path.suffix and not path.suffix[1:].isdigit():  # names of DICOM files are often numbers with dots
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def existing(path: Path) -> Path:
    """The file as the disk spells it: a name may be composed in the table and decomposed on the disk, or vice versa.

    Raises:
        BadFileError: no such file; one of the same name in other letters is named.
    """
    if path.is_file():
        return path
    for other in (Path(unicodedata.normalize("NFC", str(path))), Path(unicodedata.normalize("NFD", str(path)))):
        if other.is_file():
            return other
    if path.is_dir():
        raise BadFileError("is a folder, not a picture; name a file")
    beside = path.parent.iterdir() if path.parent.is_dir() else iter(())
    alike = [entry.name for entry in beside if entry.name.casefold() == path.name.casefold()]
    raise BadFileError(
        f"no such file (there is '{alike[0]}'); mend its name" if alike else "no such file; put it there"
    )


def _opened(path: Path, how: Decoding) -> "tuple[Image.Image, float]":
    """Whole picture in mode L, RGB or F (0..255), turned upright, and the largest value before it became 8-bit."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = existing(path)
    if path.stat().st_size == 0:
        raise BadFileError("empty file (0 bytes); copy it again")
    if is_dicom(path):
        from lvlmva_core.datasets.dicom import read_dicom

        values, largest = read_dicom(path, how.sixteen_bit)
        return _in_mode(Image.fromarray(values), how), largest
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check(image)
            deep = any("16" in str(part) for part in image.tile[0][3:]) if image.tile else False
            image.load()
            upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
            values = np.asarray(upright)
            return _in_mode(Image.fromarray(to_eight_bits(values, how.sixteen_bit)), how), float(values.max())
        if deep and how.sixteen_bit != "full_range":
            raise BadFileError(
                "colour of 16 bits can be read with prepare.sixteen_bit: full_range alone; save it with 8 bits"
            )
        return _in_mode(upright, how), 0.0
    except BadFileError:
        raise
    except UnidentifiedImageError:
        raise BadFileError(
            "not a picture (known are PNG, JPEG, TIFF, WebP, BMP, GIF, DICOM); remove or convert it"
        ) from None
    except Image.DecompressionBombError:
        raise BadFileError(f"more than {MAX_PIXELS // 10**6} million pixels; make it smaller") from None
    except DAMAGED as error:
        raise BadFileError(
            f"not a readable picture ({' '.join(str(error).split())[:120]}); copy or export it again"
        ) from error


def _check(image: "Image.Image") -> None:
    """Refuse by the header what must not be decoded."""
    width, height = image.size
    if min(width, height) < 1:
        raise BadFileError(f"{width}x{height} pixels: no picture; export it again")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadFileError(
            f"{width}x{height} pixels, more than {MAX_SIDE} a side or {MAX_PIXELS // 10**6} million in all; "
            "make it smaller"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's MPO holds previews of the one picture
        raise BadFileError(f"holds {frames} pictures (frames, pages); save the one that is meant")


def _in_mode(image: "Image.Image", how: Decoding) -> "Image.Image":
    """L or RGB as wanted; F stays F where grey is wanted; what is transparent shows the background."""
    from PIL import Image

    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        behind = Image.new("RGBA", layer.size, (how.background,) * 3 + (255,))
        image = Image.alpha_composite(behind, layer).convert("RGB")
    if image.mode == "F":
        if not how.colour:
            return image
        image = Image.fromarray(np.round(np.asarray(image)).astype(np.uint8))
    return image.convert("RGB" if how.colour else "L")


def _fitted(
    image: "Image.Image", how: Decoding, background: int, resampling: "Image.Resampling | None" = None
) -> "Image.Image":
    from PIL import Image

    method = Image.Resampling.LANCZOS if resampling is None else resampling
    (width, height), size = image.size, how.size
    if how.fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    elif how.fit == "pad":
        scale = size / max(width, height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        canvas = Image.new(image.mode, (size, size), (background,) * 3 if image.mode == "RGB" else background)
        canvas.paste(
            image if image.size == inner else image.resize(inner, method),
            ((size - inner[0]) // 2, (size - inner[1]) // 2),
        )
        return canvas
    return image if image.size == (size, size) else image.resize((size, size), method)


def _mask(path: Path, size: tuple[int, int], how: Decoding) -> np.ndarray:
    """A mask beside its picture, bool (size, size): True where at least half of a pixel is covered.

    What counts as covered in the file: above half of 255, or not 0 where its largest value is 1; an index that is not 0
    in a palette.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(existing(path), formats=FORMATS) as image:
            _check(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
        values = np.asarray(
            upright if upright.mode in ("1", "P") or upright.mode.startswith("I") else upright.convert("L")
        )
        covered = values > (0 if upright.mode in ("1", "P") or values.max() <= 1 else values.dtype.type(127))
    except BadFileError as error:
        raise BadFileError(f"its mask '{path.name}': {error}") from None
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise BadFileError(f"its mask '{path.name}' is not readable ({' '.join(str(error).split())[:120]})") from error
    if upright.size != size:
        raise BadFileError(
            f"{size[0]}x{size[1]} pixels, but its mask '{path.name}' has {upright.width}x{upright.height}; "
            "they must be of one size"
        )
    whole = Image.fromarray(np.where(covered, 255, 0).astype(np.uint8))
    return np.asarray(_fitted(whole, how, 0, Image.Resampling.BOX)) >= 128
