"""Convolutions whose double backward is made of convolutions, for penalties on input gradients.

PyTorch's own double backward of a convolution takes grouped ones (depthwise: as many groups as channels) one group
after the other, and finds the weights' gradient by convolving with kernels as large as the picture. In closed form each
is one convolution or one of its gradients: with g = grad_x(y', w), which is linear in y' and in w,

    d<v, g> / d y' = conv(v, w)        d<v, g> / d w = grad_w(y', v)

Values agree with PyTorch's up to the order of sums.

And a way around oneDNN's gradient of narrow 1x1 convolutions, which writes where it must not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# oneDNN 3.13 (torch 2.15) gathers what a strided 1x1 convolution reads into a workspace, for the weights' gradient in
# channels_last. With fewer input channels than a block holds (8 with AVX2, 16 with AVX-512) it writes past its end: a
# crash, or wrong numbers (https://github.com/uxlfoundation/oneDNN/issues/6035).
BLOCK = 16

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]  # as aten's convolution takes it


class InputGradientsOnly(TorchFunctionMode):
    """While it is open, two-dimensional convolutions run as above, and BatchNorm that doesn't move as scale and shift.

    A graph that is built under it is differentiated twice: while it is open, by the input alone (create_graph;
    gradients of a convolution's weight are not made, as nobody asks for them), and after, by anything.
    """

    is_open = False

    def __enter__(self) -> "InputGradientsOnly":
        self.is_open = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self.is_open = False
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.conv2d, functional.conv2d):
            return self._convolve(function, *args, **kwargs)
        if function is functional.batch_norm:
            return _scale(function, *args, **kwargs)
        return function(*args, **kwargs)

    def _convolve(
        self,
        function: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if isinstance(padding, str) or input.ndim != 4:
            found: Tensor = function(input, weight, bias, stride, padding, dilation, groups)
            return found
        input, stride = _thinned(input, weight, stride, padding)
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        geometry = _pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups
        found = _Convolution.apply(input, weight, geometry, self)
        return found if bias is None else found + bias[:, None, None]


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value] * (2 // len(value))


def _scale(
    function: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None or input.ndim != 4:
        found: Tensor = function(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return found
    scale = torch.rsqrt(running_var + eps) if weight is None else weight * torch.rsqrt(running_var + eps)
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return torch.addcmul(shift[:, None, None], input, scale[:, None, None])


@contextmanager
def safe_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Around a model's forward whose backward makes weights' gradients: no convolution takes oneDNN's way of BLOCK."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if any(_is_narrow(layer.weight, layer.stride, layer.padding) for layer in layers):
        with _Thinning():
            yield
    else:
        yield


class _Thinning(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.conv2d, functional.conv2d):
            return self._convolve(function, *args, **kwargs)
        return function(*args, **kwargs)

    @staticmethod
    def _convolve(
        function: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        input, stride = _thinned(input, weight, stride, padding)
        found: Tensor = function(input, weight, bias, stride, padding, dilation, groups)
        return found


def _thinned(input: Tensor, weight: Tensor, stride: Any, padding: Any) -> tuple[Tensor, Any]:
    """What a narrow strided 1x1 convolution reads, and the stride 1: the same result."""
    if input.device.type != "cpu" or not _is_narrow(weight, stride, padding):
        return input, stride
    rows, columns = _pair(stride)
    return input[..., ::rows, ::columns], 1


def _is_narrow(weight: Tensor, stride: Any, padding: Any) -> bool:
    if weight.shape[1] >= BLOCK or weight.shape[2:] != (1, 1) or _pair(stride) == [1, 1]:
        return False
    return padding == "valid" or (not isinstance(padding, str) and not any(_pair(padding)))


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, geometry: Geometry, mode: InputGradientsOnly) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.mode = geometry, mode
        found: Tensor = torch.ops.aten.convolution(input, weight, None, *geometry)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        if ctx.mode.is_open:
            return _InputGradient.apply(gradient, weight, input, ctx.geometry), None, None, None
        wanted = [*ctx.needs_input_grad[:2], False]
        of_input, of_weight, _ = _gradients(gradient, input, weight, ctx.geometry, wanted)
        return of_input, of_weight, None, None


class _InputGradient(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.geometry = geometry
        found: Tensor = _gradients(gradient, input, weight, geometry, [True, False, False])[0]
        return found

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient, weight = ctx.saved_tensors
        of_gradient = of_weight = None
        if ctx.needs_input_grad[0]:
            of_gradient = torch.ops.aten.convolution(cotangent, weight, None, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            of_weight = _gradients(gradient, cotangent, weight, ctx.geometry, [False, True, False])[1]
        return of_gradient, of_weight, None, None


def _gradients(gradient: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]) -> Any:
    return torch.ops.aten.convolution_backward(gradient, input, weight, None, *geometry, wanted)
