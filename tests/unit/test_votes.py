"""Several answers: votes, Fleiss' kappa and errors in common against brute force and a published example."""

import itertools
from typing import Any

import numpy as np
import pytest

from lvlmva.several import cost_of, describe
from lvlmva_core.agreement import fleiss_kappa
from lvlmva_core.comparison import answers_against_truth
from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow
from lvlmva_core.lvlm.settings import ModelCritic
from lvlmva_core.lvlm.votes import (
    accuracy_if_independent,
    accuracy_of_votes,
    cascade_cost,
    error_correlations,
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
    assert accuracy_of_votes(copies, truth, "majority") == np.mean(one == truth)
    assert accuracy_if_independent(copies, truth, "majority") > accuracy_of_votes(copies, truth, "majority") + 0.05
    apart = np.stack([truth ^ (draw.random(4000) < 0.2) for _ in range(3)], axis=1).astype(float)
    assert accuracy_of_votes(apart, truth, "majority") == pytest.approx(
        accuracy_if_independent(apart, truth, "majority"), abs=0.02
    )
    assert accuracy_if_independent(apart, truth, "majority") == pytest.approx(0.8**3 + 3 * 0.8**2 * 0.2, abs=0.02)
    assert error_correlations(np.stack([truth, one], 1).astype(float), truth) == {(0, 1): None}


@pytest.mark.parametrize(("rule", "least"), [("majority", 3), ("unanimous", 4)])
def test_independence_is_the_sum_over_all_outcomes(rule: Any, least: int) -> None:
    rejected = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0.0]])
    truth = np.array([True, True, True, False, False])
    right = 0.0
    for row in truth:
        rates = rejected[truth == row].mean(axis=0)
        for outcome in itertools.product([0, 1], repeat=4):
            chance = np.prod([rate if said else 1 - rate for said, rate in zip(outcome, rates, strict=True)])
            right += chance * ((sum(outcome) >= least) == row)
    assert accuracy_if_independent(rejected, truth, rule) == pytest.approx(right / 5)


def _judged(sample: str, said: list[dict[int, str]], rule: str, further: list[str]) -> VerdictRow:
    """A row of answers about a sample's two regions; the last of a cascade decides alone."""
    answers = [
        {
            **{"place": place, "index": 0, "critic": "abc"[place], "settings": {}, "failure": None, "records": []},
            "verdicts": {str(region): verdict for region, verdict in verdicts.items()},
        }
        for place, verdicts in enumerate(said)
    ]
    voters = said[-1:] if further else said
    verdicts = [
        {"region": region, "color": "red", "verdict": verdict, "certainty": certainty}
        for region in (0, 1)
        for verdict, certainty in [vote([each[region] for each in voters], rule)]  # type: ignore[arg-type]
    ]
    row = {"sample": sample, "segmentation": "s", "critic": "a", "settings": {}, "failure": None, "judge": "j"}
    row |= {"verdicts": verdicts, "records": [], "answers": answers, "votes": rule, "further": further}
    return VerdictRow.model_validate(row)


@pytest.mark.parametrize(("rule", "by_votes"), [("majority", 3 / 4), ("unanimous", 2 / 4)])
def test_votes_against_the_truth_are_counted_by_their_own_rule(rule: str, by_votes: float) -> None:
    """Region 0 of each sample is spurious. By hand: majority rejects 0 and 1 of s, 0 of t; unanimity 1 of s, 0 of t."""
    yes, no = "yes", "no"
    said = {
        "s": [{0: no, 1: no}, {0: no, 1: no}, {0: yes, 1: no}],
        "t": [{0: no, 1: yes}, {0: no, 1: yes}, {0: no, 1: no}],
    }
    segments = np.repeat([[[0, 0], [1, 1]]], 2, axis=0).astype(np.uint8)
    masks, known = segments == 0, np.array([True, True])
    rows = [_judged(sample, each, rule, []) for sample, each in said.items()]
    found = answers_against_truth(rows, ["s", "t"], segments, segments * 0.0, masks, known, overlap="any")["answers"]
    assert (found["votes"], found["regions_voted"]) == (rule, 4)
    assert found["accuracy_of_verdicts"] == found["accuracy_of_votes"] == by_votes
    assert found["accuracy"] == {"a": 3 / 4, "b": 3 / 4, "c": 1 / 4}
    assert found["error_correlation"]["a and b"] == pytest.approx(1.0)
    known[:] = [False, True]  # of s nothing is known: t alone counts
    only_t = answers_against_truth(rows, ["s", "t"], segments, segments * 0.0, masks, known, overlap="any")["answers"]
    assert (only_t["regions_voted"], only_t["accuracy_of_verdicts"]) == (2, 1.0)
    assert answers_against_truth(rows, ["s", "t"], segments, masks * 0.0, masks, known & False, overlap="any") == {}


def test_a_cascades_verdicts_are_counted_as_they_fell() -> None:
    segments = np.array([[[0, 1]], [[0, 1]]], np.uint8)
    rows = [
        _judged("s", [{0: "no", 1: "yes"}, {0: "yes", 1: "yes"}, {0: "no", 1: "no"}], "majority", ["disagreement"]),
        _judged("t", [{0: "no", 1: "yes"}, {0: "no", 1: "yes"}], "majority", []),
    ]
    known = np.array([True, True])
    given = (["s", "t"], segments, segments * 0.0, segments == 0, known)
    found = answers_against_truth(rows, *given, overlap="any")["answers"]
    assert found["accuracy_of_verdicts"] == 3 / 4  # the last critic is wrong about region 1 of s
    assert "accuracy_of_votes" not in found  # answers that were asked for by what others said cast no vote
    assert found["accuracy"] == {"a": 1.0, "b": 3 / 4, "c": 1 / 2}


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


def test_a_model_on_this_machine_is_free_in_the_cost_of_a_cascade() -> None:
    """Three answers at 0 USD each, and one at (1000 · 2 + 100 · 10) / 10⁶ where the cascade asked further."""
    here = {"base_url": "http://localhost:8000/v1", "model": "small"}
    price = {"usd_per_million_input_tokens": 2.0, "usd_per_million_output_tokens": 10.0}
    there = {"base_url": "https://models.invalid/v1", "model": "big", "api_key_variable": None, **price}
    config = ModelCritic.model_validate(
        {
            **{"critic": "model", "prompts": "knee", "endpoint": here, "samples": 3, "cascade": {"disagreement": True}},
            "critics": [{"critic": "model", "endpoint": there}],
        }
    )
    record = {"response": {"usage": {"prompt_tokens": 1000, "completion_tokens": 100}}}
    rows = [_answered(3, record, []), _answered(4, record, ["disagreement"])]
    cost = cost_of(config, rows)
    assert (cost.first, cost.last, cost.everything) == (0.0, pytest.approx(0.003), pytest.approx(0.006))
    assert "cost 0.0030 USD (0.0000 USD first, 0.0030 USD then)" in describe(cost, config.critics[-1], priced=True)


def _answered(count: int, record: dict[str, Any], further: list[str]) -> CritiqueRow:
    """A row with three answers of the first critic, and of the last one what is above that."""
    shared = {"critic": "c", "settings": {}, "failure": None, "critique": "red", "record": record}
    answers = [{"place": n // 3, "index": n % 3, **shared} for n in range(count)]
    row = {"sample": "s", "segmentation": "d", "critic": "c", "settings": {}, "failure": None, "regions": []}
    row |= {"class_name": "k", "critique": "red", "record": None, "answers": answers, "further": further}
    return CritiqueRow.model_validate(row)


def test_reliance_is_the_largest_share() -> None:
    attribution = np.array([[3.0, -9.0], [1.0, 4.0]])
    assert largest_reliance(attribution, np.array([[0, 0], [1, 255]], np.uint8)) == 3 / 8
    assert largest_reliance(-np.ones((2, 2)), np.zeros((2, 2), np.uint8)) == 0.0
