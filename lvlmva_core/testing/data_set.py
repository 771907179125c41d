"""Hold a data set to account.

from lvlmva_core.testing.data_set import DataSetTests

class TestStripes(DataSetTests):
    def build(self, seed):
        return stripes(seed)
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from lvlmva_core.arrays import write_table
from lvlmva_core.datasets import Dataset
from lvlmva_core.samples import COLUMNS, read_samples
from lvlmva_core.testing.checks import assert_same_arrays, global_generators_left_alone

SPLITS = ("train", "val", "test")


class DataSetTests:
    """What a data set owes the stages. Subclass it, override `build`, and let pytest collect it.

    draws: whether the seed decides anything.
    """

    draws = True

    def build(self, seed: int) -> Dataset:
        """The data set under test; small, if its size can be chosen."""
        raise NotImplementedError

    def test_what_comes_out(self) -> None:
        """Types and shapes of the arrays, names of classes and of the feature."""
        built = self.build(0)
        n, channels, height, width = built.images.shape
        assert built.images.dtype == np.uint8
        assert channels in (1, 3)
        assert len(built.samples) == n
        for masks in (built.spurious_masks, built.object_masks):
            assert masks is None or (masks.dtype == bool and masks.shape == (n, height, width))
        assert built.known.dtype == bool
        assert built.known.shape == (n,)
        assert built.name
        assert built.spurious_feature
        assert len(set(built.class_names)) == len(built.class_names) >= 2

    def test_the_table_is_one_that_stages_read(self) -> None:
        """Columns, ids sorted and unique, labels that are classes, groups that say so, digests of the pixels."""
        built = self.build(0)
        table = built.samples
        assert list(table.columns) == COLUMNS
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "samples.parquet"
            write_table(path, table)
            read_samples(path)  # raises where ids are doubled or unsorted
        assert table["label"].dtype == np.int64
        groups_known = not table["spurious"].isna().all()
        assert not groups_known or table["spurious"].dtype == bool
        assert set(table["label"]) <= set(range(len(built.class_names)))
        named = [
            f"{built.class_names[k]}/{'spurious' if s else 'plain'}" if groups_known else built.class_names[k]
            for k, s in zip(table["label"], table["spurious"], strict=True)
        ]
        assert table["group"].tolist() == named
        assert table["sha256"].tolist() == [hashlib.sha256(image.tobytes()).hexdigest() for image in built.images]

    def test_every_split_has_every_class(self) -> None:
        """train, val and test are there; another split is one more test."""
        built = self.build(0)
        classes = built.samples.groupby("split")["label"].nunique().to_dict()
        for split in SPLITS:
            assert classes.get(split) == len(built.class_names), f"split '{split}' lacks a class"
        assert all(split in SPLITS or str(split).startswith("test") for split in classes)

    def test_masks_say_where_the_feature_is(self) -> None:
        """Empty without the feature, not empty with it, wherever the mask is known; some mask in test is known."""
        built = self.build(0)
        holds = np.asarray(built.spurious_masks.any(axis=(1, 2)))
        if built.samples["spurious"].isna().all():  # groups unknown
            assert not (holds & ~built.known).any()
            return
        has = built.samples["spurious"].to_numpy(dtype=bool)
        assert not holds[~has].any(), "a sample without the feature has a mask"
        assert holds[has & built.known].all(), "a sample with the feature has an empty mask that is said to be known"
        assert not holds[~built.known].any(), "a mask that is not known is not empty"

    def test_no_picture_is_in_two_splits(self) -> None:
        """Of train, val and test; further test splits may show the test pictures again."""
        table = self.build(0).samples
        own = table[table["split"].isin(SPLITS)]
        assert not own["source"].duplicated().any(), "a source stands in two rows of train, val and test"

    def test_the_same_again(self) -> None:
        """Same seed, same bytes; another seed, other ones; nothing is drawn from the global generators."""
        first = self.build(0)
        with global_generators_left_alone():
            again = self.build(0)
        assert_same_arrays(_arrays(again), _arrays(first), "same seed must give the same bytes")
        assert again.samples.equals(first.samples)
        if self.draws:
            other = self.build(1)
            same = np.array_equal(other.images, first.images) and other.samples.equals(first.samples)
            assert not same, "the seed decides nothing; set draws = False where it is meant so"


def _arrays(built: Dataset) -> dict[str, np.ndarray]:
    objects = {} if built.object_masks is None else {"object_masks": built.object_masks}
    return {"images": built.images, "spurious_masks": built.spurious_masks, "known": built.known, **objects}
