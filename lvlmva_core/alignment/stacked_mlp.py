"""Several ReLU MLPs of one shape trained at once: batched matmuls, the RRR loss and its gradient in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.models import Mlp
from lvlmva_core.penalties import penalty_of


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]] | None:
    """Names and linear layers of a ReLU MLP, from the input to the logits; None for every other model.

    A ReLU MLP is an `Mlp` or an `nn.Sequential` that flattens its input, then alternates linear layers (with bias) and
    ReLUs, and ends with a linear layer.
    """
    if type(model) not in (Mlp, nn.Sequential):
        return None
    children = list(model.named_children())
    if len(children) < 2 or len(children) % 2:
        return None
    first = children[0][1]
    if not (isinstance(first, nn.Flatten) and (first.start_dim, first.end_dim) == (1, -1)):
        return None
    if not all(type(module) is nn.ReLU for _, module in children[2::2]):
        return None
    layers = [(name, module) for name, module in children[1::2] if isinstance(module, nn.Linear)]
    plain = len(layers) == len(children) // 2 and all(layer.bias is not None for _, layer in layers)
    return layers if plain else None


class StackedMlp:
    """`n_runs` copies of a ReLU MLP whose weights stand in one tensor a layer: (R, out, in), biases (R, out).

    The penalty needs no double backward here. Between the kinks of its ReLUs an MLP is linear, so that the input
    gradient is itself a chain of matmuls, with the softmax as the only curved link; its derivative in the weights is
    written out below. The numbers are those of autograd up to rounding.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Linear]], n_runs: int) -> None:
        self.names = [name for name, _ in layers]
        self.weights = [_copies(layer.weight, n_runs) for _, layer in layers]
        self.biases = [_copies(layer.bias, n_runs) for _, layer in layers]

    def parameters(self) -> list[Tensor]:
        """Every stacked tensor; `backward` fills their `grad`."""
        return [*self.weights, *self.biases]

    def state_dict(self, run: int) -> dict[str, Tensor]:
        """A copy of one run's weights, as the model that was stacked names them."""
        state = {}
        for name, weight, bias in zip(self.names, self.weights, self.biases, strict=True):
            state[f"{name}.weight"], state[f"{name}.bias"] = weight[run].clone(), bias[run].clone()
        return state

    def logits(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Logits (R, N, K) of every run for the same images (N, C, H, W)."""
        found = []
        for batch in torch.split(images.flatten(1), batch_size):
            hidden = batch.expand(len(self.weights[0]), *batch.shape)
            for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
                hidden = _linear(hidden, weight, bias).relu_()
            found.append(_linear(hidden, self.weights[-1], self.biases[-1]))
        return torch.cat(found, dim=1)

    def backward(
        self,
        rows: Tensor,
        labels: Tensor,
        masks: Tensor,
        rrr_lambda: Tensor | None,
        *,
        penalty: str = "log_probabilities",
        divisor: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Set the gradients of cross-entropy + λ penalty, both summed over a run's batch and divided by its size I.

        Args:
            rows: (R, I + a, D), the batch of I images, the `a` alignment samples first, and then `a` rows that are
                overwritten: room for what the penalty adds to the product that is the first layer's gradient.
            labels: int64 (R, I).
            masks: (R, a, D) of the images' dtype, 1 where the gradient of the first `a` samples is to vanish; or
                weights in [0, 1].
            rrr_lambda: (R,), or None for no penalty at all.
            penalty: name of a penalty of `lvlmva_core.penalties` that has a closed form.
            divisor: in the place of I, where the batch is a share of one.

        Returns:
            cross_entropy (R,) and penalty (R,), both before λ; the penalty is 0 where λ is 0.
        """
        closed = penalty_of(penalty).closed_form
        if closed is None:
            raise ValueError(f"penalty '{penalty}' has no closed form; train by double backward")
        size, n_classes, n_masked = labels.shape[1], self.weights[-1].shape[1], masks.shape[1]
        divisor = size if divisor is None else divisor
        inputs, active = [rows[:, :size]], []
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = _linear(inputs[-1], weight, bias)
            active.append(hidden > 0)
            inputs.append(hidden.relu_())
        log_p = functional.log_softmax(_linear(inputs[-1], self.weights[-1], self.biases[-1]), dim=-1)
        p = log_p.exp()
        cross_entropy = -log_p.gather(2, labels[..., None]).sum((1, 2)) / divisor
        penalties = torch.zeros_like(cross_entropy)
        at_logits = (p - functional.one_hot(labels, n_classes)) / divisor  # d loss / d logits

        down: list[Tensor] = []
        up: list[Tensor] = []
        if rrr_lambda is not None:
            # d (what the penalty differentiates) / d (output of each layer), from the logits down to the pixels
            p_masked = p[:, :n_masked]
            down = [closed.slope(p_masked, labels[:, :n_masked])]
            for weight, on in zip(reversed(self.weights[1:]), reversed(active), strict=True):
                down.insert(0, torch.bmm(down[0], weight).mul_(on[:, :n_masked]))
            gradient = torch.bmm(down[0], self.weights[0]).mul_(masks)
            penalties = gradient.square().sum((1, 2)) / divisor * (rrr_lambda > 0)
            # d (λ penalty) / d (each of these derivatives), from the pixels up to the logits
            # (the mask a second time: it may be a weight, which counts by its square)
            up = [torch.mul(gradient.mul_(masks), 2 / divisor * rrr_lambda[:, None, None], out=rows[:, size:])]
            for weight, on in zip(self.weights[:-1], active, strict=True):
                up.append(torch.bmm(up[-1], weight.transpose(1, 2)).mul_(on[:, :n_masked]))
            if closed.curvature is not None:
                at_top = torch.bmm(up[-1], self.weights[-1].transpose(1, 2))
                at_logits[:, :n_masked] += closed.curvature(p_masked, at_top)

        at_output = at_logits
        for layer in reversed(range(len(self.weights))):
            left, right = at_output, inputs[layer]
            if down:
                left = torch.cat([at_output, down[layer]], 1)
                right = torch.cat([right, up[layer]], 1) if layer else rows
            self.weights[layer].grad = torch.bmm(left.transpose(1, 2), right)
            self.biases[layer].grad = at_output.sum(1)
            if layer:
                at_output = torch.bmm(at_output, self.weights[layer]).mul_(active[layer - 1])
        return cross_entropy, penalties


def _copies(parameter: Tensor, n: int) -> Tensor:
    return parameter.detach().expand(n, *parameter.shape).clone(memory_format=torch.contiguous_format)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2))
