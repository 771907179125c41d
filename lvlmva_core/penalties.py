"""Penalties on input gradients inside masks, by name: the paper's (LVLM-VA §4.4; Ross et al. 2017), and an extension.

A penalty is a function with a decorator. This module is read with params.yaml, by stages that do without torch, and
imports it inside functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class ClosedForm:
    """The derivatives that let ReLU MLPs train several at a time (`lvlmva_core.alignment.stacked_mlp`).

    For a penalty that is the squared input gradient of a score of the logits, inside the masks.

    slope: (p (..., K) the softmax, labels (...)) -> d score / d logits, (..., K).
    curvature: (p, v (..., K)) -> the derivative of sum(slope · v) in the logits, (..., K), v held fixed; None where the
        score is linear in the logits.
    """

    slope: "Callable[[Tensor, Tensor], Tensor]"
    curvature: "Callable[[Tensor, Tensor], Tensor] | None" = None


@dataclass(frozen=True)
class Penalty:
    """A way to punish what a model does inside masks.

    measure: (model, images (B, C, H, W) in [0, 1], masks bool or floating in [0, 1] (B, H, W), labels int64 (B,)) ->
        (B,), differentiable in the model's parameters.
    closed_form: its derivatives for ReLU MLPs; without, they train by double backward as other models do.
    """

    measure: "Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]"
    closed_form: ClosedForm | None = None


PENALTIES: dict[str, Penalty] = {}


def penalty(name: str, closed_form: ClosedForm | None = None) -> Callable[[Any], Any]:
    """Enter a function as the penalty of that name: `Penalty.measure`. Raises ValueError where the name is taken."""

    def enter(measure: Any) -> Any:
        if name in PENALTIES:
            raise ValueError(f"penalty '{name}' is there already; take another name")
        PENALTIES[name] = Penalty(measure, closed_form)
        return measure

    return enter


def penalty_of(name: str) -> Penalty:
    """The penalty of that name. Raises ValueError where there is none."""
    if name not in PENALTIES:
        raise ValueError(f"no penalty '{name}'; expected one of {', '.join(PENALTIES)}")
    return PENALTIES[name]


def squared_gradient(
    model: "nn.Module", images: "Tensor", masks: "Tensor", score: "Callable[[Tensor], Tensor]"
) -> "Tensor":
    """Squared input gradient, inside the masks, of a score that is made of the logits.

    The model runs in eval mode, since BatchNorm in train mode would couple the samples; every module's mode is
    restored, also after an exception.

    Args:
        model: maps images to logits (B, K). images: (B, C, H, W) in [0, 1]; λ belongs to this scale.
        masks: bool (B, H, W), True where the gradient is to vanish, for all channels; or floating in [0, 1], by how
            much of it is to (an extension: a weight w counts as w² in the penalty).
        score: logits (B, K) -> their sum over the samples, a scalar in which a sample's part depends on its logits.

    Returns:
        (B,): sum over channels and pixels of (A * d score / dx)^2, differentiable in the model's parameters.

    Raises:
        ValueError: shapes or types differ from the above.
    """
    import torch

    from lvlmva_core.compute import attention_as_its_parts, eval_mode
    from lvlmva_core.convolutions import InputGradientsOnly

    expected = (images.shape[0], *images.shape[2:])
    if not (masks.dtype == torch.bool or masks.is_floating_point()) or masks.shape != expected:
        raise ValueError(f"masks must be bool or floating {expected}, not {masks.dtype} {tuple(masks.shape)}")
    with eval_mode(model), attention_as_its_parts(), InputGradientsOnly():
        pixels = images.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(model(pixels)), pixels, create_graph=True)
    return (gradient * masks[:, None]).square().flatten(1).sum(1)


def rrr_penalty(model: "nn.Module", images: "Tensor", masks: "Tensor") -> "Tensor":
    """Squared input gradient of the summed log-probabilities, inside the masks (LVLM-VA §4.4, the λ term).

    Args:
        model: maps images to logits (B, K).
        images: (B, C, H, W) in [0, 1]; λ belongs to this scale.
        masks: bool (B, H, W), True where the gradient is to vanish, for all channels; or weights (`squared_gradient`).

    Returns:
        (B,): sum over channels and pixels of (A * d/dx sum_k log p_k)^2, differentiable in the model's parameters.

    Raises:
        ValueError: shapes or types differ from the above.

    Examples:
        A model that is sure of class 0, whose logit is 2 x_0 + 3 x_1: log p_0 is flat there and log p_1 falls by 2 and
        3. Only what is masked counts.

        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        >>> model[1].weight = nn.Parameter(torch.tensor([[2.0, 3.0], [0.0, 0.0]]))
        >>> image = torch.tensor([[[[40.0, 40.0]]]])
        >>> rrr_penalty(model, image, torch.tensor([[[True, False]]])).item()
        4.0
        >>> rrr_penalty(model, image, torch.tensor([[[True, True]]])).item()
        13.0
    """
    return squared_gradient(model, images, masks, lambda logits: logits.log_softmax(dim=1).sum())


def _slope_of_log_probabilities(p: "Tensor", labels: "Tensor") -> "Tensor":
    return 1 - p.shape[-1] * p


def _curvature_of_log_probabilities(p: "Tensor", v: "Tensor") -> "Tensor":
    return -p.shape[-1] * (p * (v - (p * v).sum(-1, keepdim=True)))


def contrast_weights(labels: "Tensor", n_classes: int, dtype: "torch.dtype") -> "Tensor":
    """What the logits are weighted by in the contrast of a class with the mean of the others: (...) -> (..., K)."""
    from torch.nn import functional

    own = functional.one_hot(labels, n_classes).to(dtype)
    return own - (1 - own) / (n_classes - 1)


@penalty("log_probabilities", ClosedForm(_slope_of_log_probabilities, _curvature_of_log_probabilities))
def _log_probabilities(model: "nn.Module", images: "Tensor", masks: "Tensor", labels: "Tensor") -> "Tensor":
    return rrr_penalty(model, images, masks)


@penalty("contrast", ClosedForm(lambda p, labels: contrast_weights(labels, p.shape[-1], p.dtype)))
def contrast_penalty(model: "nn.Module", images: "Tensor", masks: "Tensor", labels: "Tensor") -> "Tensor":
    """Squared input gradient of the contrast between the sample's class and the others, inside the masks.

    The contrast is z_y less the mean of the other logits; with two classes the penalty is that of GradMask (Simpson et
    al. 2019, |z_0 - z_1|). Unlike `rrr_penalty` it does not vanish where all classes are equally probable, so that it
    cannot be met by being unsure. An extension.

    Args:
        labels: int64 (B,), the samples' classes; the rest, returns and raises are as in `rrr_penalty`.
    """
    return squared_gradient(
        model, images, masks, lambda logits: (logits * contrast_weights(labels, logits.shape[1], images.dtype)).sum()
    )
