"""How a model is run: device and threads, eval mode, random draws of its own."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h has them


def set_up_compute(device: str, threads: int) -> "torch.device":
    """Fix the CPU threads, flush denormals (they slow a high-λ step tenfold), keep freed memory, return the device.

    Args:
        device: "cpu", "cuda" or "cuda:<n>".

    Raises:
        InputError: a CUDA device is asked for where there is none.
        ValueError: another device.
    """
    import torch  # here as below, so that a stage that has nothing to compute starts without it

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device '{device}': expected cpu, cuda or cuda:<n>")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"compute.device: no CUDA device for '{device}' on this machine; set it to cpu")
    # cuBLAS is deterministic only with a workspace of fixed size, which it reads when it starts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    torch.backends.cudnn.benchmark = False
    # the same as use_deterministic_algorithms(True, warn_only=True), which imports a compiler first (2 s)
    torch.set_deterministic_debug_mode("warn")
    return torch.device(device)


def _keep_freed_memory() -> None:
    """Let glibc keep large blocks that were freed. By default it gives each back to the system, which clears it page by
    page when it is taken anew: a third of the time of a step of a small convolutional network on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def own_draws(device: "torch.device", seed: int, epoch: int, process: int = 0) -> Iterator[None]:
    """Layers that draw random numbers (dropout) take them from (seed, epoch), and each of several processes from its
    number; the global generators are restored."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + epoch + (process << 52))
        yield


@contextmanager
def eval_mode(model: "nn.Module") -> Iterator[None]:
    """Eval mode for as long as the context lasts; each module's own mode is restored after."""
    # flags are set one by one: a module's own train() may do more than set a flag
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def attention_as_its_parts() -> Iterator[None]:
    """Attention by matrix products and a softmax, which have second derivatives and exact attribution rules.

    torch's fused kernels have neither, nor has the fast path of `MultiheadAttention` and `TransformerEncoderLayer`.
    """
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
