"""Several answers: votes, Fleiss' kappa and errors in common against brute force and a published example."""

import itertools

import numpy as np
import pytest

from lvlmva_core.lvlm.votes import (
    accuracy_if_independent,
    accuracy_of_majority,
    cascade_cost,
    error_correlations,
    fleiss_kappa,
    largest_reliance,
    vote,
    why_further,
)

# Fleiss 1971 in the form that is taught: 10 subjects, 14 raters, 5 categories; kappa = 0.210
PUBLISHED = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]


def test_votes_are_what_counting_gives() -> None:
    for count in range(1, 6):
        for words in itertools.product(["yes", "no"], repeat=count):
            no = words.count("no")
            for rule, verdict in (
                ("majority", "no" if no > count - no else "yes"),
                ("unanimous", "no" if no == count else "yes"),
            ):
                assert vote(words, rule) == (verdict, words.count(verdict) / count)  # type: ignore[arg-type]


def test_votes_refuse_other_words() -> None:
    with pytest.raises(ValueError, match="expected one or more of yes, no"):
        vote(["maybe"], "majority")
    with pytest.raises(ValueError, match="unknown rule 'most'"):
        vote(["no"], "most")  # type: ignore[arg-type]


def test_kappa_is_the_published_one_and_that_of_pairs() -> None:
    assert fleiss_kappa(np.array(PUBLISHED)) == pytest.approx(0.210, abs=5e-4)
    draw = np.random.default_rng(0)
    ratings = draw.integers(0, 3, (20, 4))
    counts = np.array([[np.sum(item == category) for category in range(3)] for item in ratings])
    pairs = [a == b for item in ratings for a, b in itertools.permutations(item, 2)]
    chance = sum(np.mean(ratings == category) ** 2 for category in range(3))
    assert fleiss_kappa(counts) == pytest.approx((np.mean(pairs) - chance) / (1 - chance))
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1.0
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None
    with pytest.raises(ValueError, match="same number of ratings"):
        fleiss_kappa(np.array([[3, 0], [1, 1]]))


def test_copies_gain_nothing_and_independent_errors_are_as_expected() -> None:
    draw = np.random.default_rng(1)
    truth = draw.random(4000) < 0.4
    one = truth ^ (draw.random(4000) < 0.2)
    copies = np.stack([one] * 3, axis=1).astype(float)
    assert error_correlations(copies, truth) == {pair: pytest.approx(1.0) for pair in ((0, 1), (0, 2), (1, 2))}
    assert accuracy_of_majority(copies, truth) == np.mean(one == truth)
    assert accuracy_if_independent(copies, truth) > accuracy_of_majority(copies, truth) + 0.05
    apart = np.stack([truth ^ (draw.random(4000) < 0.2) for _ in range(3)], axis=1).astype(float)
    assert accuracy_of_majority(apart, truth) == pytest.approx(accuracy_if_independent(apart, truth), abs=0.02)
    assert accuracy_if_independent(apart, truth) == pytest.approx(0.8**3 + 3 * 0.8**2 * 0.2, abs=0.02)
    assert error_correlations(np.stack([truth, one], 1).astype(float), truth) == {(0, 1): None}


def test_independence_is_the_sum_over_all_outcomes() -> None:
    rejected = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0.0]])
    truth = np.array([True, True, True, False, False])
    right = 0.0
    for row in truth:
        rates = rejected[truth == row].mean(axis=0)
        for outcome in itertools.product([0, 1], repeat=4):
            chance = np.prod([rate if said else 1 - rate for said, rate in zip(outcome, rates, strict=True)])
            right += chance * ((sum(outcome) > 2) == row)
    assert accuracy_if_independent(rejected, truth) == pytest.approx(right / 5)


def test_a_cascade_by_hand() -> None:
    """Four samples, two cheap answers at 1 each, an expensive one at 10: asked about two of them, 28 beside 40."""
    same, other = {0: "yes", 1: "no"}, {0: "no", 1: "no"}
    table = [([same, same], 0.2), ([same, other], 0.2), ([same, same], 0.9), ([other, other], 0.5)]
    reasons = [why_further(a, r, disagreement=True, reliance_above=0.5) for a, r in table]
    assert reasons == [[], ["disagreement"], ["reliance"], []]
    cost = cascade_cost([2.0] * 4, [10.0 if why else None for why in reasons])
    assert (cost.asked_further, cost.first, cost.last, cost.total, cost.everything) == (2, 8.0, 20.0, 28.0, 40.0)
    assert cascade_cost([1.0], [None]).everything is None
    assert why_further([same, None], 0.0, disagreement=True, reliance_above=None) == ["failure"]


def test_reliance_is_the_largest_share() -> None:
    attribution = np.array([[3.0, -9.0], [1.0, 4.0]])
    assert largest_reliance(attribution, np.array([[0, 0], [1, 255]], np.uint8)) == 3 / 8
    assert largest_reliance(-np.ones((2, 2)), np.zeros((2, 2), np.uint8)) == 0.0
