"""Where the samples stand in a tensor, and how a batch of samples becomes a batch of pairs there.

Most networks keep the samples in the first dimension. Attention layers move them (sequence first), merge them with
windows, heads or tokens, and bring them back.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SampleAxis(NamedTuple):
    """Dimension `dim` of a tensor holds the samples: its size is outer·n·inner, in this order, for n samples."""

    dim: int
    outer: int = 1

    def fits(self, shape: torch.Size, samples: int) -> bool:
        """Whether a tensor of this shape can hold so many samples here."""
        return self.dim < len(shape) and shape[self.dim] > 0 and shape[self.dim] % (self.outer * samples) == 0

    def resized(self, shape: torch.Size, samples: int, wanted: int) -> tuple[int, ...]:
        """The shape for `wanted` samples in the place of `samples`."""
        return (*shape[: self.dim], shape[self.dim] // samples * wanted, *shape[self.dim + 1 :])

    def to_front(self, tensor: Tensor, samples: int) -> Tensor:
        """(..., outer·n·inner, ...) -> (n, ..., outer·inner, ...); a view where outer or inner is 1."""
        if self.dim == 0 and self.outer == 1:
            return tensor.view(samples, tensor.shape[0] // samples, *tensor.shape[1:])
        split: Tensor = tensor.unflatten(self.dim, (self.outer, samples, -1))
        return split.movedim(self.dim + 1, 0).flatten(self.dim + 1, self.dim + 2)

    def from_front(self, tensor: Tensor) -> Tensor:
        """Inverse of `to_front`; copies unless the samples stand in the first dimension."""
        if self.dim == 0 and self.outer == 1:
            return tensor.flatten(0, 1)
        split: Tensor = tensor.unflatten(self.dim + 1, (self.outer, -1))
        return split.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 2)


FIRST = SampleAxis(0)
