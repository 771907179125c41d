"""What the Critic is asked: three pictures of a sample and a prompt that leads through six steps (LVLM-VA §4.2)."""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from lvlmva_core.lvlm.calls import Call, Message, Picture, Record, answer_text
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.client import (
    CallFailedError,
    NotInStoreError,
    UnusableAnswerError,
    model_name,
    sampling_parameters,
    transport_parameters,
)
from lvlmva_core.lvlm.offline import CRITICS
from lvlmva_core.lvlm.prompts import Prompts
from lvlmva_core.lvlm.records import NO_CRITIQUE, CritiqueRow, Region
from lvlmva_core.lvlm.settings import Endpoint, ModelCritic, StandInCritic
from lvlmva_core.regions import regions_present
from lvlmva_core.render import COLOUR_NAMES, render_image, render_overlay, render_segmentation


def critic_call(
    endpoint: Endpoint,
    prompts: Prompts,
    class_name: str,
    picture: np.ndarray,
    segments: np.ndarray,
    *,
    name_spurious_feature: bool,
    index: int = 0,
) -> Call:
    """The call for one sample. Neither its id nor a file name is in it.

    Args:
        picture: uint8 (C, H, W). segments: uint8 (H, W); 255 = none; at least one region.
        class_name: of the sample's true class, a key of the specification.
        name_spurious_feature: whether the prompt says what the known spurious features are.
        index: 0 for the first answer, then 1, 2, ... for those beyond an unusable one.

    Raises:
        InputError: the template cannot be filled.
    """
    assert prompts.specification is not None
    names = [COLOUR_NAMES[region] for region in regions_present(segments)]
    text = prompts.render(
        picture=prompts.specification.picture,
        class_name=class_name,
        description=prompts.specification.classes[class_name],
        regions=names,
        spurious_features=list(prompts.specification.spurious_features) if name_spurious_feature else [],
    )
    shown = (render_image(picture), render_segmentation(segments), render_overlay(picture, segments))
    parts: list[str | Picture] = [text]
    for title, pixels in zip(
        ("Picture 1, the image:", "Picture 2, the regions:", "Picture 3, both:"), shown, strict=True
    ):
        parts += [title, Picture(pixels, endpoint.image_detail)]
    messages = (Message("user", tuple(parts)),)
    return Call(
        endpoint.model,
        endpoint.revision,
        messages,
        sampling_parameters(endpoint),
        index,
        transport_parameters(endpoint),
    )


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


def criticise(config: StandInCritic, cases: Sequence[Case]) -> list[CritiqueRow]:
    """Rows of a stand-in's critiques."""
    stand_in = CRITICS[config.critic]
    rows = []
    for case in cases:
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
