"""Plain explanation maps to compare with: gradients and integrated gradients, and the explanations that they make."""

import torch
from torch import Tensor, nn

from lvlmva_core.attribution.deep_lift import Explanation, check_arguments
from lvlmva_core.compute import eval_mode
from lvlmva_core.errors import InputError


def gradient(model: nn.Module, inputs: Tensor, targets: int | Tensor) -> Tensor:
    """Gradient of the target logit with respect to each input, (B, C, H, W), in eval mode (Simonyan et al. 2014)."""
    return _gradient(model, inputs, check_arguments(model, inputs, inputs[:1], targets))[0]


def integrated_gradients(
    model: nn.Module, inputs: Tensor, baselines: Tensor, targets: int | Tensor, *, steps: int, batch_size: int
) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017), the mean over baselines, by captum with Gauss-Legendre steps.

    Args: as `deep_lift_shap`; batch_size counts the images of one forward and backward pass.

    Returns:
        (B, C, H, W); adds up to the difference of outputs but for the error of `steps` points of integration.

    Raises:
        InputError: captum is not installed, or as `deep_lift_shap`.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise InputError("integrated_gradients needs captum: pip install 'lvlmva[captum]'") from error
    wanted = check_arguments(model, inputs, baselines, targets)
    with eval_mode(model):
        captum = IntegratedGradients(model, multiply_by_inputs=True)
        total = torch.zeros_like(inputs)
        for baseline in baselines:
            total += captum.attribute(
                inputs,
                baseline[None],
                target=wanted,
                n_steps=steps,
                method="gausslegendre",
                internal_batch_size=max(batch_size, len(inputs)),
            ).to(inputs.dtype)
    return total.detach() / len(baselines)


def _gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    with eval_mode(model), torch.enable_grad():
        at = inputs.detach().clone().requires_grad_()
        output = model(at).gather(1, targets[:, None])[:, 0]
        (slope,) = torch.autograd.grad(output.sum(), at)
    return slope, output.detach()


def _expected(model: nn.Module, baselines: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    with eval_mode(model), torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(baselines, batch_size)])
    return logits.mean(0)[targets]


def explain_by_gradient(
    model: nn.Module, inputs: Tensor, baselines: Tensor, targets: Tensor, batch_size: int
) -> Explanation:
    """`gradient` of one sample after the other: a map has the same bits whatever is explained beside it."""
    parts = [_gradient(model, inputs[n : n + 1], targets[n : n + 1]) for n in range(len(inputs))]
    maps, outputs = torch.cat([slope for slope, _ in parts]), torch.cat([output for _, output in parts])
    return Explanation(maps, outputs, _expected(model, baselines, targets, batch_size))


def explain_by_integrated_gradients(
    model: nn.Module, inputs: Tensor, baselines: Tensor, targets: Tensor, batch_size: int, steps: int
) -> Explanation:
    """`integrated_gradients` of one sample after the other."""
    maps = [
        integrated_gradients(
            model, inputs[n : n + 1], baselines, targets[n : n + 1], steps=steps, batch_size=batch_size
        )
        for n in range(len(inputs))
    ]
    outputs = torch.cat([_gradient(model, inputs[n : n + 1], targets[n : n + 1])[1] for n in range(len(inputs))])
    return Explanation(torch.cat(maps), outputs, _expected(model, baselines, targets, batch_size))
