"""What the Critic is asked: three pictures of a sample and a prompt that leads through six steps (LVLM-VA §4.2)."""

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
) -> Call:
    """The call for one sample. Neither its id nor a file name is in it.

    Args:
        picture: uint8 (C, H, W). segments: uint8 (H, W); 255 = none; at least one region.
        class_name: of the sample's true class, a key of the specification.
        name_spurious_feature: whether the prompt says what the known spurious features are.

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
    return Call(endpoint.model, endpoint.revision, messages, sampling_parameters(endpoint), index=0)
