"""Knee radiographs with letter tags at the edge, mostly on healthy knees in training (LVLM-VA §5.2)."""

import hashlib
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from lvlmva_core.datasets import Dataset, assemble
from lvlmva_core.datasets.balance import choose_per_group, shares_to_counts
from lvlmva_core.datasets.pictures import inside, opened, read_csv, read_picture
from lvlmva_core.datasets.settings import PrepareSettings
from lvlmva_core.errors import InputError
from lvlmva_core.samples import TWINS
from lvlmva_core.settings import Count, Settings, Share

if TYPE_CHECKING:
    import pandas as pd


CLASSES = ["healthy", "arthritic"]
GRADES = {"0": 0, "3": 1}  # Kellgren-Lawrence grade -> label
FEATURE = "a lead marker (letter L or R) at the edge of the radiograph"
SPLITS = ("train", "val", "test")
JOINT_ROWS = (0.32, 0.72)  # share of the height within which the joint lies; no tag reaches into it
OVERSAMPLING = 8  # markers are drawn this much larger and averaged down


class Knee(Settings):
    """How many knees a class, and on which share of the training knees a lead marker stands.

    val_groups: balanced, or as_training: with the shares of the training split.
    """

    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    tag_share_healthy: Share
    tag_share_arthritic: Share
    val_groups: Literal["balanced", "as_training"] = "balanced"
    negatives: Literal["leave_out", "invert"]


class KneePrepare(PrepareSettings):
    """Knee radiographs: root is a folder or tar archive (`knee`). image_size: pixels a side."""

    dataset: Literal["knee"] = "knee"
    image_size: Annotated[int, Field(ge=32, le=1024)]
    knee: Knee

    def prepare(self) -> Dataset:
        """`knee`."""
        return knee(self.folder(), self.knee, self.image_size, self.seed)


def knee(root: Path, config: Knee, size: int, seed: int) -> Dataset:
    """Knees of Kellgren-Lawrence grade 0 and 3, `size` pixels a side, grey, with a lead marker on some.

    `root` is a folder or tar archive with `<split>/<grade>/<patient><side>.png`, as the public set has it; where a
    `manifest.csv` lies beside (columns split, kl_grade, file, patient, side, sha256, inverted), it says what there is
    and every file is compared with its digest. In train the marker stands on `tag_share_healthy` and
    `tag_share_arthritic` of the classes; in test on half of each, in val as `val_groups` says. The letter is the knee's
    side. A further split, `test_twins`, shows the knees of test with a marker where there they have none, and without
    where there they have one.

    Raises:
        InputError: files are missing or damaged, a patient is in two splits, or a split has too few pictures.
    """
    with opened(root) as folder:
        table = _listed(folder)
        pictures = np.stack([read_picture(folder / path, size, colour=False) for path in table["path"]])
    inverted = (
        table["inverted"].to_numpy() == "1" if "inverted" in table else np.array([is_negative(p[0]) for p in pictures])
    )
    if config.negatives == "invert":
        pictures = np.where(inverted[:, None, None, None], 255 - pictures, pictures)
    else:
        table, pictures = table[~inverted].reset_index(drop=True), pictures[~inverted]

    label = table["kl_grade"].map(GRADES).to_numpy()
    chosen, tagged = [], []
    for number, split in enumerate(SPLITS):
        per_class = getattr(config, f"{split}_per_class")
        as_training = split == "train" or (split == "val" and config.val_groups == "as_training")
        shares = (config.tag_share_healthy, config.tag_share_arthritic) if as_training else (0.5, 0.5)
        rng = np.random.default_rng([seed, 1, number])
        for k, name in enumerate(CLASSES):
            rows = np.flatnonzero((table["split"] == split).to_numpy() & (label == k))
            groups = shares_to_counts(per_class, shares[k])
            picked = choose_per_group(
                [rows, rows], groups, rng, f"knee, {split}, {name}: prepare.knee.{split}_per_class"
            )
            chosen += [*picked[0], *picked[1]]
            tagged += [False] * len(picked[0]) + [True] * len(picked[1])
    splits = table["split"].to_numpy()[chosen]
    twins = np.flatnonzero(splits == "test")
    rows = np.concatenate([chosen, np.array(chosen)[twins]])
    has_tag = np.concatenate([tagged, ~np.array(tagged)[twins]])
    splits = np.concatenate([splits, np.full(len(twins), TWINS)])
    table, pictures = table.iloc[rows].reset_index(drop=True), pictures[rows]
    masks = np.zeros((len(rows), size, size), dtype=bool)
    for row in np.flatnonzero(has_tag):
        file = table["file"][row]
        rng = np.random.default_rng([seed, 2, zlib.crc32(file.encode())])
        pictures[row, 0], masks[row] = add_tag(pictures[row, 0], table["side"][row], rng)
    return assemble(
        "knee",
        CLASSES,
        FEATURE,
        ids=[f"{split}-{Path(file).stem}" for split, file in zip(splits, table["file"], strict=True)],
        split=splits,
        label=label[rows],
        spurious=has_tag,
        source=table["path"].tolist(),
        images=pictures,
        spurious_masks=masks,
        known=np.ones(len(rows), dtype=bool),
    )


def is_negative(picture: np.ndarray) -> bool:
    """Whether a radiograph uint8 (H, W) is a negative: its femur darker than the soft tissue at the sides."""
    height, width = picture.shape
    femur = picture[height // 11 : height * 2 // 5, width * 5 // 14 : width * 9 // 14]
    border = max(1, width // 37)
    return float(femur.mean()) < float(np.concatenate([picture[:, :border], picture[:, -border:]]).mean())


def add_tag(picture: np.ndarray, letter: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lay a lead marker into a corner; corner, place, size, brightness, tilt, frame and blur are drawn from `rng`.

    Of two corners drawn, the darker is taken, since bone would hide the marker.

    Args:
        picture: uint8 (H, W), H = W. letter: "L" | "R".

    Returns:
        (picture, mask): uint8 (H, W); bool (H, W), True on every pixel that the marker touches, none of which lies in
        JOINT_ROWS.
    """
    size = len(picture)
    marker = _draw_marker(letter, size, rng)
    height, width = marker.shape
    edge_rows = int(JOINT_ROWS[0] * size), size - int(np.ceil(JOINT_ROWS[1] * size))
    places = []
    for corner in rng.permutation(4)[:2]:
        top, left = corner < 2, corner % 2 == 0
        margin_y, margin_x = (int(rng.uniform(0.02, 0.05) * size) for _ in range(2))
        margin_y = max(0, min(margin_y, edge_rows[0 if top else 1] - height))
        row = margin_y if top else size - height - margin_y
        column = margin_x if left else size - width - margin_x
        places.append((float(picture[row : row + height, column : column + width].mean()), row, column))
    _, row, column = min(places)
    alpha = np.zeros(picture.shape)
    alpha[row : row + height, column : column + width] = marker
    lead = rng.uniform(235, 255)
    tagged = np.maximum(picture, np.round(alpha * lead + (1 - alpha) * picture)).astype(np.uint8)
    return tagged, alpha > 0


def _draw_marker(letter: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Opacity 0..1 of a marker, float (h, w), cropped to where it is not zero: a bold letter, at times in a frame."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    side = rng.uniform(0.14, 0.19) * size * OVERSAMPLING  # of the frame; the letter is two thirds as high
    font = ImageFont.load_default(round(0.85 * side))
    canvas = Image.new("L", (round(2 * side),) * 2)
    pen = ImageDraw.Draw(canvas)
    centre = side
    bold = max(1, round(0.035 * side))
    pen.text((centre, centre), letter, fill=255, font=font, anchor="mm", stroke_width=bold)
    frame = rng.choice(["none", "ring", "box"])
    box = (centre - side / 2, centre - side / 2, centre + side / 2, centre + side / 2)
    if frame == "ring":
        pen.ellipse(box, outline=200, width=bold)
    elif frame == "box":
        pen.rounded_rectangle(box, radius=side / 8, outline=200, width=bold)
    canvas = canvas.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.5) * OVERSAMPLING))
    small = canvas.resize((round(2 * side / OVERSAMPLING),) * 2, Image.Resampling.BOX)
    opacity = np.asarray(small, dtype=np.float64) / 255 * rng.uniform(0.85, 1.0)
    opacity[opacity < 0.04] = 0.0
    rows, columns = np.flatnonzero(opacity.any(axis=1)), np.flatnonzero(opacity.any(axis=0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _listed(folder: Path) -> "pd.DataFrame":
    """What there is, sorted by path: split, kl_grade, file, patient, side, path, and `inverted` where it is known."""
    if (folder / "manifest.csv").exists():
        table = read_csv(
            folder / "manifest.csv", ["split", "kl_grade", "file", "patient", "side", "sha256", "inverted"]
        )
        table = table[table["kl_grade"].isin(list(GRADES)) & table["split"].isin(SPLITS)].reset_index(drop=True)
        table["path"] = [f"{r.split}/{r.kl_grade}/{r.file}" for r in table.itertuples()]
        for path, expected in zip(table["path"], table["sha256"], strict=True):
            file = inside(folder, path)
            if not file.is_file():
                raise InputError(f"{folder / 'manifest.csv'}: names '{path}', which is not there; fetch the set again")
            if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
                raise InputError(f"{file}: differs from the sha256 in manifest.csv; fetch the set again")
    else:
        table = _scanned(folder)
    if table.empty:
        raise InputError(f"{folder}: no files like train/0/9001695L.png; expected <split>/<grade>/ (see docs/data.md)")
    table = table.sort_values("path", kind="stable", ignore_index=True)
    if table["path"].duplicated().any():
        raise InputError(
            f"{folder / 'manifest.csv'}: names '{table['path'][table['path'].duplicated()].iloc[0]}' twice"
        )
    if not table["side"].isin(["L", "R"]).all():
        raise InputError(f"{folder / 'manifest.csv'}: the column 'side' must hold L or R")
    splits_of = table.groupby("patient")["split"].nunique()
    if (splits_of > 1).any():
        patient = splits_of.index[splits_of > 1][0]
        raise InputError(
            f"{folder}: patient {patient} is in several splits ({int((splits_of > 1).sum())} such patients); "
            "leave each patient's pictures in one of them"
        )
    return table


def _scanned(folder: Path) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for split in SPLITS:
        for grade in GRADES:
            for file in sorted((folder / split / grade).glob("*.png")):
                match = re.fullmatch(r"(\d+)([LR])", file.stem)
                if match is None:
                    raise InputError(f"{file}: expected a name like 9001695L.png (patient number and side)")
                rows.append((split, grade, file.name, match[1], match[2], f"{split}/{grade}/{file.name}"))
    return pd.DataFrame(rows, columns=["split", "kl_grade", "file", "patient", "side", "path"])
