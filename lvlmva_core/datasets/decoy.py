"""Digits with decoys: a grey square in a corner whose shade gives the class away in training (LVLM-VA §5.1)."""

import gzip
import math
from pathlib import Path
from typing import Literal

import numpy as np

from lvlmva_core.datasets import Dataset, assemble
from lvlmva_core.datasets.settings import PrepareSettings
from lvlmva_core.datasets.shortcuts import Shortcut, lay_shortcut
from lvlmva_core.errors import InputError

SIZE = 28  # pixels a side
DECOY = 4  # pixels a side
DIGITS = [str(digit) for digit in range(10)]
FEATURE = "a grey 4x4 square in a corner"


class DecoyDigits(PrepareSettings):
    """DecoyDigits: comes with scikit-learn, so that `root` is not read.

    shortcut: in the place of the decoy (an extension); null = the decoy.
    """

    dataset: Literal["decoy_digits"] = "decoy_digits"
    shortcut: Shortcut | None = None

    def prepare(self) -> Dataset:
        """`decoy_digits`."""
        return decoy_digits(self.seed, self.shortcut)


class DecoyMnist(PrepareSettings):
    """DecoyMNIST: root is the folder that holds MNIST/raw/*.gz."""

    dataset: Literal["decoy_mnist"] = "decoy_mnist"

    def prepare(self) -> Dataset:
        """`decoy_mnist`."""
        return decoy_mnist(self.folder(), self.seed)


def decoy_digits(seed: int, shortcut: Shortcut | None = None) -> Dataset:
    """DecoyDigits: the 1,797 handwritten digits that scikit-learn carries (UCI optical digits, 8x8, 17 grey levels).

    Each is enlarged to 20x20 by bilinear interpolation and gets MNIST's border of 4 pixels. Stratified split
    1,000 / 297 / 500 (train / val / test), drawn from `seed`; see `add_decoys` for the decoys, `lay_shortcut` for what
    stands in their place, at a strength of 1 - digit / 10, as the decoy's shade falls.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = np.round(raw.images * (255 / 16)).astype(np.uint8)
    digits = np.zeros((len(grey), SIZE, SIZE), dtype=np.uint8)
    for digit, small in zip(digits, grey, strict=True):
        digit[4:-4, 4:-4] = np.asarray(Image.fromarray(small).resize((20, 20), Image.Resampling.BILINEAR))
    labels = raw.target.astype(np.int64)
    split = _stratified_split(labels, {"train": 1000, "val": 297, "test": 500}, np.random.default_rng([seed, 1]))
    sources = [f"digits-{i:05d}" for i in range(len(labels))]
    return _with_decoys("decoy_digits", digits, labels, split, sources, seed, shortcut)


def decoy_mnist(root: Path, seed: int) -> Dataset:
    """DecoyMNIST from MNIST's own files in the layout of torchvision's MNIST, `root`/MNIST/raw/*-ubyte[.gz].

    48,000 of the 60,000 training digits are the train split, the other 12,000 the val split (drawn from `seed`),
    the 10,000 test digits the test split (LVLM-VA §5.1).

    Raises:
        InputError: a file is missing, or is not the IDX file that its name says.
    """
    folder = root / "MNIST" / "raw"
    digits, labels, names = [], [], []
    for prefix, count in (("train", 60_000), ("t10k", 10_000)):
        digits.append(_read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (count, SIZE, SIZE)))
        labels.append(_read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (count,)).astype(np.int64))
        names += [f"{prefix}-{i:05d}" for i in range(count)]
    is_train = np.random.default_rng([seed, 1]).permutation(60_000) < 48_000
    split = np.concatenate([np.where(is_train, "train", "val"), np.full(10_000, "test")])
    return _with_decoys("decoy_mnist", np.concatenate(digits), np.concatenate(labels), split, names, seed)


def shade(digit: np.ndarray) -> np.ndarray:
    """Grey value 0..255 of the decoy that stands for a digit 0..9: 255 - 25 * digit (LVLM-VA §5.1)."""
    return (255 - 25 * np.asarray(digit, dtype=np.int64)).astype(np.uint8)


def add_decoys(digits: np.ndarray, shades: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay a square over one corner of each picture.

    Args:
        digits: uint8 (N, H, W). shades: uint8 (N,).
        corners: (N,), 0..3 = top left, top right, bottom left, bottom right.

    Returns:
        (pictures, masks): uint8 (N, H, W) with decoys; bool (N, H, W), True on the decoy.
    """
    height, width = digits.shape[1:]
    masks = np.zeros(digits.shape, dtype=bool)
    for corner in range(4):
        rows = slice(height - DECOY, height) if corner >= 2 else slice(0, DECOY)
        columns = slice(width - DECOY, width) if corner % 2 else slice(0, DECOY)
        masks[np.flatnonzero(corners == corner)[:, None, None], np.r_[rows][:, None], np.r_[columns]] = True
    return np.where(masks, shades[:, None, None], digits), masks


def _add(
    digits: np.ndarray, of: np.ndarray, corners: np.ndarray, shortcut: Shortcut | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures with the decoys, or shortcuts, that stand for the digits `of`, and their masks."""
    if shortcut is None:
        return add_decoys(digits, shade(of), corners)
    laid = [
        lay_shortcut(digit[None], shortcut, 1 - int(k) / 10, int(corner))
        for digit, k, corner in zip(digits, of, corners, strict=True)
    ]
    return np.stack([picture[0] for picture, _ in laid]), np.stack([mask for _, mask in laid])


def _with_decoys(
    name: str,
    digits: np.ndarray,
    labels: np.ndarray,
    split: np.ndarray,
    sources: list[str],
    seed: int,
    shortcut: Shortcut | None = None,
) -> Dataset:
    """Every sample gets a decoy; its shade is the class's own in training and that of a random digit in val and test.

    Two further splits show the test digits under other decoys: `test_agreeing` with the class's own shade, as in
    training, and `test_plain` without a decoy.
    """
    rng = np.random.default_rng([seed, 2])
    corners = rng.integers(0, 4, len(digits))
    random_digits = rng.integers(0, 10, len(digits))
    pictures, masks = _add(digits, np.where(split == "train", labels, random_digits), corners, shortcut)
    test = np.flatnonzero(split == "test")
    agreeing, agreeing_masks = _add(digits[test], labels[test], corners[test], shortcut)
    position = [f"{i:05d}" for i in range(len(digits))]
    return assemble(
        name,
        DIGITS,
        FEATURE if shortcut is None else f"{shortcut.kind} on a square of {shortcut.side:.2f} of the sides",
        ids=[f"{s}-{p}" for s, p in zip(split, position, strict=True)]
        + [f"{extra}-{position[i]}" for extra in ("test_agreeing", "test_plain") for i in test],
        split=np.concatenate([split, np.full(len(test), "test_agreeing"), np.full(len(test), "test_plain")]),
        label=np.concatenate([labels, labels[test], labels[test]]),
        spurious=np.concatenate([np.ones(len(digits) + len(test), bool), np.zeros(len(test), bool)]),
        source=sources + [sources[i] for i in test] * 2,
        images=np.concatenate([pictures, agreeing, digits[test]])[:, None],
        spurious_masks=np.concatenate([masks, agreeing_masks, np.zeros_like(masks[test])]),
        known=np.ones(len(digits) + 2 * len(test), dtype=bool),
    )


def _stratified_split(labels: np.ndarray, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """Split names (N,), each class spread over the splits in proportion to their sizes."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    # a class's samples get evenly spaced places in [0, 1); sorting by place mixes the classes evenly
    counts = np.bincount(labels)
    place = np.concatenate([(np.arange(count) + rng.random()) / count for count in counts])
    order = order[np.argsort(place, kind="stable")]
    split = np.empty(len(labels), dtype="<U5")
    start = 0
    for name, size in sizes.items():
        split[order[start : start + size]] = name
        start += size
    return split


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file of unsigned bytes (the format of MNIST's files)."""
    unpacked = path.with_suffix("")  # torchvision leaves both; the .gz alone will do, also in a read-only folder
    try:
        with gzip.open(path, "rb") if path.exists() or not unpacked.exists() else unpacked.open("rb") as file:
            content = file.read(4 + 4 * len(shape) + math.prod(shape) + 1)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; put MNIST's four *-ubyte.gz files there, or change prepare.root"
        ) from error
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: not a readable gzip file ({error}); fetch it again") from error
    header = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
    if content[: len(header)] != header or len(content) != len(header) + math.prod(shape):
        raise InputError(f"{path}: not an IDX file of unsigned bytes of shape {shape}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)
