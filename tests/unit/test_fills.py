"""Fills of a region, against surfaces that are known and a dense solution of the same equation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.ndimage import gaussian_filter

from lvlmva_core.fills import WIDTH, Membrane, fill_by_blur, fill_smoothly

H, W = 12, 9


def _hole() -> np.ndarray:
    mask = np.zeros((H, W), dtype=bool)
    mask[2:7, 3:8] = True
    mask[9, 1] = True
    return mask


def test_a_membrane_carries_a_slope_on_and_stays_within_its_edge() -> None:
    rows, columns = np.indices((H, W)).astype(float)
    slopes = np.stack([rows * 2 - columns, rows * 0 + 3.5])  # what has no curvature is its own membrane
    np.testing.assert_allclose(fill_smoothly(slopes, _hole()), slopes, atol=1e-9)
    picture = np.random.default_rng(0).random((3, H, W))
    filled = fill_smoothly(picture, _hole())
    assert np.array_equal(filled[:, ~_hole()], picture[:, ~_hole()])
    assert filled.min() >= picture[:, ~_hole()].min()
    assert filled.max() <= picture[:, ~_hole()].max()


@given(mask=npst.arrays(bool, (4, 5)), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_membrane_solves_the_same_equation_as_a_dense_one(mask: np.ndarray, seed: int) -> None:
    if mask.all():
        return
    values = np.random.default_rng(seed).random((4, 5))
    matrix, known = np.eye(20), values.ravel().copy()
    for place in np.flatnonzero(mask):
        row, column = divmod(int(place), 5)
        around = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        neighbours = [r * 5 + c for r, c in around if 0 <= r < 4 and 0 <= c < 5]
        matrix[place, neighbours] = -1 / len(neighbours)
        known[place] = 0
    expected = np.linalg.solve(matrix, known).reshape(4, 5)
    np.testing.assert_allclose(fill_smoothly(values[None], mask)[0], expected, atol=1e-9)


def test_a_blur_is_the_gaussian_mean_of_what_lies_outside() -> None:
    picture, mask = np.random.default_rng(0).random((2, H, W)), _hole()
    filled, sigma = fill_by_blur(picture, mask), WIDTH * H
    for row, column in ((4, 5), (9, 1)):
        spot = np.zeros((H, W))
        spot[row, column] = 1
        weight = gaussian_filter(spot, sigma, mode="constant") * ~mask  # a Gaussian is its own mirror image
        assert (weight.sum() > 1e-3) == ((row, column) == (9, 1))  # too deep inside for the other
        expected = (picture * weight).sum((1, 2)) / weight.sum() if weight.sum() > 1e-3 else picture[:, ~mask].mean(1)
        np.testing.assert_allclose(filled[:, row, column], expected, rtol=1e-6)
    assert np.array_equal(filled[:, ~mask], picture[:, ~mask])


@pytest.mark.parametrize("fill", [fill_by_blur, fill_smoothly])
def test_nothing_of_the_region_is_left_and_inputs_are(fill) -> None:  # type: ignore[no-untyped-def]
    picture, mask = np.random.default_rng(0).random((1, H, W)), _hole()
    other = np.where(mask, 1 - picture, picture)
    before = picture.copy()
    np.testing.assert_array_equal(fill(picture, mask), fill(other, mask))
    assert np.array_equal(picture, before)
    np.testing.assert_allclose(fill(np.full((1, H, W), 0.25), mask), 0.25)
    np.testing.assert_allclose(fill(picture, np.ones((H, W), dtype=bool)), picture.mean())


def test_a_membrane_without_an_edge_is_flat() -> None:
    assert not Membrane(np.ones((3, 3), dtype=bool))(np.ones((2, 3, 3))).any()
