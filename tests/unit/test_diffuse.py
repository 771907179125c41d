import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlmva_core.diffuse import DIFFUSE_FROM, diffuse_share, diffuse_warning, shares_of_pixels


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_shares_are_those_of_a_plain_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(3, 4, 5)) * (rng.random((3, 4, 5)) < 0.6)
    found = []
    for each in maps:
        left, taken = sorted((value for value in each.ravel().tolist() if value > 0), reverse=True), 0.0
        for count, value in enumerate(left, start=1):
            taken += value
            if taken >= 0.9 * sum(left) * (1 - 1e-12):
                found.append(count / 20)
                break
    np.testing.assert_allclose(shares_of_pixels(maps), found)


def test_the_share_knows_no_scale_no_negative_attribution_and_no_place() -> None:
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(6, 7, 8))
    moved = 1e6 * np.roll(np.where(maps < 0, 9 * maps, maps), (2, 3), axis=(1, 2))
    np.testing.assert_allclose(shares_of_pixels(maps), shares_of_pixels(moved))
    even = np.ones((1, 10, 10))
    assert shares_of_pixels(even)[0] == 0.9
    one = np.zeros((1, 10, 10))
    one[0, 3, 3] = 2.0
    one[0, 5] = -3.0
    assert shares_of_pixels(one)[0] == 0.01


def test_maps_without_attribution_do_not_count_and_a_warning_names_the_share() -> None:
    maps = np.zeros((3, 10, 10))
    maps[2] = -1.0
    assert diffuse_share(maps) is None
    maps[0] = 1.0
    assert diffuse_share(maps) == 0.9
    assert "takes 90% of the pixels" in diffuse_warning(0.9)
    assert diffuse_warning(DIFFUSE_FROM - 1e-9) == diffuse_warning(None) == ""
    assert diffuse_warning(DIFFUSE_FROM)


@pytest.mark.parametrize("held", [0.5, 1.0])
def test_more_pixels_hold_more(held: float) -> None:
    maps = np.random.default_rng(1).normal(size=(5, 6, 6))
    assert (shares_of_pixels(maps, 0.2) <= shares_of_pixels(maps, held)).all()
