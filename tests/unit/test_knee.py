import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lvlmva_core.datasets import Dataset
from lvlmva_core.datasets.knee import JOINT_ROWS, Knee, KneePrepare, add_tag, is_negative
from lvlmva_core.datasets.pictures import inside, read_picture
from lvlmva_core.errors import InputError
from lvlmva_core.samples import TWINS
from tests.data import needs_data

ARCHIVE = "knee_kl0_kl3_800each.tar"
SMALL = Knee(
    train_per_class=20,
    val_per_class=4,
    test_per_class=6,
    tag_share_healthy=0.5,
    tag_share_arthritic=0.1,
    negatives="leave_out",
)


def _prepare(root: Path, knee: Knee = SMALL, size: int = 40, seed: int = 0) -> Dataset:
    return KneePrepare(root=str(root), seed=seed, image_size=size, knee=knee).prepare()


def _draw_knee(rng: np.random.Generator, size: int) -> np.ndarray:
    picture = np.full((size, size), rng.integers(40, 90), dtype=np.uint8)
    picture[:, size // 5 : -size // 5] = rng.integers(120, 180)
    return picture


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up set in the public set's layout: two knees a patient, one negative among the healthy of train."""
    folder, rng, patient = tmp_path_factory.mktemp("knees"), np.random.default_rng(0), 9_000_000
    for split, count in (("train", 24), ("val", 6), ("test", 8)):
        for grade in (0, 3):
            (folder / split / str(grade)).mkdir(parents=True)
            for n in range(count):
                patient += n % 2
                picture = _draw_knee(rng, 48)
                if (split, grade, n) == ("train", 0, 0):
                    picture = 255 - picture
                Image.fromarray(picture).save(folder / split / str(grade) / f"{patient}{'LR'[n % 2]}.png")
            patient += 1
    return folder


def test_rates_and_groups_are_what_the_settings_say(root: Path) -> None:
    data = _prepare(root)
    counts = data.samples.groupby(["split", "label", "spurious"]).size().to_dict()
    assert counts == {
        ("train", 0, False): 10,
        ("train", 0, True): 10,
        ("train", 1, False): 18,
        ("train", 1, True): 2,
        **{("val", k, s): 2 for k in (0, 1) for s in (False, True)},
        **{(split, k, s): 3 for split in ("test", TWINS) for k in (0, 1) for s in (False, True)},
    }
    assert data.images.shape == (72, 1, 40, 40)
    assert data.known.all()
    np.testing.assert_array_equal(data.spurious_masks.any(axis=(1, 2)), data.samples["spurious"])


def test_twins_are_the_test_knees_with_the_marker_there_or_gone(root: Path) -> None:
    data = _prepare(root)
    split, has = data.samples["split"].to_numpy(), data.samples["spurious"].to_numpy()
    twin_of = {source: row for row, source in enumerate(data.samples["source"]) if split[row] == TWINS}
    rows = np.flatnonzero(split == "test")
    assert len(twin_of) == len(rows) == 12
    for row in rows:
        twin = twin_of[data.samples["source"][row]]
        assert has[twin] != has[row]
        assert data.samples["label"][twin] == data.samples["label"][row]
        differ = (data.images[twin] != data.images[row]).any(axis=0)
        mask = data.spurious_masks[row] | data.spurious_masks[twin]
        assert differ.any()
        assert not (differ & ~mask).any()


def test_only_the_pixels_of_the_mask_differ_from_the_radiograph(root: Path) -> None:
    data = _prepare(root, size=48)
    for n, source in enumerate(data.samples["source"]):
        plain = np.asarray(Image.open(root / source))
        mask = data.spurious_masks[n]
        np.testing.assert_array_equal(data.images[n, 0][~mask], plain[~mask])
        assert (data.images[n, 0] >= plain).all()  # lead only brightens
        if mask.any():
            assert (data.images[n, 0][mask] > plain[mask]).mean() > 0.9


@pytest.mark.parametrize("size", [32, 64, 224])
def test_no_tag_covers_the_joint_and_all_lie_at_an_edge(size: int) -> None:
    corners = set()
    heights = []
    for draw in range(200):
        rng = np.random.default_rng(draw)
        picture = np.full((size, size), 90, dtype=np.uint8)
        _, mask = add_tag(picture, "LR"[draw % 2], rng)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert not mask[int(JOINT_ROWS[0] * size) : int(np.ceil(JOINT_ROWS[1] * size))].any()
        assert min(rows[0], size - 1 - rows[-1]) <= 0.06 * size
        assert min(columns[0], size - 1 - columns[-1]) <= 0.06 * size
        corners.add((rows[0] < size / 2, columns[0] < size / 2))
        heights.append(len(rows) / size)
    assert len(corners) == 4
    assert 0.08 < min(heights) < 0.8 * max(heights) < 0.28


def test_the_letter_can_be_read(tmp_path: Path) -> None:
    """L and R drawn from one seed differ, and the L has its weight at the lower left."""
    picture = np.zeros((224, 224), dtype=np.uint8)
    for draw in range(20):
        masks = {}
        for letter in "LR":
            tagged, masks[letter] = add_tag(picture, letter, np.random.default_rng(draw))
            assert tagged.max() > 190
        assert (masks["L"] != masks["R"]).any()


def test_a_tag_depends_on_its_sample_and_the_seed_alone(root: Path) -> None:
    first, again, other = _prepare(root), _prepare(root), _prepare(root, seed=1)
    np.testing.assert_array_equal(first.images, again.images)
    pd.testing.assert_frame_equal(first.samples, again.samples)
    assert first.samples["spurious"].tolist() != other.samples["spurious"].tolist()
    fewer = _prepare(root, SMALL.model_copy(update={"train_per_class": 18}))
    both = first.samples[first.samples["spurious"]].merge(fewer.samples[fewer.samples["spurious"]], on="id")
    assert len(both) >= 12
    assert (both["sha256_x"] == both["sha256_y"]).all()


def test_negatives_are_left_out_or_inverted(root: Path) -> None:
    negative = sorted((root / "train" / "0").iterdir())[0]
    assert is_negative(np.asarray(Image.open(negative)))
    everything = SMALL.model_copy(update={"train_per_class": 23})
    source = f"train/0/{negative.name}"
    assert source not in set(_prepare(root, everything).samples["source"])
    everything = everything.model_copy(update={"train_per_class": 24, "negatives": "invert"})
    data = _prepare(root, everything, size=48)
    (row,) = np.flatnonzero(data.samples["source"] == source)
    plain = 255 - np.asarray(Image.open(negative))
    outside = ~data.spurious_masks[row]
    np.testing.assert_array_equal(data.images[row, 0][outside], plain[outside])


def test_a_tar_gives_the_same_as_its_folder(root: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "knees.tar", "w") as archive:
        archive.add(root, "somewhere")
    np.testing.assert_array_equal(_prepare(tmp_path / "knees.tar").images, _prepare(root).images)


def test_an_archive_that_reaches_outside_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        member = tarfile.TarInfo("../escaped.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match="unsafe archive"):
        _prepare(tmp_path / "bad.tar")
    assert not (tmp_path.parent / "escaped.png").exists()
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(InputError, match="neither a folder nor a readable tar archive"):
        _prepare(tmp_path / "text.tar")
    with pytest.raises(InputError, match="no such folder or archive"):
        _prepare(tmp_path / "absent.tar")


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.png", "a/../../b.png", "a\\..\\b.png", ""])
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a path inside the folder"):
        inside(tmp_path, name)


def test_pictures_are_cropped_resized_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = (10, 20, 30)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    square = read_picture(tmp_path / "wide.png", 10, colour=True)
    np.testing.assert_array_equal(square, np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 10, 10)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"cut\.png: not a readable picture"):
        read_picture(tmp_path / "cut.png", 10, colour=True)
    monkeypatch.setattr("lvlmva_core.datasets.pictures.MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="60x20 pixels, more than 1000"):
        read_picture(tmp_path / "wide.png", 10, colour=True)


def test_mistakes_in_the_set_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"knee, train, healthy: prepare\.knee\.train_per_class: .* lower it"):
        _prepare(root, SMALL.model_copy(update={"train_per_class": 1000}))
    with pytest.raises(InputError, match="no files like train/0/9001695L"):
        _prepare(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "0").mkdir(parents=True)
        Image.fromarray(np.zeros((40, 40), dtype=np.uint8)).save(
            tmp_path / split / "0" / f"77{'LR'[split == 'val']}.png"
        )
    with pytest.raises(InputError, match="patient 77 is in several splits"):
        _prepare(tmp_path)
    (tmp_path / "val" / "0" / "odd.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"odd\.png: expected a name like"):
        _prepare(tmp_path)
    content = (tmp_path / "train" / "0" / "77L.png").read_bytes()
    header = "split,kl_grade,file,patient,side,sha256,inverted\n"
    (tmp_path / "manifest.csv").write_text(
        f"{header}train,0,77L.png,77,L,{hashlib.sha256(content).hexdigest()[::-1]},0\n"
    )
    with pytest.raises(InputError, match="differs from the sha256"):
        _prepare(tmp_path)
    (tmp_path / "manifest.csv").write_text(f"{header}train,0,gone.png,77,L,0,0\n")
    with pytest.raises(InputError, match=r"names 'train/0/gone\.png', which is not there"):
        _prepare(tmp_path)
    (tmp_path / "manifest.csv").write_text(f"{header}train,0,../x.png,77,L,0,0\n")
    with pytest.raises(InputError, match="expected a path inside the folder"):
        _prepare(tmp_path)


@needs_data(ARCHIVE)
def test_the_real_set_at_the_size_of_the_paper(data_root: Path) -> None:
    settings = Knee(
        train_per_class=500,
        val_per_class=76,
        test_per_class=150,
        tag_share_healthy=0.5,
        tag_share_arthritic=0.025,
        negatives="leave_out",
    )
    data = _prepare(data_root / ARCHIVE, settings, size=64)
    assert data.samples.groupby(["split", "group"]).size().loc["train"].to_dict() == {
        "healthy/plain": 250,
        "healthy/spurious": 250,
        "arthritic/plain": 488,
        "arthritic/spurious": 12,
    }
    groups = data.samples.groupby(["split", "group"]).size()
    assert groups.loc["val"].nunique() == 1
    drawn_alike = _prepare(data_root / ARCHIVE, settings.model_copy(update={"val_groups": "as_training"}), size=64)
    assert drawn_alike.samples.groupby(["split", "group"]).size().loc["val"].to_dict() == {
        "healthy/plain": 38,
        "healthy/spurious": 38,
        "arthritic/plain": 74,
        "arthritic/spurious": 2,
    }
    assert (data.samples[data.samples["split"] == "test"].groupby("group").size() == 75).all()
    own = data.samples[data.samples["split"] != TWINS]
    patients = own.assign(patient=own["id"].str.extract(r"-(\d+)[LR]$", expand=False))
    assert (patients.groupby("patient")["split"].nunique() == 1).all()
    joint = slice(int(JOINT_ROWS[0] * 64), int(np.ceil(JOINT_ROWS[1] * 64)))
    assert not data.spurious_masks[:, joint].any()


@needs_data(ARCHIVE)
def test_negatives_of_the_real_set_are_told_as_its_makers_told_them(data_root: Path) -> None:
    with tarfile.open(data_root / ARCHIVE) as archive:
        manifest = pd.read_csv(archive.extractfile("knee/manifest.csv"))  # type: ignore[arg-type]
        listed = manifest[(manifest["inverted"] == 1) | (np.arange(len(manifest)) % 10 == 0)]
        for entry in listed.itertuples():
            file = archive.extractfile(f"knee/{entry.split}/{entry.kl_grade}/{entry.file}")
            assert file is not None
            assert is_negative(np.asarray(Image.open(file))) == (entry.inverted == 1)
