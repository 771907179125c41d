import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import precision_score, recall_score

from lvlmva_core.metrics import alignment_score, entropy_auroc, group_accuracies, verdict_quality
from lvlmva_core.statistics import mean_and_std, wilcoxon_test


def test_group_accuracies_by_hand() -> None:
    table = group_accuracies(
        predictions=[0, 1, 1, 1, 0, 0], labels=[0, 0, 1, 1, 1, 0], spurious=[True, True, False, False, False, True]
    )
    assert table.to_dict("records") == [
        {"label": 0, "spurious": True, "count": 3, "accuracy": pytest.approx(2 / 3)},
        {"label": 1, "spurious": False, "count": 3, "accuracy": pytest.approx(2 / 3)},
    ]
    # groups (0, False) and (1, True) are empty, hence absent
    assert table["accuracy"].mean() == pytest.approx(2 / 3)


def test_groups_weigh_alike_in_aga_whatever_their_size() -> None:
    table = group_accuracies([0] * 9 + [1], [0] * 9 + [0], [False] * 9 + [True])
    assert table["accuracy"].mean() == 0.5
    assert table["accuracy"].min() == 0.0


def test_group_accuracies_refuse_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="one equal length"):
        group_accuracies([0, 1], [0, 1], [True])
    with pytest.raises(ValueError, match="one equal length above 0"):
        group_accuracies([], [], [])


def test_alignment_score_by_hand() -> None:
    attributions = np.array([[[3.0, -1.0]], [[0.0, 2.0]], [[0.0, 0.0]], [[5.0, 5.0]]])
    masks = np.array([[[False, True]], [[False, True]], [[True, True]], [[False, False]]])
    # sample 0: 1/4 on the feature; sample 1: all; sample 2 has no attribution, sample 3 no feature: both left out
    assert alignment_score(attributions, masks) == pytest.approx(1 - (0.25 + 1.0) / 2)


def test_alignment_score_ignores_scale_and_sign() -> None:
    rng = np.random.default_rng(0)
    maps, masks = rng.normal(size=(5, 6, 7)), rng.random((5, 6, 7)) < 0.3
    score = alignment_score(maps, masks)
    assert alignment_score(-1e-9 * maps, masks) == pytest.approx(score)
    assert alignment_score(maps, ~masks) == pytest.approx(1 - score)


def test_alignment_score_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="no sample has both"):
        alignment_score(np.ones((2, 3, 3)), np.zeros((2, 3, 3), dtype=bool))
    with pytest.raises(ValueError, match="sample 1 is not finite"):
        alignment_score(np.array([[[1.0]], [[np.nan]]]), np.ones((2, 1, 1), dtype=bool))
    with pytest.raises(ValueError, match=r"must both be \(N, H, W\)"):
        alignment_score(np.ones((2, 1, 3, 3)), np.ones((2, 3, 3), dtype=bool))


def test_verdict_quality_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    judged, truth = rng.random(100) < 0.4, rng.random(100) < 0.3
    quality = verdict_quality(judged.tolist(), truth.tolist())
    assert quality["precision"] == pytest.approx(precision_score(truth, judged))
    assert quality["recall"] == pytest.approx(recall_score(truth, judged))
    assert quality["regions"] == 100


def test_verdict_quality_without_such_regions_is_not_a_number() -> None:
    quality = verdict_quality([False, False], [True, False])
    assert quality["precision"] is None
    assert quality["recall"] == 0.0
    assert verdict_quality([True], [False])["recall"] is None


def test_mean_and_std_over_seeds() -> None:
    assert mean_and_std([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0}
    assert mean_and_std([0.5]) == {"mean": 0.5, "std": 0.0}


@pytest.mark.parametrize("n", [3, 7, 12])
def test_wilcoxon_without_ties_is_scipys_exact_test(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    ours = wilcoxon_test(differences.tolist())
    assert ours["n"] == n
    for key, side in (("p_two_sided", "two-sided"), ("p_greater", "greater")):
        expected = stats.wilcoxon(differences, alternative=side, method="exact").pvalue
        assert ours[key] == pytest.approx(expected)


def test_wilcoxon_with_ties_and_zeros_by_enumeration() -> None:
    differences = [0.02, 0.02, 0.04, 0.0, -0.02, 0.06, 0.06, 0.02]
    values = [d for d in differences if d]
    ranks = stats.rankdata(np.abs(values))
    observed = ranks[np.array(values) > 0].sum()
    sums = [ranks[np.array(signs, dtype=bool)].sum() for signs in itertools.product([0, 1], repeat=len(values))]
    greater = np.mean([s >= observed - 1e-9 for s in sums])
    less = np.mean([s <= observed + 1e-9 for s in sums])
    ours = wilcoxon_test(differences)
    assert ours == {
        "n": 7,
        "p_two_sided": pytest.approx(min(1, 2 * min(greater, less))),
        "p_greater": pytest.approx(greater),
    }


def test_wilcoxon_at_its_ends() -> None:
    assert wilcoxon_test([0.1 * k for k in range(1, 8)]) == {
        "n": 7,
        "p_two_sided": pytest.approx(2 / 128),
        "p_greater": pytest.approx(1 / 128),
    }
    assert wilcoxon_test([0.0, 0.0]) == {"n": 0, "p_two_sided": 1.0, "p_greater": 1.0}
    assert wilcoxon_test([-1.0])["p_greater"] == 1.0


def test_entropy_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    entropies, spurious = rng.random(60).round(1), rng.random(60) < 0.4
    pairs = [(a < b) + 0.5 * (a == b) for a in entropies[spurious] for b in entropies[~spurious]]
    assert entropy_auroc(entropies, spurious) == pytest.approx(np.mean(pairs))
    assert entropy_auroc([0.1, 0.2], [True, False]) == 1.0
    assert entropy_auroc([0.1, 0.2], [True, True]) is None
