import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from lvlmva_core.errors import InputError
from lvlmva_core.ranking import output_entropy, select_alignment_set


def test_entropy_agrees_with_scipy_on_moderate_logits() -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=(50, 7))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = scipy.stats.entropy(p, axis=1)
    np.testing.assert_allclose(output_entropy(torch.from_numpy(logits)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("gap", [20.0, 40.0, 100.0, 600.0])
def test_entropy_of_a_confident_model_keeps_its_digits(gap: float) -> None:
    # two classes, logits (gap, 0): H = log(1 + e^-gap) + gap e^-gap / (1 + e^-gap), about (1 + gap) e^-gap
    entropy = output_entropy(torch.tensor([[gap, 0.0]], dtype=torch.float32))
    assert entropy.dtype == torch.float64
    e = np.exp(-gap)
    assert entropy.item() == pytest.approx(np.log1p(e) + gap * e / (1 + e), rel=1e-12 if gap < 30 else 0.1)


def test_entropy_is_largest_for_equal_logits_and_zero_is_never_negative() -> None:
    assert output_entropy(torch.zeros(1, 10)).item() == pytest.approx(np.log(10))
    assert output_entropy(torch.tensor([[1e4, 0.0]])).item() >= 0


def test_entropy_refuses_what_is_not_a_table_of_finite_logits() -> None:
    with pytest.raises(ValueError, match=r"must be \(B, K\)"):
        output_entropy(torch.zeros(3))
    with pytest.raises(ValueError, match="row 1 are not finite"):
        output_entropy(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]))


def _candidates(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "id": [f"s{i:03d}" for i in rng.permutation(n)],
            "entropy": rng.choice([0.0, 0.1, 0.2, 0.3], n),  # many ties
            "label": rng.integers(0, 3, n),
            "prediction": 0,
        }
    )


@pytest.mark.parametrize(("strategy", "sign"), [("low_entropy", 1), ("high_entropy", -1)])
def test_selection_is_the_sorted_prefix_with_ties_by_id(strategy: str, sign: int) -> None:
    candidates = _candidates()
    expected = sorted(zip(sign * candidates["entropy"], candidates["id"], strict=True))[:20]
    chosen = select_alignment_set(candidates, 20, strategy, stratify=False, seed=0)
    assert chosen.sort_values("rank")["id"].tolist() == [sample for _, sample in expected]
    assert chosen["id"].is_monotonic_increasing


@pytest.mark.parametrize("strategy", ["low_entropy", "high_entropy", "random", "mixed"])
def test_selection_ignores_row_order_and_grows_by_addition(strategy: str) -> None:
    candidates = _candidates()
    small = select_alignment_set(candidates, 15, strategy, stratify=False, seed=3)
    shuffled = select_alignment_set(candidates.sample(frac=1, random_state=1), 15, strategy, stratify=False, seed=3)
    large = select_alignment_set(candidates, 25, strategy, stratify=False, seed=3)
    pd.testing.assert_frame_equal(small, shuffled)
    assert set(small["id"]) < set(large["id"])


def test_random_selection_depends_on_its_seed() -> None:
    chosen = [set(select_alignment_set(_candidates(), 15, "random", stratify=False, seed=s)["id"]) for s in (0, 1)]
    assert chosen[0] != chosen[1]


def test_stratified_selection_takes_the_lowest_of_each_class() -> None:
    candidates = _candidates()
    chosen = select_alignment_set(candidates, 20, "low_entropy", stratify=True, seed=0)
    assert chosen["label"].value_counts().to_dict() == {0: 7, 1: 7, 2: 6}
    for label, group in chosen.groupby("label"):
        own = candidates[candidates["label"] == label].sort_values(["entropy", "id"]).head(len(group))
        assert set(own["id"]) == set(group["id"])


@pytest.mark.parametrize("stratify", [False, True])
def test_a_mixed_selection_is_half_of_the_lowest_and_half_of_the_highest(stratify: bool) -> None:
    candidates = _candidates()
    chosen = select_alignment_set(candidates, 21, "mixed", stratify=stratify, seed=0)
    groups = [(chosen, candidates)]
    if stratify:
        groups = [(chosen[chosen["label"] == k], candidates[candidates["label"] == k]) for k in range(3)]
        assert [len(own) for own, _ in groups] == [7, 7, 7]
    for own, every in groups:
        order = sorted(zip(every["entropy"], every["id"], strict=True))
        low, high = -(-len(own) // 2), len(own) // 2
        assert set(own["id"]) == {sample for _, sample in order[:low] + order[len(order) - high :]}
    assert len(select_alignment_set(candidates, 60, "mixed", stratify=False, seed=0)) == 60


def test_selection_refuses_more_than_there_is() -> None:
    with pytest.raises(InputError, match=r"rank\.n_samples = 61 is larger than the training set \(60"):
        select_alignment_set(_candidates(), 61, "low_entropy", stratify=False, seed=0)
    with pytest.raises(InputError, match=r"class . has .* fewer than its share"):
        select_alignment_set(_candidates(), 60, "low_entropy", stratify=True, seed=0)
