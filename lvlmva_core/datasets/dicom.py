"""DICOM files as a radiologist's screen would show them (pydicom, the extra `dicom`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva_core.datasets.decode import DAMAGED, MAX_SIDE, BadFileError, SixteenBit, to_eight_bits
from lvlmva_core.datasets.pictures import MAX_PIXELS
from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset


def read_dicom(path: Path, sixteen_bit: SixteenBit) -> tuple[np.ndarray, float]:
    """Values of the modality, then of the VOI (window or table), and MONOCHROME1 turned last (PS3.3 C.11).

    Args:
        sixteen_bit: for a file without window and table: (low, high) in units of the modality, else the picture's own
            least and largest value become 0 and 255.

    Returns:
        float32 (H, W) or uint8 (H, W, 3), 0..255; 0.0, since a window has been applied.

    Raises:
        BadFileError: damaged, several frames, no picture, or compressed in a way for which no decoder is installed.
        InputError: pydicom is not installed.
    """
    need_pydicom()
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
    from pydicom.pixels.utils import pixel_array

    dataset = _header(path, pixels=True)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise BadFileError(
            f"DICOM with {frames} frames (multi-frame); export the frame that is meant as a file of its own"
        )
    if "Rows" not in dataset or "PixelData" not in dataset:
        raise BadFileError("DICOM without a picture (a report, a structure set); remove it")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if min(rows, columns) < 1 or rows * columns > MAX_PIXELS or max(rows, columns) > MAX_SIDE:
        raise BadFileError(f"{columns}x{rows} pixels; make it smaller")
    try:
        values = pixel_array(dataset)  # YBR becomes RGB
        kind = str(dataset.PhotometricInterpretation)
        if kind == "PALETTE COLOR":
            values = apply_color_lut(values, dataset)
        if values.ndim == 3:
            deep = values.dtype.itemsize > 1
            return (values >> 8 if deep else values).astype(np.uint8), 0.0
        values = apply_modality_lut(values, dataset)
        if values.dtype.kind == "f" and (values == np.round(values)).all():
            values = values.astype(np.int64)  # a table is looked up by whole numbers
        shown = apply_voi_lut(values, dataset)
        grey = to_eight_bits(shown, _range(dataset) or ("per_picture" if isinstance(sixteen_bit, str) else sixteen_bit))
    except BadFileError:
        raise
    except DAMAGED as error:
        raise BadFileError(
            f"DICOM whose picture cannot be decoded ({' '.join(str(error).split())[:160]}); export it uncompressed"
        ) from error
    return (np.float32(255) - grey if kind == "MONOCHROME1" else grey), 0.0


def has_colour(path: Path) -> bool | None:
    """Whether a DICOM file holds colour, by its header; None where it cannot be read."""
    need_pydicom()
    try:
        dataset = _header(path, pixels=False)
    except BadFileError:
        return None
    kind = str(dataset.get("PhotometricInterpretation", ""))
    return int(dataset.get("SamplesPerPixel") or 1) > 1 or kind == "PALETTE COLOR"


def need_pydicom() -> None:
    """Raise InputError where pydicom is not installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise InputError("DICOM files need pydicom; install the extra: pip install 'lvlmva[dicom]'") from error


def _header(path: Path, *, pixels: bool) -> "Dataset":
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except InvalidDicomError as error:
        raise BadFileError("not a DICOM file, though it is named as one; rename or export it again") from error
    except DAMAGED as error:
        raise BadFileError(f"damaged DICOM file ({' '.join(str(error).split())[:120]}); export it again") from error


def _range(dataset: "Dataset") -> tuple[float, float] | None:
    """What a window or table gives at its two ends; None where there is neither."""
    from pydicom.pixels.processing import apply_windowing

    table: Any = dataset.get("VOILUTSequence")
    if table:
        return 0.0, float(2 ** int(table[0].LUTDescriptor[2]) - 1)
    if "WindowWidth" in dataset and "WindowCenter" in dataset:
        with np.errstate(over="ignore"):  # a sigmoid's lower end
            low, high = apply_windowing(np.array([-1e9, 1e9]), dataset).tolist()
        return low, high
    return None
