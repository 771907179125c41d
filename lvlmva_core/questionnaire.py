"""The questionnaire of LVLM-VA's user study (§5): what is drawn, answers in a CSV file a participant, their summary.

The paper asked 18 people 26 questions. How it drew and counted is not said; what is done here is an extension.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lvlmva_core.agreement import cohen_kappa, fleiss_kappa, pairwise_agreement, wilson_interval
from lvlmva_core.errors import InputError
from lvlmva_core.overrides import locked, person_file
from lvlmva_core.spreadsheet import read_spreadsheet, write_csv
from lvlmva_core.statistics import hierarchical_bootstrap

Question = Literal["explanation", "regions", "reasoning"]
Side = Literal["before", "after"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
ANSWERS: Mapping[Question, tuple[str, ...]] = {
    "explanation": ("before", "after", "same"),
    "regions": ("yes", "no", "unsure"),
    "reasoning": ("yes", "no", "unsure"),
}
FAVOURABLE: Mapping[Question, str] = {"explanation": "after", "regions": "yes", "reasoning": "yes"}
UNDECIDED = ("same", "unsure")
PUBLISHED: Mapping[Question, float] = {"explanation": 0.86, "regions": 0.88, "reasoning": 0.87}  # LVLM-VA §5
COLUMNS = ["participant", "study", "order", "sample", "question", "answer", "left"]


@dataclass(frozen=True)
class Item:
    """A question about a sample as one participant gets it. left: whose explanation stands there; "" if none does."""

    sample: str
    question: Question
    left: Side | Literal[""]


@dataclass(frozen=True)
class Answer:
    """What a participant said. order: rising numbers in a participant's file; what was said later counts."""

    participant: str
    study: str
    order: int
    sample: str
    question: Question
    answer: str
    left: str


def draw_samples(ids: Sequence[str], count: int, seed: int) -> list[str]:
    """A random set of samples: the first `count` of a seeded permutation, so that a smaller set is part of a larger.

    Args:
        ids: of all that could be asked about, in any order.

    Raises:
        InputError: there are fewer than asked for.
    """
    if not 1 <= count <= len(ids):
        raise InputError(f"--samples {count}: expected 1 to {len(ids)}, as many as can be asked about")
    ordered = sorted(ids)
    return [ordered[n] for n in np.random.default_rng([seed, 17]).permutation(len(ordered))[:count]]


def items_of(samples: Sequence[str], participant: str, seed: int) -> list[Item]:
    """The questions of a participant in order; order and sides depend on (seed, participant, samples) alone.

    First all comparisons of explanations, so that nobody has read yet what the critic rejects, then of each sample the
    regions and the reasoning. The explanation after alignment stands left by a fair coin for each sample.
    """
    person = hashlib.sha256(participant.casefold().encode()).digest()[:8]
    rng = np.random.default_rng([seed, 19, int.from_bytes(person)])
    compared = [samples[n] for n in rng.permutation(len(samples))]
    sides: list[Side] = ["after" if left else "before" for left in rng.integers(2, size=len(samples))]
    judged = [samples[n] for n in rng.permutation(len(samples))]
    items = [Item(sample, "explanation", side) for sample, side in zip(compared, sides, strict=True)]
    return items + [Item(sample, question, "") for sample in judged for question in ("regions", "reasoning")]


def participant_file(folder: Path, participant: str) -> Path:
    """`<folder>/<participant>.csv`. Raises InputError where the name cannot be a file's."""
    return person_file(folder, participant, "participant")


def read_answers(path: Path) -> list[Answer]:
    """Read one participant's file, in the order of its order numbers.

    Raises:
        InputError: the file is missing, or a row is malformed; the line is named.
    """
    rows, _ = read_spreadsheet(path)
    _, header = next(rows, (0, []))
    if header != COLUMNS:
        raise InputError(f"{path}: the first line must be '{','.join(COLUMNS)}', not '{','.join(header)[:200]}'")
    answers: dict[int, Answer] = {}
    for line, cells in rows:
        where = f"{path}, line {line}"
        if len(cells) != len(COLUMNS):
            raise InputError(f"{where}: expected {len(COLUMNS)} values, not {len(cells)}")
        row = dict(zip(COLUMNS, cells, strict=True))
        known = next((each for each in QUESTIONS if each == row["question"]), None)
        if known is None:
            raise InputError(f"{where}: question '{row['question'][:40]}' is none of {', '.join(QUESTIONS)}")
        if row["answer"] not in ANSWERS[known]:
            raise InputError(f"{where}: answer '{row['answer'][:40]}' is none of {', '.join(ANSWERS[known])}")
        if row["left"] not in (get_args(Side) if known == "explanation" else ("",)):
            raise InputError(
                f"{where}: left is '{row['left'][:40]}'; expected before or after, and of explanations alone"
            )
        if row["participant"].casefold() != path.stem.casefold():
            raise InputError(f"{where}: the participant is '{row['participant'][:80]}', but the file is {path.name}")
        if not (row["order"].isascii() and row["order"].isdigit()) or int(row["order"]) in answers:
            raise InputError(f"{where}: order '{row['order'][:40]}' is not a number, or comes twice")
        order = int(row["order"])
        answers[order] = Answer(
            path.stem, row["study"], order, row["sample"], known, row["answer"], row["left"]
        )  # fmt: skip
    return [answers[order] for order in sorted(answers)]


def add_answer(folder: Path, study: str, item: Item, answer: str, participant: str) -> Answer:
    """Add an answer to the participant's file; it is on the disk when this returns.

    Written beside itself and renamed, as verdicts are; `.lock` in the folder lets one process after the other. The
    same answer as the one that counts already is not written again.

    Raises:
        InputError: the name or answer cannot be kept, or the file is malformed or of another study.
    """
    path = participant_file(folder, participant)
    if answer not in ANSWERS[item.question]:
        raise InputError(f"answer '{answer[:40]}' is none of {', '.join(ANSWERS[item.question])}")
    with locked(folder):
        before = answers_so_far(path, study)
        counts = standing_answers(before).get((item.sample, item.question))
        if counts is not None and counts.answer == answer:
            return counts
        order = before[-1].order + 1 if before else 1
        said = Answer(path.stem, study, order, item.sample, item.question, answer, item.left)
        rows = [COLUMNS, *([str(getattr(each, name)) for name in COLUMNS] for each in [*before, said])]
        write_csv(path, rows)
    return said


def answers_so_far(path: Path, study: str) -> list[Answer]:
    """A participant's answers; none where there is no file.

    Raises:
        InputError: they are of another study, or the file is malformed.
    """
    answers = read_answers(path) if path.exists() else []
    for each in answers:
        if each.study != study:
            raise InputError(f"{path}: holds answers of another study ({each.study[:40]}, not {study}); move it away")
    return answers


def standing_answers(answers: Sequence[Answer]) -> dict[tuple[str, Question], Answer]:
    """(Sample, question) -> the answer that counts: the last one."""
    return {(each.sample, each.question): each for each in sorted(answers, key=lambda each: each.order)}


def summarise(answers: Mapping[str, Sequence[Answer]], samples: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """What the participants said, for each question: shares with intervals, and how far they agree.

    Args:
        answers: participant -> all that they said. samples: that were asked about. seed: of the resampling.

    Returns:
        JSON-able. `share`: of the favourable answer ("yes", "after") among all answers, "unsure" and "same" counted
        against it; `share_decided`: among those that are neither. `wilson` and `wilson_decided`: 95 % intervals that
        take all answers for independent. `interval`: 95 %, from resampling participants and samples (an extension);
        None with fewer than two of either. `kappa` over the samples, of those participants who answered the question on
        all of them: Cohen's of two, Fleiss' of more. `left`: how often the left one was preferred, of all preferences.
    """
    counting = {name: standing_answers(said) for name, said in sorted(answers.items())}
    return {
        "participants": {name: len(counted) for name, counted in counting.items()},
        "questions_each": len(samples) * len(QUESTIONS),
        "complete": sum(len(counted) == len(samples) * len(QUESTIONS) for counted in counting.values()),
        "questions": {
            question: _summary_of(question, list(counting.values()), list(counting), samples, seed)
            for question in QUESTIONS
        },
    }


def _summary_of(
    question: Question,
    counting: Sequence[Mapping[tuple[str, Question], Answer]],
    names: Sequence[str],
    samples: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    table = [[counted.get((sample, question)) for sample in samples] for counted in counting]
    given = [each for row in table for each in row if each is not None]
    counts = Counter(each.answer for each in given)
    favourable, decided = counts[FAVOURABLE[question]], sum(counts[each] for each in counts if each not in UNDECIDED)
    words = [[None if each is None else each.answer for each in row] for row in table]
    whole = [row for row in words if None not in row]
    found: dict[str, Any] = {
        "published": PUBLISHED[question],
        "answers": len(given),
        "counts": {each: counts[each] for each in ANSWERS[question]},
        "share": favourable / len(given) if given else None,
        "wilson": wilson_interval(favourable, len(given)),
        "share_decided": favourable / decided if decided else None,
        "wilson_decided": wilson_interval(favourable, decided),
        "interval": _interval(words, FAVOURABLE[question], seed),
        "by_participant": {
            name: _share(row, FAVOURABLE[question]) for name, row in zip(names, words, strict=True) if any(row)
        },
        "pairwise_agreement": pairwise_agreement(
            [[each for each in column if each is not None] for column in zip(*words, strict=True)]
        ),
        "kappa": _kappa(whole, ANSWERS[question]),
        "kappa_of": {0: None, 1: None, 2: "cohen"}.get(len(whole), "fleiss"),
        "kappa_participants": len(whole),
    }
    if question == "explanation":
        preferred = [each for each in given if each.answer not in UNDECIDED]
        found["left"] = sum(each.answer == each.left for each in preferred) / len(preferred) if preferred else None
    return found


def _share(row: Sequence[str | None], favourable: str) -> float:
    given = [each for each in row if each is not None]
    return sum(each == favourable for each in given) / len(given)


def _kappa(whole: Sequence[Sequence[str | None]], categories: Sequence[str]) -> float | None:
    if len(whole) < 2:
        return None
    if len(whole) == 2:
        return cohen_kappa(*whole)
    return fleiss_kappa(np.array([[column.count(each) for each in categories] for column in zip(*whole, strict=True)]))


def _interval(words: Sequence[Sequence[str | None]], favourable: str, seed: int) -> tuple[float, float] | None:
    values = np.array([[np.nan if each is None else float(each == favourable) for each in row] for row in words])
    if values.ndim != 2 or min(values.shape) < 2 or np.isnan(values).all():
        return None

    def share(drawn: np.ndarray) -> float:
        return float(np.nanmean(drawn)) if not np.isnan(drawn).all() else float("nan")

    draws = hierarchical_bootstrap(values[None], share, seed=seed)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)
