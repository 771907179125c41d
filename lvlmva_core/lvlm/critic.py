"""What the Critic is asked: three pictures of a sample and a prompt that leads through six steps (LVLM-VA §4.2)."""

from typing import Literal

import numpy as np

from lvlmva_core.lvlm.calls import Call, Message, Picture
from lvlmva_core.lvlm.client import sampling_parameters
from lvlmva_core.lvlm.prompts import Prompts
from lvlmva_core.lvlm.settings import Endpoint
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
    overlay: Literal["grey", "colour"] = "grey",
) -> Call:
    """The call for one sample. Neither its id nor a file name is in it.

    Args:
        picture: uint8 (C, H, W). segments: uint8 (H, W); 255 = none; at least one region.
        class_name: of the sample's true class, a key of the specification.
        name_spurious_feature: whether the prompt says what the known spurious features are.
        overlay: how the third picture is drawn (`lvlmva_core.render.render_overlay`).

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
    messages = (Message("user", tuple(parts)),)
    return Call(endpoint.model, endpoint.revision, messages, sampling_parameters(endpoint), index=0)


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
