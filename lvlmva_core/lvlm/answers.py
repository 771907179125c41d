"""Rows of several answers about a sample (an extension of LVLM-VA): put together, taken apart, and summed up."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvlmva_core.lvlm.calls import Record
from lvlmva_core.lvlm.records import (
    NO_CRITIQUE,
    NO_VERDICT,
    Answer,
    CritiqueAnswer,
    CritiqueRow,
    JudgedAnswer,
    Row,
    VerdictRow,
    deciding,
)
from lvlmva_core.lvlm.votes import Rule, kappa_of, vote


def join_critiques(
    answers: Sequence[tuple[int, int, CritiqueRow]],
    *,
    least: int | None,
    further: Sequence[str] = (),
    judged: Sequence[Sequence[Record]] = (),
) -> CritiqueRow:
    """One row of several that hold an answer each, about the same sample.

    Args:
        answers: (place of the critic, index of its answer, row), in this order. least: usable answers that are needed
            of those that decide, None: all. further: why a cascade asked the last critic. judged: the calls to the
            Judge that it went by, of the first answers.
    """
    first = answers[0][2]
    if not first.regions:
        return first
    of_judge = {place: list(records) for place, records in enumerate(judged) if records}
    kept = [
        CritiqueAnswer.model_validate(
            {
                "place": place,
                "index": index,
                **{name: getattr(row, name) for name in ("critic", "settings", "failure", "critique", "record")},
                **({"judged": of_judge[number]} if number in of_judge else {}),
            }
        )
        for number, (place, index, row) in enumerate(answers)
    ]
    voters = deciding(kept, further)
    usable = [each for each in voters if each.failure is None]
    needed = len(voters) if least is None else min(least, len(voters))
    failure = None
    if len(usable) < needed:
        failure = NO_CRITIQUE + _too_few(usable, voters, needed, NO_CRITIQUE)
    return CritiqueRow.model_validate(
        {
            **{name: getattr(first, name) for name in ("sample", "segmentation", "critic", "settings", "class_name")},
            "regions": [each.model_dump() for each in first.regions],
            "critique": None if failure else usable[0].critique,
            "failure": failure,
            "record": None,
            "answers": kept,
            "least_answers": needed,
            **({"further": list(further)} if further else {}),
        }
    )


def _too_few(usable: Sequence[Answer], voters: Sequence[Answer], needed: int, prefix: str) -> str:
    reason = next(each.failure for each in voters if each.failure is not None).removeprefix(prefix)
    return f"{len(usable)} of {len(voters)} answers are usable, {needed} are needed ({reason})"


def alone(row: CritiqueRow) -> list[CritiqueRow]:
    """Rows that hold one answer each, for the Judge; the row itself where there are not several, or too few."""
    if not row.answers or row.failure is not None:
        return [row]
    shared = {name: getattr(row, name) for name in ("sample", "segmentation", "class_name")}
    regions = [each.model_dump() for each in row.regions]
    return [
        CritiqueRow.model_validate(
            {
                **shared,
                "regions": regions,
                **{name: getattr(each, name) for name in ("critic", "settings", "failure", "critique", "record")},
            }
        )
        for each in row.answers
    ]


def join_verdicts(row: CritiqueRow, judged: Sequence[VerdictRow], rule: Rule) -> VerdictRow:
    """The votes of several answers, of which each was judged.

    Args:
        row: the critique. judged: what the Judge made of each of `alone(row)`.
    """
    if not row.answers or row.failure is not None:
        return judged[0]
    kept = [
        JudgedAnswer(
            place=of.place,
            index=of.index,
            critic=of.critic,
            settings=of.settings,
            failure=one.failure,
            verdicts={str(each.region): each.verdict for each in one.verdicts},
            records=one.records,
        )
        for of, one in zip(row.answers, judged, strict=True)
    ]
    voters = deciding(kept, row.further)
    usable = [each for each in voters if each.failure is None]
    failure = None
    verdicts: list[dict[str, Any]] = []
    if len(usable) < row.least_answers:
        failure = NO_VERDICT + _too_few(usable, voters, row.least_answers, NO_VERDICT)
    else:
        for each in row.regions:
            verdict, certainty = vote([answer.by_region()[each.region] for answer in usable], rule)
            verdicts.append({"region": each.region, "color": each.color, "verdict": verdict, "certainty": certainty})
    return VerdictRow.model_validate(
        {
            **{name: getattr(row, name) for name in ("sample", "segmentation", "critic", "settings")},
            "failure": failure,
            "judge": judged[0].judge,
            "verdicts": verdicts,
            "records": [],
            "answers": kept,
            "votes": rule,
            **({"further": list(row.further)} if row.further else {}),
            **({} if row.not_asked is None else {"not_asked": row.not_asked}),
        }
    )


def critic_names(rows: Sequence[Row]) -> dict[int, str]:
    """Place of a critic -> its name, with the place where two have the same."""
    names = {each.place: each.critic for row in rows for each in row.all_answers()}
    doubled = {name for name, count in Counter(names.values()).items() if count > 1}
    return {place: f"{name} [{place}]" if name in doubled else name for place, name in sorted(names.items())}


def columns_of(rows: Sequence[VerdictRow]) -> dict[str, tuple[int, int]]:
    """Name of each answer -> (place of its critic, index)."""
    places = sorted({(each.place, each.index) for row in rows for each in row.answers})
    names, several = critic_names(rows), {place for place, index in places if index > 0}
    return {f"{names[p]} #{n + 1}" if p in several else names[p]: (p, n) for p, n in places}


def rejections(rows: Sequence[VerdictRow]) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """What each answer says of each region.

    Returns:
        (float (N, A): 1 rejected, 0 kept, nan where it says nothing, columns as in `columns_of`; of each of the N
        regions the sample and the region).
    """
    columns = {place: number for number, place in enumerate(columns_of(rows).values())}
    lines, places = [], []
    for row in rows:
        said = {(each.place, each.index): each.by_region() for each in row.answers}
        for region in sorted({region for verdicts in said.values() for region in verdicts}):
            line = np.full(len(columns), np.nan)
            for place, verdicts in said.items():
                if region in verdicts:
                    line[columns[place]] = verdicts[region] == "no"
            lines.append(line)
            places.append((row.sample, region))
    return (np.stack(lines) if lines else np.zeros((0, len(columns)))), places


def by_critic(rejected: np.ndarray, columns: Sequence[tuple[int, int]]) -> np.ndarray:
    """The majority of each critic's own answers; a tie keeps the region. float (N, critics), nan where it has none."""
    places = sorted({place for place, _ in columns})
    found = np.full((len(rejected), len(places)), np.nan)
    for number, place in enumerate(places):
        own = rejected[:, [each == place for each, _ in columns]]
        given = (~np.isnan(own)).sum(axis=1)
        found[given > 0, number] = 2 * np.nansum(own, axis=1)[given > 0] > given[given > 0]
    return found


def summarise_answers(critiques: Sequence[CritiqueRow], rows: Sequence[VerdictRow], rule: Rule) -> dict[str, Any]:
    """How far several answers agree, for the metrics file; {} where one was asked for."""
    several = [row for row in rows if row.answers]
    if not several:
        return {}
    rejected, _ = rejections(several)
    columns = list(columns_of(several).values())
    names = critic_names(several)
    between_answers = {
        name: kappa_of(rejected[:, [place == each for place, _ in columns]])
        for each, name in names.items()
        if sum(place == each for place, _ in columns) > 1
    }
    certainties = [each.certainty for row in several for each in row.verdicts if each.certainty is not None]
    summary: dict[str, Any] = {
        "votes": rule,
        "critics": list(names.values()),
        "answers": sum(len(row.answers) for row in several),
        "answers_failed": sum(each.failure is not None for row in several for each in row.answers),
        "regions_split": sum(certainty < 1 for certainty in certainties),
        "regions_tied": sum(certainty == 0.5 for certainty in certainties),
        "mean_certainty": float(np.mean(certainties)) if certainties else None,
        "kappa_between_answers": between_answers,
        "tokens": _tokens(critiques, names),
    }
    if len(names) > 1:
        summary["kappa_between_critics"] = kappa_of(by_critic(rejected, columns))
    further = Counter(reason for row in several for reason in row.further)
    if further:
        asked = sum(bool(row.further) for row in several)
        summary["asked_further"] = {"samples": asked, "of": len(several), "reasons": dict(sorted(further.items()))}
    return {"answers": summary}


def _tokens(critiques: Sequence[CritiqueRow], names: dict[int, str]) -> dict[str, dict[str, int]]:
    """Of each critic that is a model: calls, and the tokens that the server stated."""
    found: dict[str, dict[str, int]] = {}
    for row in critiques:
        for each in row.answers:
            if each.record is None or each.place not in names:
                continue
            used = found.setdefault(names[each.place], {"calls": 0, "input": 0, "output": 0})
            inputs, outputs = tokens_of(each.record)
            used["calls"] += 1
            used["input"] += inputs
            used["output"] += outputs
    return found


def tokens_of(record: Record) -> tuple[int, int]:
    """Tokens in and out that the server stated for an answer, 0 where it stated none."""
    usage = record["response"].get("usage")
    stated = usage if isinstance(usage, dict) else {}
    counts = [stated.get(name) for name in ("prompt_tokens", "completion_tokens")]
    inputs, outputs = (n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 0 for n in counts)
    return inputs, outputs
