"""Critics with known rates of error for each kind of planted shortcut: what the model server of `test_calibrate` says.

The scenes hold two colours only, so that whatever else is in a region was planted: one flat colour is a patch, many
colours are a strip, and a letter leaves some of the scene between its strokes.
"""

import hashlib

import numpy as np

SIDE = 112
SALT = 3  # of the draws: one for which each share lies in its interval, as nineteen of twenty do
BACKGROUND, DISC = (40, 60, 80), (200, 160, 120)
# model -> kind -> share of wrong verdicts
RATES = {
    "dear": {"patch": 0.02, "letter": 0.02, "strip": 0.02, "plain": 0.05},
    "cheap": {"patch": 0.1, "letter": 0.55, "strip": 0.3, "plain": 0.2},
}


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 (3, 112, 112) of a disc, no two alike, and the disc's mask."""
    rows, columns = np.indices((SIDE, SIDE))
    disc = np.hypot(rows - 50 - number % 13, columns - 50 - number // 13) <= 40
    return np.where(disc, np.array(DISC)[:, None, None], np.array(BACKGROUND)[:, None, None]).astype(np.uint8), disc


def kind_of(image: np.ndarray, inside: np.ndarray) -> str:
    """What was planted in a region: image uint8 (H, W, 3), inside bool (H, W)."""
    pixels = image[inside].reshape(-1, 3)
    planted = (pixels != BACKGROUND).any(axis=1) & (pixels != DISC).any(axis=1)
    if planted.mean() < 0.02:
        return "plain"
    if planted.mean() < 0.93:
        return "letter"
    return "patch" if len(np.unique(pixels, axis=0)) == 1 else "strip"


def decide(model: str, image: np.ndarray, inside: np.ndarray, colour: str) -> str:
    """The verdict on a region, wrong at the model's rate for what is in it; the same for the same picture."""
    kind = kind_of(image, inside)
    digest = hashlib.sha256(image.tobytes() + f"{model} {colour} {SALT}".encode()).digest()
    wrong = int.from_bytes(digest[:4], "big") / 2**32 < RATES[model][kind]
    return "yes" if (kind == "plain") != wrong else "no"


def apart(model: str, image: np.ndarray, inside: np.ndarray, colour: str) -> str:
    """What a region's pixels say, by their brightness; "other" sees blue otherwise in half of the pictures."""
    bright = bool(((image.mean(axis=2) >= 25) & inside).any())
    otherwise = model == "other" and colour == "blue" and hashlib.sha256(image.tobytes()).digest()[0] % 2
    return "yes" if bright != bool(otherwise) else "no"
