"""More than one answer about a region (an extension of LVLM-VA): votes, agreement, errors in common, a cascade.

Functions over words and arrays; rows of several answers are put together in `lvlmva_core.lvlm.answers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from lvlmva_core.agreement import fleiss_kappa
from lvlmva_core.regions import attribution_shares

Rule = Literal["majority", "unanimous"]


def vote(verdicts: Sequence[str], rule: Rule) -> tuple[str, float]:
    """One verdict from several, and its certainty.

    Args:
        verdicts: "yes" | "no", at least one. rule: "no" where more than half say so, so that a tie keeps the region
            ("majority"), or where all do ("unanimous").

    Returns:
        ("yes" | "no", share of the votes that are for it).

    Raises:
        ValueError: no verdict, another word, or another rule.

    Examples:
        >>> vote(["no", "no", "yes", "yes"], "majority")
        ('yes', 0.5)
    """
    if not verdicts or set(verdicts) - {"yes", "no"}:
        raise ValueError(f"votes {list(verdicts)}; expected one or more of yes, no")
    rejecting = sum(verdict == "no" for verdict in verdicts)
    rejected = bool(rejects(np.array(rejecting), len(verdicts), rule))
    agreeing = rejecting if rejected else len(verdicts) - rejecting
    return ("no" if rejected else "yes"), agreeing / len(verdicts)


def kappa_of(rejected: np.ndarray) -> float | None:
    """Fleiss' kappa of answers about regions, over those on which each answer has a verdict.

    Args:
        rejected: float (N, A), 1 where an answer rejects a region, 0 where it keeps it, nan where it says nothing.
    """
    if rejected.shape[1] < 2:
        return None
    complete = rejected[~np.isnan(rejected).any(axis=1)]
    no = complete.sum(axis=1).astype(int)
    return fleiss_kappa(np.stack([no, rejected.shape[1] - no], axis=1))


def error_correlations(rejected: np.ndarray, truth: np.ndarray) -> dict[tuple[int, int], float | None]:
    """Correlation (phi) of the errors of each pair of answers, over the regions on which both have a verdict.

    Args:
        rejected: as in `kappa_of`. truth: bool (N,), which regions are to be rejected.

    Returns:
        (a, b) with a < b -> in [-1, 1]; None where one of them errs nowhere or everywhere.
    """
    found: dict[tuple[int, int], float | None] = {}
    for one, other in combinations(range(rejected.shape[1]), 2):
        both = ~np.isnan(rejected[:, [one, other]]).any(axis=1)
        wrong = rejected[both][:, [one, other]] != truth[both, None]
        varies = len(wrong) > 0 and (wrong.any(axis=0) & ~wrong.all(axis=0)).all()
        found[one, other] = float(np.corrcoef(wrong.astype(float), rowvar=False)[0, 1]) if varies else None
    return found


def rejects(votes: np.ndarray, answers: int, rule: Rule) -> np.ndarray:
    """Whether so many votes of `answers` reject a region (`vote`): bool, in the shape of `votes`.

    Raises:
        ValueError: another rule.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule '{rule}'; expected one of {', '.join(get_args(Rule))}")
    return np.asarray(2 * votes > answers if rule == "majority" else votes == answers)


def accuracy_of_votes(rejected: np.ndarray, truth: np.ndarray, rule: Rule) -> float:
    """Share of regions on which the answers' vote is right.

    Args:
        rejected: as in `kappa_of`, N at least 1, without nan. truth: bool (N,). rule: as for `vote`.
    """
    return float((rejects(rejected.sum(axis=1), rejected.shape[1], rule) == truth).mean())


def accuracy_if_independent(rejected: np.ndarray, truth: np.ndarray, rule: Rule) -> float:
    """What `accuracy_of_votes` would be expected to be, did the answers err independently of each other.

    Each answer keeps its own rates of errors on regions that are to be rejected and on those to be kept; what is
    dropped is that they err on the same ones.
    """
    right = 0.0
    for kind in (True, False):
        of_kind = rejected[truth == kind]
        if not len(of_kind):
            continue
        rejecting = np.ones(1)  # probability that so many answers reject
        for rate in of_kind.mean(axis=0):
            rejecting = np.convolve(rejecting, [1 - rate, rate])
        by_vote = float(rejecting[rejects(np.arange(len(rejecting)), rejected.shape[1], rule)].sum())
        right += len(of_kind) * (by_vote if kind else 1 - by_vote)
    return right / len(rejected)


def largest_reliance(attribution: np.ndarray, segments: np.ndarray) -> float:
    """The share of a picture's positive attribution that its region with the most of it holds.

    Args:
        attribution: float (H, W). segments: uint8 (H, W); 255 = none.

    Returns:
        In [0, 1]; 0 where there is no positive attribution or no region.
    """
    return max(attribution_shares(attribution, segments).values(), default=0.0)


def why_further(
    answers: Sequence[Mapping[int, str] | None],
    reliance: float,
    *,
    disagreement: bool,
    reliance_above: float | None,
) -> list[str]:
    """Why a cascade asks further about a sample; empty where it does not.

    Args:
        answers: of the first critics, region -> "yes" | "no"; None where one is missing. reliance: `largest_reliance`.
        disagreement, reliance_above: what is asked further about (`settings.Cascade`).
    """
    given = [answer for answer in answers if answer is not None]
    reasons = []
    if disagreement and any(answer != given[0] for answer in given):
        reasons.append("disagreement")
    if not given or (disagreement and len(given) < len(answers)):
        reasons.append("failure")
    if reliance_above is not None and reliance > reliance_above:
        reasons.append("reliance")
    return reasons


@dataclass(frozen=True)
class CascadeCost:
    """What a cascade costs, in one unit (USD or calls), beside asking the last critic about every sample.

    everything: known for the samples that it was asked about, for the others their mean; None where it was asked about
    none.
    """

    samples: int
    asked_further: int
    first: float
    last: float
    everything: float | None

    @property
    def total(self) -> float:
        """Of the cascade as it was asked."""
        return self.first + self.last


def cascade_cost(first: Sequence[float], last: Sequence[float | None]) -> CascadeCost:
    """Add up.

    Args:
        first: of each sample, what the critics before the last one cost. last: what the last one cost; None where it
            was not asked.

    Raises:
        ValueError: they are of different samples.
    """
    if len(first) != len(last):
        raise ValueError(f"costs of {len(first)} and of {len(last)} samples")
    asked = [cost for cost in last if cost is not None]
    everything = sum(asked) / len(asked) * len(last) if asked else None
    return CascadeCost(len(last), len(asked), float(sum(first)), float(sum(asked)), everything)


def error_summary(rejected: np.ndarray, truth: np.ndarray, names: Sequence[str], rule: Rule | None) -> dict[str, Any]:
    """How the answers err against the truth, and whether they do so together.

    Args:
        rejected: as in `kappa_of`. truth: bool (N,). names: of the A answers. rule: by which all of them vote; None in
            a cascade, where they do not.
    """
    complete = ~np.isnan(rejected).any(axis=1)
    accuracy = {}
    for column, name in enumerate(names):
        known = ~np.isnan(rejected[:, column])
        if known.any():
            accuracy[name] = float((rejected[known, column] == truth[known]).mean())
    pairs = error_correlations(rejected, truth)
    summary: dict[str, Any] = {
        "regions": len(truth),
        "accuracy": accuracy,
        "error_correlation": {f"{names[one]} and {names[other]}": value for (one, other), value in pairs.items()},
        "regions_with_all_answers": int(complete.sum()),
    }
    if complete.any() and rule is not None:
        summary["accuracy_of_votes"] = accuracy_of_votes(rejected[complete], truth[complete], rule)
        summary["accuracy_if_independent"] = accuracy_if_independent(rejected[complete], truth[complete], rule)
    return summary
