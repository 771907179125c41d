"""Several processes that train one model together, as `torchrun` starts them: the curve is that of one process.

Every process holds all data and makes the same draws; each takes its share of every batch. What a batch makes is a mean
over processes of what each makes of its share: the gradients (by DistributedDataParallel, DDP), the figures of a curve,
and the statistics of BatchNorm. In a process of its own everything here does nothing.

`torch.distributed.init_process_group` says that there are several; all must make the same calls in the same order.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from lvlmva_core.compute import eval_mode
from lvlmva_core.errors import InputError
from lvlmva_core.models import predict_logits


def processes() -> int:
    """How many processes train together; 1 where torch.distributed was not set up."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """Which of them this one is, from 0. The first writes what is written."""
    return distributed.get_rank() if processes() > 1 else 0


def share(batch: Tensor, dim: int = 0) -> Tensor:
    """This process's part of what all hold alike: neighbours along `dim`, as many as the others have, to one."""
    return batch.tensor_split(processes(), dim)[number()]


def mean(value: Tensor) -> Tensor:
    """The mean over processes of a tensor that is part of no graph; the same bits in each."""
    if processes() == 1:
        return value
    summed = value.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(summed)
    return summed / processes()


def of_first(content: bytes | None) -> bytes | None:
    """What the first process holds; the others' is passed over."""
    if processes() == 1:
        return content
    held = [content]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def check_batch(name: str, size: int) -> None:
    """Raises InputError where a batch of `size` leaves a process without a sample."""
    if size < processes():
        raise InputError(
            f"{name}: a batch of {size} has no sample for each of {processes()} processes; take fewer processes, or "
            "another size"
        )


def check_plain(model: nn.Module) -> None:
    """Raises InputError where several processes are at it with the model already: here it is copied and differentiated
    twice, which a sharded one does not allow."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    sharded = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    if any(isinstance(module, sharded) for module in model.modules()):
        raise InputError(
            "the model is sharded by FSDP, which frees weights that a penalty's second backward needs "
            "(https://github.com/pytorch/pytorch/issues/172543); hand over the whole model, which DDP trains"
        )
    if isinstance(model, DistributedDataParallel):
        raise InputError("the model is wrapped in DistributedDataParallel; hand over `model.module`, which is wrapped")


def with_mean_gradients(model: nn.Module, images: Tensor, *, all_used: bool = False) -> nn.Module:
    """The model, or a DDP of it, which must be called once before each backward (further calls may pass it by).

    The gradient of each parameter then is the mean over processes. Parameters are made those of the first process.

    Args:
        images: (B, C, H, W), a few, which show whether the logits depend on all parameters. all_used: the loss does.
    """
    if processes() == 1:
        return model
    if not all_used:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with eval_mode(model):
            found = torch.autograd.grad(model(images).sum(), trained, allow_unused=True)
        all_used = all(gradient is not None for gradient in found)
    return DistributedDataParallel(model, find_unused_parameters=not all_used)


def predict_together(model: nn.Module, images: Tensor) -> Tensor:
    """`lvlmva_core.models.predict_logits`, each process for its share: logits (N, K) of all, the same in each."""
    if processes() == 1 or len(images) < processes():
        return predict_logits(model, images)
    mine = predict_logits(model, share(images))
    logits = mine.new_zeros((len(images), mine.shape[1]))
    share(logits).copy_(mine)
    distributed.all_reduce(logits)  # the others' are zeros
    return logits


@contextmanager
def whole_batch() -> Iterator[None]:
    """Around a step of one: BatchNorm that takes statistics of its batch takes those of all processes' batches."""
    if processes() == 1:
        yield
        return
    with _GlobalBatchNorm(), warnings.catch_warnings():
        # DDP takes the strides of an axis of length 1 for another layout, which they are not
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        yield


class _GlobalBatchNorm(TorchFunctionMode):
    """torch's SyncBatchNorm refuses tensors on a CPU, and replaces modules; here modules stay what they are."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.batch_norm:
            return _normalise(function, *args, **kwargs)
        return function(*args, **kwargs)


def _normalise(
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
    if not training:
        found: Tensor = function(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return found
    others = [0, *range(2, input.ndim)]
    each = [1, -1] + [1] * (input.ndim - 2)
    wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    values = wide.new_full((1,), input.numel() / input.shape[1])
    summed = _Sum.apply(torch.cat([wide.sum(others), values]))
    mean, n = summed[:-1] / summed[-1], summed[-1].detach()
    centred = wide - mean.view(each)
    variance = _Sum.apply(centred.square().sum(others)) / n
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (n / (n - 1))).to(running_var.dtype), momentum)
    scale = torch.rsqrt(variance + eps)
    result: Tensor = centred * (scale if weight is None else scale * weight).view(each)
    if bias is not None:
        result = result + bias.view(each)
    return result.to(input.dtype)


class _Sum(Function):
    """The sum over processes; its gradient is the sum of theirs, and may be differentiated again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        summed = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)  # type: ignore[no-any-return]
