"""JTT: train briefly, up-weight the training errors, train anew (Liu et al. 2021; LVLM-VA §5)."""

import torch
from torch import Tensor, nn

from lvlmva_core.models import predict_logits


def error_rows(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Rows (int64, rising, on the CPU) that the model gets wrong in eval mode; its mode is restored.

    Eval mode is what the method means: with BatchNorm in train mode the errors would depend on the batches.

    Args:
        images: float32 (N, C, H, W) in [0, 1]. labels: int64 (N,).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        wrong = predict_logits(model, images).argmax(1) != labels
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.nonzero(wrong).flatten().cpu()


def upweighted_rows(n_samples: int, errors: Tensor, up: int) -> Tensor:
    """All rows 0..n-1 once and those in `errors` `up` times, int64: what an epoch of the second training holds."""
    return torch.cat([torch.arange(n_samples), errors.repeat(up - 1)])
