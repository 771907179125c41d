"""How far people agree, and how sure a share of answers is: kappas and Wilson's interval."""

from collections.abc import Hashable, Sequence
from itertools import combinations

import numpy as np


def wilson_interval(successes: int, total: int, *, level: float = 0.95) -> tuple[float, float] | None:
    """Score interval of a share, by scipy (Wilson 1927, Journal of the American Statistical Association 22, 209-212).

    It takes the answers for independent; several of one person or about one sample are not, and it is too narrow then.

    Args:
        successes: 0..total. total: answers. level: in (0, 1).

    Returns:
        (low, high) in [0, 1]; None where there is no answer.

    Raises:
        ValueError: more successes than answers, a negative count, or another level.

    Examples:
        >>> low, high = wilson_interval(81, 263)
        >>> round(low, 4), round(high, 4)
        (0.2553, 0.3662)
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= total or not 0 < level < 1:
        raise ValueError(f"{successes} of {total} at level {level}; expected 0 <= successes <= total and 0 < level < 1")
    if total == 0:
        return None
    found = binomtest(successes, total).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable]) -> float | None:
    """Agreement of two raters beyond chance (Cohen 1960, Educational and Psychological Measurement 20, 37-46).

    Args:
        one, other: the category that each rater puts each of N items into, in the same order.

    Returns:
        At most 1 (they agree everywhere), 0 at chance; None where it is not defined: no item, or one category alone.

    Raises:
        ValueError: other numbers of items.
    """
    if len(one) != len(other):
        raise ValueError(f"one rater has {len(one)} ratings, the other {len(other)}")
    if not one:
        return None
    observed = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    by_chance = sum(one.count(each) * other.count(each) for each in set(one)) / len(one) ** 2
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Agreement of raters beyond chance (Fleiss 1971, Psychological Bulletin 76, 378-382).

    Args:
        counts: int (N, C), how many of the raters put each of N items into each of C categories; the same number of
            raters, two or more, for each item.

    Returns:
        At most 1 (they agree everywhere), 0 at chance; None where it is not defined: no item, or all ratings alike.

    Raises:
        ValueError: a negative count, other numbers of raters, or fewer than two.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or (counts < 0).any():
        raise ValueError(f"counts must be (N, C) and not negative, not {counts.shape}")
    if not len(counts):
        return None
    raters = int(counts[0].sum())
    if raters < 2 or (counts.sum(axis=1) != raters).any():
        raise ValueError("each item needs the same number of ratings, two or more")
    agreeing = (counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))
    shares = counts.sum(axis=0) / counts.sum()
    by_chance = float((shares**2).sum())
    if (counts.sum(axis=0) > 0).sum() == 1:
        return None
    return (float(agreeing.mean()) - by_chance) / (1 - by_chance)


def pairwise_agreement(ratings: Sequence[Sequence[Hashable]]) -> float | None:
    """Share of pairs of raters who say the same of an item, over all items.

    Args:
        ratings: for each item, what each of its raters says; items may have other numbers of raters.

    Returns:
        In [0, 1]; None where no item has two raters.
    """
    pairs = [a == b for said in ratings for a, b in combinations(said, 2)]
    return sum(pairs) / len(pairs) if pairs else None
