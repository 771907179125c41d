"""DeepLIFT with the rescale rule, averaged over baselines (DeepLiftSHAP; Lundberg and Lee 2017; LVLM-VA §4.1)."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lvlmva_core.attribution.rules import (
    CONSTANT_OPS,
    RESHAPES,
    RULES,
    Step,
    aten,
    batch_norm_scale,
    same_constants,
)
from lvlmva_core.attribution.tape import INPUT, Node, Tape, UnsupportedOperationError, Value, record
from lvlmva_core.errors import InputError


class CompletenessError(InputError):
    """Attributions do not add up to the difference of outputs."""


@dataclass(frozen=True)
class Explanation:
    """Maps and what they add up to: `attributions.sum() == output - expected` for each sample.

    attributions: (B, C, H, W); output, expected: (B,) the target logit of the input, and its mean over the baselines.
    """

    attributions: Tensor
    output: Tensor
    expected: Tensor

    def completeness_error(self) -> Tensor:
        """|Σ attributions - (output - expected)| as a share of Σ|attributions|, (B,) float64; 0 for an all-zero map."""
        maps = self.attributions.double().flatten(1)
        gap = (maps.sum(1) - (self.output.double() - self.expected.double())).abs()
        return torch.where(gap == 0, gap, gap / maps.abs().sum(1))


def deep_lift_shap(
    model: nn.Module,
    inputs: Tensor,
    baselines: Tensor,
    target: int | Tensor,
    *,
    batch_size: int = 64,
    samples_at_once: int | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    """Attribute a logit to the input, as the mean over baselines of DeepLIFT's rescale rule (LVLM-VA §4.1).

    Locally accurate to rounding: each map sums to the target logit minus its mean over the baselines. The model runs in
    eval mode and comes back as it was.

    Args:
        model: maps (B, C, H, W) to logits (B, K) and treats each sample on its own.
        inputs: (B, C, H, W) float32 or float64, on the model's device; other trailing dimensions work as well.
        baselines: (R, C, H, W), weighted alike.
        target: class of every input, or int64 (B,) one per input.
        batch_size: (input, baseline) pairs held at once; bounds the memory whatever B and R are.
        samples_at_once: at most so many inputs share a pass; None means as many as `batch_size` allows. With 1, a map
            has the same bits whatever else is in `inputs`.
        channels_last: memory layout of the passes; None takes it for float32 images on a CPU, where it is faster,
            unless the model calls `.view()` on its activations.

    Returns:
        (B, C, H, W) in the inputs' dtype and device, channels not summed.

    Raises:
        UnsupportedOperationError: the model does something that has no exact rule; names the operation and its place.
        CompletenessError: the maps do not add up, as when inputs or weights are not finite.
        InputError: shapes, dtypes, devices or classes do not fit.
        torch.OutOfMemoryError: not even one pair fits; before, a RuntimeWarning says that batch_size was halved.

    Examples:
        A unit that fires when x_0 + x_1 > 1. The gradient at (1, 1) is 1 for each pixel, twice of what happened between
        the black baseline and the image; the attributions add up to it.

        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2, bias=False))
        >>> model[1].weight, model[1].bias = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.tensor([-1.0]))
        >>> model[3].weight = nn.Parameter(torch.tensor([[1.0], [0.0]]))
        >>> image, baselines = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
        >>> deep_lift_shap(model, image, baselines, target=0)
        tensor([[[[0.5000, 0.5000]]]])
        >>> (model(image) - model(baselines))[0, 0].item()
        1.0
    """
    return explain(
        model,
        inputs,
        baselines,
        target,
        batch_size=batch_size,
        samples_at_once=samples_at_once,
        channels_last=channels_last,
    ).attributions


def explain(
    model: nn.Module,
    inputs: Tensor,
    baselines: Tensor,
    target: int | Tensor,
    *,
    batch_size: int = 64,
    samples_at_once: int | None = None,
    channels_last: bool | None = None,
) -> Explanation:
    """`deep_lift_shap` together with the outputs that its maps add up to. Same arguments and errors."""
    targets = check_arguments(model, inputs, baselines, target)
    for name, value in (("batch_size", batch_size), ("samples_at_once", samples_at_once)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected 1 or more")
    samples_at_once = min(samples_at_once or len(inputs), len(inputs))
    batch_size = min(batch_size, len(baselines) * samples_at_once)
    in_doubt = channels_last is None and inputs.ndim == 4 and inputs.dtype == torch.float32 and not inputs.is_cuda
    layout = torch.channels_last if channels_last or in_doubt else torch.contiguous_format
    inputs, baselines = inputs.detach(), baselines.detach()
    total = torch.zeros_like(inputs, memory_format=torch.contiguous_format)
    output = expected = torch.zeros(len(inputs), dtype=inputs.dtype, device=inputs.device)
    done = 0
    while done < len(baselines):
        remaining = len(baselines) - done
        part = baselines[done : done + math.ceil(remaining / math.ceil(remaining / batch_size))]  # parts of equal size
        at_once = min(max(batch_size // len(part), 1), samples_at_once)
        try:
            sums, output, means = _attribute(model, inputs, part, targets, at_once, layout)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            warnings.warn(f"out of memory: going on with batch_size={batch_size}", RuntimeWarning, stacklevel=2)
            continue
        except RuntimeError as error:
            if not (in_doubt and "view size is not compatible" in str(error)):
                raise
            in_doubt, layout = False, torch.contiguous_format  # the model calls .view() on its activations
            continue
        in_doubt = False
        total += sums
        expected = expected + means
        done += len(part)
    found = Explanation(total / len(baselines), output, expected / len(baselines))
    _check_gap(found)
    return found


def _attribute(
    model: nn.Module, inputs: Tensor, baselines: Tensor, targets: Tensor, at_once: int, layout: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    """All inputs against some baselines whose activations are held all the while.

    Returns:
        attributions summed over the baselines, like the inputs; the target logits of the inputs, and of the baselines
        summed, (B,).
    """
    sums = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    output = torch.empty(len(inputs), dtype=inputs.dtype, device=inputs.device)
    with torch.no_grad(), full_precision(inputs.device):
        baseline_tape = record(model, _in_layout(baselines, layout), RULES, CONSTANT_OPS)
        classes = baseline_tape.output.shape[1]
        if bool(((targets < 0) | (targets >= classes)).any()):
            raise InputError(
                f"target has classes outside 0..{classes - 1}, the model's logits: {targets.tolist()[:20]}"
            )
        for start in range(0, len(inputs), at_once):
            rows = slice(start, start + at_once)
            tape = _record_beside(model, _in_layout(inputs[rows], layout), baseline_tape)
            sums[rows] = attribute_pairs(tape, baseline_tape, targets[rows])
            output[rows] = tape.output.gather(1, targets[rows, None])[:, 0]
            del tape  # its activations go before the next ones come
        return sums, output, baseline_tape.output[:, targets].sum(0)


def _record_beside(model: nn.Module, inputs: Tensor, baseline: Tape) -> Tape:
    """The tape of `inputs`, which ran the same operations as the baselines'.

    PyTorch may choose other operations for one sample (a linear layer asks whether its input is contiguous, einsum
    leaves out dimensions of size 1); then it runs twice, as one of two.
    """
    if len(inputs) == 1:
        try:
            tape = record(model, inputs, RULES, CONSTANT_OPS, baseline.axes)
            check_same_computation(tape, baseline)
            return tape
        except UnsupportedOperationError:
            pass
    tape = record(model, inputs, RULES, CONSTANT_OPS)
    check_same_computation(tape, baseline)
    return tape


def _in_layout(images: Tensor, layout: torch.memory_format) -> Tensor:
    return images.contiguous(memory_format=layout) if images.ndim == 4 else images.contiguous()


_GROSS_GAP = {torch.float32: 1e-3, torch.float64: 1e-9}  # far above rounding, far below a forgotten path


def _check_gap(found: Explanation) -> None:
    """Refuse maps that do not add up: what no rule saw (a detour through numpy, say) or numbers that are not finite."""
    gap = (found.attributions.flatten(1).sum(1) - (found.output - found.expected)).abs()
    scale = found.attributions.abs().flatten(1).sum(1) + found.output.abs() + found.expected.abs()
    bad = torch.nonzero(~(gap <= _GROSS_GAP[found.attributions.dtype] * scale))[:, 0].tolist()
    if bad:
        raise CompletenessError(
            f"the maps of samples {bad[:10]} do not add up to the difference of outputs (first: {gap[bad[0]]:.3g}); "
            "check that inputs and weights are finite, and that the model computes by torch operations only"
        )


def check_arguments(model: nn.Module, inputs: Tensor, baselines: Tensor, target: int | Tensor) -> Tensor:
    """Check what every attribution function takes; returns the targets as int64 (B,). Raises InputError."""
    if not inputs.is_floating_point() or inputs.dtype not in (torch.float32, torch.float64):
        raise InputError(f"inputs are {inputs.dtype}, expected float32 or float64; convert inputs and model")
    if inputs.ndim < 2 or len(inputs) == 0:
        raise InputError(f"inputs have shape {tuple(inputs.shape)}, expected (B, C, H, W) with B > 0")
    if baselines.shape[1:] != inputs.shape[1:] or len(baselines) == 0:
        raise InputError(
            f"baselines have shape {tuple(baselines.shape)}, expected (R, *{tuple(inputs.shape[1:])}), R > 0"
        )
    for name, tensor in (("baselines", baselines), *model.named_parameters(), *model.named_buffers()):
        if tensor.device != inputs.device:
            raise InputError(f"{name} is on {tensor.device}, the inputs on {inputs.device}; move them to one device")
        if tensor.is_floating_point() and tensor.dtype != inputs.dtype:
            raise InputError(f"{name} is {tensor.dtype}, the inputs {inputs.dtype}; convert them to one dtype")
    if isinstance(target, int):
        return torch.full((len(inputs),), target, dtype=torch.int64, device=inputs.device)
    if target.dtype != torch.int64 or target.shape != (len(inputs),):
        raise InputError(f"target is {target.dtype} {tuple(target.shape)}, expected an int or int64 ({len(inputs)},)")
    return target.to(inputs.device)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32 in convolutions and matrix products of a GPU: it keeps 10 bits of the mantissa only."""
    if device.type != "cuda":
        yield
        return
    with products_in("ieee"):
        yield


@contextmanager
def products_in(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """A GPU's convolutions and matrix products of float32 in that precision; what stood before is restored."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = precision
        yield
    finally:
        for each, own in zip(settings, before, strict=True):
            each.fp32_precision = own


def attribute_pairs(tape: Tape, baseline: Tape, targets: Tensor) -> Tensor:
    """DeepLIFT of every input against every baseline, summed over the baselines; both ran the same operations.

    Returns:
        (b, ...) like the inputs of `tape`.
    """
    b, r = len(tape.inputs), len(baseline.inputs)
    consumers: dict[Value, int] = {}
    for node in tape.nodes:
        for value in node.inputs:
            consumers[value] = consumers.get(value, 0) + 1
    seed = torch.zeros(b, r, tape.output.shape[1], dtype=tape.output.dtype, device=tape.output.device)
    seed.scatter_(2, targets[:, None, None].expand(b, r, 1), 1.0)
    pending: dict[Value, tuple[Tensor, bool]] = {tape.result: (seed.flatten(0, 1), True)}
    scales: dict[int, Tensor] = {}
    for position in range(len(tape.nodes) - 1, -1, -1):
        node, twin = tape.nodes[position], baseline.nodes[position]
        arrived = [pending.pop(Value(position, slot), None) for slot in range(len(node.output_shapes))]
        if all(item is None for item in arrived):
            continue
        source = node.inputs[0]
        if (
            node.op in _BATCH_NORMS
            and source.node >= 0
            and tape.nodes[source.node].op is aten.convolution.default
            and not tape.nodes[source.node].args[6]
            and consumers[source] == 1
            and node.axis.dim == 0
        ):
            # one pass over the multipliers less: the convolution before takes the factors into its weights
            scales[source.node] = batch_norm_scale(node)
            pending[source] = arrived[0]  # type: ignore[assignment]
            continue
        step = Step(node, twin, b, r, tape.samples, baseline.samples, scales.pop(position, None))
        g = [None if item is None else item[0] for item in arrived]
        owned = len(g) == 1 and arrived[0] is not None and arrived[0][1]
        del arrived
        results = RULES[node.op].backward(step, g, owned)
        _send(pending, node.inputs, results, g, owned)
    multipliers = pending.get(INPUT)
    if multipliers is None:
        raise UnsupportedOperationError("the target logit does not depend on the input")
    change = tape.inputs.unsqueeze(1) - baseline.inputs.unsqueeze(0)
    return (multipliers[0].view(b, r, *change.shape[2:]) * change).sum(1)


_BATCH_NORMS = frozenset(op for op in RULES if "batch_norm" in str(op))


def _send(
    pending: dict[Value, tuple[Tensor, bool]],
    values: tuple[Value, ...],
    results: list[Tensor | None],
    g: list[Tensor | None],
    owned: bool,
) -> None:
    """Add what a rule returned to what waits at its inputs. A tensor that two values share is written to by neither."""
    incoming = {t.untyped_storage().data_ptr() for t in g if t is not None}
    addresses = [t.untyped_storage().data_ptr() for t in results if t is not None]
    for value, result in zip(values, results, strict=True):
        if result is None:
            continue
        address = result.untyped_storage().data_ptr()
        mine = (owned or address not in incoming) and addresses.count(address) == 1 and _dense(result)
        if value not in pending:
            pending[value] = (result, mine)
            continue
        waiting, waiting_mine = pending[value]
        if waiting_mine and waiting.dtype == result.dtype:
            waiting.add_(result)
        else:
            pending[value] = (result.add_(waiting) if mine else result + waiting, True)


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def check_same_computation(tape: Tape, baseline: Tape) -> None:
    """Inputs and baselines must have run the same operations: else the model chooses its path by its input."""
    if len(tape.nodes) != len(baseline.nodes) or tape.result != baseline.result:
        raise UnsupportedOperationError(
            "the model runs other operations for the inputs than for the baselines; it must not"
        )
    for x, y in zip(tape.nodes, baseline.nodes, strict=True):
        same = (x.op is y.op or {x.op, y.op} <= RESHAPES) and x.inputs == y.inputs
        same = same and x.axis == y.axis and _per_sample(x, tape.samples) == _per_sample(y, baseline.samples)
        if not (same and same_constants(x, y, (tape.samples, baseline.samples))):
            raise UnsupportedOperationError(
                f"{x.place}: {str(x.op).removesuffix('.default')} differs between the run on the inputs and the run on "
                "the baselines; attribution needs a model that computes the same for each sample, without random draws"
            )


def _per_sample(node: Node, samples: int) -> list[tuple[int, ...] | None]:
    inputs = [axis.resized(shape, samples, 1) for axis, shape in zip(node.input_axes, node.input_shapes, strict=True)]
    return [*inputs, *(None if shape is None else node.axis.resized(shape, samples, 1) for shape in node.output_shapes)]
