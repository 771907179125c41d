"""Exchange of regions: against a plain loop, and on models whose reliance is known by construction."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lvlmva_core.errors import InputError
from lvlmva_core.exchange import (
    centred,
    draw_trial,
    exchange_regions,
    run_trial,
    summary_of,
)
from lvlmva_core.independence import independent_regions
from lvlmva_core.metrics import reliance_on_rejected
from lvlmva_core.samples import Split
from lvlmva_core.statistics import bootstrap_interval

K, SIDE, REGIONS = 3, 6, 4


class _Linear(nn.Module):
    """Logits that are weighted sums of pixels: what a region contributes is known in closed form."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.flatten(1).T


def _split(n: int, seed: int) -> tuple[Split, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [f"s{seed}-{i}" for i in range(n)]
    labels = torch.arange(n) % K
    return Split(torch.rand((n, 1, SIDE, SIDE), generator=generator), labels, pd.DataFrame({"id": ids})), ids


def _model(seed: int = 0) -> _Linear:
    return _Linear(torch.randn((K, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)))


def _segments(n: int) -> np.ndarray:
    segments = np.random.default_rng(0).integers(0, REGIONS, (n, SIDE, SIDE)).astype(np.uint8)
    segments[0][segments[0] == 2] = 255  # a region that owns no pixel, and pixels of none
    return segments


def test_it_is_what_a_loop_over_all_donors_gives() -> None:
    """With as many donors as there are, nothing is drawn: every donor of each class in turn."""
    samples, ids = _split(5, 1)
    donors, donor_ids = _split(9, 2)
    model, segments = _model().requires_grad_(False), _segments(5)
    found = exchange_regions(
        model, samples, ids, segments, donors, donor_ids, n_regions=REGIONS, n_donors=99, batch_size=4, seed=0
    )
    for n, label in enumerate(samples.labels.tolist()):
        for region in range(REGIONS):
            inside = torch.from_numpy(segments[n] == region)
            if not inside.any():
                assert np.isnan(found.other[n, region])
                continue
            falls: dict[bool, list[float]] = {True: [], False: []}
            flips = []
            before = model(samples.images[n : n + 1])
            for picture, donor_label in zip(donors.images, donors.labels.tolist(), strict=True):
                changed = samples.images[n].clone()
                changed[:, inside] = picture[:, inside]
                after = model(changed[None])
                own = donor_label == label
                fall = (before - before.mean())[0, label] - (after - after.mean())[0, label]
                falls[own].append(float(fall))
                if not own:
                    flips.append(float(after.argmax() != before.argmax()))
            assert found.other[n, region] == pytest.approx(np.mean(falls[False]), abs=1e-5)
            assert found.own[n, region] == pytest.approx(np.mean(falls[True]), abs=1e-5)
            assert found.other_spread[n, region] == pytest.approx(np.std(falls[False], ddof=1), abs=1e-5)
            assert found.own_spread[n, region] == pytest.approx(np.std(falls[True], ddof=1), abs=1e-5)
            assert found.flipped[n, region] == pytest.approx(np.mean(flips))


def test_a_sample_does_not_depend_on_the_others_or_on_the_batch_and_repeats() -> None:
    samples, ids = _split(6, 1)
    donors, donor_ids = _split(40, 2)
    segments, model = _segments(6), _model()
    settings = {"n_regions": REGIONS, "n_donors": 3, "seed": 5}
    whole = exchange_regions(model, samples, ids, segments, donors, donor_ids, batch_size=64, **settings)  # type: ignore[arg-type]
    part = Split(samples.images[3:], samples.labels[3:])
    alone = exchange_regions(model, part, ids[3:], segments[3:], donors, donor_ids, batch_size=2, **settings)  # type: ignore[arg-type]
    np.testing.assert_allclose(whole.other[3:], alone.other, atol=1e-5)
    other = exchange_regions(
        model, samples, ids, segments, donors, donor_ids, n_regions=REGIONS, n_donors=3, batch_size=64, seed=6
    )
    assert not np.allclose(whole.other[3:], other.other[3:])


def test_a_sample_never_fills_itself() -> None:
    """Alone in its class among the donors, it has no own donor left."""
    donors, ids = _split(3, 1)
    with pytest.raises(InputError, match="sample 's1-0': no picture of its own class"):
        exchange_regions(
            _model(), donors, ids, _segments(3), donors, ids, n_regions=REGIONS, n_donors=2, batch_size=8, seed=0
        )


def test_a_model_that_uses_one_place_is_found_out_by_its_region() -> None:
    weights = torch.zeros(2, 1, SIDE, SIDE)
    weights[1, :, :2, :2] = 1.0  # the shortcut: a bright corner speaks for class 1
    model = _Linear(weights)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((60, 1, SIDE, SIDE), generator=generator)
    labels = torch.arange(60) % 2
    images[:, :, :2, :2] = labels[:, None, None, None] * 0.8 + 0.1
    segments = np.ones((60, SIDE, SIDE), dtype=np.uint8)
    segments[:, :2, :2] = 0
    split, ids = Split(images, labels), [f"s{n}" for n in range(60)]
    found = exchange_regions(model, split, ids, segments, split, ids, n_regions=2, n_donors=4, batch_size=64, seed=0)
    np.testing.assert_allclose(found.other[:, 0], 4 * 0.8 / 2, atol=1e-5)  # half the difference of the two logits
    np.testing.assert_allclose(found.other[:, 1], 0, atol=1e-6)
    np.testing.assert_allclose(found.own, 0, atol=1e-5)
    spread_out = found.logit + np.linspace(-1, 1, 60, dtype=np.float32)
    falls, spreads = (found.other, found.own), (found.other_spread, found.own_spread)
    assert independent_regions(falls, spreads, spread_out, 0.1).tolist() == [[False, True]] * 60
    assert summary_of(found)["regions"] == 120
    masks = segments == 0
    trial = draw_trial(labels.numpy(), masks, labels.numpy(), n_held_out=20, n_donors=3, seed=1)
    assert trial is not None
    assert (labels.numpy()[trial.donors] != labels.numpy()[trial.rows][:, None]).all()
    assert (labels.numpy()[trial.fills] == labels.numpy()[trial.rows][:, None]).all()
    assert (trial.fills != trial.rows[:, None]).all()
    found_of = run_trial(model, split, images, torch.from_numpy(masks), trial, 16)
    np.testing.assert_allclose(found_of[:, 2] - found_of[:, 1], 4 * 0.8 / 2, atol=1e-5)
    blind = _Linear(torch.where(torch.arange(SIDE)[:, None] > 2, torch.randn(2, 1, SIDE, SIDE), torch.zeros(1)))
    np.testing.assert_allclose(
        reliance_on_rejected(run_trial(blind, split, images, torch.from_numpy(masks), trial, 16)), 0, atol=1e-5
    )


def test_nothing_rejected_is_no_trial() -> None:
    labels = np.array([0, 1, 0, 1])
    assert draw_trial(labels, np.zeros((4, 2, 2), bool), labels, n_held_out=3, n_donors=2, seed=0) is None


def test_centring_changes_no_probability_and_hides_what_all_logits_share() -> None:
    logits = torch.randn((8, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 5
    torch.testing.assert_close(centred(logits + 7.0, labels), centred(logits, labels))


def test_reliance_is_free_of_the_logits_scale() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 3))
    value = reliance_on_rejected(rows)
    assert value == pytest.approx((rows[:, 2] - rows[:, 1]).mean() / np.sqrt((rows[:, 0] ** 2).mean()))
    assert reliance_on_rejected(rows * 9) == pytest.approx(value)
    assert reliance_on_rejected(np.zeros((4, 3))) == 0


def test_the_bootstrap_interval_is_scipys() -> None:
    rows = np.random.default_rng(0).normal(size=200)
    low, high = bootstrap_interval(rows, lambda drawn: float(drawn.mean()), draws=4000)
    theirs = stats.bootstrap((rows,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.02)
    assert high == pytest.approx(theirs.high, abs=0.02)
