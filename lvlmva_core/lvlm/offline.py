"""Stand-ins for a vision-language model that need no network: critics, and the judge that reads their prose.

Each is named for what it is, in every record; none of them is an LVLM. A stand-in is a function with one line above it:
`@critic("name")` makes it a value of critique.critic, `@judge("name")` one of judge.judge. One more, replay, is the
model's own path kept from sending (`lvlmva_core.lvlm.client`). Trained detectors enter themselves in the same way
(`lvlmva_core.lvlm.detectors`), and are no stand-ins.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.settings import OracleCritic, is_detector
from lvlmva_core.regions import ON_OBJECT, Overlap, overlaps, regions_present
from lvlmva_core.render import COLOUR_NAMES

REPLAY = "replay"


@dataclass(frozen=True)
class StandIn:
    """A critic without a model.

    criticise: (case, settings of the section) -> prose whose last line is "Verdicts: red - yes; blue - no" with each
    region of the case once. knows_truth: whether the case has to hold attribution and true masks. told: (case,
    settings) -> what the record says of how it was set; {} unless it has settings of its own. seen_together: (all
    cases, settings) -> these, with what a case alone does not tell.
    """

    criticise: Callable[[Case, Any], str]
    knows_truth: bool
    told: Callable[[Case, Any], dict[str, Any]]
    seen_together: Callable[[Sequence[Case], Any], Sequence[Case]]


CRITICS: dict[str, StandIn] = {}
JUDGES: dict[str, Callable[[str, list[int]], dict[int, str]]] = {}


def is_stand_in(name: str) -> bool:
    """Whether a critic or judge, as records name it, is a rule, the truth or a store, and nothing that was trained."""
    return (name in CRITICS or name in JUDGES or name == REPLAY) and not is_detector(name)


def critic(
    name: str,
    *,
    knows_truth: bool = False,
    told: Callable[[Case, Any], dict[str, Any]] = lambda case, settings: {},
    seen_together: Callable[[Sequence[Case], Any], Sequence[Case]] = lambda cases, settings: cases,
) -> Callable[[Callable[[Case, Any], str]], Callable[[Case, Any], str]]:
    """Enter a stand-in under a name."""

    def enter(criticise: Callable[[Case, Any], str]) -> Callable[[Case, Any], str]:
        CRITICS[name] = StandIn(criticise, knows_truth, told, seen_together)
        return criticise

    return enter


def judge(
    name: str,
) -> Callable[[Callable[[str, list[int]], dict[int, str]]], Callable[[str, list[int]], dict[int, str]]]:
    """Enter a reader of the stand-ins' prose under a name: (critique, regions) -> region -> "yes" | "no"."""

    def enter(read: Callable[[str, list[int]], dict[int, str]]) -> Callable[[str, list[int]], dict[int, str]]:
        JUDGES[name] = read
        return read

    return enter


BRIGHT = 25  # grey level from which a pixel is ink; the faintest decoy has 30
CENTRAL = 0.35  # of the picture's sides; ink that comes no closer to the middle is not part of the stroke


def central_stroke(picture: np.ndarray) -> np.ndarray:
    """Ink that belongs to the stroke in the middle of a picture.

    Bright pixels fall into 4-connected parts; the stroke is all parts that come within 0.35 of the picture's sides of
    its centre, so that a broken stroke counts whole and an object in a corner does not.

    Args:
        picture: uint8 (C, H, W); channels are averaged.

    Returns:
        bool (H, W).
    """
    from scipy import ndimage

    bright = picture.mean(axis=0) >= BRIGHT
    parts, count = ndimage.label(bright)
    if not count:
        return np.zeros_like(bright)
    height, width = bright.shape
    rows, columns = np.indices(bright.shape)
    from_centre = np.hypot((rows + 0.5) / height - 0.5, (columns + 0.5) / width - 0.5)
    nearest = np.asarray(ndimage.minimum(from_centre, parts, np.arange(1, count + 1)))
    return np.isin(parts, 1 + np.flatnonzero(nearest <= CENTRAL))


def criticise_by_rules(picture: np.ndarray, segments: np.ndarray) -> str:
    """Critique by one rule for digits: a region is relevant if any of its pixels lies on the central stroke.

    It sees the picture and the regions only; no true mask, no attribution, no class. The rule is the one that
    LVLM-VA states for mixed regions of digits.

    Args:
        picture: uint8 (C, H, W). segments: uint8 (H, W); 255 = none.
    """
    stroke = central_stroke(picture)
    ink = picture.mean(axis=0) >= BRIGHT
    lines = [
        f"The picture has {int(ink.sum())} bright pixels; {int(stroke.sum())} of them form the stroke in the middle, "
        f"{int((ink & ~stroke).sum())} lie apart from it."
    ]
    verdicts = {}
    for region in regions_present(segments):
        inside = segments == region
        on, off = int((inside & stroke).sum()), int((inside & ink & ~stroke).sum())
        verdicts[region] = "yes" if on else "no"
        conclusion = "It touches the stroke, so it is relevant" if on else "It misses the stroke, so it is not relevant"
        lines.append(
            f"The {COLOUR_NAMES[region]} region fills {inside.mean():.0%} of the picture, holds {on} pixels of the "
            f"stroke and {off} bright pixels apart from it. {conclusion}."
        )
    return with_verdicts(lines, verdicts)


def criticise_by_oracle(
    sample: str,
    segments: np.ndarray,
    spurious_mask: np.ndarray,
    attribution: np.ndarray,
    *,
    rule: Overlap,
    false_positive_rate: float,
    false_negative_rate: float,
    seed: int,
    object_mask: np.ndarray | None = None,
    errors: Mapping[int, float] | None = None,
) -> str:
    """Critique by someone who knows the true masks, with errors at set rates.

    A region that overlaps the spurious feature gets "no", any other "yes"; where an `object_mask` is given, a region
    that does not lie on the object gets "no" instead (LVLM-VA §5: only the tag of a knee, but all beside a lesion).
    Then a relevant region is rejected with `false_positive_rate` and an irrelevant one accepted with
    `false_negative_rate`. The draw of a region depends on (seed, sample, region) alone, and a higher rate errs wherever
    a lower one does; where `errors` (`place_errors`) are given, a region errs where its number is below the rate.

    Args:
        segments: uint8 (H, W); 255 = none. spurious_mask, object_mask: bool (H, W). attribution: float (H, W).
        rule: of `lvlmva_core.regions.overlaps`, for the spurious feature; a region lies on the object by
            "majority_of_attribution".
    """
    if object_mask is None:
        lines = [f"The true spurious mask is known; a region counts as spurious by the rule {rule}."]
        truths = {True: "overlaps the spurious feature", False: "does not overlap the spurious feature"}
    else:
        lines = [f"The object's true mask is known; a region lies on it by the rule {ON_OBJECT}."]
        truths = {True: "does not lie on the object", False: "lies on the object"}
    verdicts = {}
    for region, spurious in _irrelevant(segments, spurious_mask, attribution, rule, object_mask).items():
        place = _draw(seed, sample, region) if errors is None else errors[region]
        wrong = place < (false_negative_rate if spurious else false_positive_rate)
        verdicts[region] = "no" if spurious != wrong else "yes"
        truth = truths[spurious]
        error = " This verdict is wrong on purpose." if wrong else ""
        lines.append(f"The {COLOUR_NAMES[region]} region {truth}.{error}")
    return with_verdicts(lines, verdicts)


def place_errors(cases: Sequence[Case], settings: OracleCritic) -> Sequence[Case]:
    """Say of each region at which rate the oracle errs on it (`Case.errors`), so that errors at a rate have a system.

    "by_class": classes in an order drawn from the seed; at a rate of r all regions of the first r · K classes are
    judged wrongly, and of one class between them a share. "small_regions", "large_regions": of all relevant and of all
    spurious regions, by their share of the picture. "independent": nothing is said, each region draws for itself.

    Raises:
        InputError: a true mask that is needed is unknown.
        ValueError: another way to err.
    """
    if settings.errors not in get_args(OracleCritic.model_fields["errors"].annotation):
        raise ValueError(f"errors '{settings.errors}': expected independent, by_class, small_regions or large_regions")
    if settings.errors == "independent":
        return cases
    if settings.errors == "by_class":
        names = sorted({case.class_name for case in cases})
        rank = {names[place]: n for n, place in enumerate(np.random.default_rng(settings.seed).permutation(len(names)))}
        return [
            replace(
                case,
                errors={
                    region: (rank[case.class_name] + _draw(settings.seed, case.sample, region)) / len(names)
                    for region in case.regions()
                },
            )
            for case in cases
        ]
    found: list[tuple[bool, float, int, int]] = []
    for n, case in enumerate(cases):
        spurious_mask, attribution, object_mask = _truth_of(case, settings)
        irrelevant = _irrelevant(case.segments, spurious_mask, attribution, settings.overlap, object_mask)
        found += [(kind, float((case.segments == region).mean()), n, region) for region, kind in irrelevant.items()]
    errors: list[dict[int, float]] = [{} for _ in cases]
    for kind in (True, False):
        sign = 1 if settings.errors == "small_regions" else -1
        ordered = sorted((sign * share, n, region) for is_kind, share, n, region in found if is_kind == kind)
        for place, (_, n, region) in enumerate(ordered):
            errors[n][region] = (place + 0.5) / len(ordered)
    return [replace(case, errors=of_case) for case, of_case in zip(cases, errors, strict=True)]


def _irrelevant(
    segments: np.ndarray,
    spurious_mask: np.ndarray,
    attribution: np.ndarray,
    rule: Overlap,
    object_mask: np.ndarray | None,
) -> dict[int, bool]:
    """Whether each region is to be rejected by someone who makes no mistake."""
    if object_mask is None:
        return overlaps(segments, spurious_mask, attribution, rule)
    on_object = overlaps(segments, object_mask, attribution, ON_OBJECT)
    return {region: not lies_on_it for region, lies_on_it in on_object.items()}


@critic("rules")
def rules(case: Case, settings: Any) -> str:
    """Criticise a case by `criticise_by_rules`."""
    return criticise_by_rules(case.picture, case.segments)


def _told_the_oracle(case: Case, settings: OracleCritic) -> dict[str, Any]:
    return {
        "rejects": settings.oracle_rejects,
        "overlap": settings.overlap if settings.oracle_rejects == "spurious_feature" else ON_OBJECT,
        "false_positive_rate": settings.false_positive_rate,
        "false_negative_rate": settings.false_negative_rate,
        **({} if settings.errors == "independent" else {"errors": settings.errors}),
        "seed": settings.seed,
    }


@critic("oracle", knows_truth=True, told=_told_the_oracle, seen_together=place_errors)
def oracle(case: Case, settings: OracleCritic) -> str:
    """Criticise a case by `criticise_by_oracle`.

    Raises:
        InputError: a true mask that it needs is unknown.
    """
    spurious_mask, attribution, object_mask = _truth_of(case, settings)
    return criticise_by_oracle(
        case.sample,
        case.segments,
        spurious_mask,
        attribution,
        rule=settings.overlap,
        false_positive_rate=settings.false_positive_rate,
        false_negative_rate=settings.false_negative_rate,
        seed=settings.seed,
        object_mask=object_mask,
        errors=case.errors,
    )


def _truth_of(case: Case, settings: OracleCritic) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Spurious mask, attribution, and the object's mask where it decides. Raises InputError where one is unknown."""
    assert case.attribution is not None
    if case.spurious_mask is None:
        raise InputError(
            f"critique.critic 'oracle' needs the true mask of '{case.sample}', which is unknown; use another critic"
        )
    if settings.oracle_rejects == "spurious_feature":
        return case.spurious_mask, case.attribution, None
    if case.object_mask is None:
        raise InputError(
            "critique.oracle_rejects 'off_object' needs masks of the object, which this data set does not have; "
            "set it to spurious_feature"
        )
    return case.spurious_mask, case.attribution, case.object_mask


@judge("rules")
def judge_by_rules(critique: str, regions: list[int]) -> dict[int, str]:
    """Read the verdicts from a stand-in's critique: its last line, "Verdicts: red - yes; blue - no".

    Raises:
        ValueError: there is no such line, or a region's colour is missing, doubled or unknown.
    """
    found = re.fullmatch(r"Verdicts: (.+)", critique.rstrip().rpartition("\n")[2])
    if not found:
        raise ValueError("the last line states no verdicts")
    verdicts: dict[str, str] = {}
    for entry in found[1].split("; "):
        match = re.fullmatch(r"([a-z]+) - (yes|no)", entry)
        if not match or match[1] in verdicts:
            raise ValueError(f"'{entry}' is no single verdict 'colour - yes' or 'colour - no'")
        verdicts[match[1]] = match[2]
    wanted = [COLOUR_NAMES[region] for region in regions]
    if sorted(verdicts) != sorted(wanted):
        raise ValueError(f"verdicts for {', '.join(sorted(verdicts))}; expected {', '.join(sorted(wanted))}")
    return {region: verdicts[COLOUR_NAMES[region]] for region in regions}


def with_verdicts(lines: list[str], verdicts: Mapping[int, str]) -> str:
    """Prose that ends with the line that `judge_by_rules` reads."""
    stated = "; ".join(f"{COLOUR_NAMES[region]} - {verdict}" for region, verdict in verdicts.items())
    return "\n".join([*lines, f"Verdicts: {stated}"])


def _draw(seed: int, sample: str, region: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone."""
    digest = hashlib.sha256(f"{seed}/{region}/{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
