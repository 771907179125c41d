"""The questionnaire: what is drawn, what reaches a participant's file, and the summary against counting."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from lvlmva_core.agreement import fleiss_kappa
from lvlmva_core.errors import InputError
from lvlmva_core.questionnaire import (
    ANSWERS,
    COLUMNS,
    FAVOURABLE,
    QUESTIONS,
    Answer,
    Item,
    add_answer,
    answers_so_far,
    draw_samples,
    items_of,
    read_answers,
    standing_answers,
    summarise,
)

SAMPLES = [f"s{n}" for n in range(8)]


def test_the_draw_depends_on_seed_and_ids_alone_and_grows() -> None:
    ids = [f"x{n:03}" for n in range(200)]
    drawn = draw_samples(ids, 50, 3)
    assert draw_samples(ids[::-1], 20, 3) == drawn[:20]
    assert len(set(drawn)) == 50
    assert draw_samples(ids, 50, 4) != drawn
    with pytest.raises(InputError, match="--samples 201: expected 1 to 200"):
        draw_samples(ids, 201, 0)


def test_each_participant_gets_every_question_once_in_an_order_and_on_sides_of_their_own() -> None:
    left = Counter[str]()
    orders = set()
    for n in range(200):
        items = items_of(SAMPLES, f"P{n}", 0)
        assert items == items_of(SAMPLES, f"p{n}", 0)  # one person's file
        assert sorted((each.sample, each.question) for each in items) == sorted(
            (sample, question) for sample in SAMPLES for question in QUESTIONS
        )
        assert {each.question for each in items[: len(SAMPLES)]} == {"explanation"}  # before anything is said of them
        left.update(each.left for each in items if each.question == "explanation")
        orders.add(tuple(items))
    assert len(orders) == 200
    assert abs(left["after"] - 800) < 4 * 20  # four standard deviations of 1600 fair coins


def test_answers_are_appended_and_the_last_counts(tmp_path: Path) -> None:
    item = Item("s, 1", "explanation", "after")
    add_answer(tmp_path, "d", item, "before", "Åsa 1")
    add_answer(tmp_path, "d", item, "before", "åsa 1")  # said already
    add_answer(tmp_path, "d", Item("s, 1", "regions", ""), "unsure", "Åsa 1")
    add_answer(tmp_path, "d", item, "same", "Åsa 1")
    (file,) = tmp_path.glob("*.csv")
    assert file.read_text().splitlines() == [
        ",".join(COLUMNS),
        'Åsa 1,d,1,"s, 1",explanation,before,after',
        'Åsa 1,d,2,"s, 1",regions,unsure,',
        'Åsa 1,d,3,"s, 1",explanation,same,after',
    ]
    counting = standing_answers(answers_so_far(file, "d"))
    assert {key[1]: each.answer for key, each in counting.items()} == {"explanation": "same", "regions": "unsure"}
    with pytest.raises(InputError, match=r"Åsa 1.csv: holds answers of another study \(d, not e\)"):
        add_answer(tmp_path, "e", item, "after", "Åsa 1")
    with pytest.raises(InputError, match="answer 'left' is none of before, after, same"):
        add_answer(tmp_path, "d", item, "left", "Åsa 1")
    with pytest.raises(InputError, match=r"participant '\.\./x': expected a name"):
        add_answer(tmp_path, "d", item, "after", "../x")
    assert len(read_answers(file)) == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("P,d,1,s,which,yes,", "line 2: question 'which' is none of explanation"),
        ("P,d,1,s,regions,maybe,", "line 2: answer 'maybe' is none of yes, no, unsure"),
        ("P,d,1,s,regions,yes,after", "line 2: left is 'after'"),
        ("P,d,1,s,explanation,after,", "line 2: left is ''"),
        ("Q,d,1,s,regions,yes,", "line 2: the participant is 'Q'"),
        ("P,d,x,s,regions,yes,", "line 2: order 'x' is not a number"),
        ("P,d,1,s,regions", "line 2: expected 7 values, not 5"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named(tmp_path: Path, row: str, words: str) -> None:
    (tmp_path / "P.csv").write_text(f"{','.join(COLUMNS)}\n{row}\n")
    with pytest.raises(InputError, match=words):
        read_answers(tmp_path / "P.csv")


def said(participants: int, seed: int) -> dict[str, list[Answer]]:
    """Random answers of people who lean towards the favourable one; the last has not finished."""
    draw = np.random.default_rng(seed)
    found: dict[str, list[Answer]] = {}
    for n in range(participants):
        name = f"P{n}"
        items = items_of(SAMPLES, name, 0)[: -3 if n == participants - 1 else None]
        found[name] = []
        for order, item in enumerate(items):
            options = ANSWERS[item.question]
            answer = FAVOURABLE[item.question] if draw.random() < 0.6 else options[draw.integers(len(options))]
            found[name].append(Answer(name, "d", order, item.sample, item.question, answer, item.left))
    return found


def test_the_summary_is_what_counting_gives() -> None:
    answers = said(5, 0)
    found: Any = summarise(answers, SAMPLES)
    assert found["participants"] == {"P0": 24, "P1": 24, "P2": 24, "P3": 24, "P4": 21}
    assert (found["complete"], found["questions_each"]) == (4, 24)
    for question in QUESTIONS:
        each = found["questions"][question]
        words = [a.answer for given in answers.values() for a in given if a.question == question]
        assert each["counts"] == {option: words.count(option) for option in ANSWERS[question]}
        assert each["share"] == pytest.approx(words.count(FAVOURABLE[question]) / len(words))
        decided = [word for word in words if word not in ("same", "unsure")]
        assert each["share_decided"] == pytest.approx(decided.count(FAVOURABLE[question]) / len(decided))
        low, high = each["interval"]
        assert low < each["share"] < high
        assert each["kappa_participants"] == (5 if question == "explanation" else 4)
        whole = [
            {a.sample: a.answer for a in given if a.question == question}
            for given in list(answers.values())[: each["kappa_participants"]]
        ]
        counts = [[[row[s] for row in whole].count(option) for option in ANSWERS[question]] for s in SAMPLES]
        assert each["kappa"] == pytest.approx(fleiss_kappa(np.array(counts)))
    preferred = [a for given in answers.values() for a in given if a.left and a.answer != "same"]
    assert found["questions"]["explanation"]["left"] == pytest.approx(np.mean([a.answer == a.left for a in preferred]))
    assert summarise(answers, SAMPLES) == found  # resampling is seeded


def test_two_have_cohens_kappa_and_one_or_none_have_none() -> None:
    answers = {name: given for name, given in said(3, 1).items() if name != "P2"}
    found = summarise(answers, SAMPLES)["questions"]
    for question in QUESTIONS:
        rows = [
            [next(a.answer for a in given if (a.sample, a.question) == (s, question)) for s in SAMPLES]
            for given in answers.values()
        ]
        assert found[question]["kappa_of"] == "cohen"
        assert found[question]["kappa"] == pytest.approx(cohen_kappa_score(*rows))
    alone = summarise({"P0": answers["P0"]}, SAMPLES)["questions"]["regions"]
    assert (alone["kappa"], alone["pairwise_agreement"], alone["interval"]) == (None, None, None)
    nobody = summarise({}, SAMPLES)["questions"]["regions"]
    assert (nobody["share"], nobody["wilson"], nobody["answers"]) == (None, None, 0)


def test_the_resampled_interval_is_wider_where_answers_hang_together() -> None:
    """Oracle: if each participant says one thing throughout, eight samples are worth no more than one."""
    answers = {
        f"P{n}": [Answer(f"P{n}", "d", i, s, "regions", "yes" if n < 6 else "no", "") for i, s in enumerate(SAMPLES)]
        for n in range(9)
    }
    found = summarise(answers, SAMPLES)["questions"]["regions"]
    wilson, resampled = found["wilson"][1] - found["wilson"][0], found["interval"][1] - found["interval"][0]
    # 2 * 1.96 standard errors of 6 of 9 people
    assert resampled == pytest.approx(2 * 1.96 * np.sqrt(6 / 9 * 3 / 9 / 9), rel=0.2)
    assert resampled > 2 * wilson
