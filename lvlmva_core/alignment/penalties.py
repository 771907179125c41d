"""Penalties on input gradients inside masks: the paper's (LVLM-VA §4.4; Ross et al. 2017), and by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.alignment.stacked_mlp import contrast_weights
from lvlmva_core.compute import eval_mode


def rrr_penalty(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """Squared input gradient of the summed log-probabilities, inside the masks (LVLM-VA §4.4, the λ term).

    The model runs in eval mode, since BatchNorm in train mode would couple the samples; every module's mode is
    restored, also after an exception.

    Args:
        model: maps images to logits (B, K).
        images: (B, C, H, W) in [0, 1]; λ belongs to this scale.
        masks: bool (B, H, W), True where the gradient is to vanish, for all channels.

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
    return _squared_gradient(model, images, masks, lambda logits: functional.log_softmax(logits, dim=1).sum())


def contrast_penalty(model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    """Squared input gradient of the contrast between the sample's class and the others, inside the masks.

    The contrast is z_y less the mean of the other logits; with two classes the penalty is that of GradMask (Simpson et
    al. 2019, |z_0 - z_1|). Unlike `rrr_penalty` it does not vanish where all classes are equally probable, so that it
    cannot be met by being unsure.

    Args:
        labels: int64 (B,), the samples' classes; the rest, returns and raises are as in `rrr_penalty`.
    """
    return _squared_gradient(
        model, images, masks, lambda logits: (logits * contrast_weights(labels, logits.shape[1], images.dtype)).sum()
    )


def _squared_gradient(model: nn.Module, images: Tensor, masks: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Inside the masks, of the score (a sum over the samples) that is made of the logits; (B,)."""
    if masks.dtype != torch.bool or masks.shape != (images.shape[0], *images.shape[2:]):
        expected = (images.shape[0], *images.shape[2:])
        raise ValueError(f"masks must be bool {expected}, not {masks.dtype} {tuple(masks.shape)}")
    with eval_mode(model):
        pixels = images.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(model(pixels)), pixels, create_graph=True)
    return (gradient * masks[:, None]).square().flatten(1).sum(1)


# name -> (model, images, masks, labels) -> (B,), differentiable in the model's parameters
PENALTIES: Mapping[str, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "log_probabilities": lambda model, images, masks, _: rrr_penalty(model, images, masks),
        "contrast": contrast_penalty,
    }
)
