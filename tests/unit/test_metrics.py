import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import precision_score, recall_score

from lvlmva_core.comparison import shortcut_pairs
from lvlmva_core.datasets.decoy import decoy_digits
from lvlmva_core.metrics import (
    METRICS,
    Measured,
    alignment_score,
    best_worst_group,
    contrast,
    entropy_auroc,
    group_accuracies,
    shortcut_effect,
    verdict_quality,
)
from lvlmva_core.statistics import hierarchical_bootstrap, holm, mean_and_std, two_sided_p, wilcoxon_test


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


def test_a_contrast_is_a_logit_less_the_mean_of_the_others() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 4))
    expected = [row[k] - np.mean([row[j] for j in range(4) if j != k]) for row, k in zip(logits, [0, 1, 2, 3, 0, 1])]  # noqa: B905
    np.testing.assert_allclose(contrast(logits, [0, 1, 2, 3, 0, 1]), expected)


def test_the_effect_of_a_shortcut_that_is_known() -> None:
    # z_1 = what is there + 2 * shortcut, z_0 = 0: the contrast moves by 2, and spreads as what is there does
    rng = np.random.default_rng(0)
    there = rng.normal(scale=3.0, size=500)
    paired = np.stack([there + 2, there], axis=1)
    assert shortcut_effect(paired) == pytest.approx(2 / there.std())
    assert shortcut_effect(100 * paired + 7) == pytest.approx(2 / there.std())
    assert shortcut_effect(paired[:, ::-1]) == pytest.approx(-2 / there.std())
    assert shortcut_effect(np.stack([there, there], axis=1)) == 0
    assert shortcut_effect(np.ones((3, 2))) == 0


def test_the_best_threshold_is_found_by_trying_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 12, 30).astype(float)  # with ties
        labels, spurious = rng.integers(0, 2, 30), rng.random(30) < 0.4
        worst = [
            group_accuracies(scores >= cut, labels, spurious)["accuracy"].min() for cut in np.arange(-0.5, 13, 0.5)
        ]
        assert best_worst_group(scores, labels, spurious) == pytest.approx(max(worst))


def test_auc_of_groups_counts_pairs_and_needs_two_classes() -> None:
    rng = np.random.default_rng(1)
    labels, spurious, logits = rng.integers(0, 2, 40), rng.random(40) < 0.5, rng.normal(size=(40, 2)).round(1)
    of = Measured(
        logits.argmax(1), labels, spurious, labels.astype(str), pd.Series(dtype=float), None, None, logits=logits
    )
    for name, chosen in (("auc_spurious", spurious), ("auc_plain", ~spurious)):
        score = (logits[:, 1] - logits[:, 0])[chosen]
        own, others = score[labels[chosen] == 1], score[labels[chosen] == 0]
        won = [(a > b) + 0.5 * (a == b) for a in own for b in others]
        assert METRICS[name].measure(of) == pytest.approx(np.mean(won))
    three = Measured(labels, labels, spurious, labels, pd.Series(dtype=float), None, None, logits=np.ones((40, 3)))
    assert [METRICS[name].measure(three) for name in ("auc_plain", "wga_best_threshold")] == [None, None]


def test_decoys_are_paired_with_the_same_digit_without() -> None:
    samples = decoy_digits(0).samples
    pairs = shortcut_pairs(samples)
    assert pairs is not None
    rows = samples[samples["split"].str.startswith("test")].reset_index(drop=True)
    shown, without = rows.iloc[pairs.shown], rows.iloc[pairs.without]
    assert len(shown) == 500
    assert set(shown["split"]) == {"test_agreeing"}
    assert set(without["split"]) == {"test_plain"}
    assert shown["source"].tolist() == without["source"].tolist()
    np.testing.assert_array_equal(pairs.classes, shown["label"])
    assert shortcut_pairs(samples[~samples["split"].isin(["test_plain"])]) is None


def test_twins_are_paired_and_the_feature_speaks_for_the_class_that_has_it() -> None:
    samples = pd.DataFrame(
        {
            "split": ["test", "test", "test_twins", "test_twins", "train", "train", "train", "train"],
            "label": [0, 1, 0, 1, 0, 0, 1, 1],
            "spurious": [True, False, False, True, False, False, True, False],
            "source": ["a", "b", "a", "b", "c", "d", "e", "f"],
        }
    )
    pairs = shortcut_pairs(samples)
    assert pairs is not None
    assert dict(zip(pairs.shown.tolist(), pairs.without.tolist(), strict=True)) == {0: 2, 3: 1}
    assert pairs.classes.tolist() == [1, 1]
    logits = np.array([[0.0, 5.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    assert sorted(pairs.contrasts(logits).tolist()) == [[3.0, 1.0], [5.0, 2.0]]
    assert shortcut_pairs(samples.assign(spurious=pd.array([None] * 8, dtype="boolean"))) is None


def test_the_hierarchical_bootstrap_spreads_as_the_closed_form_says() -> None:
    # additive effects of bases, seeds within them, and pictures: the variances of the three resamplings add up
    rng = np.random.default_rng(0)
    bases, seeds, pictures = 6, 3, 40
    of_base, of_seed = rng.normal(size=(bases, 1)), rng.normal(size=(bases, seeds))
    of_picture = 4 * rng.normal(size=pictures)
    values = (of_base + of_seed)[:, :, None] + of_picture
    draws = hierarchical_bootstrap(values, lambda drawn: float(drawn.mean()), draws=20_000)
    means = (of_base + of_seed).mean(axis=1)
    variance = means.var() / bases + of_seed.var(axis=1).mean() / (bases * seeds) + of_picture.var() / pictures
    assert draws.mean() == pytest.approx(values.mean(), abs=4 * np.sqrt(variance / 20_000))
    assert draws.var() == pytest.approx(variance, rel=0.04)  # its relative standard error is 0.01
    again = hierarchical_bootstrap(values, lambda drawn: float(drawn.mean()), draws=5)
    np.testing.assert_array_equal(again, draws[:5])


def test_two_sided_p_of_draws_by_counting() -> None:
    assert two_sided_p(np.arange(-1, 98) + 0.5) == pytest.approx(2 * (1 + 1) / 100)
    assert two_sided_p(np.ones(999)) == pytest.approx(0.002)
    assert two_sided_p(np.array([-1.0, 1.0])) == 1.0


def test_holm_is_the_closed_test_with_bonferroni() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 3, 5):
        p = dict(zip("abcde", rng.random(size) ** 3, strict=False))
        closed = {  # rejected only if every intersection that holds it is
            name: max(
                min(1.0, len(those) * min(p[other] for other in those))
                for count in range(1, size + 1)
                for those in itertools.combinations(p, count)
                if name in those
            )
            for name in p
        }
        assert holm(p) == pytest.approx(closed)
    # statsmodels 0.15.0, multipletests([0.01, 0.04, 0.03], method="holm")[1]
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
