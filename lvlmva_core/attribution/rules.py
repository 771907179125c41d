"""DeepLIFT's rescale rule (Shrikumar et al. 2017) for each operation, over pairs of an input and a baseline.

Every rule keeps completeness: with Δ the difference between input and baseline, the multipliers `m` that it returns for
its inputs satisfy Σ m_in·Δin = Σ m_out·Δout. Then so does the whole network, whatever its shape.

A rule sees b inputs and r baselines, whose activations were computed once each, and multipliers of all b·r pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from lvlmva_core.attribution import follow
from lvlmva_core.attribution.axes import FIRST, SampleAxis
from lvlmva_core.attribution.follow import Follow, argument
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
    ran: int  # samples that ran for the inputs and for the baselines: the first b and r of them are wanted
    ran_baseline: int
    channel_scale: Tensor | None = None  # a factor per output channel that a following BatchNorm left to this operation

    @property
    def pairs(self) -> int:
        return self.b * self.r

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of input `index` for all pairs."""
        return self.x.input_axes[index].resized(self.x.input_shapes[index], self.ran, self.pairs)

    def inputs(self, index: int) -> tuple[Tensor, Tensor]:
        """The kept activations of input `index`, as (b, 1, ...) and (1, r, ...)."""
        axis = self.x.input_axes[index]
        x = axis.to_front(self.x.saved[index], self.ran)[: self.b]
        baseline = axis.to_front(self.baseline.saved[index], self.ran_baseline)[: self.r]
        return x.unsqueeze(1), baseline.unsqueeze(0)

    def middle(self, index: int) -> Tensor:
        """The mean of input and baseline, for all pairs in the form of input `index`."""
        x, baseline = self.inputs(index)
        return self.lower((x + baseline) * 0.5, index)

    def lift(self, g: Tensor) -> Tensor:
        """Multipliers at the output, as (b, r, ...)."""
        by_pair = self.x.axis.to_front(g, self.pairs)
        return by_pair.view(self.b, self.r, *by_pair.shape[1:])

    def lower(self, multipliers: Tensor, index: int = 0) -> Tensor:
        """(b, r, ...) in the form of input `index`."""
        return self.x.input_axes[index].from_front(multipliers.flatten(0, 1))

    def to(self, index: int, g: Tensor) -> Tensor:
        """Multipliers at a broadcast result, summed to the form of input `index`."""
        return g.sum_to_size(self.shape(index))

    def constant(self, tensor: Tensor) -> Tensor:
        """A tensor that does not depend on the input, repeated for the pairs where it holds something per sample."""
        return self.per_pair(tensor, _samples_dim(self.x, tensor))

    def per_pair(self, constant: Tensor, dim: int | None) -> Tensor:
        """The same where dimension `dim` holds something per sample; None says that none does."""
        if dim is None:
            return constant
        tile = _tile(self.x, constant, self.ran, dim)
        outer, inner = tile.shape[dim : dim + 2]
        shape = (*tile.shape[:dim], outer, self.pairs, inner, *tile.shape[dim + 2 :])
        return tile.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 2)


def _samples_dim(node: Node, constant: Tensor) -> int | None:
    """The dimension in which a constant holds something per sample; broadcasting aligns dimensions from the last."""
    axis, shape = node.input_axes[0], node.input_shapes[0]
    dim = axis.dim - len(shape) + constant.ndim
    return dim if dim >= 0 and constant.shape[dim] == shape[axis.dim] else None


def _tile(node: Node, constant: Tensor, samples: int, dim: int) -> Tensor:
    """The part of a constant that repeats from sample to sample, (..., outer, inner, ...)."""
    tiles: Tensor = constant.unflatten(dim, (node.input_axes[0].outer, samples, -1)).movedim(dim + 1, 0)
    if not torch.equal(tiles, tiles[:1].expand_as(tiles)):
        raise refuse(node, f"uses a constant {tuple(constant.shape)} that differs between the samples of a batch")
    return tiles[0]


def same_constants(x: Node, baseline: Node, samples: tuple[int, int]) -> bool:
    """Whether an operation had the same constants in both runs, but for a number of samples."""
    if x.op in COUNTS_IN_ARGUMENTS:
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
    if a.ndim != b.ndim:
        return False
    differ = [dim for dim in range(a.ndim) if a.shape[dim] != b.shape[dim]]
    grown = x.input_axes[0].outer * samples[0], baseline.input_axes[0].outer * samples[1]
    if len(differ) != 1 or a.shape[differ[0]] % grown[0] or b.shape[differ[0]] % grown[1]:
        return False
    parts = _tile(x, a, samples[0], differ[0]), _tile(baseline, b, samples[1], differ[0])
    return parts[0].shape == parts[1].shape and torch.equal(*parts)


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


def _follow_convolution(node: Node, samples: int) -> SampleAxis:
    if not isinstance(node.args[0], Value) or len(node.inputs) != 1:
        raise refuse(node, "has a weight that depends on the input")
    if len(node.input_shapes[0]) != len(node.args[1].shape):
        raise refuse(node, "has no batch dimension")
    return follow.in_batches(node, samples)


def batch_norm_scale(node: Node) -> Tensor:
    """The factor per channel of a BatchNorm in eval mode, (C,)."""
    weight, _, _, variance, _, _, eps = node.args[1:8]
    scale = torch.rsqrt(variance + eps)
    return scale if weight is None else scale * weight


def _batch_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    if _takes_statistics(step.x):
        return _instance_norm(step, g)
    scale = batch_norm_scale(step.x)
    if step.x.axis.dim == 1:  # one picture with the channels of all samples, and as many statistics
        scale = step.per_pair(scale, 0)
    return [g[0] * scale.reshape(1, -1, *[1] * (g[0].ndim - 2))]


def _keep_for_statistics(node: Node) -> Keep:
    return Keep.INPUTS if _takes_statistics(node) else Keep.NOTHING


def _takes_statistics(node: Node) -> bool:
    return bool(node.args[5]) or node.args[3] is None or node.args[4] is None


def _matrix_product(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """A product with a constant matrix is linear. Of two followed matrices each gets the other's midpoint, as in
    `_mul`; what is added passes through."""
    node = step.x
    *added, left, right = [arg for arg in node.args[:3] if not isinstance(arg, int | float)]
    beta, alpha = (argument(node, name) for name in ("beta", "alpha"))
    found: list[Tensor | None] = []
    if added and isinstance(added[0], Value):
        found.append(step.to(0, g[0] if beta == 1 else g[0] * beta))
    out = g[0] if alpha in (None, 1) else g[0] * alpha
    if isinstance(left, Value) and isinstance(right, Value):
        place = len(found)
        return [*found, out @ step.middle(place + 1).mT, step.middle(place).mT @ out]
    if isinstance(left, Value):
        return [*found, out @ _constant_matrix(step, right).mT]
    return [*found, _constant_matrix(step, left).mT @ out]


def _constant_matrix(step: Step, matrix: Tensor) -> Tensor:
    batched = matrix.ndim == 3 and step.x.axis.dim == 0
    return step.per_pair(matrix, 0 if batched else None)


def _reshape(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [g[0].reshape(step.shape(0))]


def _expand(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [g[0].sum_to_size(step.shape(0))]


def _cast(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [g[0]]


def _follow_cast(node: Node, samples: int) -> SampleAxis:
    dtype = node.kwargs.get("dtype")
    if dtype is not None:
        raise refuse(node, f"changes the dtype to {dtype}, which rounds; convert the model to one dtype")
    return follow.unchanged(node, samples)


def _permute(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    dims = [dim % g[0].ndim for dim in step.x.args[1]]
    inverse = [dims.index(dim) for dim in range(len(dims))]
    return [g[0].permute(inverse)]


def _linear(step: Step, g: list[Tensor | None]) -> list[Tensor | None]:
    """Any operation that is linear in what depends on the input: its transpose, by autograd at zero."""
    return _transposed(step, g, lambda constant: constant)


def _linear_beside_constants(step: Step, g: list[Tensor | None]) -> list[Tensor | None]:
    """The same where constants may hold something per sample, as a class token that was expanded does."""
    return _transposed(step, g, step.constant)


def _transposed(step: Step, g: list[Tensor | None], constant: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    first = next(t for t in g if t is not None)
    at = [
        torch.zeros((), dtype=first.dtype, device=first.device).expand(step.shape(i)).requires_grad_()
        for i in range(len(step.x.inputs))
    ]
    remaining = iter(at)

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return next(remaining)
        return constant(leaf) if isinstance(leaf, Tensor) else leaf

    is_value: Callable[[Any], bool] = lambda leaf: isinstance(leaf, Value)  # noqa: E731
    with torch.enable_grad():
        args = tree_map(fill, step.x.args, is_leaf=is_value)
        kwargs = tree_map(fill, step.x.kwargs, is_leaf=is_value)
        out = step.x.op(*args, **kwargs)
        outputs = out if isinstance(out, list | tuple) else (out,)
        used = [(o, t) for o, t in zip(outputs, g, strict=True) if t is not None]
        return list(torch.autograd.grad([o for o, _ in used], at, [t for _, t in used], allow_unused=True))


# ------------------------------------------------------------------------------------------- sums, products, quotients


def _operands(node: Node) -> tuple[Any, Any]:
    return node.args[0], node.args[1]


def _factor(step: Step, constant: Any) -> Any:
    return step.constant(constant) if isinstance(constant, Tensor) else constant


def _add(step: Step, g: list[Tensor], sign: float = 1.0) -> list[Tensor | None]:
    a, b = _operands(step.x)
    alpha = sign * step.x.kwargs.get("alpha", step.x.args[2] if len(step.x.args) > 2 else 1)
    scales = [1.0] * isinstance(a, Value) + [alpha] * isinstance(b, Value)
    return [step.to(i, g[0] if scale == 1 else g[0] * scale) for i, scale in enumerate(scales)]


def _sub(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return _add(step, g, -1.0)


def _rsub(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    a, b = _operands(step.x)
    alpha = step.x.kwargs.get("alpha", step.x.args[2] if len(step.x.args) > 2 else 1)
    scales = [-alpha] * isinstance(a, Value) + [1.0] * isinstance(b, Value)
    return [step.to(i, g[0] * scale) for i, scale in enumerate(scales)]


def _neg(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return [-g[0]]


def _mul(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """A product with a constant is linear. Of two followed factors, u·v, each gets the other's midpoint:
    Δ(uv) = v̄·Δu + ū·Δv, which is also the Shapley value of a product of two."""
    a, b = _operands(step.x)
    if isinstance(a, Value) and isinstance(b, Value):
        return [step.to(0, g[0] * step.middle(1)), step.to(1, g[0] * step.middle(0))]
    constant = _factor(step, b if isinstance(a, Value) else a)
    return [step.to(0, g[0] * constant)]


def _add_product(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """addcmul, w + value·u·v."""
    w, u, v = step.x.args[:3]
    value = argument(step.x, "value")
    out = g[0] if value == 1 else g[0] * value
    found: list[Tensor | None] = [step.to(0, g[0])] if isinstance(w, Value) else []
    place = len(found)
    if isinstance(u, Value) and isinstance(v, Value):
        return [*found, step.to(place, out * step.middle(place + 1)), step.to(place + 1, out * step.middle(place))]
    if isinstance(u, Value) or isinstance(v, Value):
        found.append(step.to(place, out * step.constant(v if isinstance(u, Value) else u)))
    return found


def _div(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """u/v as u·(1/v), the reciprocal by the rescale rule: Δ(1/v) = -Δv / (v_x·v_b)."""
    a, b = _operands(step.x)
    if not isinstance(b, Value):
        return [step.to(0, g[0] / _factor(step, b))]
    divisor = 1 if isinstance(a, Value) else 0
    x, baseline = step.inputs(divisor)
    slope = step.lower(-1.0 / (x * baseline), divisor)
    if not isinstance(a, Value):
        return [step.to(0, g[0] * _factor(step, a) * slope)]
    reciprocal = step.lower((1.0 / x + 1.0 / baseline) * 0.5, divisor)
    return [step.to(0, g[0] * reciprocal), step.to(1, g[0] * step.middle(0) * slope)]


def _follow_div(node: Node, samples: int) -> SampleAxis:
    if node.kwargs.get("rounding_mode") is not None:
        raise refuse(node, "rounds")
    return follow.broadcast(node, samples)


def _larger(step: Step, g: list[Tensor], sign: float = 1.0) -> list[Tensor | None]:
    """max(u, v) = v + relu(u - v), min(u, v) = v - relu(v - u): the rescale rule for relu; the rest is linear."""
    a, b = _operands(step.x)
    index = 0
    sides = []
    for operand in (a, b):
        if isinstance(operand, Value):
            both = [t.expand(step.b, step.r, *t.shape[2:]) for t in step.inputs(index)]
            sides.append([step.lower(t, index) for t in both])
            index += 1
        else:
            sides.append([step.constant(operand)] * 2)
    (u_x, u_b), (v_x, v_b) = sides
    share = relu_multiplier((u_x - v_x) * sign, (u_b - v_b) * sign)
    shares = [share] * isinstance(a, Value) + [1.0 - share] * isinstance(b, Value)
    return [step.to(i, g[0] * each) for i, each in enumerate(shares)]


def _smaller(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    return _larger(step, g, -1.0)


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
    slope = step.constant(step.x.args[1])
    x, baseline = step.inputs(0)
    share = step.lower(relu_multiplier(x, baseline))
    return [g[0] * (share + (1.0 - share) * slope)]


def _follow_prelu(node: Node, samples: int) -> SampleAxis:
    if len(node.inputs) != 1 or node.input_shapes[0] != node.output_shape:
        raise refuse(node, "has a slope that depends on the input")
    return follow.unchanged(node, samples)


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
    near: float | Tensor = torch.finfo(difference.dtype).eps ** (1 / 3)
    if relative:
        near = torch.maximum(x.abs(), b.abs()).mul_(near).add_(torch.finfo(difference.dtype).tiny)
    # 1 where the quotient is taken and 0 where the slope is; as numbers, since masks would cost more than functions do
    far = difference.abs().div_(near).clamp_(max=1.0).floor_()
    quotient = (f(x) - f(b)).div_(difference.add_(1.0 - far))
    middle = (x + b).mul_(0.5).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(f(middle).sum(), middle)
    return slope.lerp_(quotient, far)


def _smooth(relative: bool = False) -> Callable[[Node], Callable[[Tensor, Tensor], Tensor]]:
    def of(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
        def f(t: Tensor) -> Tensor:
            return node.op(t, *node.args[1:], **node.kwargs)  # type: ignore[no-any-return]

        return lambda x, b: _divided_difference(f, x, b, relative)

    return of


def _after_one(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, b: _divided_difference(torch.log, x + 1.0, b + 1.0, relative=True)


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


def _follow_function(node: Node, samples: int) -> SampleAxis:
    if len(node.inputs) != 1 or node.input_shapes[0] != node.output_shape:
        raise refuse(node, "is supported as a function of one followed tensor only")
    if any(isinstance(arg, Tensor) for arg in node.args[1:]):
        raise refuse(node, "is supported with plain numbers as its parameters only")
    return follow.unchanged(node, samples)


def _pointwise(multiplier: Callable[[Node], Callable[[Tensor, Tensor], Tensor]]) -> Rule:
    """The rescale rule for a function of one number. On a CPU in blocks, so that temporaries stay in cache."""

    def backward(step: Step, g: list[Tensor], owned: bool) -> list[Tensor | None]:
        rule = multiplier(step.x)
        out = g[0]
        threads = torch.get_num_threads()
        block = _SERIAL if threads < _MANY_THREADS else 2 * _SERIAL * threads
        if out.is_cuda or out.numel() <= block or step.x.axis != FIRST:
            x, baseline = step.inputs(0)
            return [step.lower(step.lift(out).mul(rule(x, baseline)))]
        layout = _layout(step.x.saved[0]) or torch.contiguous_format
        if not owned or not out.is_contiguous(memory_format=layout):
            out = out.clone(memory_format=layout)
        x = _flat(step.x.saved[0].contiguous(memory_format=layout), layout, step.ran)
        baseline = _flat(step.baseline.saved[0].contiguous(memory_format=layout), layout, step.ran_baseline)[: step.r]
        flat = _flat(out, layout, step.pairs).view(step.b, step.r, -1)
        width = max(block // step.r, 512)
        for i in range(step.b):
            for start in range(0, flat.shape[-1], width):
                part = slice(start, start + width)
                flat[i, :, part].mul_(rule(x[i, None, part], baseline[:, part]))
        return [out]

    return Rule(Keep.INPUTS, _follow_function, backward)


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
    x, x_out, x_at = (t[: step.b].unsqueeze(1) for t in _pooled(step.x, step.ran, layout))
    base, base_out, base_at = (t[: step.r].unsqueeze(0) for t in _pooled(step.baseline, step.ran_baseline, layout))
    all_pairs = (step.b, step.r, -1, -1)
    x_wins = x_out > base_out
    change = torch.where(
        x_wins,
        x_out - base.expand(all_pairs).gather(-1, x_at.expand(all_pairs)),
        x.expand(all_pairs).gather(-1, base_at.expand(all_pairs)) - base_out,
    )
    no_change = change == 0
    share = ((x_out - base_out) / change.masked_fill_(no_change, 1.0)).masked_fill_(no_change, 1.0)
    sent = share.mul_(
        _by_sample(_flat(g[0].contiguous(memory_format=layout), layout, g[0].shape[0]), step.pairs).unflatten(
            0, (step.b, step.r)
        )
    )
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
    return [_by_sample(t, samples) for t in (values, out, at)]


def _by_sample(tensor: Tensor, samples: int) -> Tensor:
    return tensor.view(samples, tensor.shape[0] // samples, *tensor.shape[1:])


def _follow_max_pool(node: Node, samples: int) -> SampleAxis:
    if node.input_axes[0] != FIRST:
        raise refuse(node, "is supported with the samples in the first dimension alone")
    return follow.pooled(node, samples)


def _softmax(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """exp(x - log Σexp(x)): rescale for both exps and the log, so that no product is split; multipliers are in [-1, 1].

    exp/Σexp by the midpoint would be complete as well, but its terms grow as e^|Δx| and cancel: a shift of all scores,
    to which softmax is blind, would drown the map.
    """
    scores = _Scores.of(step)
    out = scores.slopes_of_softmax().mul_(step.lift(g[0]))
    return [step.lower(scores.unmasked(out.sub_(scores.shares().mul_(out.sum(scores.dim, keepdim=True)))))]


def _log_softmax(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """x - log Σexp(x): rescale for exp and log, the difference is linear."""
    scores = _Scores.of(step)
    out = step.lift(g[0])
    return [step.lower(scores.unmasked(out - scores.shares() * out.sum(scores.dim, keepdim=True)))]


def _log_sum_exp(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """log Σexp(x): rescale for exp and log."""
    scores = _Scores.of(step)
    return [step.lower(scores.unmasked(_with_reduced(step, step.lift(g[0])) * scores.shares()))]


class _Scores(NamedTuple):
    """Inputs of a softmax along `dim`, as pairs.

    change: Δx (b, r, ...). change_of_log: Δ log Σexp(x). y_x, y_b: the softmax of inputs (b, 1, ...) and of baselines
    (1, r, ...); part_x, part_b: Σexp(x) of each as a share of the larger of the two. masked: where x is -inf.
    """

    change: Tensor
    change_of_log: Tensor
    y_x: Tensor
    y_b: Tensor
    part_x: Tensor
    part_b: Tensor
    masked: Tensor
    dim: list[int]

    @classmethod
    def of(cls, step: Step) -> "_Scores":
        dim, (x, b) = _reduced_dims(step), step.inputs(0)
        masked = (x == -math.inf) | (b == -math.inf)
        # a number whose exponential is 0 too, and that can be subtracted from itself
        x, b = x.clamp(min=-1e30), b.clamp(min=-1e30)
        # a score of 100 would leave float32 five digits of its exponential
        log_x, log_b = (t.double().logsumexp(dim, keepdim=True) for t in (x, b))
        largest = torch.maximum(log_x, log_b)
        return cls(
            change=x - b,
            change_of_log=(log_x - log_b).to(x.dtype),
            y_x=(x - log_x).exp().to(x.dtype),
            y_b=(b - log_b).exp().to(x.dtype),
            part_x=(log_x - largest).exp().to(x.dtype),
            part_b=(log_b - largest).exp().to(x.dtype),
            masked=masked,
            dim=dim,
        )

    def slopes_of_softmax(self) -> Tensor:
        """Δy / Δ log y."""
        return _slope_of_exp(self.change - self.change_of_log).mul_(torch.maximum(self.y_x, self.y_b))

    def shares(self) -> Tensor:
        """Multipliers of log Σexp(x) for each x, (Δe^x / Δx) / (ΔΣ / Δ log Σ): none below 0, and at most 1 in sum."""
        larger = torch.maximum(self.y_x * self.part_x, self.y_b * self.part_b)
        return _slope_of_exp(self.change).mul_(larger).div_(_slope_of_exp(self.change_of_log))

    def unmasked(self, multipliers: Tensor) -> Tensor:
        """What is masked has no part; nor has anything in a row in which all is masked."""
        return multipliers.masked_fill(self.masked, 0.0) if bool(self.masked.any()) else multipliers


def _slope_of_exp(change: Tensor) -> Tensor:
    """(e^u - e^v) / (u - v) as a share of the larger of e^u and e^v: (1 - e^-d) / d for d = |u - v|, with no pole and
    no cancellation, 1 for d = 0."""
    d = change.abs().neg_()
    slope = torch.expm1(d).div_(d)
    return slope.masked_fill_(d == 0, 1.0)


def _normalise(g: Tensor, x: Tensor, b: Tensor, eps: float, dims: list[int]) -> Tensor:
    """(x - mean)·(variance + eps)^-½: subtracting the mean is linear; what is left is divided by its size."""
    out = _scaled_to_one(g, x - x.mean(dims, keepdim=True), b - b.mean(dims, keepdim=True), eps, dims)
    return out - out.mean(dims, keepdim=True)


def _scaled_to_one(g: Tensor, x: Tensor, b: Tensor, eps: float, dims: list[int]) -> Tensor:
    """x·(mean x² + eps)^-½ as a composition: the square and the product take the midpoint rule, the root the rescale
    rule."""
    s_x = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    s_b = (b.square().mean(dims, keepdim=True) + eps).rsqrt()
    count = math.prod(x.shape[dim] for dim in dims)
    middle = (x + b) * 0.5
    through_scale = (g * middle).sum(dims, keepdim=True) * _rsqrt_slope(s_x, s_b) * (2.0 / count)
    return g * ((s_x + s_b) * 0.5) + through_scale * middle


def _layer_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    _, normalized_shape, weight, _, eps = step.x.args
    x, b = step.inputs(0)
    out = step.lift(g[0] if weight is None else g[0] * weight)
    return [step.lower(_normalise(out, x, b, eps, _last(len(normalized_shape))))]


def _rms_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    _, normalized_shape, weight, eps = step.x.args
    x, b = step.inputs(0)
    out = step.lift(g[0] if weight is None else g[0] * weight)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return [step.lower(_scaled_to_one(out, x, b, eps, _last(len(normalized_shape))))]


def _last(count: int) -> list[int]:
    return [-1 - place for place in range(count)]


def _group_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    _, weight, _, _, _, _, groups, eps = step.x.args
    out = step.lift(g[0] if weight is None else g[0] * weight.reshape(1, -1, *[1] * (g[0].ndim - 2)))
    x, b = (_in_groups(t, groups) for t in step.inputs(0))
    return [step.lower(_normalise(_in_groups(out, groups), x, b, eps, [-1]).reshape(out.shape))]


def _instance_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """torch runs it as the BatchNorm of one picture with n·C channels, whose weights repeat from sample to sample."""
    weight, eps = step.x.args[1], step.x.args[7]
    out = step.lift(g[0])
    if weight is not None:
        out = out * _tile(step.x, weight, step.ran, 0).reshape(-1, *[1] * (g[0].ndim - 2))
    x, b = step.inputs(0)
    return [step.lower(_normalise(out, x, b, eps, _last(g[0].ndim - 2)))]


def _reduced_dims(step: Step) -> list[int]:
    """The dimensions that were summed over, counted in (b, r, ...)."""
    named = argument(step.x, "dim")
    dims = [named] if isinstance(named, int) else named
    return sorted(dim % len(step.x.input_shapes[0]) + 2 for dim in dims)


def _with_reduced(step: Step, lifted: Tensor) -> Tensor:
    """Multipliers (b, r, ...) at the result of a reduction, with its dimensions in place as of size 1."""
    if not argument(step.x, "keepdim"):
        for dim in _reduced_dims(step):
            lifted = lifted.unsqueeze(dim)
    return lifted


def _variance(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """The mean is linear; of the squares, each gets the midpoint: Δ(c²) = 2·c̄·Δc, and the c̄ add up to 0."""
    dims, (x, b) = _reduced_dims(step), step.inputs(0)
    correction = argument(step.x, "correction")
    count = math.prod(x.shape[dim] for dim in dims) - (1 if correction is None else correction)
    middle = (x + b) * 0.5
    middle = middle - middle.mean(dims, keepdim=True)
    out: Tensor | float = 0.0
    if g[0] is not None:
        out = _with_reduced(step, step.lift(g[0])) * middle * (2.0 / count)
    if len(g) > 1 and g[1] is not None:  # var_mean
        out = out + _with_reduced(step, step.lift(g[1])).expand_as(x + b) / math.prod(x.shape[dim] for dim in dims)
    assert isinstance(out, Tensor)
    return [step.lower(out)]


def _deviation(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """The root of the variance by the rescale rule."""
    dims, (x, b) = _reduced_dims(step), step.inputs(0)
    correction = argument(step.x, "correction")
    count = math.prod(x.shape[dim] for dim in dims) - (1 if correction is None else correction)
    c_x, c_b = x - x.mean(dims, keepdim=True), b - b.mean(dims, keepdim=True)
    size = (c_x.square().sum(dims, keepdim=True) / count).sqrt() + (c_b.square().sum(dims, keepdim=True) / count).sqrt()
    out = _with_reduced(step, step.lift(g[0])) / size.masked_fill(size == 0, 1.0)
    return [step.lower(out * (c_x + c_b) / count)]


def _largest(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """amax, max along dimensions: as max-pooling. With m = max(o_x, o_b), g·(m - o_b) goes to where the input's largest
    stands and g·(o_x - m) to where the baseline's does, divided by the change there."""
    dims, (x, b) = _reduced_dims(step), step.inputs(0)
    sign = -1.0 if "min" in str(step.x.op) else 1.0
    full = (step.b, step.r, *x.shape[2:])
    last = list(range(-len(dims), 0))
    x, b = (_flat_at_end((t * sign).expand(full), dims) for t in (x, b))
    out = _flat_at_end(_with_reduced(step, step.lift(g[0])), dims)
    (x_out, x_at), (b_out, b_at) = x.max(-1, keepdim=True), b.max(-1, keepdim=True)
    x_wins = x_out > b_out
    change = torch.where(x_wins, x_out - b.gather(-1, x_at), x.gather(-1, b_at) - b_out)
    still = change == 0
    share = ((x_out - b_out) / change.masked_fill(still, 1.0)).masked_fill(still, 1.0)
    sent = torch.zeros_like(x).scatter_(-1, torch.where(x_wins, x_at, b_at), share * out)
    shape = [full[dim] for dim in range(len(full)) if dim not in dims] + [full[dim] for dim in dims]
    return [step.lower(sent.view(shape).movedim(last, dims))]


def _flat_at_end(tensor: Tensor, dims: list[int]) -> Tensor:
    """The named dimensions as one, the last."""
    return tensor.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims))


def _gated(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """GLU, u·sigmoid(v) of the halves u and v: midpoint for the product, rescale for the sigmoid."""
    dim = argument(step.x, "dim") % len(step.x.input_shapes[0]) + 2
    (u_x, v_x), (u_b, v_b) = (t.chunk(2, dim) for t in step.inputs(0))
    out = step.lift(g[0])
    to_u = out * ((v_x.sigmoid() + v_b.sigmoid()) * 0.5)
    to_v = out * ((u_x + u_b) * 0.5) * _divided_difference(torch.sigmoid, v_x, v_b)
    return [step.lower(torch.cat([to_u, to_v], dim))]


def _vector_norm(step: Step, g: list[Tensor]) -> list[Tensor | None]:
    """√Σx²: squares and root by the rescale rule, without a difference of near numbers; 0 where both are 0."""
    x, b = step.inputs(0)
    dims = _reduced_dims(step)
    out = _with_reduced(step, step.lift(g[0]))
    length = x.square().sum(dims, keepdim=True).sqrt() + b.square().sum(dims, keepdim=True).sqrt()
    return [step.lower(out * (x + b) / length.masked_fill(length == 0, 1.0))]


def _follow_vector_norm(node: Node, samples: int) -> SampleAxis:
    if argument(node, "ord") != 2:
        raise refuse(node, f"of order {argument(node, 'ord')} has no rule; order 2 has one")
    return follow.reduced(node, samples)


def _in_groups(tensor: Tensor, groups: int) -> Tensor:
    """(b, r, k, C, ...) -> (b, r, k, groups, -1)"""
    return tensor.reshape(*tensor.shape[:3], groups, -1)


# ------------------------------------------------------------------------------------------------------------ the table


def _rule(
    backward: Callable[..., Any],
    follow: Follow,
    keep: Keep | Callable[[Node], Keep] = Keep.NOTHING,
    *,
    one_output: bool = False,
) -> Rule:
    return Rule(keep, follow, lambda step, g, owned: backward(step, g), one_output)


def _table() -> dict[OpOverload, Rule]:
    table: dict[OpOverload, Rule] = {}

    def add(rule: Rule, *names: str) -> None:
        for name in names:
            packet, _, overload = name.partition(".")
            found = getattr(getattr(aten, packet, None), overload or "default", None)
            if found is not None:  # some operations exist in some versions of torch only
                table[found] = rule

    add(_rule(_convolution, _follow_convolution), "convolution")
    add(
        _rule(_batch_norm, follow.batch_normalised, _keep_for_statistics, one_output=True),
        *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"),
    )
    add(_rule(_matrix_product, follow.multiplied, Keep.FACTORS), "mm", "addmm", "bmm", "baddbmm")
    add(_rule(_reshape, follow.viewed), "view", "_unsafe_view", "reshape", "_reshape_alias")
    add(_rule(_expand, follow.broadcast), "expand")
    add(_rule(_permute, follow.permuted), "permute")
    identity = Rule(Keep.NOTHING, follow.unchanged, lambda step, g, owned: g, identity=True)
    add(identity, "clone", "detach", "alias", "contiguous", "lift_fresh", "as_strided")
    add(_rule(_cast, _follow_cast), "_to_copy")
    add(_rule(_linear, follow.permuted), "transpose.int", "t")
    add(_rule(_linear, follow.inserted), "unsqueeze")
    add(_rule(_linear, follow.removed), "squeeze.dim", "squeeze.dims", "select.int", "unbind.int")
    add(_rule(_linear, follow.reduced), "mean.dim", "sum.dim_IntList")
    add(
        _rule(_linear, follow.along_other_dims),
        *("split.Tensor", "split_with_sizes", "flip", "roll", "narrow", "index_select", "cumsum", "unfold"),
    )
    add(_rule(_linear, follow.sliced), "slice.Tensor")
    add(_rule(_linear, follow.broadcast), "repeat")
    add(_rule(_linear, follow.picked), "index.Tensor")
    add(_rule(_linear_beside_constants, follow.along_other_dims), "cat")
    add(_rule(_linear_beside_constants, follow.inserted), "stack")
    add(_rule(_linear_beside_constants, follow.broadcast), "where.self", "masked_fill.Scalar")
    add(
        _rule(_linear, follow.pooled),
        *("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest2d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "upsample_nearest2d.vec"),
        *("upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "_upsample_nearest_exact2d.vec"),
        *("reflection_pad2d", "replication_pad2d"),
    )
    add(_rule(_linear, follow.padded), "constant_pad_nd")
    add(_rule(_linear, follow.rearranged), "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col")
    add(_rule(_linear, follow.folded), "col2im")
    add(_rule(_add, follow.broadcast), "add.Tensor", "add.Scalar")
    add(_rule(_sub, follow.broadcast), "sub.Tensor", "sub.Scalar")
    add(_rule(_rsub, follow.broadcast), "rsub.Tensor", "rsub.Scalar")
    add(_rule(_neg, follow.unchanged), "neg")
    add(_rule(_mul, follow.broadcast, Keep.FACTORS), "mul.Tensor", "mul.Scalar")
    add(_rule(_add_product, follow.broadcast, Keep.FACTORS), "addcmul")
    add(_rule(_div, _follow_div), "div.Scalar")
    add(_rule(_div, _follow_div, Keep.INPUTS), "div.Tensor")
    add(_rule(_larger, follow.broadcast, Keep.INPUTS), "maximum")
    add(_rule(_smaller, follow.broadcast, Keep.INPUTS), "minimum")
    add(_pointwise(lambda node: relu_multiplier), "relu")
    add(_pointwise(_leaky_relu), "leaky_relu")
    add(_rule(_prelu, _follow_prelu, Keep.INPUTS), "_prelu_kernel")
    add(_pointwise(_hardtanh), "hardtanh")
    add(_pointwise(lambda node: lambda x, b: _hardtanh_multiplier(x, b, 0.0, 6.0)), "relu6")
    add(_pointwise(_clamp), "clamp")
    add(_pointwise(_clamp_min), "clamp_min")
    add(_pointwise(_hardsigmoid), "hardsigmoid")
    add(_pointwise(_hardswish), "hardswish")
    add(_pointwise(_abs), "abs")
    add(_pointwise(_elu), "elu", "celu")
    add(_pointwise(_smooth()), "sigmoid", "tanh", "silu", "gelu", "mish", "softplus", "exp", "erf", "log_sigmoid")
    add(_pointwise(_smooth()), "expm1", "sin", "cos", "atan", "sinh", "cosh")
    add(_pointwise(_smooth(relative=True)), "log")
    add(_pointwise(_after_one), "log1p")
    add(_pointwise(_reciprocal), "reciprocal")
    add(_pointwise(_sqrt), "sqrt")
    add(_pointwise(_rsqrt), "rsqrt")
    add(_pointwise(_pow), "pow.Tensor_Scalar")
    add(
        _rule(_max_pool, _follow_max_pool, Keep.ALL),
        *("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    )
    add(_rule(_softmax, follow.along_other_dims, Keep.INPUTS), "_softmax", "_safe_softmax")
    add(_rule(_log_softmax, follow.along_other_dims, Keep.INPUTS), "_log_softmax")
    add(_rule(_log_sum_exp, follow.reduced, Keep.INPUTS), "logsumexp")
    add(_rule(_largest, follow.reduced, Keep.INPUTS, one_output=True), "amax", "amin", "max.dim", "min.dim")
    add(_rule(_variance, follow.reduced, Keep.INPUTS), "var.correction", "var_mean.correction")
    add(_rule(_deviation, follow.reduced, Keep.INPUTS), "std.correction")
    add(_rule(_gated, follow.along_other_dims, Keep.INPUTS), "glu")
    add(_rule(_layer_norm, follow.normalised, Keep.INPUTS, one_output=True), "native_layer_norm")
    add(_rule(_rms_norm, follow.normalised, Keep.INPUTS, one_output=True), "_fused_rms_norm")
    add(_rule(_group_norm, follow.in_batches, Keep.INPUTS, one_output=True), "native_group_norm")
    add(_rule(_vector_norm, _follow_vector_norm, Keep.INPUTS), "linalg_vector_norm")
    return table


RULES = _table()

# what depends on the shape of a tensor, and not on its values
CONSTANT_OPS = frozenset(
    op
    for name in ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty")
    if (op := getattr(getattr(aten, name), "default", None)) is not None
)

# views keep the order of elements; which of them runs depends on the layout in memory
RESHAPES = frozenset(getattr(aten, name).default for name in ("view", "_unsafe_view", "reshape", "_reshape_alias"))

# operations whose arguments hold the number of samples
COUNTS_IN_ARGUMENTS = RESHAPES | {aten.expand.default, aten.native_group_norm.default}
