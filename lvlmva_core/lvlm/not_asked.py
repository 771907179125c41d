"""Regions that no critic is asked about, since the prediction does not depend on them (an extension of LVLM-VA)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.records import CritiqueRow, NotAsked, Region
from lvlmva_core.regions import NO_REGION, regions_present


def cases_to_ask(cases: Sequence[Case], independent: np.ndarray) -> list[Case]:
    """Cases without the regions that need no critic; one that loses all of its regions is left out.

    Args:
        independent: bool (N, J), of each case and region (`lvlmva_core.independence.independent_regions`).
    """
    asked = []
    for case, needless in zip(cases, independent, strict=True):
        segments = np.where(np.isin(case.segments, np.flatnonzero(needless)), NO_REGION, case.segments)
        if regions_present(segments) or not case.regions():
            asked.append(replace(case, segments=segments.astype(case.segments.dtype)))
    return asked


def with_not_asked(
    rows: Sequence[CritiqueRow], cases: Sequence[Case], *, critic: str, at_most: float, calls: int
) -> list[CritiqueRow]:
    """A row for each case, which names the regions that nobody was asked about.

    Args:
        rows: of those cases that were asked about, without the other regions. cases: all of them, whole.
        critic: who would have been asked. at_most: what the regions were chosen by. calls: to critics a sample.
    """
    of_sample = {row.sample: row for row in rows}
    found = []
    for case in cases:
        row = of_sample.get(case.sample)
        asked = set() if row is None else {each.region for each in row.regions}
        left = [Region(region=each, color=colour) for each, colour in case.regions().items() if each not in asked]
        if row is not None and not left:
            found.append(row)
            continue
        not_asked = NotAsked(regions=left, at_most=at_most, calls_saved=0 if row is not None else calls)
        if row is not None:
            found.append(row.model_copy(update={"segmentation": case.segmentation(), "not_asked": not_asked}))
            continue
        found.append(
            CritiqueRow(
                sample=case.sample,
                segmentation=case.segmentation(),
                regions=[],
                class_name=case.class_name,
                critic=critic,
                settings={},
                critique=None,
                failure=None,
                record=None,
                not_asked=not_asked,
            )
        )
    return found


def summarise_not_asked(rows: Sequence[CritiqueRow], cases: Sequence[Case]) -> str:
    """What was saved, in one line."""
    left = [row.not_asked for row in rows if row.not_asked is not None]
    regions, whole = sum(len(each.regions) for each in left), sum(not row.regions for row in rows if row.not_asked)
    return (
        f"{regions} of {sum(len(case.regions()) for case in cases)} regions were not asked about, since the prediction "
        f"does not depend on them (not rejected); {whole} of {len(cases)} samples had no other: "
        f"{sum(each.calls_saved for each in left)} calls to critics saved, and those to a judge"
    )
