"""Skin lesions with coloured bandages at the edge, mostly beside benign ones in training (LVLM-VA §5.2)."""

import zlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from lvlmva_core.datasets import Dataset, assemble
from lvlmva_core.datasets.balance import choose_per_group, shares_to_counts
from lvlmva_core.datasets.pictures import inside, opened, read_coverage, read_csv, read_picture
from lvlmva_core.datasets.settings import PrepareSettings
from lvlmva_core.datasets.shortcuts import Shortcut, lay_shortcut
from lvlmva_core.errors import InputError
from lvlmva_core.samples import TWINS
from lvlmva_core.settings import Count, Settings, Share

CLASSES = ["benign", "malignant"]
FEATURE = "a coloured bandage at the edge of the picture"
SPLITS = ("train", "val", "test")
DONOR_SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}  # of the pictures that bandages are cut from
PLACES = 8  # tried for a bandage; the one that hides least of the lesion is taken


class Skin(Settings):
    """How many lesions a class, which bandages, and on which share of the training pictures they lie.

    val_groups: balanced, or as_training: with the shares of the training split.
    shortcut: in the place of pasted bandages, on the same pictures (an extension); null = the bandages.
    """

    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    bandages: Literal["real", "pasted"]
    bandage_share_benign: Share
    bandage_share_malignant: Share
    val_groups: Literal["balanced", "as_training"] = "balanced"
    shortcut: Shortcut | None = None

    @model_validator(mode="after")
    def _a_shortcut_is_planted(self) -> "Skin":
        if self.shortcut is not None and self.bandages == "real":
            raise ValueError("a shortcut stands in the place of pasted bandages; set bandages to pasted")
        return self

    @model_validator(mode="after")
    def _real_bandages_are_on_benign_lesions(self) -> "Skin":
        if self.bandages == "real" and self.bandage_share_malignant > 0:
            raise ValueError("bandage_share_malignant must be 0 with bandages 'real': no malignant lesion has one")
        return self


class SkinPrepare(PrepareSettings):
    """Skin lesions: root is a folder or tar archive (`skin`). image_size: pixels a side."""

    dataset: Literal["skin"] = "skin"
    image_size: Annotated[int, Field(ge=32, le=1024)]
    skin: Skin

    def prepare(self) -> Dataset:
        """`skin`."""
        return skin(self.folder(), self.skin, self.image_size, self.seed)


def skin(root: Path, config: Skin, size: int, seed: int) -> Dataset:
    """Dermoscopic pictures, benign or malignant, `size` pixels a side, RGB, with a bandage on some.

    `root` is a folder or tar archive with `metadata.csv` (columns image_id, label, bandage: 0 | 1), `images/<id>.jpg`,
    and where known `lesion_masks/<id>.png` and `bandage_masks/<id>.png`.

    `bandages: real` takes the pictures as they are; the mask of a bandage is known only where somebody drew it, and
    the group of malignant lesions with a bandage stays empty. `bandages: pasted` leaves out the pictures that show a
    bandage and lays bandages cut from them at the edges of others, in both classes alike, so that the paste itself
    tells nothing; a bandage is used in one split only. In train they lie on `bandage_share_benign` and
    `bandage_share_malignant` of the classes, in test on half of each (real: of the benign), in val as `val_groups`
    says. With `pasted`, a further split, `test_twins`, shows the pictures of test with a bandage where there they have
    none, and without where there they have one.

    Raises:
        InputError: files are missing or damaged, or there are too few pictures or bandages.
    """
    with opened(root) as folder:
        table = read_csv(folder / "metadata.csv", ["image_id", "label", "bandage"])
        table = table.sort_values("image_id", kind="stable", ignore_index=True)
        if not table["label"].isin(CLASSES).all() or not table["bandage"].isin(["0", "1"]).all():
            raise InputError(f"{folder / 'metadata.csv'}: label must be benign or malignant, and bandage 0 or 1")
        if table["image_id"].duplicated().any():
            raise InputError(f"{folder / 'metadata.csv'}: an image_id stands there twice")
        ids = table["image_id"].tolist()
        label = (table["label"] == "malignant").to_numpy().astype(np.int64)
        flagged = (table["bandage"] == "1").to_numpy()
        rows, split, wanted = _chosen(config, label, flagged, seed)
        if config.bandages == "pasted":
            twins = np.flatnonzero(split == "test")
            rows, wanted = np.concatenate([rows, rows[twins]]), np.concatenate([wanted, ~wanted[twins]])
            split = np.concatenate([split, np.full(len(twins), TWINS)])
        pictures = np.stack([read_picture(inside(folder, f"images/{ids[row]}.jpg"), size, colour=True) for row in rows])
        lesions = np.stack([_mask_of(folder, "lesion_masks", ids[row], size) for row in rows]) >= 0.5
        masks = np.zeros(lesions.shape, dtype=bool)
        known = np.ones(len(rows), dtype=bool)
        if config.bandages == "pasted":
            donors = _donors(folder, [name for name, has in zip(ids, flagged, strict=True) if has], size, seed)
            for place in np.flatnonzero(wanted):
                rng = np.random.default_rng([seed, 2, zlib.crc32(ids[rows[place]].encode())])
                own = donors["test" if split[place] == TWINS else split[place]]
                if config.shortcut is not None:
                    corner = int(rng.integers(4))
                    pictures[place], masks[place] = lay_shortcut(pictures[place], config.shortcut, 1.0, corner)
                    continue
                bandage, coverage = own[int(rng.integers(len(own)))]
                pictures[place], masks[place] = add_bandage(pictures[place], bandage, coverage, lesions[place], rng)
        else:
            for place in np.flatnonzero(wanted):
                known[place] = (folder / "bandage_masks" / f"{ids[rows[place]]}.png").exists()
                masks[place] = _mask_of(folder, "bandage_masks", ids[rows[place]], size) >= 0.5
    return assemble(
        "skin",
        CLASSES,
        FEATURE if config.shortcut is None else f"{config.shortcut.kind} on {config.shortcut.side:.2f} of the sides",
        ids=[f"{s}-{ids[row]}" for s, row in zip(split, rows, strict=True)],
        split=split,
        label=label[rows],
        spurious=wanted,
        source=[f"images/{ids[row]}.jpg" for row in rows],
        images=pictures,
        spurious_masks=masks,
        known=known,
        object_masks=lesions,
    )


def add_bandage(
    picture: np.ndarray, bandage: np.ndarray, coverage: np.ndarray, lesion: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Lay a bandage at an edge: turned, mirrored, moved along its edge and made lighter or darker, drawn from `rng`.

    Args:
        picture, bandage: uint8 (3, H, W), H = W; the bandage where it was. coverage: float (H, W), 0..1, its opacity.
        lesion: bool (H, W), hidden as little as PLACES draws allow.

    Returns:
        (picture, mask): uint8 (3, H, W); bool (H, W), True on every pixel that the bandage covers in part or whole.
    """
    places: list[tuple[int, int, np.ndarray]] = []
    for _ in range(PLACES):
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        layers = np.rot90(np.concatenate([bandage, 255 * coverage[None]]), turns, axes=(1, 2))
        layers = layers[:, :, ::-1] if mirrored else layers
        layers = _moved_along_its_edge(layers, rng.random())
        places.append((int((lesion & (layers[3] > 0)).sum()), len(places), layers))
    layers = min(places, key=lambda entry: entry[:2])[2]
    opacity = layers[3] / 255
    colour = np.clip(layers[:3] * rng.uniform(0.9, 1.1), 0, 255)
    return np.round(opacity * colour + (1 - opacity) * picture).astype(np.uint8), opacity > 0


def _moved_along_its_edge(layers: np.ndarray, place: float) -> np.ndarray:
    """Move layers (4, H, W) along the edge that most of the last one lies on; place 0..1.

    Where the bandage was cut off by a corner it stays, lest the straight cut be seen.
    """
    shown = layers[3] > 0
    edges = [shown[0].sum(), shown[-1].sum(), shown[:, 0].sum(), shown[:, -1].sum()]
    along = 1 if max(edges[:2]) >= max(edges[2:]) else 0  # axis of `shown` to move along
    extent = np.flatnonzero(shown.any(axis=1 - along))
    first, last, size = int(extent[0]), int(extent[-1]), shown.shape[along]
    if first == 0 or last == size - 1:
        return layers
    return np.roll(layers, round(place * (size - 1 - last + first)) - first, axis=along + 1)


def _chosen(
    config: Skin, label: np.ndarray, flagged: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, their split, and whether each is to show a bandage; no row twice."""
    free = np.ones(len(label), dtype=bool)
    rows: list[int] = []
    splits: list[str] = []
    wanted: list[bool] = []
    for number, split in reversed(list(enumerate(SPLITS))):  # the balanced splits first: they need the rare pictures
        rng = np.random.default_rng([seed, 1, number])
        as_training = split == "train" or (split == "val" and config.val_groups == "as_training")
        shares = (config.bandage_share_benign, config.bandage_share_malignant) if as_training else (0.5, 0.5)
        for k, name in enumerate(CLASSES):
            real = config.bandages == "real"
            plain = np.flatnonzero(free & (label == k) & ~flagged)
            other = np.flatnonzero(free & (label == k) & flagged) if real else plain
            share = 0.0 if real and name == "malignant" else shares[k]
            counts = shares_to_counts(getattr(config, f"{split}_per_class"), share)
            picked = choose_per_group(
                [plain, other], counts, rng, f"skin, {split}, {name}: prepare.skin.{split}_per_class"
            )
            for has, chosen in enumerate(picked):
                rows += chosen.tolist()
                splits += [split] * len(chosen)
                wanted += [bool(has)] * len(chosen)
                free[chosen] = False
    return np.array(rows), np.array(splits), np.array(wanted)


def _donors(folder: Path, names: list[str], size: int, seed: int) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Pictures with their bandages' coverage, dealt to the splits so that no bandage is in two."""
    masked = [name for name in names if (folder / "bandage_masks" / f"{name}.png").exists()]
    coverages = {name: _mask_of(folder, "bandage_masks", name, size) for name in masked}
    masked = [name for name in masked if (coverages[name] >= 0.5).mean() >= 0.01]  # the crop has cut some off
    order = np.random.default_rng([seed, 3]).permutation(len(masked))
    ends = np.round(np.cumsum(list(DONOR_SHARES.values())) * len(masked)).astype(int)
    dealt = {}
    for split, part in zip(DONOR_SHARES, np.split(order, ends[:-1]), strict=True):
        if not len(part):
            raise InputError(
                f"{folder / 'bandage_masks'}: {len(masked)} masks of bandages, too few to give every split its own; "
                "set prepare.skin.bandages to real, or add masks"
            )
        chosen = [masked[place] for place in part]
        dealt[split] = [
            (read_picture(inside(folder, f"images/{name}.jpg"), size, colour=True), coverages[name]) for name in chosen
        ]
    return dealt


def _mask_of(folder: Path, kind: str, name: str, size: int) -> np.ndarray:
    """Coverage 0..1, zero everywhere where nobody drew a mask."""
    path = inside(folder, f"{kind}/{name}.png")
    return read_coverage(path, size) if path.exists() else np.zeros((size, size))
