"""Critics that are trained detectors of one thing: burned-in text, or a named class of ImageNet. An extension.

They look at the picture and the regions and know no truth. Neither are they vision-language models: they cannot read
a description, and reject what they were trained to find, whatever the task. Records, metrics and pages say so. They run
on this machine, without a key.
"""

from typing import Any

from lvlmva_core.concepts import class_numbers, classifier, concept_evidence
from lvlmva_core.found_text import find_text, network_version
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.offline import critic, with_verdicts
from lvlmva_core.lvlm.settings import ConceptCritic, DetectorCritic, TextCritic
from lvlmva_core.render import COLOUR_NAMES

WHAT_IT_IS = "a detector, not a vision-language model"
COVERED = 0.5  # of a region's pixels that lie on text, from which it is text whatever share of the text it holds


def ready(settings: DetectorCritic) -> str:
    """What a critic is, in a line. Raises InputError where the library or the weights that it needs are missing."""
    if isinstance(settings, TextCritic):
        return f"'text' is {WHAT_IT_IS}: {network_version()}"
    assert isinstance(settings, ConceptCritic)
    class_numbers(tuple(settings.concepts))
    classifier(settings.weights)
    return f"'concept' is {WHAT_IT_IS}: it looks for {', '.join(settings.concepts)}"


def _told_the_text_detector(_case: Case, settings: TextCritic) -> dict[str, Any]:
    return {
        "is": WHAT_IT_IS,
        "network": network_version(),
        "overlap": settings.overlap,
        "side": settings.side,
        "least_probability": settings.least_probability,
    }


@critic("text", told=_told_the_text_detector)
def text(case: Case, settings: TextCritic) -> str:
    """Reject a region that holds text: by the rule `overlap` of a piece, or where text covers half of the region."""
    pieces = find_text(case.picture, settings.side, settings.least_probability)
    lines = [
        f"A text detector found {len(pieces)} pieces of text in the picture."
        + "".join(
            f" One fills {piece.mask.mean():.1%} of it (probability {piece.probability:.2f})." for piece in pieces
        )
    ]
    verdicts = {}
    for region, colour in case.regions().items():
        inside = case.segments == region
        held = [float((inside & piece.mask).sum() / piece.mask.sum()) for piece in pieces]
        covered = max((float((inside & piece.mask).sum() / inside.sum()) for piece in pieces), default=0.0)
        most = max(held, default=0.0)
        holds = most > 0 if settings.overlap == "any" else most >= 0.5
        verdicts[region] = "no" if holds or covered >= COVERED else "yes"
        lines.append(
            f"The {colour} region holds {most:.0%} of a piece of text, and text covers {covered:.0%} of it: "
            f"{'it is text, which is not relevant' if verdicts[region] == 'no' else 'it is not text'}."
        )
    return with_verdicts(lines, verdicts)


def _told_the_classifier(_case: Case, settings: ConceptCritic) -> dict[str, Any]:
    return {
        "is": WHAT_IT_IS,
        "network": "EfficientNet-Lite0 with ImageNet's classes",
        "concepts": settings.concepts,
        "look": settings.look,
        "at_least": settings.at_least,
    }


@critic("concept", told=_told_the_classifier)
def concept(case: Case, settings: ConceptCritic) -> str:
    """Reject a region in which a classifier sees one of the named things."""
    evidence = concept_evidence(case.picture, case.segments, tuple(settings.concepts), settings.weights, settings.look)
    lines = [f"An ImageNet classifier looked for: {' or '.join(settings.concepts)}."]
    verdicts = {}
    for region, nats in evidence.items():
        verdicts[region] = "no" if nats >= settings.at_least else "yes"
        colour, it = COLOUR_NAMES[region], "it shows it, and is not relevant"
        told = f"The {colour} region by itself has log-odds of {nats:.2f}"
        if settings.look == "without":
            told = f"Without the {colour} region the log-odds of the picture fall by {nats:.2f}"
        lines.append(f"{told}: {it if verdicts[region] == 'no' else 'it does not show it'}.")
    return with_verdicts(lines, verdicts)
