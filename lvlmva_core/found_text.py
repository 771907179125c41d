"""Text in a picture, found by a trained network: the detection half of PP-OCRv4 (DB, Liao et al. 2020), Apache 2.0.

The wheel of rapidocr-onnxruntime carries its weights; nothing else of that library is used or imported. It finds
letters and reads none.
"""

import functools
import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lvlmva_core.errors import InputError

PACKAGE = "rapidocr-onnxruntime"
NETWORK = "models/ch_PP-OCRv4_det_infer.onnx"
STRIDE = 32  # the network takes sides that are multiples of it
MARGIN = 0.15  # of the sides: letters at the very edge are found only where the picture goes on
IS_TEXT = 0.3  # probability from which a pixel belongs to a piece of text
GROWN = 1.6  # the network marks the core of a text; area times this over perimeter, as its authors grow it
LEAST_SIDE = 3  # of a core, in enlarged pixels


@dataclass(frozen=True)
class Text:
    """A piece of text. mask: bool (H, W). probability: its core's mean, 0..1."""

    mask: np.ndarray
    probability: float


def find_text(picture: np.ndarray, side: int, least_probability: float) -> list[Text]:
    """Pieces of text, by falling probability; of each the box around it.

    Args:
        picture: uint8 (C, H, W). side: what its larger side is enlarged to before it is looked at, in pixels.
        least_probability: of a piece, 0..1.

    Raises:
        InputError: the library that carries the network is not installed.
    """
    from scipy import ndimage

    size = picture.shape[1:]
    margin = max(1, round(MARGIN * max(size)))
    padded = np.pad(picture, ((0, 0), (margin, margin), (margin, margin)), mode="edge")
    probabilities = text_probabilities(padded, round(side * max(padded.shape[1:]) / max(size)))
    scales = [large / small for large, small in zip(probabilities.shape, padded.shape[1:], strict=True)]
    cores, _ = ndimage.label(probabilities > IS_TEXT)
    found = []
    for number, place in enumerate(ndimage.find_objects(cores), start=1):
        height, width = (part.stop - part.start for part in place)
        probability = float(probabilities[place][cores[place] == number].mean())
        if min(height, width) < LEAST_SIDE or probability < least_probability:
            continue
        grown = height * width * GROWN / (2 * (height + width))
        box = [
            slice(
                max(0, round((part.start - grown) / scale) - margin),
                max(0, round((part.stop + grown) / scale) - margin),
            )
            for part, scale in zip(place, scales, strict=True)
        ]
        mask = np.zeros(size, dtype=bool)
        mask[tuple(box)] = True
        if mask.any():
            found.append(Text(mask, probability))
    return sorted(found, key=lambda text: -text.probability)


def text_probabilities(picture: np.ndarray, side: int) -> np.ndarray:
    """The network's word on each pixel of an enlarged picture: float32 (h, w), 0..1.

    Args:
        picture: uint8 (C, H, W); one channel stands for all three.
        side: what the larger side becomes, to the next multiple of 32.
    """
    from PIL import Image

    network = _network()
    scale = side / max(picture.shape[1:])
    height, width = (max(1, round(n * scale / STRIDE)) * STRIDE for n in picture.shape[1:])
    pixels = np.broadcast_to(picture, (3, *picture.shape[1:])).transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.LANCZOS)
    scaled = (np.asarray(image, dtype=np.float32)[:, :, ::-1] / 255 - 0.5) / 0.5  # blue first, as it was trained
    said: Any = network.run(None, {network.get_inputs()[0].name: scaled.transpose(2, 0, 1)[None].copy()})[0]
    return np.asarray(said[0, 0])


def network_version() -> str:
    """What found the text, for records. Raises InputError as `find_text`."""
    _network()
    return f"PP-OCRv4 detection of {PACKAGE} {version(PACKAGE)}"


@functools.cache
def _network() -> Any:
    """The network on one thread, so that its last bits do not depend on the machine's number of cores."""
    missing = f"critique.critic 'text' needs {PACKAGE}: pip install 'lvlmva[ocr]'"
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(missing) from error
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise InputError(missing)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    weights = Path(found.submodule_search_locations[0]) / NETWORK
    if not weights.is_file():
        raise InputError(f"{weights}: not in this version of {PACKAGE}; install 1.4.4")
    return onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
