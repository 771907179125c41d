"""Prepared rows as tensors on a device: what every stage that runs a model starts from."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lvlmva_core.models import predict_logits
from lvlmva_core.samples import Split, read_images, rows_of_ids, rows_of_split, to_unit_range


def read_split(images: Path, samples: pd.DataFrame, split: str, device: torch.device) -> Split:
    """All samples of a split, in the order of the table. Raises InputError where there is no such split."""
    return read_rows(images, samples.iloc[rows_of_split(samples, split)], device)


def read_sample_rows(images: Path, samples: pd.DataFrame, ids: list[str], device: torch.device) -> Split:
    """Samples in the order of `ids`. Raises InputError naming the first that is not there."""
    return read_rows(images, samples.iloc[rows_of_ids(samples, ids)], device)


def read_masked(
    images: Path, samples: pd.DataFrame, ids: list[str], masks: np.ndarray, device: torch.device
) -> tuple[Split, torch.Tensor]:
    """Samples in the order of `ids`, and their masks as a tensor: `lvlmva_core.controls.MaskSet` on a device."""
    return read_sample_rows(images, samples, ids, device), torch.from_numpy(masks).to(device)


def read_rows(images: Path, chosen: pd.DataFrame, device: torch.device) -> Split:
    """These rows of the sample table, whose index is the row in images.zarr, in their order."""
    pixels = torch.from_numpy(to_unit_range(read_images(images, chosen.index.to_numpy())))
    return Split(pixels.to(device), torch.from_numpy(chosen["label"].to_numpy(copy=True)).to(device), chosen)


def logits_of_rows(
    model: torch.nn.Module, images: Path, chosen: pd.DataFrame, device: torch.device, batch_size: int = 500
) -> torch.Tensor:
    """`predict_logits` of these rows of the sample table, of which no more than a batch is in memory."""
    parts = [chosen.iloc[first : first + batch_size] for first in range(0, len(chosen), batch_size)]
    return torch.cat([predict_logits(model, read_rows(images, part, device).images, batch_size) for part in parts])


def arrays_of(*splits: Split) -> list[np.ndarray]:
    """Images and labels of each, as numpy has them: what names the work that is done on them."""
    return [tensor.cpu().numpy() for split in splits for tensor in (split.images, split.labels)]
