"""Kappas and Wilson's interval against published worked examples, scikit-learn, scipy and brute force."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from lvlmva_core.agreement import cohen_kappa, fleiss_kappa, pairwise_agreement, wilson_interval

# Fleiss 1971, table 1: 30 patients, 6 psychiatrists; depression, personality disorder, schizophrenia, neurosis, other
FLEISS = """00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"""
# Cohen 1968, table 1: 200 patients, two psychiatrists; personality disorder, neurosis, psychosis; kappa = .492
COHEN = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]
# Newcombe 1998, table I, method 3
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


def test_fleiss_is_the_psychiatric_example() -> None:
    counts = np.array([[int(digit) for digit in row] for row in FLEISS.split()])
    assert counts.sum(axis=0) / 180 == pytest.approx([0.144, 0.144, 0.167, 0.306, 0.239], abs=5e-4)  # as printed there
    assert fleiss_kappa(counts) == pytest.approx(0.430, abs=5e-4)


def test_cohen_is_the_published_example_and_scikit_learns() -> None:
    cells = [(a, b) for a, b in itertools.product(range(3), repeat=2) for _ in range(COHEN[a][b])]
    one, other = zip(*cells, strict=True)
    assert cohen_kappa(one, other) == pytest.approx(0.492, abs=5e-4)
    draw = np.random.default_rng(0)
    for _ in range(50):
        first = draw.integers(0, 3, 30).tolist()
        second = [int(draw.integers(0, 3)) if draw.random() < 0.5 else each for each in first]
        assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None
    assert cohen_kappa([], []) is None
    with pytest.raises(ValueError, match="one rater has 1 ratings, the other 2"):
        cohen_kappa(["a"], ["a", "b"])


@pytest.mark.parametrize(("successes", "total", "low", "high"), NEWCOMBE)
def test_wilson_is_newcombes_table(successes: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_scipys_at_every_count_and_level() -> None:
    for total, level in ((1, 0.95), (7, 0.9), (40, 0.99)):
        for successes in range(total + 1):
            found = binomtest(successes, total).proportion_ci(level, method="wilson")
            assert wilson_interval(successes, total, level=level) == pytest.approx((found.low, found.high), abs=1e-12)
    assert wilson_interval(0, 0) is None
    for wrong in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="expected 0 <= successes <= total"):
            wilson_interval(*wrong)


def test_pairs_agree_as_counting_says() -> None:
    assert pairwise_agreement([["a", "a", "b"], ["a"], ["b", "b"]]) == pytest.approx(2 / 4)
    assert pairwise_agreement([["a"], []]) is None
