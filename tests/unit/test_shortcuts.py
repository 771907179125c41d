"""Shortcuts that change what is there: what they change, where, and how much of it goes with the class."""

from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from lvlmva_core.datasets.decoy import DecoyDigits, decoy_digits
from lvlmva_core.datasets.shortcuts import Kind, Shortcut, lay_shortcut, support_of
from lvlmva_core.errors import InputError


def _picture(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(60, 180, (channels, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_nothing_changes_off_the_square_and_more_strength_changes_more(kind: Any) -> None:
    side = 1.0 if kind == "vignette" else 0.5
    for channels in (3,) if kind == "colour_cast" else (1, 3):
        picture, changes = _picture(channels), []
        for strength in (0.0, 0.4, 1.0):
            laid, mask = lay_shortcut(picture, Shortcut(kind=kind, side=side), strength, 3)
            np.testing.assert_array_equal(mask, support_of(28, 28, side, 3))
            np.testing.assert_array_equal(laid[:, ~mask], picture[:, ~mask])
            changes.append(np.abs(laid.astype(int) - picture)[:, mask].mean())
        if kind == "texture":  # a change of fineness, not of amount
            assert min(changes) > 15
        else:
            assert changes[0] == 0
            assert changes[1] < changes[2]


def test_closed_forms() -> None:
    flat = np.full((1, 28, 28), 55, np.uint8)
    assert set(np.unique(lay_shortcut(flat, Shortcut(kind="brightness", side=1.0), 1.0, 0)[0])) == {155}  # half-way
    assert set(np.unique(lay_shortcut(flat, Shortcut(kind="blur", side=1.0), 1.0, 0)[0])) == {55}
    red, green, blue = lay_shortcut(np.full((3, 8, 8), 100, np.uint8), Shortcut(kind="colour_cast", side=1.0), 1.0, 0)[
        0
    ]
    assert (red == 130).all()
    assert (green == 100).all()
    assert (blue == 70).all()
    dark = lay_shortcut(np.full((3, 28, 28), 200, np.uint8), Shortcut(kind="vignette", side=1.0), 1.0, 0)[0]
    assert dark[0, 13, 13] > 195 > 75 > dark[0, 0, 0]
    assert support_of(28, 28, 4 / 28, 1)[:4, 24:].all()
    assert support_of(28, 28, 4 / 28, 1).sum() == 16


@pytest.mark.parametrize("kind", ["brightness", "vignette"])
def test_digits_hold_their_own_classs_strength_in_training_and_any_in_test(kind: Any) -> None:
    found = decoy_digits(0, Shortcut(kind=kind, side=1.0))
    plain = decoy_digits(0)
    np.testing.assert_array_equal(found.samples["label"], plain.samples["label"])
    table, corner = found.samples, found.images[:, 0, 0, 0].astype(float)  # the background is black there
    by_class = [corner[(table["split"] == "train") & (table["label"] == k)] for k in range(10)]
    assert all(np.ptp(levels) == 0 for levels in by_class)
    assert (np.diff([levels[0] for levels in by_class]) < 0).all()
    assert np.ptp(corner[(table["split"] == "test") & (table["label"] == 0)]) > 0
    unchanged = (table["split"] == "test_plain").to_numpy()
    np.testing.assert_array_equal(found.images[unchanged], plain.images[unchanged])
    assert found.spurious_masks[~unchanged].all()
    assert not found.spurious_masks[unchanged].any()


def test_mistakes_are_refused() -> None:
    with pytest.raises(InputError, match="a vignette is on the whole picture; set it to 1"):
        lay_shortcut(_picture(1), Shortcut(kind="vignette", side=0.5), 1.0, 0)
    with pytest.raises(InputError, match="'colour_cast' needs pictures in colour"):
        decoy_digits(0, Shortcut(kind="colour_cast", side=1.0))
    with pytest.raises(ValidationError, match="greater than 0"):
        DecoyDigits.model_validate({"seed": 0, "shortcut": {"kind": "blur", "side": 0.0}})
    with pytest.raises(ValueError, match="'smell': expected one of brightness"):
        lay_shortcut(_picture(1), Shortcut.model_construct(kind="smell", side=1.0), 1.0, 0)  # type: ignore[arg-type]
