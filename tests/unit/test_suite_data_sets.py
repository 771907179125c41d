"""Every data set that can be made without files from elsewhere against the conformance suite of data sets."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmva_core.datasets import Dataset
from lvlmva_core.datasets.decoy import DecoyDigits
from lvlmva_core.testing.data_set import DataSetTests
from tests.unit import test_knee, test_skin
from tests.unit.conformance import complaints
from tests.unit.test_knee import root as knee_root  # noqa: F401 - a fixture
from tests.unit.test_skin import root as skin_root  # noqa: F401 - a fixture


class TestDecoyDigits(DataSetTests):
    def build(self, seed: int) -> Dataset:
        return DecoyDigits(seed=seed).prepare()


class TestKnee(DataSetTests):
    @pytest.fixture(autouse=True)
    def given(self, knee_root: Path) -> None:  # noqa: F811
        self.root = knee_root

    def build(self, seed: int) -> Dataset:
        return test_knee._prepare(self.root, seed=seed)


class TestSkin(DataSetTests):
    draws = False  # the helper's seed is its own

    @pytest.fixture(autouse=True)
    def given(self, skin_root: Path) -> None:  # noqa: F811
        self.root = skin_root

    def build(self, seed: int) -> Dataset:
        return test_skin._prepare(self.root)


DIGITS = DecoyDigits(seed=0).prepare()


def _with(**columns: Any) -> Dataset:
    return replace(DIGITS, samples=DIGITS.samples.assign(**columns))


def _of_the_clock(seed: int) -> Dataset:
    np.random.random()  # noqa: NPY002
    return DIGITS


def _masks_elsewhere(seed: int) -> Dataset:
    return replace(DIGITS, spurious_masks=np.ones_like(DIGITS.spurious_masks))


def _unknown_but_drawn(seed: int) -> Dataset:
    return replace(DIGITS, known=np.zeros_like(DIGITS.known))


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda seed: DIGITS, "test_the_same_again"),
        (_of_the_clock, "test_the_same_again"),
        (_masks_elsewhere, "test_masks_say_where_the_feature_is"),
        (_unknown_but_drawn, "test_masks_say_where_the_feature_is"),
        (lambda seed: replace(DIGITS, images=255 - DIGITS.images), "test_the_table_is_one_that_stages_read"),
        (lambda seed: _with(id="the same"), "test_the_table_is_one_that_stages_read"),
        (lambda seed: _with(group="0/plain"), "test_the_table_is_one_that_stages_read"),
        (lambda seed: _with(source="one file"), "test_no_picture_is_in_two_splits"),
        (lambda seed: _with(split="train"), "test_every_split_has_every_class"),
        (lambda seed: replace(DIGITS, images=DIGITS.images / 255), "test_what_comes_out"),
    ],
)
def test_a_broken_data_set_is_caught(build: Callable[[int], Dataset], complaint: str) -> None:
    suite = type("Suite", (DataSetTests,), {"build": lambda self, seed: build(seed)})
    assert complaint in complaints(suite)
