"""Hold a metric to account.

from lvlmva_core.testing.metric import MetricTests

class TestMine(MetricTests):
    name = "mine"
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd

from lvlmva_core.metrics import METRICS, Measured
from lvlmva_core.testing.checks import global_generators_left_alone

N, CLASSES = 60, 3


class MetricTests:
    """What a metric owes a table. Subclass it, set `name`, and let pytest collect it."""

    name: str

    def measure(self, of: Measured) -> float | None:
        """The metric under test, by its name."""
        return METRICS[self.name].measure(of)

    def measured(self) -> Measured:
        """Sixty samples of three classes with and without the feature, a third wrong; maps, true masks, exchanges."""
        rng = np.random.default_rng(0)
        labels, spurious = rng.integers(0, CLASSES, N), rng.random(N) < 0.6
        predictions = np.where(rng.random(N) < 2 / 3, labels, (labels + 1) % CLASSES)
        groups = np.array([f"{k}/{'spurious' if s else 'plain'}" for k, s in zip(labels, spurious, strict=True)])
        shares = pd.Series(rng.dirichlet(np.ones(2 * CLASSES)), sorted(set(groups)))
        maps, masks = rng.normal(size=(20, 6, 6)), rng.random((20, 6, 6)) < 0.3
        exchanged = rng.normal(size=(20, 3))
        return Measured(predictions, labels, spurious, groups, shares, maps, masks, exchanged)

    def test_a_number_or_none(self) -> None:
        """A finite float; without maps and masks it may be None."""
        found = self.measure(self.measured())
        assert type(found) is float, f"expected a float, not {type(found).__name__}"
        assert math.isfinite(found)
        without = self.measure(replace(self.measured(), maps=None, masks=None, exchanged=None))
        assert without is None or without == found

    def test_the_order_of_samples_changes_nothing(self) -> None:
        """Neither of predictions nor of maps."""
        of = self.measured()
        order, of_maps = np.random.default_rng(1).permutation(N), np.random.default_rng(2).permutation(20)
        assert of.spurious is not None
        assert of.maps is not None
        assert of.masks is not None
        assert of.exchanged is not None
        shuffled = Measured(
            of.predictions[order],
            of.labels[order],
            of.spurious[order],
            of.groups[order],
            of.training_shares[::-1],
            of.maps[of_maps],
            of.masks[of_maps],
            of.exchanged[of_maps],
        )
        self._same(shuffled, "it depends on the order of samples")

    def test_the_numbers_of_classes_change_nothing(self) -> None:
        """Predictions and labels renumbered alike."""
        of, other = self.measured(), np.array([2, 0, 1])
        self._same(
            replace(of, predictions=other[of.predictions], labels=other[of.labels]), "it depends on numbers of classes"
        )

    def test_every_sample_twice_changes_nothing(self) -> None:
        """It is about shares, not counts."""
        of = self.measured()
        assert of.spurious is not None
        assert of.maps is not None
        assert of.masks is not None
        assert of.exchanged is not None
        twice = Measured(
            np.tile(of.predictions, 2),
            np.tile(of.labels, 2),
            np.tile(of.spurious, 2),
            np.tile(of.groups, 2),
            of.training_shares,
            np.concatenate([of.maps, of.maps]),
            np.concatenate([of.masks, of.masks]),
            np.concatenate([of.exchanged, of.exchanged]),
        )
        self._same(twice, "it depends on the number of samples")

    def test_inputs_are_left_alone(self) -> None:
        """Nothing is written to, or drawn from the global generators."""
        of = self.measured()
        kept = copy.deepcopy(of)
        with global_generators_left_alone():
            self.measure(of)
        for name in ("predictions", "labels", "spurious", "groups", "maps", "masks", "exchanged"):
            assert np.array_equal(getattr(of, name), getattr(kept, name)), f"{name} was written to"
        assert of.training_shares.equals(kept.training_shares)

    def _same(self, changed: Measured, why: str) -> None:
        found, wanted = self.measure(changed), self.measure(self.measured())
        assert found is not None
        assert wanted is not None
        assert math.isclose(found, wanted, rel_tol=1e-9), f"{found} is not {wanted}: {why}"
