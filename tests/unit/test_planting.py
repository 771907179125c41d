"""Planted shortcuts: of the stated size, at the stated place, inside the picture, and nothing else is changed."""

from typing import get_args

import numpy as np
import pytest

from lvlmva_core.planting import (
    LEAST_PIXELS,
    SHARES,
    VISIBLE,
    GlobalKind,
    LocalKind,
    Place,
    Planted,
    Size,
    centre_of,
    distort,
    kinds_for,
    plant,
)

SHAPES = [(1, 28, 28), (3, 96, 96), (3, 224, 224), (1, 60, 150)]


def _picture(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A dark picture with a bright disc and noise."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 30, shape)
    picture[:, centre_of(*shape[1:])] += 120
    return picture.astype(np.uint8)


def _planted(shape: tuple[int, ...], kind: LocalKind, size: Size, place: Place, seed: int) -> Planted:
    return plant(_picture(shape, seed), kind, size, place, centre_of(*shape[1:]), np.random.default_rng(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", get_args(LocalKind))
@pytest.mark.parametrize("size", get_args(Size))
def test_a_shortcut_has_its_size_and_changes_nothing_outside_its_mask(
    shape: tuple[int, ...], kind: LocalKind, size: Size
) -> None:
    pixels = shape[1] * shape[2]
    for seed in range(8):
        found = _planted(shape, kind, size, "on" if seed % 2 else "off", seed)
        before = _picture(shape, seed)
        assert found.picture.shape == shape
        assert found.picture.dtype == np.uint8
        assert np.array_equal(found.picture[:, ~found.mask], before[:, ~found.mask])
        low, high = (max(share * pixels, LEAST_PIXELS[kind]) for share in SHARES[size])
        border = 1.5 * np.sqrt(found.mask.sum()) + 2  # rounding to whole rows, columns or edge pixels
        assert low - border <= found.mask.sum() <= high + border
        changed = (found.picture != before).any(axis=0)[found.mask].mean()
        assert changed > (0.2 if kind == "letter" else 0.95)


@pytest.mark.parametrize("kind", get_args(LocalKind))
def test_it_lies_on_the_object_or_off_it_and_can_be_seen(kind: LocalKind) -> None:
    centre = centre_of(96, 96)
    for seed in range(12):
        on, off = (_planted((3, 96, 96), kind, "small", place, seed) for place in get_args(Place))
        assert not (off.mask & centre).any()
        assert (on.mask & centre).sum() >= 0.8 * on.mask.sum()
        assert (off.place, on.place) == ("off", "on")
        for found in (off, on):
            difference = np.abs(found.picture.astype(int) - _picture((3, 96, 96), seed)).max(axis=0)[found.mask]
            assert np.quantile(difference, 0.9) > VISIBLE / 2


def test_it_keeps_away_from_what_it_is_told_to_avoid() -> None:
    avoid = np.zeros((28, 28), bool)
    avoid[:14] = True
    for seed in range(20):
        found = plant(
            _picture((1, 28, 28), seed), "patch", "small", "off", centre_of(28, 28), np.random.default_rng(seed), avoid
        )
        assert not (found.mask & avoid).any()


def test_off_an_object_that_fills_the_picture_is_on_it() -> None:
    everywhere = np.ones((28, 28), bool)
    found = plant(_picture((1, 28, 28), 0), "patch", "small", "off", everywhere, np.random.default_rng(0))
    assert found.place == "on"


def test_the_same_seed_gives_the_same_picture_and_another_another() -> None:
    for kind in get_args(LocalKind):
        one, two, other = (_planted((3, 96, 96), kind, "medium", "off", seed) for seed in (5, 5, 6))
        assert np.array_equal(one.picture, two.picture)
        assert np.array_equal(one.mask, two.mask)
        assert not np.array_equal(one.mask, other.mask)


def test_places_are_drawn_from_all_that_suit() -> None:
    """Every corner of a dark picture gets its share of small patches off the centre."""
    sides = [np.argwhere(_planted((1, 64, 64), "patch", "small", "off", seed).mask).mean(axis=0) for seed in range(200)]
    quarters = [(row > 32, column > 32) for row, column in sides]
    assert min(quarters.count(quarter) for quarter in set(quarters)) > 25
    assert len(set(quarters)) == 4


def test_a_blur_keeps_the_mean_and_takes_detail_and_a_cast_moves_channels_apart() -> None:
    picture = _picture((3, 96, 96), 1)
    detail = [
        np.abs(np.diff(distort(picture, "blur", size, np.random.default_rng(0)).astype(int), axis=2)).mean()
        for size in get_args(Size)
    ]
    assert detail == sorted(detail, reverse=True)
    blurred = distort(picture, "blur", "medium", np.random.default_rng(0))
    assert abs(blurred.mean() - picture.mean()) < 1
    for seed in range(6):
        cast = distort(picture, "colour_cast", "medium", np.random.default_rng(seed))
        means = cast.mean(axis=(1, 2))
        assert means.max() / means.min() > 1.1
        ratio = cast[0][picture[0] > 60] / picture[0][picture[0] > 60]
        assert ratio.std() < 0.02  # one gain everywhere


def test_grey_pictures_have_no_colour_cast() -> None:
    assert kinds_for(3) == (*get_args(LocalKind), *get_args(GlobalKind))
    assert "colour_cast" not in kinds_for(1)
    with pytest.raises(ValueError, match="a grey picture has no colour cast"):
        distort(_picture((1, 28, 28), 0), "colour_cast", "small", np.random.default_rng(0))


def test_unknown_names_and_empty_objects_are_refused() -> None:
    picture, rng = _picture((1, 28, 28), 0), np.random.default_rng(0)
    with pytest.raises(ValueError, match="'hat': expected one of patch, letter, strip"):
        plant(picture, "hat", "small", "on", centre_of(28, 28), rng)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'huge': expected one of small"):
        distort(picture, "blur", "huge", rng)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the object mask is empty"):
        plant(picture, "patch", "small", "on", np.zeros((28, 28), bool), rng)
