"""What the Critic is asked: three pictures of a sample and a prompt that leads through six steps (LVLM-VA §4.2)."""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from lvlmva_core.lvlm import detectors  # noqa: F401 - enters its critics
from lvlmva_core.lvlm.calls import Call, Message, Picture, Record, answer_text
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.client import (
    CallFailedError,
    NotInStoreError,
    UnusableAnswerError,
    call_of,
    model_name,
)
from lvlmva_core.lvlm.offline import CRITICS
from lvlmva_core.lvlm.prompts import Prompts
from lvlmva_core.lvlm.records import NO_CRITIQUE, CritiqueRow, Region
from lvlmva_core.lvlm.settings import DetectorCritic, Endpoint, ModelCritic, StandInCritic
from lvlmva_core.regions import Overlay, regions_present
from lvlmva_core.render import COLOUR_NAMES, render_image, render_overlay, render_segmentation


def critic_call(
    endpoint: Endpoint,
    prompts: Prompts,
    class_name: str,
    picture: np.ndarray,
    segments: np.ndarray,
    *,
    name_spurious_feature: bool,
    overlay: Overlay = "grey",
    index: int = 0,
) -> Call:
    """The call for one sample. Neither its id nor a file name is in it.

    Args:
        picture: uint8 (C, H, W). segments: uint8 (H, W); 255 = none; at least one region.
        class_name: of the sample's true class, a key of the specification.
        name_spurious_feature: whether the prompt says what the known spurious features are.
        overlay: how the third picture is drawn (`lvlmva_core.render.render_overlay`).
        index: 0 for the first answer, then 1, 2, ... for those beyond an unusable one.

    Raises:
        InputError: the template cannot be filled.
    """
    names = [COLOUR_NAMES[region] for region in regions_present(segments)]
    text = critic_text(prompts, class_name, names, name_spurious_feature=name_spurious_feature)
    laid_over = render_overlay(picture, segments, style=overlay)
    shown = (render_image(picture), render_segmentation(segments), laid_over)
    parts: list[str | Picture] = [text]
    for title, pixels in zip(
        ("Picture 1, the image:", "Picture 2, the regions:", "Picture 3, both:"), shown, strict=True
    ):
        parts += [title, Picture(pixels, endpoint.image_detail)]
    return call_of(endpoint, [Message("user", tuple(parts))], index)


def critic_text(prompts: Prompts, class_name: str, colours: list[str], *, name_spurious_feature: bool) -> str:
    """The words of a call.

    Names and descriptions stand in double quotes or on a line of their own; what they hold cannot end either.

    Args:
        class_name: a key of the specification. colours: of the regions that are shown.

    Raises:
        InputError: the template cannot be filled.
    """
    specification = prompts.specification
    assert specification is not None
    features = specification.spurious_features if name_spurious_feature else []
    return prompts.render(
        picture=_on_one_line(specification.picture),
        class_name=_on_one_line(_quotable(class_name)),
        description=_quotable(specification.classes[class_name]),
        regions=colours,
        spurious_features=[_on_one_line(feature) for feature in features],
    )


def _quotable(text: str) -> str:
    return text.translate(dict.fromkeys(map(ord, '"\u201c\u201d\u201e\u201f\u2033\uff02'), "'"))


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def why_no_critique(text: str, colours: Sequence[str]) -> str | None:
    """Why a text is no critique of regions named by these colours, or None: a Judge would make verdicts up."""
    if any(re.search(rf"\b{re.escape(colour)}\b", text, re.IGNORECASE) for colour in colours):
        return None
    return "it names no region"


async def ask_critic(
    ask: Callable[[int], Awaitable[Record]], *, max_attempts: int, beyond: Callable[[str], None]
) -> Record:
    """Ask until an answer is usable: one more in each run beyond those in the store, at most `max_attempts` in all.

    Args:
        ask: for the answer of an index. beyond: told the key of an answer beyond unusable ones.

    Raises:
        CallFailedError: there is none. NotInStoreError: in replay, where the store knows nothing at all.
    """
    reason: str | None = None
    for index in range(max_attempts):
        try:
            record = await ask(index)
        except UnusableAnswerError as error:
            if error.bought:
                raise CallFailedError(str(error)) from None
            reason = str(error)
            continue
        except NotInStoreError:
            if reason is None:
                raise
            raise CallFailedError(reason) from None
        if reason is not None:
            beyond(record["key"])
        return record
    raise CallFailedError(f"{reason}; none of {max_attempts} answers is usable (critique.max_attempts)")


def criticise(config: StandInCritic | DetectorCritic, cases: Sequence[Case]) -> list[CritiqueRow]:
    """Rows of the critiques of a stand-in or a detector."""
    stand_in = CRITICS[config.critic]
    rows = []
    for case in stand_in.seen_together(cases, config):
        prose = stand_in.criticise(case, config) if case.regions() else None
        rows.append(critique_row(case, config.critic, stand_in.told(case, config) if prose else {}, critique=prose))
    return rows


def critique_row(
    case: Case,
    critic: str,
    settings: dict[str, Any],
    *,
    critique: str | None = None,
    record: Record | None = None,
    failure: str | None = None,
) -> CritiqueRow:
    """A row; a case without regions says so."""
    regions = case.regions()
    if not regions:
        failure = f"no region to judge (segmentation: {case.status})"
    return CritiqueRow(
        sample=case.sample,
        segmentation=case.segmentation(),
        regions=[Region(region=region, color=colour) for region, colour in regions.items()],
        class_name=case.class_name,
        critic=critic,
        settings=settings,
        critique=critique,
        failure=failure,
        record=record,
    )


def row_of_answer(case: Case, config: ModelCritic, settings: dict[str, Any], result: Record | str) -> CritiqueRow:
    """A row of what a model answered, or of why there is no answer (a str)."""
    name = model_name(config.endpoint)
    if isinstance(result, str):
        return critique_row(case, name, settings, failure=NO_CRITIQUE + result)
    return critique_row(case, name, settings, critique=answer_text(result), record=result)
