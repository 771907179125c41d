"""Spread over seeds, tests of differences (LVLM-VA §5.2), and intervals over bases, seeds and pictures."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (n - 1; 0 for a single value) over seeds."""
    array = np.asarray(values, dtype=np.float64)
    return {"mean": float(array.mean()), "std": float(array.std(ddof=1)) if array.size > 1 else 0.0}


def wilcoxon_test(differences: Sequence[float]) -> dict[str, float | int]:
    """Exact Wilcoxon signed-rank test of paired differences (LVLM-VA §5.2; scipy).

    Zero differences are left out. Where differences tie, all 2^n signs are enumerated, so that these are exact too, up
    to 16 differences; above that scipy's own choice of method is taken. With n = 7 the least two-sided p is 2 / 128 =
    0.0156.

    Returns:
        n (differences that are not zero), p_two_sided, p_greater (one-sided: the differences lie above zero).
    """
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0]
    n = len(values)
    if n == 0:
        return {"n": 0, "p_two_sided": 1.0, "p_greater": 1.0}
    ties = len(np.unique(np.abs(values))) < n
    method = stats.PermutationMethod(n_resamples=2**n) if ties and n <= 16 else "auto"  # without ties auto is exact
    tests = {side: stats.wilcoxon(values, alternative=side, method=method).pvalue for side in ("two-sided", "greater")}
    return {
        "n": n,
        "p_two_sided": min(1.0, float(tests["two-sided"])),
        "p_greater": float(tests["greater"]),
    }


def bootstrap_interval(
    rows: np.ndarray, statistic: Callable[[np.ndarray], float], *, seed: int = 0, draws: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a statistic under resampling of rows with replacement (Efron 1979).

    Args:
        rows: (n, ...). statistic: of (n, ...) rows.
    """
    rng = np.random.default_rng([seed, 11])
    found = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def hierarchical_bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], *, seed: int = 0, draws: int = 2000
) -> np.ndarray:
    """Draws of a statistic under resampling of bases, of seeds within them, and of test pictures (an extension).

    Bases are drawn with replacement, then for each that was drawn its seeds, and once for all of them the pictures,
    since every model is measured on the same ones (Saravanan, Berman and Sober 2020 for the nesting; Owen 2007 for
    models crossed with pictures).

    Args:
        values: (bases, seeds, pictures, ...), what the statistic needs of each model and picture; of several methods,
            paired by base and seed, in further axes.
        statistic: of (bases, seeds, pictures, ...) of the same shape.

    Returns:
        float64 (draws,).
    """
    bases, seeds, pictures = values.shape[:3]
    rng = np.random.default_rng([seed, 13])
    found = np.empty(draws)
    for draw in range(draws):
        of_bases = rng.integers(bases, size=(bases, 1))
        of_seeds = rng.integers(seeds, size=(bases, seeds))
        drawn = rng.integers(pictures, size=pictures)
        found[draw] = statistic(values[of_bases, of_seeds][:, :, drawn])
    return found


def two_sided_p(draws: np.ndarray) -> float:
    """Twice the share of draws of a difference on the rarer side of 0; never 0 (Davison and Hinkley 1997)."""
    n = len(draws)
    return min(1.0, 2 * (1 + min(int((draws <= 0).sum()), int((draws >= 0).sum()))) / (n + 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for being a family (Holm 1979): the chance of any false rejection stays below the level."""
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
