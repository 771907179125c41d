"""Prepared rows as tensors on a device: what every stage that runs a model starts from."""

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from lvlmva_core.samples import read_images, rows_of_ids, rows_of_split, to_unit_range


def split_tensors(
    images: Path, samples: pd.DataFrame, split: str, device: torch.device
) -> tuple[Tensor, Tensor, pd.DataFrame]:
    """Images (float32 in [0, 1]), labels (int64) and table rows of a split."""
    return _tensors(images, samples.iloc[rows_of_split(samples, split)], device)


def sample_tensors(
    images: Path, samples: pd.DataFrame, ids: list[str], device: torch.device
) -> tuple[Tensor, Tensor, pd.DataFrame]:
    """Images (float32 in [0, 1]), labels (int64) and table rows of samples, in the order of `ids`."""
    return _tensors(images, samples.iloc[rows_of_ids(samples, ids)], device)


def _tensors(images: Path, chosen: pd.DataFrame, device: torch.device) -> tuple[Tensor, Tensor, pd.DataFrame]:
    pixels = torch.from_numpy(to_unit_range(read_images(images, chosen.index.to_numpy())))
    return pixels.to(device), torch.from_numpy(chosen["label"].to_numpy(copy=True)).to(device), chosen
