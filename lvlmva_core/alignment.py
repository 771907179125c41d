"""RRR fine-tuning: cross-entropy plus a penalty on input gradients inside masks (LVLM-VA §4.4; Ross et al. 2017)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.errors import InputError
from lvlmva_core.progress import track
from lvlmva_core.training import accuracy, endless_batches


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
    """
    if masks.dtype != torch.bool or masks.shape != (images.shape[0], *images.shape[2:]):
        expected = (images.shape[0], *images.shape[2:])
        raise ValueError(f"masks must be bool {expected}, not {masks.dtype} {tuple(masks.shape)}")
    with _in_eval_mode(model):
        pixels = images.detach().requires_grad_(True)
        log_p = functional.log_softmax(model(pixels), dim=1)
        (gradient,) = torch.autograd.grad(log_p.sum(), pixels, create_graph=True)
    return (gradient * masks[:, None]).square().flatten(1).sum(1)


def align_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    alignment_images: Tensor,
    alignment_labels: Tensor,
    masks: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
    *,
    rrr_lambda: float,
    gamma: float,
    learning_rate: float,
    epochs: int,
    alignment_batch: int,
    training_batch: int,
    seed: int,
) -> pd.DataFrame:
    """Fine-tune `model` in place with the RRR loss and Adam; the model is left in eval mode (LVLM-VA §4.4).

    A batch mixes `alignment_batch` masked samples with `training_batch` training samples (whose masks are empty); both
    come from endless streams that run on across epochs, and an epoch is ceil(N_train / training_batch) steps. Both sums
    of the loss are divided by the size of the whole batch. The penalty's forward runs in eval mode, the
    cross-entropy's in train mode, so that only the latter moves running statistics.

    Args:
        images: float32 (N, C, H, W) in [0, 1] on the model's device, labels: int64 (N,): all training samples.
        alignment_images: (n, C, H, W), alignment_labels: (n,), masks: bool (n, H, W): the alignment set.

    Returns:
        The curve, one row an epoch: epoch (from 1), cross_entropy and penalty (means over the epoch's steps of both
        sums of the loss before λ), val_accuracy.

    Raises:
        InputError: the loss stops being finite.
    """
    draw_training = endless_batches(len(images), training_batch, torch.Generator().manual_seed(2 * seed))
    draw_alignment = endless_batches(len(masks), alignment_batch, torch.Generator().manual_seed(2 * seed + 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    steps = math.ceil(len(images) / training_batch)
    size = alignment_batch + training_batch
    curve = []
    for epoch in track(range(1, epochs + 1), f"align, seed {seed}"):
        totals = torch.zeros(2, dtype=torch.float64)
        for _ in range(steps):
            rows, chosen = next(draw_training), next(draw_alignment)
            masked_images = alignment_images[chosen]
            model.train()
            logits = model(torch.cat([masked_images, images[rows]]))
            targets = torch.cat([alignment_labels[chosen], labels[rows]])
            cross_entropy = functional.cross_entropy(logits, targets, reduction="sum") / size
            loss = cross_entropy
            penalty = torch.zeros(())
            if rrr_lambda:
                penalty = rrr_penalty(model, masked_images, masks[chosen]).sum() / size
                loss = loss + rrr_lambda * penalty
            if gamma:
                squares = [parameter.square().sum() for parameter in model.parameters()]
                loss = loss + gamma * torch.stack(squares).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals += torch.stack([cross_entropy.detach(), penalty.detach()]).double().cpu()
        if not bool(torch.isfinite(totals).all()):
            raise InputError(
                f"the loss is not finite in epoch {epoch} at λ = {rrr_lambda}; lower λ or the learning rate"
            )
        model.eval()
        curve.append(
            {
                "epoch": epoch,
                "cross_entropy": float(totals[0]) / steps,
                "penalty": float(totals[1]) / steps,
                "val_accuracy": accuracy(model, val_images, val_labels),
            }
        )
    model.eval()
    return pd.DataFrame(curve)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
