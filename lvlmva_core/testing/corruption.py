"""Hold a corruption of pictures to account.

from lvlmva_core.testing.corruption import CorruptionTests

class TestMine(CorruptionTests):
    name = "mine"
"""

import itertools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lvlmva_core.corruptions import SEVERITIES, corrupt
from lvlmva_core.testing.checks import global_generators_left_alone, refused


class CorruptionTests:
    """What a corruption owes an evaluation. Subclass it, set `name`, and let pytest collect it."""

    name: str

    def apply(self, images: Tensor, severity: int) -> Tensor:
        """The corruption under test, by its name."""
        return corrupt(images, self.name, severity)

    def images(self, channels: int = 3) -> Tensor:
        """float32 (3, C, 64, 64) in [0, 1], smooth enough to be pictures."""
        noise = np.random.default_rng(channels).random((3, channels, 64, 64), dtype=np.float32)
        return functional.avg_pool2d(torch.from_numpy(noise), 3, 1, 1)

    def test_pictures_stay_pictures(self) -> None:
        """Shape, dtype and range, grey and in colour, at every severity."""
        for channels, severity in itertools.product((1, 3), range(1, SEVERITIES + 1)):
            images = self.images(channels)
            found = self.apply(images, severity)
            assert found.shape == images.shape
            assert found.dtype == images.dtype
            assert bool(torch.isfinite(found).all())
            assert float(found.min()) >= -1e-6
            assert float(found.max()) <= 1 + 1e-6

    def test_each_severity_departs_further(self) -> None:
        """By the mean absolute change."""
        images = self.images()
        changes = [float((self.apply(images, n) - images).abs().mean()) for n in range(1, SEVERITIES + 1)]
        assert all(a < b for a, b in itertools.pairwise([0.0, *changes])), changes

    def test_pictures_are_independent(self) -> None:
        """A picture comes out as it does alone."""
        images = self.images()
        together = self.apply(images, 3)
        for n in range(len(images)):
            torch.testing.assert_close(self.apply(images[n : n + 1], 3)[0], together[n], rtol=0, atol=1e-6)

    def test_the_same_again(self) -> None:
        """Same pictures, same bits; the input is left alone, and nothing is drawn from the global generators."""
        images = self.images()
        first = self.apply(images, 3)
        with global_generators_left_alone():
            assert torch.equal(self.apply(images, 3), first)
        assert torch.equal(images, self.images()), "the pictures that were given were written to"

    def test_other_severities_are_refused(self) -> None:
        """Those are 1 to 5."""
        for severity in (0, SEVERITIES + 1, -1):
            with refused("severity"):
                self.apply(self.images(), severity)
