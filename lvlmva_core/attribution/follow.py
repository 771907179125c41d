"""Where the samples stand after each operation, told from where they stood before; the same for all of its outputs.

Each function takes a recorded operation and the number of samples, and raises UnsupportedOperationError where the
operation works across samples. With one sample the place may be ambiguous: see `record`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from lvlmva_core.attribution.axes import SampleAxis
from lvlmva_core.attribution.tape import Node, Value, refuse

Follow = Callable[[Node, int], SampleAxis]


def argument(node: Node, name: str) -> Any:
    """An argument of the operation by its name, or its default."""
    for place, each in enumerate(node.op._schema.arguments):
        if each.name == name:
            if place < len(node.args):
                return node.args[place]
            return node.kwargs.get(name, each.default_value if each.has_default_value() else None)
    return None


def _dims(node: Node, ndim: int) -> list[int]:
    """The dimensions that the operation names, counted from 0."""
    found: list[int] = []
    for name in ("dim", "dims", "dim0", "dim1", "dimension"):
        given = argument(node, name)
        found += [given] if isinstance(given, int) else list(given or [])
    return [dim % ndim for dim in found]


def _apart(node: Node, dims: list[int], axis: SampleAxis) -> None:
    if not dims:
        raise refuse(node, "works along all dimensions, the samples' included")
    if axis.dim in dims:
        raise refuse(node, f"works along dimension {axis.dim}, which holds the samples")


def _same_axes(node: Node) -> SampleAxis:
    """The axis that all followed inputs share, dimension for dimension."""
    if len(set(node.input_axes)) > 1:
        raise refuse(node, "combines tensors whose samples stand in different dimensions")
    return node.input_axes[0]


def _of_one(node: Node) -> SampleAxis:
    """The axis of the one followed input of an operation whose weights are constants."""
    if len(node.inputs) != 1:
        raise refuse(node, "has a weight that depends on the input")
    return node.input_axes[0]


def unchanged(node: Node, samples: int) -> SampleAxis:
    """Functions of one number, and whatever else keeps every dimension."""
    return node.input_axes[0]


def along_other_dims(node: Node, samples: int) -> SampleAxis:
    """Dimensions stay, and the operation works along those that it names: softmax, cat, split, roll."""
    axis = _same_axes(node)
    _apart(node, _dims(node, len(node.input_shapes[0])), axis)
    return axis


def sliced(node: Node, samples: int) -> SampleAxis:
    """x[:, i] may slice the samples' dimension as a whole; nothing else may touch it."""
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    whole = start in (None, 0) and step in (None, 1) and (end is None or end >= torch.iinfo(torch.int64).max)
    return node.input_axes[0] if whole else along_other_dims(node, samples)


def reduced(node: Node, samples: int) -> SampleAxis:
    """Sums, means and norms over named dimensions."""
    axis, ndim = node.input_axes[0], len(node.input_shapes[0])
    dims = _dims(node, ndim)
    _apart(node, dims, axis)
    if argument(node, "dtype") is not None:
        raise refuse(node, "changes the dtype, which rounds")
    return axis if argument(node, "keepdim") else axis._replace(dim=axis.dim - sum(dim < axis.dim for dim in dims))


def removed(node: Node, samples: int) -> SampleAxis:
    """select, unbind: the named dimension goes. squeeze: the named ones go whose size is 1."""
    axis, shape = node.input_axes[0], node.input_shapes[0]
    dims = _dims(node, len(shape))
    _apart(node, dims, axis)
    if len(shape) - len(node.output_shape) != len(dims):
        dims = [dim for dim in dims if shape[dim] == 1]
    return axis._replace(dim=axis.dim - sum(dim < axis.dim for dim in dims))


def inserted(node: Node, samples: int) -> SampleAxis:
    """unsqueeze, stack: a dimension comes."""
    axis = _same_axes(node)
    (dim,) = _dims(node, len(node.output_shape))
    return axis._replace(dim=axis.dim + (dim <= axis.dim))


def permuted(node: Node, samples: int) -> SampleAxis:
    """permute, transpose, t, movedim."""
    axis, ndim = node.input_axes[0], len(node.input_shapes[0])
    order = list(range(ndim))
    if node.op is torch.ops.aten.permute.default:
        order = _dims(node, ndim)
    else:
        first, second = _dims(node, ndim) or (0, ndim - 1)
        order[first], order[second] = second, first
    return axis._replace(dim=order.index(axis.dim))


def viewed(node: Node, samples: int) -> SampleAxis:
    """A view keeps the order of elements: the samples' axis has the same stride in it before and after."""
    axis, source, target = node.input_axes[0], node.input_shapes[0], node.output_shape
    inner = source[axis.dim] // (axis.outer * samples)
    stride = inner * math.prod(source[axis.dim + 1 :])
    behind = 1
    for dim in range(len(target) - 1, -1, -1):
        ahead = behind * target[dim]
        if behind <= stride and stride * samples <= ahead:
            if stride % behind or ahead % (stride * samples):
                break
            return SampleAxis(dim, ahead // (stride * samples))
        behind = ahead
    raise refuse(node, f"from {tuple(source)} to {tuple(target)} does not keep the {samples} samples apart")


def broadcast(node: Node, samples: int) -> SampleAxis:
    """Operations on numbers at the same place, and expand, which repeats along other dimensions than the samples'."""
    shape = node.output_shape
    axes = set()
    for axis, source in zip(node.input_axes, node.input_shapes, strict=True):
        axes.add(axis._replace(dim=axis.dim + len(shape) - len(source)))
        if source[axis.dim] != shape[axis.dim + len(shape) - len(source)]:
            raise refuse(node, "broadcasts along the dimension that holds the samples")
    if len(axes) > 1:
        raise refuse(node, "combines tensors whose samples stand in different dimensions")
    return axes.pop()


def in_batches(node: Node, samples: int) -> SampleAxis:
    """What treats each entry of the first dimension on its own: convolutions, norms and pooling of images."""
    axis = node.input_axes[0]
    if axis.dim != 0:
        raise refuse(node, f"gets the samples in dimension {axis.dim}, and works across it")
    if len(node.input_axes) > 1:
        raise refuse(node, "has weights that depend on the input")
    return axis


def pooled(node: Node, samples: int) -> SampleAxis:
    """Pooling and interpolation of (n, C, ...)."""
    source, target = node.input_shapes[0], node.output_shape
    spatial = 3 if "3d" in str(node.op) else 2
    if len(source) != spatial + 2 or source[:2] != target[:2]:
        raise refuse(node, "has no batch dimension")
    return in_batches(node, samples)


def rearranged(node: Node, samples: int) -> SampleAxis:
    """What rearranges (n, C, H, W)."""
    if len(node.input_shapes[0]) != 4:
        raise refuse(node, "has no batch dimension")
    return in_batches(node, samples)


def folded(node: Node, samples: int) -> SampleAxis:
    """Patches (n, C·k·k, L) back to (n, C, H, W)."""
    if len(node.input_shapes[0]) != 3:
        raise refuse(node, "has no batch dimension")
    return in_batches(node, samples)


def padded(node: Node, samples: int) -> SampleAxis:
    """Padding of other dimensions than the samples'."""
    axis, source = node.input_axes[0], node.input_shapes[0]
    if axis.dim >= len(source) - len(node.args[1]) // 2:
        raise refuse(node, f"pads dimension {axis.dim}, which holds the samples")
    return axis


def normalised(node: Node, samples: int) -> SampleAxis:
    """LayerNorm and RMSNorm over the last dimensions."""
    axis = _of_one(node)
    if axis.dim >= len(node.input_shapes[0]) - len(argument(node, "normalized_shape")):
        raise refuse(node, f"works along dimension {axis.dim}, which holds the samples")
    return axis


def batch_normalised(node: Node, samples: int) -> SampleAxis:
    """BatchNorm by fixed statistics, or InstanceNorm, which torch runs as one picture with n·C channels."""
    axis = _of_one(node)
    training = argument(node, "training") or argument(node, "running_mean") is None
    as_instances = axis == SampleAxis(1) and node.input_shapes[0][0] == 1
    if not (as_instances or (axis.dim == 0 and not training)):
        raise refuse(node, "uses the statistics of the batch, which mixes samples (track_running_stats=False?)")
    return axis


def multiplied(node: Node, samples: int) -> SampleAxis:
    """mm, addmm, bmm, baddbmm: samples may stand in a batch dimension of both factors, or in rows or columns of one."""
    *_, left, right = (arg for arg in node.args[:3] if not isinstance(arg, int | float))
    followed = [factor for factor in (left, right) if isinstance(factor, Value)]
    axes = dict(zip(node.inputs, node.input_axes, strict=True))
    ndim, found = len(node.output_shape), {axes[factor] for factor in followed}
    batched = ndim == 3 and all(axis.dim == 0 for axis in found)
    by_left = len(followed) == 1 and followed[0] is left and next(iter(found)).dim == ndim - 2
    by_right = len(followed) == 1 and followed[0] is right and next(iter(found)).dim == ndim - 1
    if len(found) != 1 or not (batched or by_left or by_right):
        raise refuse(node, "multiplies along a dimension that holds the samples, which mixes them")
    added = [axes[value] for value in node.inputs if value not in (left, right)]
    if any(axis not in found for axis in added):
        raise refuse(node, "adds a tensor whose samples stand in another dimension")
    return found.pop()


def picked(node: Node, samples: int) -> SampleAxis:
    """Advanced indexing with constants: x[:, index] along dimensions other than the samples'."""
    axis, indices = node.input_axes[0], node.args[1]
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if any(indices[dim].dtype == torch.bool or isinstance(indices[dim], Value) for dim in used):
        raise refuse(node, "is supported with constant whole numbers as indices only")
    if used != list(range(used[0], used[-1] + 1)):
        raise refuse(node, "has indices that are not side by side")
    if axis.dim in used:
        raise refuse(node, f"picks from dimension {axis.dim}, which holds the samples")
    return (
        axis if axis.dim < used[0] else axis._replace(dim=axis.dim + len(node.output_shape) - len(node.input_shapes[0]))
    )
