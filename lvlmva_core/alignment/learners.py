"""What takes the steps of an alignment: any model by double backward, ReLU MLPs several at a time in closed form."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.adam import Adam
from lvlmva_core.alignment.stacked_mlp import StackedMlp
from lvlmva_core.compute import eval_mode
from lvlmva_core.convolutions import safe_weight_gradients
from lvlmva_core.counterexamples import Counterexamples, Made, pair_change
from lvlmva_core.data_parallel import (
    mean,
    predict_together,
    processes,
    share,
    whole_batch,
    with_mean_gradients,
)
from lvlmva_core.penalties import penalty_of

if TYPE_CHECKING:
    from lvlmva_core.align_settings import AlignSettings


@dataclass(frozen=True)
class Batches:
    """What a group of runs learns from; `size` is the number of samples in a batch, I.

    counterexamples: what one run makes besides, or None.
    """

    images: Tensor
    labels: Tensor
    alignment_images: Tensor
    alignment_labels: Tensor
    masks: Tensor
    size: int
    counterexamples: Counterexamples | None = None


class Learner(Protocol):
    """R runs that take their steps together.

    Of several processes each takes its share of a step; what it makes of it is divided by the size of a mean share, so
    that the mean over processes is what the whole batch makes.
    """

    totals: Tensor  # float64 (R, 3): sums over steps of cross-entropy, penalty, and change of pairs, of this process
    optimizer: Adam

    def step(self, rows: Tensor, chosen: Tensor, made: Tensor) -> None:
        """One step of every run on training samples `rows` (R, b), alignment samples `chosen` (R, a) and
        counterexamples `made` (R, c, 2), as `Counterexamples.draw` gives them."""

    def logits(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (R, N, K), in eval mode."""

    def weights(self, run: int) -> dict[str, Tensor]:
        """A copy of a run's state dict."""

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""


class Single:
    """One run of any model, by autograd: double backward for a penalty, counterexamples as they are."""

    def __init__(self, model: nn.Module, data: Batches, rrr_lambda: float, settings: "AlignSettings") -> None:
        self.settings = settings
        self.model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # convolutions are faster so
        self.forward = with_mean_gradients(self.model, data.images[:2], all_used=settings.gamma > 0)
        self.data = data
        self.size = data.size / processes()
        self.rrr_lambda = rrr_lambda
        self.masks = data.masks if data.masks.ndim == 3 else data.masks[0]
        mixed = settings.precision == "bfloat16"
        self.mixed = torch.autocast(data.images.device.type, torch.bfloat16, enabled=mixed)
        self.optimizer = Adam(self.model.parameters(), settings.learning_rate, fused=True)
        self.totals = torch.zeros((1, 3), dtype=torch.float64, device=data.images.device)

    def step(self, rows: Tensor, chosen: Tensor, made: Tensor) -> None:
        with whole_batch(), safe_weight_gradients(self.model):
            self._step(share(rows[0]), share(chosen[0]), made)

    def _step(self, rows: Tensor, chosen: Tensor, made: Tensor) -> None:
        data = self.data
        masked_images = data.alignment_images[chosen]
        pictures = [masked_images, data.images[rows]]
        labels = [data.alignment_labels[chosen], data.labels[rows]]
        found = data.counterexamples.make(made[0]) if data.counterexamples else None
        if found is not None:
            pictures += [found.swapped, found.erased]
            labels += [found.swapped_labels, found.erased_labels]
        targets = torch.cat(labels)
        self.model.train()
        for module in self.model.modules() if self.settings.batch_norm == "frozen" else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        with self.mixed:
            logits = self.forward(torch.cat(pictures))
            cross_entropy = functional.cross_entropy(logits, targets, reduction="sum") / self.size
            loss = cross_entropy
            penalty = torch.zeros_like(cross_entropy)
            if self.rrr_lambda:
                penalty = self._penalty(masked_images, chosen).sum() / self.size
                loss = loss + self.rrr_lambda * penalty
            change = torch.zeros_like(cross_entropy)
            if found is not None and data.counterexamples and data.counterexamples.settings.pair_weight:
                whole = data.counterexamples.settings.swapped
                change = self._change(found) * (len(found.swapped) * processes() / whole)
                loss = loss + data.counterexamples.settings.pair_weight * change
        if self.settings.gamma:
            squares = [parameter.square().sum() for parameter in self.model.parameters()]
            loss = loss + self.settings.gamma * torch.stack(squares).sum()
        self.optimizer.zero_grad()
        loss.backward()
        if self.settings.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient_norm)
        self.optimizer.step()
        self.totals += torch.stack([cross_entropy.detach(), penalty.detach(), change.detach()]).double()

    def _change(self, found: Made) -> Tensor:
        """Mean change of the contrasts between swapped pictures and their twins, in eval mode as the penalty is: what
        dropout does to one of the two is no effect of the region."""
        with eval_mode(self.model):
            return pair_change(*self.model(torch.cat([found.swapped, found.twins])).chunk(2)).mean()

    def _penalty(self, images: Tensor, chosen: Tensor) -> Tensor:
        labels = self.data.alignment_labels[chosen]
        return penalty_of(self.settings.penalty).measure(self.model, images, self.masks[chosen], labels)

    def logits(self, images: Tensor) -> Tensor:
        self.model.eval()
        return predict_together(self.model, images)[None]

    def weights(self, run: int) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}

    def state(self) -> dict[str, Any]:
        return {"model": self.weights(0), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Stack:
    """Several runs of a ReLU MLP, with the gradient in closed form."""

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Linear]],
        data: Batches,
        lambdas: Sequence[float],
        settings: "AlignSettings",
    ) -> None:
        images = data.images
        self.settings = settings
        self.data = data
        self.stack = StackedMlp(layers, len(lambdas))
        self.rrr_lambda = torch.tensor(lambdas, dtype=images.dtype, device=images.device) if any(lambdas) else None
        channels = data.masks.unsqueeze(-3).expand(*data.masks.shape[:-2], *images.shape[1:])
        self.masks = channels.flatten(-3).to(images.dtype)
        self.pixels = torch.cat([data.alignment_images, images]).flatten(1)  # one gather a step
        self.run = torch.arange(len(lambdas), device=images.device)[:, None]
        # the gradient of γ Σ θ² is 2 γ θ, which is what Adam calls weight decay; `_clip` adds it itself
        decay = 2 * settings.gamma if settings.max_gradient_norm is None else 0.0
        self.optimizer = Adam(self.stack.parameters(), settings.learning_rate, weight_decay=decay, fused=True)
        self.totals = torch.zeros((len(lambdas), 3), dtype=torch.float64, device=images.device)

    def step(self, rows: Tensor, chosen: Tensor, _made: Tensor) -> None:
        data = self.data
        rows, chosen = share(rows, 1), share(chosen, 1)
        first = len(data.alignment_images)
        places = torch.cat([chosen, rows + first, chosen], dim=1)  # the last ones only make room, see `backward`
        batch = self.pixels.index_select(0, places.flatten()).view(*places.shape, -1)
        targets = torch.cat([data.alignment_labels[chosen], data.labels[rows]], dim=1)
        masks = self.masks[chosen] if self.masks.ndim == 2 else self.masks[self.run, chosen]
        divisor = data.size / processes()
        losses = self.stack.backward(
            batch, targets, masks, self.rrr_lambda, penalty=self.settings.penalty, divisor=divisor
        )
        for parameter in self.stack.parameters() if processes() > 1 else ():
            parameter.grad = None if parameter.grad is None else mean(parameter.grad)
        if self.settings.max_gradient_norm is not None:
            self._clip(self.settings.max_gradient_norm)
        self.optimizer.step()
        self.totals[:, :2] += torch.stack(losses, dim=1).double()

    def _clip(self, longest: float) -> None:
        """What `clip_grad_norm_` does to one model, for each run."""
        parameters = self.stack.parameters()
        gradients = [
            parameter.grad.add_(parameter, alpha=2 * self.settings.gamma)
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


class Graphed:
    """On a CUDA device, replays `step` as one CUDA graph; elsewhere, and where several processes share it, calls it.

    The first calls are ordinary steps on a side stream, as a capture asks for; the capture itself computes nothing, so
    that no step is lost or taken twice.
    """

    eager_steps = 3

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], None], device: torch.device) -> None:
        self.step = step
        self.device = device
        self.calls = 0
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self.graph: Any = None

    def __call__(self, rows: Tensor, chosen: Tensor, made: Tensor) -> None:
        if self.device.type != "cuda" or processes() > 1:
            self.step(rows, chosen, made)
            return
        if self.inputs is None:
            self.inputs = rows.clone(), chosen.clone(), made.clone()
        for kept, given in zip(self.inputs, (rows, chosen, made), strict=True):
            kept.copy_(given)
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
