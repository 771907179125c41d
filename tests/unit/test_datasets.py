import gzip
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lvlmva_core.datasets import Dataset
from lvlmva_core.datasets.decoy import DecoyDigits, DecoyMnist, add_decoys, shade
from lvlmva_core.errors import InputError
from tests.data import needs_data


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return DecoyDigits(seed=0).prepare()


def _split(dataset: Dataset, split: str) -> np.ndarray:
    return np.flatnonzero(dataset.samples["split"] == split)


def test_all_digits_are_there_once_and_every_class_in_every_split(digits: Dataset) -> None:
    counts = digits.samples["split"].value_counts().to_dict()
    assert counts == {"train": 1000, "val": 297, "test": 500, "test_agreeing": 500, "test_plain": 500}
    own = digits.samples[digits.samples["split"].isin(["train", "val", "test"])]
    assert sorted(own["source"]) == [f"digits-{i:05d}" for i in range(1797)]
    per_class = own.groupby(["split", "label"]).size().unstack()
    assert (per_class.max(axis=1) - per_class.min(axis=1) <= 5).all()
    expected = load_digits().target
    assert all(expected[int(s[-5:])] == label for s, label in zip(own["source"], own["label"], strict=True))


def test_decoys_pixel_by_pixel(digits: Dataset) -> None:
    boxes = {0: (slice(0, 4), slice(0, 4)), 1: (slice(0, 4), slice(24, 28))}
    boxes |= {2: (slice(24, 28), slice(0, 4)), 3: (slice(24, 28), slice(24, 28))}
    seen = set()
    for row in _split(digits, "train"):
        image, label = digits.images[row, 0], int(digits.samples["label"][row])
        corners = [corner for corner, box in boxes.items() if (image[box] == 255 - 25 * label).all()]
        assert len(corners) == 1
        seen.add(corners[0])
        expected = np.zeros((28, 28), dtype=bool)
        expected[boxes[corners[0]]] = True
        np.testing.assert_array_equal(digits.spurious_masks[row], expected)
        border = np.ones((28, 28), dtype=bool)
        border[4:24, 4:24] = False
        assert (image[border & ~expected] == 0).all()
    assert seen == {0, 1, 2, 3}


def test_the_three_test_splits_show_the_same_digits_under_other_decoys(digits: Dataset) -> None:
    plain, agreeing, test = (digits.images[_split(digits, s), 0] for s in ("test_plain", "test_agreeing", "test"))
    masks = digits.spurious_masks[_split(digits, "test")]
    labels = digits.samples["label"].to_numpy()[_split(digits, "test")]
    np.testing.assert_array_equal(plain[~masks], test[~masks])
    np.testing.assert_array_equal(plain[~masks], agreeing[~masks])
    assert (plain[masks] == 0).all()
    np.testing.assert_array_equal(agreeing[masks].reshape(500, 16), np.repeat(255 - 25 * labels, 16).reshape(500, 16))
    shades = test[masks].reshape(500, 16)
    assert (shades == shades[:, :1]).all()
    shown = (255 - shades[:, 0].astype(int)) // 25
    assert (np.bincount(shown, minlength=10) > 25).all()  # any digit's shade, whatever the label
    assert abs(np.corrcoef(shown, labels)[0, 1]) < 0.1
    assert not digits.spurious_masks[_split(digits, "test_plain")].any()
    assert not digits.samples["spurious"].to_numpy()[_split(digits, "test_plain")].any()


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(digits: Dataset) -> None:
    again = DecoyDigits(seed=0).prepare()
    np.testing.assert_array_equal(again.images, digits.images)
    assert again.samples.equals(digits.samples)
    other = DecoyDigits(seed=1).prepare()
    assert set(other.samples["id"]) != set(digits.samples["id"])


def test_shades_run_from_white_to_dark_grey() -> None:
    assert shade(np.arange(10)).tolist() == [255, 230, 205, 180, 155, 130, 105, 80, 55, 30]


def test_decoys_fit_pictures_that_are_not_square() -> None:
    pictures, masks = add_decoys(
        np.zeros((4, 10, 20), dtype=np.uint8), np.full(4, 7, dtype=np.uint8), np.array([0, 1, 2, 3])
    )
    assert masks.sum(axis=(1, 2)).tolist() == [16] * 4
    assert [masks[i, r, c] for i, (r, c) in enumerate([(0, 0), (0, -1), (-1, 0), (-1, -1)])] == [True] * 4
    np.testing.assert_array_equal(pictures, 7 * masks)


def test_mnist_needs_a_root_that_holds_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prepare\.root is null"):
        DecoyMnist(seed=0).prepare()
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: no such file"):
        DecoyMnist(root=str(tmp_path), seed=0).prepare()
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match="not a readable gzip file"):
        DecoyMnist(root=str(tmp_path), seed=0).prepare()
    with gzip.open(raw / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes(100))
    with pytest.raises(InputError, match="not an IDX file"):
        DecoyMnist(root=str(tmp_path), seed=0).prepare()


@needs_data("mnist/MNIST/raw")
def test_mnist_agrees_with_torchvision(data_root: Path, tmp_path: Path) -> None:
    import shutil

    from torchvision.datasets import MNIST

    shutil.copytree(data_root / "mnist", tmp_path / "mnist")
    official = MNIST(str(tmp_path / "mnist"), train=True, download=True)
    dataset = DecoyMnist(root=str(tmp_path / "mnist"), seed=0).prepare()
    assert dataset.samples["split"].value_counts().to_dict() == {
        "train": 48_000,
        "val": 12_000,
        "test": 10_000,
        "test_agreeing": 10_000,
        "test_plain": 10_000,
    }
    rows = np.concatenate([_split(dataset, "train"), _split(dataset, "val")])
    places = dataset.samples["source"].iloc[rows].str[-5:].astype(int).to_numpy()
    masks = dataset.spurious_masks[rows]
    np.testing.assert_array_equal(dataset.samples["label"].to_numpy()[rows], official.targets.numpy()[places])
    np.testing.assert_array_equal(
        np.where(masks, 0, dataset.images[rows, 0]), np.where(masks, 0, official.data.numpy()[places])
    )
