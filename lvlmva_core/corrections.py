"""What experts' corrections of a critic have in common, by counting alone: no model is asked (an extension)."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlmva_core.audit import place_name
from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow
from lvlmva_core.overrides import Override
from lvlmva_core.regions import attribution_shares
from lvlmva_core.render import COLOUR_NAMES

ENOUGH = 20  # corrections from which a change of the description is proposed
LEAST = 3  # corrections that share something before it is worth saying
LIFT = 0.15  # by which something must be more frequent among the corrected regions than among those left as they are
MOST_WORDS = 8
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Judged:
    """A region on which the critic has a verdict, and the experts' where they said otherwise.

    place: where its middle lies, in words. share: of the positive attribution, 0..1. critic, expert: "yes" | "no";
    expert is None where nobody differs. said: the critique's sentences that name its colour. notes: the experts'.
    """

    class_name: str
    place: str
    share: float
    critic: str
    expert: str | None
    said: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Common:
    """Something that corrections of one kind share. count of total: corrections; others: share of the regions of that
    class with the same verdict of the critic, which the experts left as they are, that have it too, 0..1."""

    kind: str
    value: str
    count: int
    total: int
    others: float


@dataclass(frozen=True)
class InCommon:
    """What the corrections of a class in one direction share. expert: what the experts say, "yes" | "no"."""

    class_name: str
    expert: str
    total: int
    shared: list[Common]
    notes: list[str]


def judged_regions(
    ids: Sequence[str],
    class_names: Sequence[str],
    label_maps: np.ndarray,
    attributions: np.ndarray,
    digests: Sequence[str],
    critiques: Mapping[str, CritiqueRow],
    verdicts: Mapping[str, VerdictRow],
    overrides: Sequence[Override],
    notes: Mapping[tuple[str, str, int], Sequence[str]],
) -> list[Judged]:
    """Every region that the critic has a verdict on, in the order of samples and regions.

    Args:
        ids, class_names, digests: of N samples. label_maps: uint8 (N, H, W). attributions: float (N, H, W).
        overrides: resolved (`lvlmva_core.overrides.resolve`); those of other segmentations, unsure ones, and those that
            say what the critic says are no corrections. notes: (sample, segmentation, region) -> what experts wrote.
    """
    said = {(each.sample, each.segmentation, each.region): each.verdict for each in overrides}
    found = []
    for n, sample in enumerate(ids):
        if sample not in verdicts or verdicts[sample].failure is not None:
            continue
        critique = critiques[sample].critique if sample in critiques else None
        shares = attribution_shares(attributions[n], label_maps[n])
        height, width = label_maps[n].shape
        for region, verdict in sorted(verdicts[sample].by_region().items()):
            rows, columns = np.nonzero(label_maps[n] == region)
            if not len(rows):
                continue
            key = (sample, digests[n], region)
            expert = said.get(key)
            found.append(
                Judged(
                    class_names[n],
                    place_name((rows.mean() + 0.5) / height, (columns.mean() + 0.5) / width),
                    shares[region],
                    verdict,
                    expert if expert in ("yes", "no") and expert != verdict else None,
                    sentences_about(critique or "", COLOUR_NAMES[region]),
                    tuple(notes.get(key, ())) if expert is not None else (),
                )
            )
    return found


def sentences_about(critique: str, colour: str) -> str:
    """The sentences of a critique that name a colour, and no more than one other."""
    colours = re.compile(rf"\b({'|'.join(COLOUR_NAMES)})\b", re.IGNORECASE)
    chosen = []
    for sentence in _SENTENCE.split(critique):
        named = {each.casefold() for each in colours.findall(sentence)}
        if colour in named and len(named) <= 2:
            chosen.append(sentence.strip())
    return " ".join(chosen)


def corrections_of(judged: Sequence[Judged]) -> list[Judged]:
    """Those on which the experts differ from the critic."""
    return [each for each in judged if each.expert is not None]


def in_common(judged: Sequence[Judged]) -> list[InCommon]:
    """What the corrections share: place and words of the critique, for each class and direction with LEAST or more.

    A place or word is named where LEAST corrections have it and its share among them exceeds by LIFT or more that among
    the class's regions with the same verdict of the critic that nobody corrected: what a critic says of every region,
    or of every one that it rejects, falls out by itself.
    """
    kinds = Counter((each.class_name, each.expert) for each in corrections_of(judged))
    found = []
    for (class_name, expert), total in sorted(kinds.items(), key=lambda pair: (-pair[1], str(pair[0]))):
        if total < LEAST or expert is None:
            continue
        mine = [each for each in judged if (each.class_name, each.expert) == (class_name, expert)]
        others = [
            each for each in judged if (each.class_name, each.critic, each.expert) == (class_name, mine[0].critic, None)
        ]
        places = _shared("place", [{each.place} for each in mine], [{each.place} for each in others])
        words = _shared("word", [_words(each) for each in mine], [_words(each) for each in others])
        notes = list(dict.fromkeys(note for each in mine for note in each.notes if note))
        found.append(InCommon(class_name, expert, total, [*places, *words[:MOST_WORDS]], notes))
    return found


def as_dict(each: InCommon) -> dict[str, Any]:
    """JSON-able."""
    return {
        "class": each.class_name,
        "expert": each.expert,
        "total": each.total,
        "shared": [vars(shared) for shared in each.shared],
        "notes": each.notes,
    }


def _words(each: Judged) -> set[str]:
    return {word.casefold() for word in _WORD.findall(each.said)} - set(COLOUR_NAMES)


def _shared(kind: str, mine: Sequence[set[str]], others: Sequence[set[str]]) -> list[Common]:
    counts, elsewhere = Counter(x for each in mine for x in each), Counter(x for each in others for x in each)
    found = [
        Common(kind, value, count, len(mine), elsewhere[value] / len(others) if others else 0.0)
        for value, count in counts.items()
        if count >= LEAST
    ]
    telling = [each for each in found if each.count / each.total - each.others >= LIFT]
    return sorted(telling, key=lambda each: (each.others - each.count / each.total, each.value))
