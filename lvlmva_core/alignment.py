"""RRR fine-tuning: cross-entropy plus a penalty on input gradients inside masks (LVLM-VA §4.4; Ross et al. 2017)."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.errors import InputError
from lvlmva_core.models import predict_logits
from lvlmva_core.progress import track
from lvlmva_core.resume import Checkpoint, Resume
from lvlmva_core.selection import Selection
from lvlmva_core.stacked_mlp import StackedMlp, contrast_weights, linear_layers
from lvlmva_core.training import endless_batches, own_draws

# Weights of the MLPs that are trained at a time. On a CPU a larger stack no longer stays in its caches between steps.
CPU_STACK_BYTES = 8 << 20
GPU_STACK_BYTES = 1 << 30


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
    with _in_eval_mode(model):
        pixels = images.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(model(pixels)), pixels, create_graph=True)
    return (gradient * masks[:, None]).square().flatten(1).sum(1)


@dataclass(frozen=True)
class AlignedRun:
    """One fine-tuned model.

    weights: state dict of the last epoch, or of the best one where training may stop early. epoch: which that is
    (from 1). curve: one row an epoch, as `align_ensemble` says. score: of these weights on the selection, or None.
    """

    rrr_lambda: float
    seed: int
    epoch: int
    score: float | None
    weights: dict[str, Tensor]
    curve: pd.DataFrame


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
    """Fine-tune `model` in place once; it is left in eval mode. Returns the curve. See `align_ensemble`."""
    (run,) = align_ensemble(
        model,
        images,
        labels,
        alignment_images,
        alignment_labels,
        masks,
        val_images,
        val_labels,
        runs=[(rrr_lambda, seed)],
        gamma=gamma,
        learning_rate=learning_rate,
        epochs=epochs,
        alignment_batch=alignment_batch,
        training_batch=training_batch,
    )
    model.load_state_dict(run.weights)
    model.eval()
    return run.curve


def align_ensemble(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    alignment_images: Tensor,
    alignment_labels: Tensor,
    masks: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
    *,
    runs: Sequence[tuple[float, int]],
    gamma: float,
    learning_rate: float,
    epochs: int,
    alignment_batch: int,
    training_batch: int,
    selection: Selection | None = None,
    patience: int | None = None,
    resume: Resume | None = None,
    precision: str = "float32",
    batch_norm: str = "train",
    max_gradient_norm: float | None = None,
    learning_rate_schedule: str = "constant",
    penalty: str = "log_probabilities",
) -> list[AlignedRun]:
    """Fine-tune copies of `model` with the RRR loss and Adam, one for each (λ, seed) of `runs` (LVLM-VA §4.4).

    A batch mixes `alignment_batch` masked samples with `training_batch` training samples (whose masks are empty); both
    come from endless streams that run on across epochs, and an epoch is ceil(N_train / training_batch) steps. Both sums
    of the loss are divided by the size of the whole batch. The penalty's forward runs in eval mode, the
    cross-entropy's in train mode, so that only the latter moves running statistics.

    The streams of a run depend on its seed alone. ReLU MLPs (`stacked_mlp.linear_layers`) are trained several at a time
    with the gradient in closed form, every other model one after the other by double backward: which of the two
    depends on the model only, and the numbers agree up to rounding.

    Args:
        images: float32 (N, C, H, W) in [0, 1] on the model's device, labels: int64 (N,): all training samples.
        alignment_images: (n, C, H, W), alignment_labels: (n,): the alignment set.
        masks: bool (n, H, W) for all runs, or (len(runs), n, H, W).
        runs: pairs of λ (for inputs in [0, 1]) and seed.
        selection: what the curve's `score` is measured on.
        patience: a run ends after so many epochs without a better score, and its best epoch's weights are kept; None
            trains for `epochs` and keeps the last ones.
        resume: where to keep checkpoints, and to go on from them.
        precision: "float32", or "bfloat16" for mixed precision (torch.autocast) in the steps of models that are no
            ReLU MLPs; weights, optimiser and validation stay as they are.
        batch_norm: "train", or "frozen": BatchNorm layers keep the base model's running statistics and use them in the
            cross-entropy's forward too. With "train" the penalty may be lowered by moving the weights away from the
            running statistics, which the cross-entropy does not see: the model in eval mode then is another one.
        max_gradient_norm: the gradient of the whole loss in all parameters of a run is scaled down to this norm where
            it is longer. A pretrained network may begin with penalties in the hundreds; unclipped, these set Adam's
            scale for the hundreds of steps that its second moment remembers, and the cross-entropy is drowned.
        learning_rate_schedule: "constant", or "linear": falls from `learning_rate` to 0, step by step.
        penalty: "log_probabilities" (`rrr_penalty`, the paper's), or "contrast" (`contrast_penalty`).

    Returns:
        In the order of `runs`. Curves hold epoch (from 1), cross_entropy and penalty (means over the epoch's steps of
        both sums of the loss before λ; penalty is 0 where λ is), val_accuracy, and score if there is a `selection`.

    Raises:
        InputError: the loss stops being finite, or "bfloat16" for a ReLU MLP.
        ValueError: `patience` without `selection`, or masks of another shape.
    """
    if patience is not None and selection is None:
        raise ValueError("patience needs a selection to score each epoch on")
    each = (len(masks), *images.shape[2:]) if masks.ndim == 3 else (len(runs), len(alignment_images), *images.shape[2:])
    if masks.dtype != torch.bool or tuple(masks.shape) != each:
        raise ValueError(f"masks must be bool {each}, not {masks.dtype} {tuple(masks.shape)}")
    layers = linear_layers(model)
    if layers is not None and precision != "float32":
        raise InputError(f"align.precision: a ReLU MLP is trained in float32 only, not {precision}; set it to float32")
    groups = _groups(len(runs), 1 if layers is None else _stack_size(layers, images.device))
    found = []
    for group in groups:
        data = _Data(
            images,
            labels,
            alignment_images,
            alignment_labels,
            masks if masks.ndim == 3 else masks[group.start : group.stop],
            alignment_batch + training_batch,
        )
        lambdas = [runs[n][0] for n in group]
        learner: _Learner
        if layers is None:
            learner = _Single(
                model, data, lambdas[0], gamma, learning_rate, max_gradient_norm, penalty, precision, batch_norm
            )
        else:
            learner = _Stack(layers, data, lambdas, gamma, learning_rate, max_gradient_norm, penalty)
        found += _train(
            learner,
            data,
            [runs[n] for n in group],
            val_images,
            val_labels,
            epochs=epochs,
            alignment_batch=alignment_batch,
            training_batch=training_batch,
            selection=selection,
            patience=patience,
            checkpoint=resume.part(f"runs {group.start} to {group.stop}") if resume else None,
            falling_from=learning_rate if learning_rate_schedule == "linear" else None,
        )
    return found


@dataclass(frozen=True)
class _Data:
    """What a group of runs learns from; `size` is the number of samples in a batch, I."""

    images: Tensor
    labels: Tensor
    alignment_images: Tensor
    alignment_labels: Tensor
    masks: Tensor
    size: int


class _Learner(Protocol):
    """R runs that take their steps together."""

    totals: Tensor  # float64 (R, 2): sums over steps of cross-entropy and penalty
    optimizer: torch.optim.Adam

    def step(self, rows: Tensor, chosen: Tensor) -> None:
        """One step of every run on training samples `rows` (R, b) and alignment samples `chosen` (R, a)."""

    def logits(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (R, N, K), in eval mode."""

    def weights(self, run: int) -> dict[str, Tensor]:
        """A copy of a run's state dict."""

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""


class _Single:
    """One run of any model, by double backward."""

    def __init__(
        self,
        model: nn.Module,
        data: _Data,
        rrr_lambda: float,
        gamma: float,
        learning_rate: float,
        max_gradient_norm: float | None,
        penalty: str,
        precision: str,
        batch_norm: str,
    ) -> None:
        self.max_gradient_norm = max_gradient_norm
        self.contrast = penalty == "contrast"
        self.frozen = batch_norm == "frozen"
        self.model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # convolutions are faster so
        self.data = data
        self.rrr_lambda = rrr_lambda
        self.gamma = gamma
        self.masks = data.masks if data.masks.ndim == 3 else data.masks[0]
        self.mixed = torch.autocast(data.images.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        self.optimizer = _adam(list(self.model.parameters()), learning_rate)
        self.totals = torch.zeros((1, 2), dtype=torch.float64, device=data.images.device)

    def step(self, rows: Tensor, chosen: Tensor) -> None:
        data = self.data
        masked_images = data.alignment_images[chosen[0]]
        targets = torch.cat([data.alignment_labels[chosen[0]], data.labels[rows[0]]])
        self.model.train()
        for module in self.model.modules() if self.frozen else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        with self.mixed:
            logits = self.model(torch.cat([masked_images, data.images[rows[0]]]))
            cross_entropy = functional.cross_entropy(logits, targets, reduction="sum") / data.size
            loss = cross_entropy
            penalty = torch.zeros_like(cross_entropy)
            if self.rrr_lambda:
                penalty = self._penalty(masked_images, chosen[0]).sum() / data.size
                loss = loss + self.rrr_lambda * penalty
        if self.gamma:
            squares = [parameter.square().sum() for parameter in self.model.parameters()]
            loss = loss + self.gamma * torch.stack(squares).sum()
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        self.optimizer.step()
        self.totals += torch.stack([cross_entropy.detach(), penalty.detach()]).double()

    def _penalty(self, images: Tensor, chosen: Tensor) -> Tensor:
        masks = self.masks[chosen]
        if self.contrast:
            return contrast_penalty(self.model, images, masks, self.data.alignment_labels[chosen])
        return rrr_penalty(self.model, images, masks)

    def logits(self, images: Tensor) -> Tensor:
        self.model.eval()
        return predict_logits(self.model, images)[None]

    def weights(self, run: int) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}

    def state(self) -> dict[str, Any]:
        return {"model": self.weights(0), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class _Stack:
    """Several runs of a ReLU MLP, with the gradient in closed form."""

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Linear]],
        data: _Data,
        lambdas: Sequence[float],
        gamma: float,
        learning_rate: float,
        max_gradient_norm: float | None,
        penalty: str,
    ) -> None:
        images = data.images
        self.contrast = penalty == "contrast"
        self.gamma = gamma
        self.max_gradient_norm = max_gradient_norm
        self.data = data
        self.stack = StackedMlp(layers, len(lambdas))
        self.rrr_lambda = torch.tensor(lambdas, dtype=images.dtype, device=images.device) if any(lambdas) else None
        channels = data.masks.unsqueeze(-3).expand(*data.masks.shape[:-2], *images.shape[1:])
        self.masks = channels.flatten(-3).to(images.dtype)
        self.pixels = torch.cat([data.alignment_images, images]).flatten(1)  # one gather a step
        self.run = torch.arange(len(lambdas), device=images.device)[:, None]
        # the gradient of γ Σ θ² is 2 γ θ, which is what Adam calls weight decay; `_clip` adds it itself
        decay = 2 * gamma if max_gradient_norm is None else 0.0
        self.optimizer = _adam(self.stack.parameters(), learning_rate, weight_decay=decay)
        self.totals = torch.zeros((len(lambdas), 2), dtype=torch.float64, device=images.device)

    def step(self, rows: Tensor, chosen: Tensor) -> None:
        data = self.data
        first = len(data.alignment_images)
        places = torch.cat([chosen, rows + first, chosen], dim=1)  # the last ones only make room, see `backward`
        batch = self.pixels.index_select(0, places.flatten()).view(*places.shape, -1)
        targets = torch.cat([data.alignment_labels[chosen], data.labels[rows]], dim=1)
        masks = self.masks[chosen] if self.masks.ndim == 2 else self.masks[self.run, chosen]
        losses = self.stack.backward(batch, targets, masks, self.rrr_lambda, contrast=self.contrast)
        if self.max_gradient_norm is not None:
            self._clip(self.max_gradient_norm)
        self.optimizer.step()
        self.totals += torch.stack(losses, dim=1).double()

    def _clip(self, longest: float) -> None:
        """What `clip_grad_norm_` does to one model, for each run."""
        parameters = self.stack.parameters()
        gradients = [
            parameter.grad.add_(parameter, alpha=2 * self.gamma)
            for parameter in parameters
            if parameter.grad is not None
        ]
        norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
        factors = (longest / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    def logits(self, images: Tensor) -> Tensor:
        return self.stack.logits(images)

    def weights(self, run: int) -> dict[str, Tensor]:
        return self.stack.state_dict(run)

    def state(self) -> dict[str, Any]:
        return {"stack": self.stack.parameters(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        for parameter, saved in zip(self.stack.parameters(), state["stack"], strict=True):
            parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])


class _Graphed:
    """On a CUDA device, replays `step` as one CUDA graph; elsewhere calls it.

    The first calls are ordinary steps on a side stream, as a capture asks for; the capture itself computes nothing, so
    that no step is lost or taken twice.
    """

    eager_steps = 3

    def __init__(self, step: Callable[[Tensor, Tensor], None], device: torch.device) -> None:
        self.step = step
        self.device = device
        self.calls = 0
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.graph: Any = None

    def __call__(self, rows: Tensor, chosen: Tensor) -> None:
        if self.device.type != "cuda":
            self.step(rows, chosen)
            return
        if self.inputs is None:
            self.inputs = rows.clone(), chosen.clone()
        self.inputs[0].copy_(rows)
        self.inputs[1].copy_(chosen)
        self.calls += 1
        if self.calls <= self.eager_steps:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self.step(*self.inputs)
            torch.cuda.current_stream(self.device).wait_stream(side)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step(*self.inputs)
        self.graph.replay()


def _train(
    learner: _Learner,
    data: _Data,
    runs: Sequence[tuple[float, int]],
    val_images: Tensor,
    val_labels: Tensor,
    *,
    epochs: int,
    alignment_batch: int,
    training_batch: int,
    selection: Selection | None,
    patience: int | None,
    checkpoint: Checkpoint | None,
    falling_from: float | None,
) -> list[AlignedRun]:
    """Train a group of runs from its checkpoint, or from the start, to its end."""
    steps = math.ceil(len(data.images) / training_batch)
    device = data.images.device
    done = 0
    curves: list[list[dict[str, float]]] = [[] for _ in runs]
    best: list[dict[str, Any]] = [{"epoch": 0, "score": -math.inf, "weights": {}} for _ in runs]
    saved = checkpoint.load() if checkpoint else None
    if saved:
        learner.load(saved["learner"])
        done, curves, best = saved["epoch"], saved["curves"], saved["best"]
    seeds = list(dict.fromkeys(seed for _, seed in runs))
    training = {seed: _stream(len(data.images), training_batch, 2 * seed, done * steps) for seed in seeds}
    alignment = {
        seed: _stream(len(data.alignment_images), alignment_batch, 2 * seed + 1, done * steps) for seed in seeds
    }
    step = _Graphed(learner.step, device)
    name = f"seed {runs[0][1]}" if len(runs) == 1 else f"{len(runs)} runs"
    for epoch in track(range(done + 1, epochs + 1), f"align, {name}"):
        going = [n for n in range(len(runs)) if patience is None or len(curves[n]) < best[n]["epoch"] + patience]
        if not going:
            break
        rows, chosen = (_epoch(streams, steps, runs).to(device) for streams in (training, alignment))
        learner.totals.zero_()
        with own_draws(device, runs[0][1], epoch):
            for n in range(steps):
                if falling_from is not None:
                    taken = (epoch - 1) * steps + n
                    _set_learning_rate(learner.optimizer, falling_from * (1 - taken / (epochs * steps)))
                step(rows[n], chosen[n])
        totals = learner.totals.tolist()
        for n in going:
            if not all(math.isfinite(total) for total in totals[n]):
                raise InputError(
                    f"the loss is not finite in epoch {epoch} at λ = {runs[n][0]}; lower λ or the learning rate"
                )
        right = (learner.logits(val_images).argmax(2) == val_labels).double().mean(1).tolist()
        scored = learner.logits(selection.images) if selection else None
        for n in going:
            row = {"epoch": epoch, "cross_entropy": totals[n][0] / steps, "penalty": totals[n][1] / steps}
            row["val_accuracy"] = right[n]
            if selection is not None and scored is not None:
                row["score"] = selection.score(scored[n])
                if patience is None:
                    best[n] = {"epoch": epoch, "score": row["score"], "weights": {}}
                elif row["score"] > best[n]["score"]:
                    best[n] = {"epoch": epoch, "score": row["score"], "weights": learner.weights(n)}
            curves[n].append(row)
        if checkpoint:
            state = {"learner": learner.state(), "epoch": epoch, "curves": curves, "best": best}
            checkpoint.save(state, always=epoch == epochs)
    return [
        AlignedRun(
            rrr_lambda,
            seed,
            best[n]["epoch"] if selection else len(curves[n]),
            best[n]["score"] if selection else None,
            best[n]["weights"] or learner.weights(n),
            pd.DataFrame(curves[n]),
        )
        for n, (rrr_lambda, seed) in enumerate(runs)
    ]


def _stream(n_samples: int, batch_size: int, seed: int, skip: int) -> Iterator[Tensor]:
    return endless_batches(n_samples, batch_size, torch.Generator().manual_seed(seed), skip)


def _epoch(streams: dict[int, Iterator[Tensor]], steps: int, runs: Sequence[tuple[float, int]]) -> Tensor:
    """Row numbers of an epoch's batches: (steps, R, batch). Runs of one seed draw the same."""
    drawn = {seed: torch.stack([next(stream) for _ in range(steps)]) for seed, stream in streams.items()}
    return torch.stack([drawn[seed] for _, seed in runs], dim=1)


def _adam(parameters: list[Tensor], learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    on_cuda = parameters[0].device.type == "cuda"
    # a captured graph reads the rate from a tensor, and so sees it change
    rate = torch.tensor(learning_rate, device=parameters[0].device) if on_cuda else learning_rate
    return torch.optim.Adam(parameters, lr=rate, weight_decay=weight_decay, fused=True, capturable=on_cuda)


def _set_learning_rate(optimizer: torch.optim.Adam, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _stack_size(layers: Sequence[tuple[str, nn.Linear]], device: torch.device) -> int:
    """How many MLPs are trained at a time: on a CPU as many as its caches hold, on a GPU all that fit."""
    size = sum(parameter.numel() * parameter.element_size() for _, layer in layers for parameter in layer.parameters())
    return max(1, (GPU_STACK_BYTES if device.type == "cuda" else CPU_STACK_BYTES) // size)


def _groups(n_runs: int, at_most: int) -> list[range]:
    """Split 0..n_runs - 1 into as few ranges of nearly equal length as possible."""
    n_groups = math.ceil(n_runs / at_most)
    edges = [n_runs * n // n_groups for n in range(n_groups + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
