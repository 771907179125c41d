"""DeepLIFT's rescale rule (Shrikumar et al. 2017) for each operation, over pairs of an input and a baseline.

Every rule keeps completeness: with Δ the difference between input and baseline, the multipliers `m` that it returns for
its inputs satisfy Σ m_in·Δin = Σ m_out·Δout. Then so does the whole network, whatever its shape.

A rule sees b inputs and r baselines, whose activations were computed once each, and multipliers of all b·r pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from lvlmva_core.attribution.tape import Keep, Node, Rule, Value, refuse

aten = torch.ops.aten

_SERIAL = (1 << 15) - 1  # elements: PyTorch starts no second thread for so few, and temporaries stay in cache
_MANY_THREADS = 8  # from so many on, blocks are made large enough to use them all


@dataclass(frozen=True)
class Step:
    """One operation met in the backward sweep: the same node as recorded for b inputs and for r baselines."""

    x: Node
    baseline: Node
    b: int
    r: int
    channel_scale: Tensor | None = None  # a factor per output channel that a following BatchNorm left to this operation

    @property
    def pairs(self) -> int:
        return self.b * self.r

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of input `index` for all pairs."""
        shape = self.x.input_shapes[index]
        return (self.pairs * (shape[0] // self.b), *shape[1:])

    def inputs(self, index: int) -> tuple[Tensor, Tensor]:
        """The kept activations number `index`, as (b, 1, k, ...) and (1, r, k, ...)."""
        return _lift(self.x.saved[index], self.b).unsqueeze(1), _lift(self.baseline.saved[index], self.r).unsqueeze(0)

    def middle(self, index: int) -> Tensor:
        """The mean of input and baseline, (b·r·k, ...)."""
        x, baseline = self.inputs(index)
        return ((x + baseline) * 0.5).flatten(0, 2)

    def constant(self, tensor: Tensor, rows: int) -> Tensor:
        """A tensor that does not depend on the input, repeated for the pairs where it has a row per sample."""
        if not _has_rows(self.x, tensor, rows):
            return tensor
        return _tile(self.x, tensor, self.b).repeat(self.pairs, *[1] * (tensor.ndim - 1))

    def lift(self, g: Tensor) -> Tensor:
        """(b·r·k, ...) -> (b, r, k, ...)"""
        return g.view(self.b, self.r, g.shape[0] // self.pairs, *g.shape[1:])


def _lift(tensor: Tensor, samples: int) -> Tensor:
    return tensor.view(samples, tensor.shape[0] // samples, *tensor.shape[1:])


def _has_rows(node: Node, tensor: Tensor, rows: int) -> bool:
    return tensor.ndim >= len(node.input_shapes[0]) and tensor.shape[0] == rows


def _tile(node: Node, tensor: Tensor, samples: int) -> Tensor:
    """The part of a constant that repeats from sample to sample."""
    tiles = tensor.reshape(samples, -1, *tensor.shape[1:])
    if not torch.equal(tiles, tiles[:1].expand_as(tiles)):
        raise refuse(node, f"uses a constant {tuple(tensor.shape)} that differs between the samples of a batch")
    return tiles[0]


def same_constants(x: Node, baseline: Node, samples: tuple[int, int]) -> bool:
    """Whether an operation had the same constants in both runs, but for a number of rows."""
    if x.op in ROWS_IN_ARGUMENTS:
        return True
    a, b = ((*node.args, *node.kwargs.values()) for node in (x, baseline))
    return len(a) == len(b) and all(_same_constant(x, p, baseline, q, samples) for p, q in zip(a, b, strict=True))


def _same_constant(x: Node, a: Any, baseline: Node, b: Any, samples: tuple[int, int]) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same_constant(x, p, baseline, q, samples) for p, q in zip(a, b, strict=True))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()):
        return True
    if a.shape == b.shape:
        return torch.equal(a, b)
    rows = x.input_shapes[0][0], baseline.input_shapes[0][0]
    if not (_has_rows(x, a, rows[0]) and _has_rows(baseline, b, rows[1])):
        return False
    return torch.equal(_tile(x, a, samples[0]), _tile(baseline, b, samples[1]))


# --------------------------------------------------------------------------------------------------- linear operations


def _convolution(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    _, weight, _, stride, padding, dilation, transposed, output_padding, groups = step.x.args
    if step.channel_scale is not None:
        weight = weight * step.channel_scale.reshape(-1, *[1] * (weight.ndim - 1))
    # only the shape and layout of the input matter; its memory is never touched
    layout = _layout(g[0]) or torch.contiguous_format
    like = torch.empty(step.shape(0), dtype=g[0].dtype, device=g[0].device, memory_format=layout)
    wanted = [True, False, False]
    grad, _, _ = aten.convolution_backward(
        g[0], like, weight, None, stride, padding, dilation, transposed, output_padding, groups, wanted
    )
    return [grad]


def _check_convolution(node: Node) -> None:
    if not isinstance(node.args[0], Value) or len(node.inputs) != 1:
        raise refuse(node, "has a weight that depends on the input")
    if len(node.input_shapes[0]) != len(node.args[1].shape):
        raise refuse(node, "has no batch dimension")


def batch_norm_scale(node: Node) -> Tensor:
    """The factor per channel of a BatchNorm in eval mode, (C,)."""
    weight, _, _, variance, _, _, eps = node.args[1:8]
    scale = torch.rsqrt(variance + eps)
    return scale if weight is None else scale * weight


def _batch_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    scale = batch_norm_scale(step.x)
    return [g[0] * scale.reshape(1, -1, *[1] * (g[0].ndim - 2))]


def _check_batch_norm(node: Node) -> None:
    if len(node.inputs) != 1 or node.args[3] is None or node.args[4] is None or node.args[5]:
        raise refuse(node, "uses the statistics of the batch, which mixes samples (track_running_stats=False?)")


def _addmm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [g[0] @ step.x.args[2].t()]


def _check_addmm(node: Node) -> None:
    plain = all(value == 1 for value in node.kwargs.values())
    if not plain or len(node.inputs) != 1 or not isinstance(node.args[1], Value):
        raise refuse(node, "is supported as bias + (followed tensor) @ (constant matrix) only")


def _mm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [g[0] @ step.x.args[1].t()]


def _check_mm(node: Node) -> None:
    if len(node.inputs) != 1 or not isinstance(node.args[0], Value):
        raise refuse(node, "is supported as (followed tensor) @ (constant matrix) only: else it mixes samples")


def _reshape(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [g[0].reshape(step.shape(0))]


def _expand(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [g[0].sum_to_size(step.shape(0))]


def _check_expand(node: Node) -> None:
    source, target = node.input_shapes[0], node.output_shape
    if len(source) != len(target) or source[0] != target[0]:
        raise refuse(node, "repeats samples")


def _cast(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [g[0]]


def _check_cast(node: Node) -> None:
    dtype = node.kwargs.get("dtype")
    if dtype is not None:
        raise refuse(node, f"changes the dtype to {dtype}, which rounds; convert the model to one dtype")


def _check_slice(node: Node) -> None:
    # x[:, i] may slice the first dimension as a whole; nothing else may touch it
    start, end, pace = (node.args[i] if len(node.args) > i else None for i in (2, 3, 4))
    whole = start in (None, 0) and pace in (None, 1) and (end is None or end >= torch.iinfo(torch.int64).max)
    if not whole:
        _check_dims(node)


def _permute(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    dims = [dim % g[0].ndim for dim in step.x.args[1]]
    inverse = [dims.index(dim) for dim in range(len(dims))]
    return [g[0].permute(inverse)]


def _linear(step: Step, g: list[Tensor | None]) -> list[Tensor | None]:
    """Any operation that is linear in what depends on the input: its transpose, by autograd at zero."""
    first = next(t for t in g if t is not None)
    at = [
        torch.zeros((), dtype=first.dtype, device=first.device).expand(step.shape(i)).requires_grad_()
        for i in range(len(step.x.inputs))
    ]
    rows = step.x.input_shapes[0][0]
    remaining = iter(at)

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return next(remaining)
        return step.constant(leaf, rows) if isinstance(leaf, Tensor) else leaf

    is_value: Callable[[Any], bool] = lambda leaf: isinstance(leaf, Value)  # noqa: E731
    with torch.enable_grad():
        args = tree_map(fill, step.x.args, is_leaf=is_value)
        kwargs = tree_map(fill, step.x.kwargs, is_leaf=is_value)
        out = step.x.op(*args, **kwargs)
        outputs = out if isinstance(out, list | tuple) else (out,)
        used = [(o, t) for o, t in zip(outputs, g, strict=True) if t is not None]
        return list(torch.autograd.grad([o for o, _ in used], at, [t for _, t in used], allow_unused=True))


_DIM_NAMES = ("dim", "dims", "dim0", "dim1", "dimension")


def _check_dims(node: Node) -> None:
    """Refuse an operation along the first dimension, which holds the samples."""
    ndim = max(len(node.input_shapes[0]), len(node.output_shape))
    named = {argument.name: node.args[i] for i, argument in enumerate(node.op._schema.arguments) if i < len(node.args)}
    named.update(node.kwargs)
    for argument in node.op._schema.arguments:
        if argument.name not in _DIM_NAMES:
            continue
        given = named.get(argument.name, argument.default_value if argument.has_default_value() else None)
        dims = [given] if isinstance(given, int) else list(given or [])
        if node.op is aten.permute.default:
            dims = [] if dims[0] % ndim == 0 else [0]
        elif not dims:
            raise refuse(node, "works along all dimensions, the samples' included")
        if any(dim % ndim == 0 for dim in dims):
            raise refuse(node, "works along the first dimension, which holds the samples")


def _check_elementwise(node: Node) -> None:
    shape = node.output_shape
    if any(len(source) != len(shape) or source[0] != shape[0] for source in node.input_shapes):
        raise refuse(node, "broadcasts along the first dimension, which holds the samples")


def _check_pool(node: Node) -> None:
    source, target = node.input_shapes[0], node.output_shape
    spatial = 2 if "2d" in str(node.op) else 3 if "3d" in str(node.op) else 1
    if len(source) != spatial + 2 or source[:2] != target[:2]:
        raise refuse(node, "has no batch dimension")


# ------------------------------------------------------------------------------------------- sums, products, quotients


def _operands(node: Node) -> tuple[Any, Any]:
    return node.args[0], node.args[1]


def _to(step: Step, index: int, g: Tensor) -> Tensor:
    return g.sum_to_size(step.shape(index))


def _factor(step: Step, constant: Any, rows: int) -> Any:
    return step.constant(constant, rows) if isinstance(constant, Tensor) else constant


def _add(step: Step, g: list[Tensor], sign: float = 1.0) -> list[Tensor | None]:
    a, b = _operands(step.x)
    alpha = sign * step.x.kwargs.get("alpha", step.x.args[2] if len(step.x.args) > 2 else 1)
    scales = [1.0] * isinstance(a, Value) + [alpha] * isinstance(b, Value)
    return [_to(step, i, g[0] if scale == 1 else g[0] * scale) for i, scale in enumerate(scales)]


def _sub(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return _add(step, g, -1.0)


def _rsub(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    a, b = _operands(step.x)
    alpha = step.x.kwargs.get("alpha", step.x.args[2] if len(step.x.args) > 2 else 1)
    scales = [-alpha] * isinstance(a, Value) + [1.0] * isinstance(b, Value)
    return [_to(step, i, g[0] * scale) for i, scale in enumerate(scales)]


def _neg(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [-g[0]]


def _mul(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """A product with a constant is linear. Of two followed factors, u·v, each gets the other's midpoint:
    Δ(uv) = v̄·Δu + ū·Δv, which is also the Shapley value of a product of two."""
    a, b = _operands(step.x)
    rows = step.x.output_shape[0]
    if isinstance(a, Value) and isinstance(b, Value):
        return [_to(step, 0, g[0] * step.middle(1)), _to(step, 1, g[0] * step.middle(0))]
    constant = _factor(step, b if isinstance(a, Value) else a, rows)
    return [_to(step, 0, g[0] * constant)]


def _div(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """u/v as u·(1/v), the reciprocal by the rescale rule: Δ(1/v) = -Δv / (v_x·v_b)."""
    a, b = _operands(step.x)
    rows = step.x.output_shape[0]
    if not isinstance(b, Value):
        return [_to(step, 0, g[0] / _factor(step, b, rows))]
    x, baseline = step.inputs(1 if isinstance(a, Value) else 0)
    slope = (-1.0 / (x * baseline)).flatten(0, 2)
    if not isinstance(a, Value):
        return [_to(step, 0, g[0] * _factor(step, a, rows) * slope)]
    reciprocal = ((1.0 / x + 1.0 / baseline) * 0.5).flatten(0, 2)
    return [_to(step, 0, g[0] * reciprocal), _to(step, 1, g[0] * step.middle(0) * slope)]


def _check_div(node: Node) -> None:
    _check_elementwise(node)
    if node.kwargs.get("rounding_mode") is not None:
        raise refuse(node, "rounds")


def _bmm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """Like the product: each matrix gets the other's midpoint."""
    a, b = _operands(step.x)
    rows = step.x.output_shape[0]
    if isinstance(a, Value) and isinstance(b, Value):
        return [g[0] @ step.middle(1).mT, step.middle(0).mT @ g[0]]
    if isinstance(a, Value):
        return [g[0] @ step.constant(b, rows).mT]
    return [step.constant(a, rows).mT @ g[0]]


# -------------------------------------------------------------------------------------------- functions of one number


def relu_multiplier(x: Tensor, baseline: Tensor) -> Tensor:
    """(relu(x) - relu(b)) / (x - b), the derivative where x = b; exactly 0 or 1 where the signs agree.

    max(x, b) / |x - b| is below 0 where both are negative, above 1 where both are positive, and the quotient itself
    where they differ, so that clamping it to [0, 1] is the rule, without a difference of near numbers.
    """
    distance = (x - baseline).abs_().add_(torch.finfo(x.dtype).tiny)
    return torch.maximum(x, baseline).div_(distance).clamp_(0.0, 1.0)


def _leaky_relu(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    slope = node.args[1] if len(node.args) > 1 else 0.01
    return lambda x, b: relu_multiplier(x, b).mul_(1.0 - slope).add_(slope)


def _prelu(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    slope = step.constant(step.x.args[1], step.x.output_shape[0])
    x, baseline = step.inputs(0)
    share = relu_multiplier(x, baseline).flatten(0, 2)
    return [g[0] * (share + (1.0 - share) * slope)]


def _check_prelu(node: Node) -> None:
    if len(node.inputs) != 1 or node.input_shapes[0] != node.output_shape:
        raise refuse(node, "has a slope that depends on the input")


def _hardtanh_multiplier(x: Tensor, b: Tensor, low: float, high: float) -> Tensor:
    out = relu_multiplier(x - low, b - low) if low > -math.inf else torch.ones_like(x + b)
    return out.sub_(relu_multiplier(x - high, b - high)) if high < math.inf else out


def _hardtanh(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    low = node.args[1] if len(node.args) > 1 else -1.0
    high = node.args[2] if len(node.args) > 2 else 1.0
    return lambda x, b: _hardtanh_multiplier(x, b, low, high)


def _clamp(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    limits = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in ((1, "min"), (2, "max"))]
    low = -math.inf if limits[0] is None else float(limits[0])
    high = math.inf if limits[1] is None else float(limits[1])
    return lambda x, b: _hardtanh_multiplier(x, b, low, high)


def _clamp_min(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, b: _hardtanh_multiplier(x, b, float(node.args[1]), math.inf)


def _hardsigmoid(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, b: _hardtanh_multiplier(x, b, -3.0, 3.0).div_(6.0)


def _hardswish(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    """x·h(x) with h the hard sigmoid: the divided difference of a product is h̄ + x̄·h[x, b]."""

    def multiplier(x: Tensor, b: Tensor) -> Tensor:
        h = torch.nn.functional.hardsigmoid
        slope = _hardtanh_multiplier(x, b, -3.0, 3.0).div_(6.0)
        return slope.mul_((x + b).mul_(0.5)).add_((h(x) + h(b)).mul_(0.5))

    return multiplier


def _abs(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, b: relu_multiplier(x, b).mul_(2.0).sub_(1.0)


def _elu(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    """relu(x)·scale + α·scale·(exp(min(x, 0)·s) - 1): each part by its own divided difference."""
    alpha, scale, input_scale = (node.args[i] if len(node.args) > i else 1.0 for i in (1, 2, 3))
    if node.op is aten.celu.default:
        input_scale = 1.0 / alpha

    def multiplier(x: Tensor, b: Tensor) -> Tensor:
        positive = relu_multiplier(x, b)
        low_x, low_b = x.clamp(max=0.0) * input_scale, b.clamp(max=0.0) * input_scale
        curve = _divided_difference(torch.exp, low_x, low_b)
        return (1.0 - positive) * curve * (alpha * scale * input_scale) + positive * scale

    return multiplier


def _divided_difference(f: Callable[[Tensor], Tensor], x: Tensor, b: Tensor, relative: bool = False) -> Tensor:
    """(f(x) - f(b)) / (x - b) for a smooth f; where x and b are so near that the difference would be rounding noise,
    the derivative at their midpoint, which is off by f'''·Δ²/24 only.

    relative: nearness is measured against |x|, for functions with a pole or branch point at 0.
    """
    difference = x - b
    near = torch.finfo(difference.dtype).eps ** (1 / 3)
    scale = torch.maximum(x.abs(), b.abs()) if relative else 1.0
    small = difference.abs() < near * scale
    small = small | (difference == 0)
    quotient = (f(x) - f(b)) / torch.where(small, torch.ones_like(difference), difference)
    if not bool(small.any()):
        return quotient
    with torch.enable_grad():
        middle = ((x + b) * 0.5).detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(middle).sum(), middle)
    return torch.where(small, slope, quotient)


def _smooth(relative: bool = False) -> Callable[[Node], Callable[[Tensor, Tensor], Tensor]]:
    def of(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
        def f(t: Tensor) -> Tensor:
            return node.op(t, *node.args[1:], **node.kwargs)  # type: ignore[no-any-return]

        return lambda x, b: _divided_difference(f, x, b, relative)

    return of


def _reciprocal(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, b: -1.0 / (x * b)


def _sqrt(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, b: 1.0 / (x.sqrt() + b.sqrt())


def _rsqrt(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, b: _rsqrt_slope(x.rsqrt(), b.rsqrt())


def _rsqrt_slope(s_x: Tensor, s_b: Tensor) -> Tensor:
    """(s_x - s_b) / (v_x - v_b) for s = v^-½, without cancellation."""
    return -(s_x * s_b).square() / (s_x + s_b)


def _pow(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    exponent = node.args[1]
    if exponent == 2:
        return lambda x, b: x + b
    return _smooth(relative=exponent != int(exponent) or exponent < 0)(node)


def _check_same_shape(node: Node) -> None:
    if len(node.inputs) != 1 or node.input_shapes[0] != node.output_shape:
        raise refuse(node, "is supported as a function of one followed tensor only")
    if any(isinstance(arg, Tensor) for arg in node.args[1:]):
        raise refuse(node, "is supported with plain numbers as its parameters only")


def _pointwise(multiplier: Callable[[Node], Callable[[Tensor, Tensor], Tensor]]) -> Rule:
    """The rescale rule for a function of one number. On a CPU in blocks, so that temporaries stay in cache."""

    def backward(step: Step, g: list[Tensor], owned: bool) -> list[Tensor | None]:
        rule = multiplier(step.x)
        out = g[0]
        threads = torch.get_num_threads()
        block = _SERIAL if threads < _MANY_THREADS else 2 * _SERIAL * threads
        if out.is_cuda or out.numel() <= block:
            x, baseline = step.inputs(0)
            return [step.lift(out).mul(rule(x, baseline)).flatten(0, 2)]
        layout = _layout(step.x.saved[0]) or torch.contiguous_format
        if not owned or not out.is_contiguous(memory_format=layout):
            out = out.clone(memory_format=layout)
        x = _flat(step.x.saved[0].contiguous(memory_format=layout), layout, step.b)
        baseline = _flat(step.baseline.saved[0].contiguous(memory_format=layout), layout, step.r)
        flat = _flat(out, layout, step.pairs).view(step.b, step.r, -1)
        width = max(block // step.r, 512)
        for i in range(step.b):
            for start in range(0, flat.shape[-1], width):
                part = slice(start, start + width)
                flat[i, :, part].mul_(rule(x[i, None, part], baseline[:, part]))
        return [out]

    return Rule(Keep.INPUTS, _check_same_shape, backward)


def _layout(tensor: Tensor) -> torch.memory_format | None:
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _flat(tensor: Tensor, layout: torch.memory_format, rows: int) -> Tensor:
    """(rows, ...) in the order of memory, as a view (rows, -1)."""
    if layout is torch.channels_last:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(rows, -1)


def _unflat(tensor: Tensor, layout: torch.memory_format, shape: tuple[int, ...]) -> Tensor:
    """What `_flat` undoes: a view with the shape (rows, C, ...)."""
    if layout is torch.channels_last:
        return tensor.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
    return tensor.view(shape)


# ------------------------------------------------------------------------------------- pooling, softmax, normalisation


def _max_pool(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """Each window's g·Δout goes to where its maximum stands: in the input where that is larger, else in the baseline.

    With m = max(o_x, o_b), g·(m - o_b) goes to the input's winner and g·(o_x - m) to the baseline's; one of the two is
    zero, and at the other |Δin| >= |Δout|, so that the multiplier lies in [0, 1]. Overlapping windows accumulate.
    """
    layout = _layout(step.x.saved[0]) or torch.contiguous_format
    x, x_out, x_at = (t.unsqueeze(1) for t in _pooled(step.x, step.b, layout))
    base, base_out, base_at = (t.unsqueeze(0) for t in _pooled(step.baseline, step.r, layout))
    all_pairs = (step.b, step.r, -1, -1)
    x_wins = x_out > base_out
    change = torch.where(
        x_wins,
        x_out - base.expand(all_pairs).gather(-1, x_at.expand(all_pairs)),
        x.expand(all_pairs).gather(-1, base_at.expand(all_pairs)) - base_out,
    )
    no_change = change == 0
    share = ((x_out - base_out) / change.masked_fill_(no_change, 1.0)).masked_fill_(no_change, 1.0)
    sent = share.mul_(step.lift(_flat(g[0].contiguous(memory_format=layout), layout, g[0].shape[0])))
    out = torch.zeros(*sent.shape[:3], x.shape[-1], dtype=sent.dtype, device=sent.device)
    out.scatter_add_(-1, torch.where(x_wins, x_at, base_at), sent)
    return [_unflat(out, layout, step.shape(0))]


def _pooled(node: Node, samples: int, layout: torch.memory_format) -> list[Tensor]:
    """Input, output and winners (as places in a sample's memory) of a pooling, each (samples, k, -1)."""
    values, out, at = (_flat(t.contiguous(memory_format=layout), layout, t.shape[0]) for t in node.saved)
    channels, places = node.input_shapes[0][1], math.prod(node.input_shapes[0][2:])
    position = torch.arange(at.shape[1], device=at.device)
    if layout is torch.channels_last:
        at = at * channels + position % channels
    else:
        at = at + position // (at.shape[1] // channels) * places
    return [_lift(t, samples) for t in (values, out, at)]


def _softmax(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """exp(x)·(1/Σexp(x)): rescale for exp and reciprocal, midpoint for the product; in float64, since it shifts both
    sides of a pair by the same amount and so meets large exponents."""
    dim = step.x.args[1] % len(step.x.input_shapes[0]) + 2
    x, b = (t.double() for t in step.inputs(0))
    shift = (x.amax(dim, keepdim=True) + b.amax(dim, keepdim=True)) * 0.5
    x, b = x - shift, b - shift
    e_x, e_b = x.exp(), b.exp()
    r_x, r_b = 1.0 / e_x.sum(dim, keepdim=True), 1.0 / e_b.sum(dim, keepdim=True)
    out = step.lift(g[0]).double()
    through_sum = (out * (e_x + e_b) * 0.5).sum(dim, keepdim=True) * -(r_x * r_b)
    result = (out * (r_x + r_b) * 0.5 + through_sum) * _divided_difference(torch.exp, x, b)
    return [result.to(g[0].dtype).flatten(0, 2)]


def _normalise(g: Tensor, x: Tensor, b: Tensor, eps: float, dims: list[int]) -> Tensor:
    """(x - mean)·(variance + eps)^-½ as a composition: the mean is linear, the square and the product take the midpoint
    rule, the root the rescale rule."""
    c_x, c_b = x - x.mean(dims, keepdim=True), b - b.mean(dims, keepdim=True)
    s_x = (c_x.square().mean(dims, keepdim=True) + eps).rsqrt()
    s_b = (c_b.square().mean(dims, keepdim=True) + eps).rsqrt()
    count = math.prod(x.shape[dim] for dim in dims)
    middle = (c_x + c_b) * 0.5
    through_scale = (g * middle).sum(dims, keepdim=True) * _rsqrt_slope(s_x, s_b) * (2.0 / count)
    out = g * ((s_x + s_b) * 0.5) + through_scale * middle
    return out - out.mean(dims, keepdim=True)


def _layer_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    _, normalized_shape, weight, _, eps = step.x.args
    x, b = step.inputs(0)
    out = step.lift(g[0] if weight is None else g[0] * weight)
    return [_normalise(out, x, b, eps, [-1 - i for i in range(len(normalized_shape))]).flatten(0, 2)]


def _group_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    _, weight, _, _, _, _, groups, eps = step.x.args
    out = g[0] if weight is None else g[0] * weight.reshape(1, -1, *[1] * (g[0].ndim - 2))
    x, b = (_in_groups(t, groups) for t in step.inputs(0))
    result = _normalise(_in_groups(step.lift(out), groups), x, b, eps, [-1])
    return [result.reshape(step.shape(0))]


def _in_groups(tensor: Tensor, groups: int) -> Tensor:
    """(b, r, k, C, ...) -> (b, r, k, groups, -1)"""
    return tensor.reshape(*tensor.shape[:3], groups, -1)


def _check_normalisation(node: Node) -> None:
    if len(node.inputs) != 1:
        raise refuse(node, "has a weight that depends on the input")


# ------------------------------------------------------------------------------------------------------------ the table


def _rule(
    backward: Callable[..., Any],
    check: Callable[[Node], None] | None = None,
    keep: Keep = Keep.NOTHING,
    *,
    one_output: bool = False,
) -> Rule:
    return Rule(keep, check, lambda step, g, owned: backward(step, g), one_output)


def _table() -> dict[OpOverload, Rule]:
    table: dict[OpOverload, Rule] = {}

    def add(rule: Rule, *names: str) -> None:
        for name in names:
            packet, _, overload = name.partition(".")
            found = getattr(getattr(aten, packet, None), overload or "default", None)
            if found is not None:  # some operations exist in some versions of torch only
                table[found] = rule

    add(_rule(_convolution, _check_convolution), "convolution")
    add(
        _rule(_batch_norm, _check_batch_norm, one_output=True),
        *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"),
    )
    add(_rule(_addmm, _check_addmm), "addmm")
    add(_rule(_mm, _check_mm), "mm")
    add(_rule(_bmm, _check_rows, Keep.FACTORS), "bmm")
    add(_rule(_reshape), "view", "_unsafe_view", "reshape", "_reshape_alias")
    add(_rule(_expand, _check_expand), "expand")
    add(_rule(_permute, _check_dims), "permute")
    identity = Rule(Keep.NOTHING, None, lambda step, g, owned: g, identity=True)
    add(identity, "clone", "detach", "alias", "contiguous", "lift_fresh", "as_strided")
    add(_rule(_cast, _check_cast), "_to_copy")
    add(
        _rule(_linear, _check_dims),
        *("transpose.int", "unsqueeze", "squeeze.dim", "squeeze.dims", "select.int", "cat", "stack"),
        *("split.Tensor", "split_with_sizes", "unbind.int", "mean.dim", "sum.dim_IntList", "flip", "roll", "narrow"),
        *("index_select", "cumsum"),
    )
    add(_rule(_linear, _check_slice), "slice.Tensor")
    add(
        _rule(_linear, _check_pool),
        *("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest2d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "upsample_nearest2d.vec"),
        *("upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "_upsample_nearest_exact2d.vec"),
        *("reflection_pad2d", "replication_pad2d"),
    )
    add(_rule(_linear, _check_padding), "constant_pad_nd")
    add(_rule(_linear, _check_image), "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col")
    add(_rule(_linear, _check_elementwise), "where.self", "masked_fill.Scalar")
    add(_rule(_add, _check_elementwise), "add.Tensor", "add.Scalar")
    add(_rule(_sub, _check_elementwise), "sub.Tensor", "sub.Scalar")
    add(_rule(_rsub, _check_elementwise), "rsub.Tensor", "rsub.Scalar")
    add(_rule(_neg, _check_elementwise), "neg")
    add(_rule(_mul, _check_elementwise, Keep.FACTORS), "mul.Tensor", "mul.Scalar")
    add(_rule(_div, _check_div), "div.Scalar")
    add(_rule(_div, _check_div, Keep.INPUTS), "div.Tensor")
    add(_pointwise(lambda node: relu_multiplier), "relu")
    add(_pointwise(_leaky_relu), "leaky_relu")
    add(_rule(_prelu, _check_prelu, Keep.INPUTS), "_prelu_kernel")
    add(_pointwise(_hardtanh), "hardtanh")
    add(_pointwise(lambda node: lambda x, b: _hardtanh_multiplier(x, b, 0.0, 6.0)), "relu6")
    add(_pointwise(_clamp), "clamp")
    add(_pointwise(_clamp_min), "clamp_min")
    add(_pointwise(_hardsigmoid), "hardsigmoid")
    add(_pointwise(_hardswish), "hardswish")
    add(_pointwise(_abs), "abs")
    add(_pointwise(_elu), "elu", "celu")
    add(_pointwise(_smooth()), "sigmoid", "tanh", "silu", "gelu", "mish", "softplus", "exp", "erf", "log_sigmoid")
    add(_pointwise(_smooth(relative=True)), "log")
    add(_pointwise(_reciprocal), "reciprocal")
    add(_pointwise(_sqrt), "sqrt")
    add(_pointwise(_rsqrt), "rsqrt")
    add(_pointwise(_pow), "pow.Tensor_Scalar")
    add(
        _rule(_max_pool, _check_pool, Keep.ALL),
        *("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    )
    add(_rule(_softmax, _check_dims, Keep.INPUTS), "_softmax", "_safe_softmax")
    add(_rule(_layer_norm, _check_normalisation, Keep.INPUTS, one_output=True), "native_layer_norm")
    add(_rule(_group_norm, _check_normalisation, Keep.INPUTS, one_output=True), "native_group_norm")
    return table


def _check_rows(node: Node) -> None:
    rows = node.output_shape[0]
    if any(shape[0] != rows for shape in node.input_shapes):
        raise refuse(node, "broadcasts along the first dimension, which holds the samples")


def _check_padding(node: Node) -> None:
    if node.output_shape[0] != node.input_shapes[0][0] or len(node.args[1]) >= 2 * len(node.input_shapes[0]):
        raise refuse(node, "pads the first dimension, which holds the samples")


def _check_image(node: Node) -> None:
    if len(node.input_shapes[0]) != 4:
        raise refuse(node, "has no batch dimension")


RULES = _table()

# what depends on the shape of a tensor, and not on its values
CONSTANT_OPS = frozenset(
    op
    for name in ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty")
    if (op := getattr(getattr(aten, name), "default", None)) is not None
)

# operations whose arguments hold the number of rows
RESHAPES = frozenset(getattr(aten, name).default for name in ("view", "_unsafe_view", "reshape", "_reshape_alias"))

ROWS_IN_ARGUMENTS = frozenset(
    getattr(aten, name).default
    for name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "native_group_norm")
)
