"""Hold a segmenter to account.

from lvlmva_core.testing.segmenter import SegmenterTests

class TestTiles(SegmenterTests):
    def segmenter(self):
        return Tiles(n_regions=4)
"""

import numpy as np
import torch

from lvlmva_core.regions import NO_REGION
from lvlmva_core.segmenters.interface import Arrays, Segmenter
from lvlmva_core.store import digest
from lvlmva_core.testing.checks import assert_same_arrays, global_generators_left_alone, refused

STATES = {"ok", "no_positive_effect", "too_few_pixels", "collapsed"}
CPU = torch.device("cpu")


class SegmenterTests:
    """What a segmenter owes its caller. Subclass it, override `segmenter`, and let pytest collect it.

    shape: (H, W) of a map. channels: of a picture. The second of the maps has no positive attribution.
    """

    shape: tuple[int, int] = (40, 32)
    channels = 3
    ids = ("first", "second", "third")

    def segmenter(self) -> Segmenter:
        """The segmenter under test, the same at every call."""
        raise NotImplementedError

    def maps(self) -> np.ndarray:
        """Attributions, float32 (3, H, W)."""
        found = np.random.default_rng(0).normal(size=(3, *self.shape)).astype(np.float32)
        found[1] = -np.abs(found[1])
        return found

    def pictures(self) -> np.ndarray:
        """uint8 (3, C, H, W): quarters of different brightness, with a little noise."""
        noise = np.random.default_rng(1).integers(0, 9, (3, self.channels, *self.shape))
        noise[:, :, : self.shape[0] // 2] += 80
        noise[:, :, :, : self.shape[1] // 2] += 150
        return noise.astype(np.uint8)

    def test_what_comes_out(self) -> None:
        """Names, types, shapes and ranges."""
        segmenter = self.segmenter()
        found, n_regions = self._segment(segmenter), segmenter.n_regions
        assert found["segments"].dtype == np.uint8
        assert found["segments"].shape == (3, *self.shape)
        assert found["weights"].dtype == np.float64
        assert found["weights"].shape == (3, n_regions)
        assert found["status"].shape == (3,)
        assert set(found["status"].tolist()) <= STATES
        assert all(len(array) == 3 for array in found.values()), "every array has a row for each sample"
        labels = found["segments"]
        assert ((labels < n_regions) | (labels == NO_REGION)).all()

    def test_regions_are_numbered_by_falling_share(self) -> None:
        """And the shares sum to one where there is something to share."""
        weights = self._segment(self.segmenter())["weights"][[0, 2]]
        assert (np.diff(weights, axis=1) <= 1e-12).all(), "regions must be numbered by falling share"
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)

    def test_a_map_without_positive_attribution_has_no_region(self) -> None:
        """It says so, and every number is finite."""
        found = self._segment(self.segmenter())
        assert found["status"][1] == "no_positive_effect"
        assert (found["segments"][1] == NO_REGION).all()
        assert not found["weights"][1].any()
        assert all(np.isfinite(array).all() for array in found.values() if array.dtype.kind == "f")

    def test_the_same_again(self) -> None:
        """Same inputs, same bytes; nothing is drawn from the global generators."""
        first = self._segment(self.segmenter())
        with global_generators_left_alone():
            again = self._segment(self.segmenter())
        assert_same_arrays(again, first, "same inputs must give the same bytes")

    def test_samples_are_independent(self) -> None:
        """A sample's result is what it is alone, and in any order."""
        together = self._segment(self.segmenter())
        for rows in ([2], [2, 1, 0]):
            found = self._segment(self.segmenter(), rows)
            wanted = {name: array[rows] for name, array in together.items()}
            assert_same_arrays(found, wanted, "a sample's result must not depend on the others")

    def test_inputs_are_left_alone(self) -> None:
        """Maps and pictures are not written to."""
        maps, pictures = self.maps(), self.pictures()
        self.segmenter().segment(maps, pictures, self.ids, CPU)
        assert (maps == self.maps()).all()
        assert (pictures == self.pictures()).all()

    def test_the_scale_of_a_map_changes_nothing(self) -> None:
        """Twice the attribution, the same regions."""
        segmenter = self.segmenter()
        found = segmenter.segment(self.maps() * np.float32(2), self.pictures(), self.ids, CPU)["segments"]
        assert (found == self._segment(segmenter)["segments"]).all()

    def test_pictures_count_where_it_says_so(self) -> None:
        """What does not read them gives the same without; what does says that they are missing."""
        segmenter = self.segmenter()
        if segmenter.reads_images:
            with refused("images"):
                segmenter.segment(self.maps(), None, self.ids, CPU)
        else:
            found = segmenter.segment(self.maps(), None, self.ids, CPU)
            assert_same_arrays(found, self._segment(segmenter), "it says that it does not read the pictures")

    def test_a_broken_map_is_refused_by_its_sample(self) -> None:
        """NaN and infinity; the message names the sample."""
        for value in (np.nan, np.inf):
            maps = self.maps()
            maps[2, 0, 0] = value
            with refused(self.ids[2]):
                self.segmenter().segment(maps, self.pictures(), self.ids, CPU)

    def test_what_changes_the_result_changes_what_it_is_kept_under(self) -> None:
        """Each whole number among the settings is raised by one; `kept_under` can be digested."""
        segmenter = self.segmenter()
        wanted = self._segment(segmenter)["segments"]
        kept = digest(segmenter.kept_under())
        assert digest(self.segmenter().kept_under()) == kept
        for name, value in segmenter.model_dump().items():
            if type(value) is not int or name == "n_regions":  # which stands in the key by itself
                continue
            other = segmenter.model_copy(update={name: value + 1})
            if (self._segment(other)["segments"] != wanted).any():
                assert digest(other.kept_under()) != kept, f"{name} changes the result, but not `kept_under`"

    def test_it_is_found_by_its_name(self) -> None:
        """In params.yaml, beside keys of other segmenters."""
        segmenter = self.segmenter()
        others = {key: 1 for key in Segmenter.known_keys() if key not in type(segmenter).model_fields}
        assert Segmenter.model_validate({**others, **segmenter.model_dump()}) == segmenter

    def _segment(self, segmenter: Segmenter, rows: list[int] | None = None) -> Arrays:
        chosen = list(range(3)) if rows is None else rows
        return segmenter.segment(self.maps()[chosen], self.pictures()[chosen], [self.ids[n] for n in chosen], CPU)
