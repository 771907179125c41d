"""Cross-entropy training, and the order in which samples are drawn."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lvlmva_core.adam import Adam
from lvlmva_core.compute import own_draws
from lvlmva_core.convolutions import safe_weight_gradients
from lvlmva_core.data_parallel import (
    check_batch,
    check_plain,
    mean,
    number,
    predict_together,
    processes,
    share,
    whole_batch,
    with_mean_gradients,
)
from lvlmva_core.errors import InputError
from lvlmva_core.models import predict_logits
from lvlmva_core.progress import track
from lvlmva_core.samples import Split


class Checkpointing(Protocol):
    """Where a training keeps its state, and finds it again (`lvlmva_core.resume.Checkpoint`)."""

    def load(self) -> dict[str, Any] | None:
        """The state that was kept last, or None."""

    def save(self, state: dict[str, Any], *, always: bool = False) -> None:
        """Keep a state, unless the last one is too recent to bother."""


# logits (B, K), labels (B,), rows (B,), places in the training split -> the loss of a batch
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stopping:
    """score: of the model in eval mode, higher is better. patience: epochs without a better one that end a training."""

    score: Callable[[nn.Module], float]
    patience: int


def epoch_batches(n_samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One pass over the samples in random order: row numbers (int64); the last batch may be shorter."""
    yield from torch.split(torch.randperm(n_samples, generator=generator), batch_size)


def endless_batches(n_samples: int, batch_size: int, generator: torch.Generator, skip: int = 0) -> Iterator[Tensor]:
    """An endless stream of full batches of row numbers, reshuffled at each pass (LVLM-VA §4.4).

    Passes run on into one another, so that every sample is drawn equally often whatever the length of an epoch. The
    first `skip` batches are drawn but not yielded.
    """
    passes, rows = divmod(skip * batch_size, n_samples)
    for _ in range(passes):
        torch.randperm(n_samples, generator=generator)
    pool = torch.randperm(n_samples, generator=generator)[rows:]
    while True:
        while len(pool) < batch_size:
            pool = torch.cat([pool, torch.randperm(n_samples, generator=generator)])
        yield pool[:batch_size]
        pool = pool[batch_size:]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, C, H, W) whose highest logit is that of their label (N,)."""
    predictions = predict_together(model, images).argmax(1)
    return float((predictions == labels.to(predictions.device)).double().mean())


def curve_row(model: nn.Module, training: Split, validation: Split) -> dict[str, float]:
    """The training curve's row of a model that was trained elsewhere: epoch 0, loss over the training split.

    Args:
        training, validation: on the model's device.
    """
    logits = predict_logits(model, training.images)
    return {
        "epoch": 0,
        "loss": float(cross_entropy(logits.double(), training.labels)),
        "train_accuracy": float((logits.argmax(1) == training.labels).double().mean()),
        "val_accuracy": accuracy(model, validation.images, validation.labels),
    }


def train_classifier(
    model: nn.Module,
    training: Split,
    validation: Split,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    batch_size: int,
    epochs: int,
    seed: int,
    rows: Tensor | None = None,
    epoch_rows: Callable[[int], Tensor] | None = None,
    objective: Objective | None = None,
    stopping: Stopping | None = None,
    checkpoint: Checkpointing | None = None,
) -> pd.DataFrame:
    """Train `model` in place with cross-entropy and Adam (decoupled weight decay); the model is left in eval mode.

    Several processes that call this alike (`lvlmva_core.data_parallel`) take a share of every batch each, and end with
    the same model.

    Args:
        training, validation: on the model's device.
        rows: int64, on the CPU, what an epoch passes over; a row may stand there several times. None = each row once.
        epoch_rows: number of an epoch (from 1) -> as many rows as `rows` has, in its place. objective: of a batch, in
            the place of the mean cross-entropy.
        stopping: ends the training, and leaves the model as it was in the epoch of the best score, the first of equals.
        checkpoint: of the same training; where it holds a state, the training goes on from there to the same bits.

    Returns:
        The training curve, one row an epoch: epoch (from 1), loss (mean over samples), train_accuracy (of
        the samples that `rows` names), val_accuracy, and with `stopping` score.

    Raises:
        InputError: the loss stops being finite; a batch, or what is left for the last one, is smaller than the number
            of processes; the model is wrapped in DDP or FSDP.
        ValueError: `stopping` together with `checkpoint`, which keeps no best epoch; `objective` or `stopping`, which
            see whole batches, in several processes.
    """
    if stopping and checkpoint:
        raise ValueError("a training that may stop early keeps no checkpoints")
    if (objective or stopping) and processes() > 1:
        raise ValueError("a training with an objective or a stopping rule of its own runs in one process")
    check_plain(model)
    images, labels = training.images, training.labels
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(images)) if rows is None else rows
    seen = rows.unique()
    seen_images, seen_labels = (images, labels) if len(seen) == len(images) else (images[seen], labels[seen])
    check_batch("batch_size", min(batch_size, len(rows) % batch_size or batch_size))
    model.to(memory_format=torch.channels_last)  # convolutions are faster so
    forward = with_mean_gradients(model, images[:2])
    optimizer = Adam(model.parameters(), learning_rate, weight_decay=weight_decay, decoupled=True)
    curve: list[dict[str, float]] = []
    saved = checkpoint.load() if checkpoint else None
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        curve = saved["curve"]
        for _ in curve:  # the passes that were made
            torch.randperm(len(rows), generator=generator)
    best, best_epoch, best_weights = -math.inf, 0, {}
    for epoch in track(range(len(curve) + 1, epochs + 1), "train"):
        drawn = epoch_rows(epoch) if epoch_rows else rows
        model.train()
        summed = torch.zeros((), dtype=torch.float64, device=images.device)
        with own_draws(images.device, seed, epoch, number()), whole_batch(), safe_weight_gradients(model):
            for places in epoch_batches(len(rows), batch_size, generator):
                whole = drawn[places]
                batch = share(whole)
                logits = forward(images[batch])
                loss = objective(logits, labels[batch], batch) if objective else cross_entropy(logits, labels[batch])
                loss = loss * (len(batch) * processes() / len(whole))  # so that the mean over processes is the batch's
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                summed += loss.detach().double() * len(whole)
        total = float(mean(summed))
        if not total < float("inf"):
            raise InputError(f"the training loss is not finite in epoch {epoch}; lower train.learning_rate")
        model.eval()
        curve.append(
            {
                "epoch": epoch,
                "loss": total / len(rows),
                "train_accuracy": accuracy(model, seen_images, seen_labels),
                "val_accuracy": accuracy(model, validation.images, validation.labels),
            }
        )
        if checkpoint:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
            checkpoint.save(state, always=epoch == epochs)
        if stopping:
            curve[-1]["score"] = score = stopping.score(model)
            if score > best:
                best, best_epoch = score, epoch
                best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            elif epoch - best_epoch >= stopping.patience:
                break
    if stopping:
        model.load_state_dict(best_weights)
    model.to(memory_format=torch.contiguous_format).eval()
    return pd.DataFrame(curve)
