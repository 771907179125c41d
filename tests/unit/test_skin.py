import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from lvlmva_core.datasets import Dataset
from lvlmva_core.datasets.shortcuts import Shortcut
from lvlmva_core.datasets.skin import Skin, SkinPrepare, add_bandage
from lvlmva_core.errors import InputError
from lvlmva_core.samples import TWINS
from tests.data import needs_data

ARCHIVE = "skin_isic2018_224.tar"
SIZE = 32
N_DONORS = 12
SMALL = Skin(
    train_per_class=10,
    val_per_class=4,
    test_per_class=6,
    bandages="pasted",
    bandage_share_benign=0.5,
    bandage_share_malignant=0.1,
)


def _prepare(root: Path, skin: Skin = SMALL, size: int = SIZE) -> Dataset:
    return SkinPrepare(root=str(root), seed=0, image_size=size, skin=skin).prepare()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up set: grey skin, a dark lesion in the middle; bandages of one green shade a picture."""
    folder = tmp_path_factory.mktemp("skin")
    for kind in ("images", "lesion_masks", "bandage_masks"):
        (folder / kind).mkdir()
    lines = ["image_id,label,bandage"]
    for n in range(72):
        name, has = f"ISIC_{n:03d}", n < N_DONORS + 8
        picture = np.full((SIZE, SIZE, 3), 200, dtype=np.uint8)
        lesion = np.zeros((SIZE, SIZE), dtype=np.uint8)
        lesion[12:20, 12:20] = 255
        picture[lesion > 0] = 40
        if has:
            mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
            mask[10:20, :6] = 255
            picture[mask > 0] = (0, 100 + 7 * n, 0)
            if n < N_DONORS:
                Image.fromarray(mask).save(folder / "bandage_masks" / f"{name}.png")
        Image.fromarray(picture).save(folder / "images" / f"{name}.jpg", quality=100, subsampling=0)
        Image.fromarray(lesion).save(folder / "lesion_masks" / f"{name}.png")
        lines.append(f"{name},{'malignant' if n >= 46 else 'benign'},{int(has)}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_rates_and_groups_are_what_the_settings_say(root: Path) -> None:
    data = _prepare(root)
    assert data.samples.groupby(["split", "label", "spurious"]).size().to_dict() == {
        ("train", 0, False): 5,
        ("train", 0, True): 5,
        ("train", 1, False): 9,
        ("train", 1, True): 1,
        **{("val", k, s): 2 for k in (0, 1) for s in (False, True)},
        **{(split, k, s): 3 for split in ("test", TWINS) for k in (0, 1) for s in (False, True)},
    }
    assert data.known.all()
    assert data.object_masks is not None
    assert (data.object_masks.sum(axis=(1, 2)) == 64).all()
    assert not data.samples.loc[data.samples["split"] != TWINS, "source"].duplicated().any()
    pasted_on = {int(source[-7:-4]) for source in data.samples["source"]}
    assert min(pasted_on) >= N_DONORS + 8  # no picture that shows a bandage of its own


def test_bandages_are_pasted_into_both_classes_alike_and_none_is_in_two_splits(root: Path) -> None:
    data = _prepare(root)
    donors_of: dict[str, set[int]] = {}
    for row in np.flatnonzero(data.samples["spurious"]):
        mask = data.spurious_masks[row]
        edges = [mask[0].any(), mask[-1].any(), mask[:, 0].any(), mask[:, -1].any()]
        assert any(edges)
        assert mask.sum() == 60
        red, green, blue = np.median(data.images[row][:, mask].astype(int), axis=1)
        assert green > 60 + red
        assert red < 20
        assert blue < 20
        donors_of.setdefault(data.samples["split"][row], set()).add(_donor(data, row, root))
    assert not donors_of["train"] & donors_of["test"]
    assert not donors_of["train"] & donors_of["val"]
    assert not donors_of["val"] & donors_of["test"]
    assert not donors_of[TWINS] & (donors_of["train"] | donors_of["val"])


def test_twins_are_the_test_pictures_with_the_bandage_there_or_gone(root: Path) -> None:
    data = _prepare(root)
    split, has = data.samples["split"].to_numpy(), data.samples["spurious"].to_numpy()
    twin_of = {source: row for row, source in enumerate(data.samples["source"]) if split[row] == TWINS}
    assert len(twin_of) == (split == "test").sum() == 12
    for row in np.flatnonzero(split == "test"):
        twin = twin_of[data.samples["source"][row]]
        assert has[twin] != has[row]
        assert data.samples["label"][twin] == data.samples["label"][row]
        differ = (data.images[twin] != data.images[row]).any(axis=0)
        assert differ.any()
        assert not (differ & ~(data.spurious_masks[row] | data.spurious_masks[twin])).any()


def test_a_shortcut_stands_in_the_place_of_bandages_on_the_same_pictures(root: Path) -> None:
    plain = _prepare(root)
    cast = Shortcut(kind="colour_cast", side=1.0)
    data = _prepare(root, SMALL.model_copy(update={"shortcut": cast}))
    assert data.samples[["id", "label", "spurious"]].equals(plain.samples[["id", "label", "spurious"]])
    has = data.samples["spurious"].to_numpy()
    assert (data.images[~has] == plain.images[~has]).all()
    assert data.spurious_masks[has].all()
    assert not data.spurious_masks[~has].any()
    red, green, blue = data.images[has][:, :, 0, 31].astype(int).T  # skin of 200, far from the lesion
    assert (red == 255).all()
    assert np.abs(green - 200).max() <= 1
    assert np.abs(blue - 140).max() <= 1
    assert "colour_cast" in data.spurious_feature
    with pytest.raises(ValidationError, match="set bandages to pasted"):
        Skin.model_validate(
            {**SMALL.model_dump(), "bandages": "real", "bandage_share_malignant": 0.0, "shortcut": cast}
        )


def _donor(data: Dataset, row: int, root: Path) -> int:
    """Which picture a bandage came from: pasting again from each, the one that gives this very picture."""
    source = data.samples["source"][row]
    plain = np.asarray(Image.open(root / source)).transpose(2, 0, 1)
    lesion = np.asarray(Image.open(root / "lesion_masks" / f"{Path(source).stem}.png")) > 0
    found = []
    for donor in range(N_DONORS):
        coverage = np.asarray(Image.open(root / "bandage_masks" / f"ISIC_{donor:03d}.png")) / 255
        bandage = np.asarray(Image.open(root / "images" / f"ISIC_{donor:03d}.jpg")).transpose(2, 0, 1)
        for count in (2, 3, 7):
            rng = np.random.default_rng([0, 2, zlib.crc32(Path(source).stem.encode())])
            rng.integers(count)
            if (add_bandage(plain, bandage, coverage, lesion, rng)[0] == data.images[row]).all():
                found.append(donor)
    assert len(set(found)) == 1
    return found[0]


def test_only_the_pixels_of_the_mask_differ_and_the_lesion_is_spared_where_it_can_be(root: Path) -> None:
    data = _prepare(root)
    assert data.object_masks is not None
    assert not (data.object_masks & data.spurious_masks).any()
    for row, source in enumerate(data.samples["source"]):
        plain = np.asarray(Image.open(root / source)).transpose(2, 0, 1)
        np.testing.assert_array_equal(
            data.images[row][:, ~data.spurious_masks[row]], plain[:, ~data.spurious_masks[row]]
        )


def test_a_bandage_moves_along_its_edge_unless_a_corner_cut_it() -> None:
    picture = np.zeros((3, 20, 20), dtype=np.uint8)
    coverage = np.zeros((20, 20))
    coverage[4:9, :3] = 1
    bandage = np.full((3, 20, 20), 200, dtype=np.uint8)
    places = set()
    for draw in range(60):
        tagged, mask = add_bandage(picture, bandage, coverage, np.zeros((20, 20), bool), np.random.default_rng(draw))
        assert mask.sum() == 15
        np.testing.assert_array_equal(tagged.any(axis=0), mask)
        places.add(tuple(np.argwhere(mask).min(axis=0).tolist()))
    assert len(places) > 20
    coverage[:4, :3] = 1  # now it touches the corner
    corners = set()
    for draw in range(60):
        _, mask = add_bandage(picture, bandage, coverage, np.zeros((20, 20), bool), np.random.default_rng(draw))
        assert mask[[0, 0, -1, -1], [0, -1, 0, -1]].sum() == 1
        corners.add(tuple(mask[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()))
    assert len(corners) == 4


def test_real_bandages_stay_as_they_are(root: Path) -> None:
    settings = SMALL.model_copy(update={"bandages": "real", "bandage_share_malignant": 0.0})
    data = _prepare(root, settings)
    groups = data.samples.groupby(["split", "group"]).size()
    assert groups["test"].to_dict() == {"benign/plain": 3, "benign/spurious": 3, "malignant/plain": 6}
    assert groups["train"].to_dict() == {"benign/plain": 5, "benign/spurious": 5, "malignant/plain": 10}
    for row, source in enumerate(data.samples["source"]):
        np.testing.assert_array_equal(data.images[row], np.asarray(Image.open(root / source)).transpose(2, 0, 1))
        has, number = bool(data.samples["spurious"][row]), int(source[-7:-4])
        assert has == (number < N_DONORS + 8)
        assert data.known[row] == (not has or number < N_DONORS)
        assert data.spurious_masks[row].any() == (has and number < N_DONORS)


def test_mistakes_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="bandage_share_malignant must be 0"):
        Skin(**{**SMALL.model_dump(), "bandages": "real"})
    with pytest.raises(InputError, match=r"skin, test, benign: prepare\.skin\.test_per_class.*lower it"):
        _prepare(root, SMALL.model_copy(update={"test_per_class": 80}))
    with pytest.raises(InputError, match=r"metadata\.csv: not a readable CSV table"):
        _prepare(tmp_path)
    (tmp_path / "metadata.csv").write_text("image_id,label\nA,benign\n")
    with pytest.raises(InputError, match="lacks the columns bandage"):
        _prepare(tmp_path)
    (tmp_path / "metadata.csv").write_text("image_id,label,bandage\nA,unsure,0\n")
    with pytest.raises(InputError, match="label must be benign or malignant"):
        _prepare(tmp_path)
    (tmp_path / "metadata.csv").write_text("image_id,label,bandage\nA,,0\n")
    with pytest.raises(InputError, match="line 2: no value for 'label'"):
        _prepare(tmp_path)
    rows = "".join(f"../{n},{'malignant' if n % 2 else 'benign'},0\n" for n in range(60))
    (tmp_path / "metadata.csv").write_text("image_id,label,bandage\n" + rows)
    with pytest.raises(InputError, match="expected a path inside the folder"):
        _prepare(tmp_path)


@needs_data(ARCHIVE)
def test_the_real_set(data_root: Path) -> None:
    settings = Skin(
        train_per_class=340,
        val_per_class=50,
        test_per_class=120,
        bandages="pasted",
        bandage_share_benign=0.5,
        bandage_share_malignant=0.03,
    )
    data = _prepare(data_root / ARCHIVE, settings, size=64)
    assert data.samples.groupby(["split", "group"]).size().loc["train"].to_dict() == {
        "benign/plain": 170,
        "benign/spurious": 170,
        "malignant/plain": 330,
        "malignant/spurious": 10,
    }
    groups = data.samples.groupby(["split", "group"]).size()
    assert groups.loc["val"].nunique() == 1
    drawn_alike = _prepare(data_root / ARCHIVE, settings.model_copy(update={"val_groups": "as_training"}), size=64)
    assert drawn_alike.samples.groupby(["split", "group"]).size().loc["val"].to_dict() == {
        "benign/plain": 25,
        "benign/spurious": 25,
        "malignant/plain": 48,
        "malignant/spurious": 2,
    }
    assert (data.samples[data.samples["split"] == "test"].groupby("group").size() == 60).all()
    areas = data.spurious_masks.mean(axis=(1, 2))
    np.testing.assert_array_equal(areas > 0, data.samples["spurious"])
    assert 0.01 < areas[areas > 0].min() < areas.max() < 0.4
    assert data.object_masks is not None
    assert data.object_masks.any(axis=(1, 2)).mean() > 0.99
