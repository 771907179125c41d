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

N = 60

OF_SAMPLES = ("predictions", "labels", "spurious", "groups", "logits")
OF_SOME = ("maps", "masks", "exchanged", "contrasts")


def _taken(of: Measured, rows: np.ndarray, some: np.ndarray) -> Measured:
    """The same of some of the samples; each may stand there several times."""
    chosen = {name: getattr(of, name)[rows] for name in OF_SAMPLES}
    return replace(of, **chosen, **{name: getattr(of, name)[some] for name in OF_SOME})


class MetricTests:
    """What a metric owes a table. Subclass it, set `name`, and let pytest collect it.

    classes: 2 for a metric that is known with two classes only.
    """

    name: str
    classes: int = 3

    def measure(self, of: Measured) -> float | None:
        """The metric under test, by its name."""
        return METRICS[self.name].measure(of)

    def measured(self) -> Measured:
        """Sixty samples of some classes with and without the feature, a third wrong; maps, true masks, exchanges,
        logits, contrasts with and without the feature."""
        rng = np.random.default_rng(0)
        labels, spurious = rng.integers(0, self.classes, N), rng.random(N) < 0.6
        predictions = np.where(rng.random(N) < 2 / 3, labels, (labels + 1) % self.classes)
        groups = np.array([f"{k}/{'spurious' if s else 'plain'}" for k, s in zip(labels, spurious, strict=True)])
        shares = pd.Series(rng.dirichlet(np.ones(2 * self.classes)), sorted(set(groups)))
        maps, masks = rng.normal(size=(20, 6, 6)), rng.random((20, 6, 6)) < 0.3
        exchanged, contrasts = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
        logits = rng.random((N, self.classes)) + np.eye(self.classes)[predictions]
        return Measured(
            predictions, labels, spurious, groups, shares, maps, masks, exchanged, logits=logits, contrasts=contrasts
        )

    def test_a_number_or_none(self) -> None:
        """A finite float; without maps and masks it may be None."""
        found = self.measure(self.measured())
        assert type(found) is float, f"expected a float, not {type(found).__name__}"
        assert math.isfinite(found)
        absent = dict.fromkeys(("maps", "masks", "exchanged", "logits", "contrasts"))
        without = self.measure(replace(self.measured(), **absent))  # type: ignore[arg-type]
        assert without is None or without == found

    def test_the_order_of_samples_changes_nothing(self) -> None:
        """Neither of predictions nor of maps."""
        of = self.measured()
        order, of_maps = np.random.default_rng(1).permutation(N), np.random.default_rng(2).permutation(20)
        shuffled = replace(_taken(of, order, of_maps), training_shares=of.training_shares[::-1])
        self._same(shuffled, "it depends on the order of samples")

    def test_the_numbers_of_classes_change_nothing(self) -> None:
        """Predictions and labels renumbered alike."""
        of, other = self.measured(), np.roll(np.arange(self.classes), 1)
        assert of.logits is not None
        renumbered = replace(
            of, predictions=other[of.predictions], labels=other[of.labels], logits=of.logits[:, np.argsort(other)]
        )
        self._same(renumbered, "it depends on numbers of classes")

    def test_every_sample_twice_changes_nothing(self) -> None:
        """It is about shares, not counts."""
        twice = _taken(self.measured(), np.tile(np.arange(N), 2), np.tile(np.arange(20), 2))
        self._same(twice, "it depends on the number of samples")

    def test_inputs_are_left_alone(self) -> None:
        """Nothing is written to, or drawn from the global generators."""
        of = self.measured()
        kept = copy.deepcopy(of)
        with global_generators_left_alone():
            self.measure(of)
        for name in (*OF_SAMPLES, *OF_SOME):
            assert np.array_equal(getattr(of, name), getattr(kept, name)), f"{name} was written to"
        assert of.training_shares.equals(kept.training_shares)

    def _same(self, changed: Measured, why: str) -> None:
        found, wanted = self.measure(changed), self.measure(self.measured())
        assert found is not None
        assert wanted is not None
        assert math.isclose(found, wanted, rel_tol=1e-9), f"{found} is not {wanted}: {why}"
