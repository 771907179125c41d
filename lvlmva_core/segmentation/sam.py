"""Regions by Segment Anything (Kirillov et al. 2023), through transformers' `SamModel` (the extra `sam`)."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lvlmva_core.errors import InputError

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of the channels in ImageNet, which SAM's inputs are scaled by


def load_sam(folder: Path, device: torch.device) -> Any:
    """Load a `SamModel` (ViT-B in LVLM-VA §5) that the user downloaded: config.json and model.safetensors in `folder`.

    Raises:
        InputError: transformers is not installed, or the folder holds no such model.
    """
    try:
        from transformers import SamModel
    except ImportError as error:
        raise InputError("segment.method 'sam' needs transformers: pip install 'lvlmva[sam]'") from error
    if not (folder / "model.safetensors").is_file() or not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: segment.sam_checkpoint must be a folder with config.json and model.safetensors of a SAM; "
            "download one (facebook/sam-vit-base) and give its folder"
        )
    model: Any = SamModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return model.eval().to(device)


def checkpoint_digest(folder: Path) -> str:
    """sha256 over the files of a checkpoint that decide its masks. Raises InputError where one is missing."""
    total = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        try:
            with (folder / name).open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(
                f"{folder / name}: cannot be read ({error.strerror}); see segment.sam_checkpoint"
            ) from error
    return total.hexdigest()


@torch.inference_mode()
def sam_regions(
    model: Any,
    image: np.ndarray,
    *,
    points_per_side: int = 16,
    points_per_batch: int = 64,
    least_quality: float = 0.88,
    least_stability: float = 0.95,
    stability_offset: float = 1.0,
    largest_overlap: float = 0.7,
) -> np.ndarray:
    """Ask SAM at a grid of points, keep its good and distinct masks, and cut the picture by them.

    Args:
        image: uint8 (C, H, W), C in {1, 3}.
        points_per_side: the grid asks at the centres of this many squared tiles.
        points_per_batch: how many points are decoded at once.
        least_quality: masks that the model itself gives a lower intersection over union are dropped.
        least_stability: so are masks whose area changes more than this when their logits move by `stability_offset`.
        largest_overlap: and masks with a larger intersection over union with a better one.

    Returns:
        int64 (H, W): 0 where there is no mask, else the number of the smallest mask that holds the pixel.
    """
    height, width = image.shape[1:]
    device = next(model.parameters()).device
    pixels, scale = prepared(image, model.config.vision_config.image_size, device)
    embedding = model.get_image_embeddings(pixels)
    centres = (torch.arange(points_per_side, dtype=torch.float32, device=device) + 0.5) / points_per_side * scale
    places = torch.cartesian_prod(centres * width, centres * height)  # x, y on the scaled picture
    masks, quality = [], []
    for part in torch.split(places, points_per_batch):
        answer = model(image_embeddings=embedding, input_points=part[None, :, None], multimask_output=True)
        logits = at_size(answer.pred_masks[0].flatten(0, 1), pixels.shape[-1], scale, (height, width))
        stable = _stability(logits, stability_offset) >= least_stability
        keep = stable & (answer.iou_scores[0].flatten() >= least_quality)
        masks.append((logits[keep] > 0).cpu().numpy())
        quality.append(answer.iou_scores[0].flatten()[keep].cpu().numpy())
    return partition(np.concatenate(masks), np.concatenate(quality), largest_overlap)


def prepared(image: np.ndarray, side: int, device: torch.device) -> tuple[Tensor, float]:
    """The picture scaled so that its longer side is `side`, normalised and padded with zeros; and the scale."""
    rgb = torch.from_numpy(np.array(np.broadcast_to(image, (3, *image.shape[1:])))).float().to(device) / 255
    scale = side / max(image.shape[1:])
    size = [round(length * scale) for length in image.shape[1:]]
    scaled = functional.interpolate(rgb[None], size, mode="bilinear", align_corners=False, antialias=scale < 1)
    mean, std = (torch.tensor(part, device=device)[:, None, None] for part in (MEAN, STD))
    return functional.pad((scaled - mean) / std, (0, side - size[1], 0, side - size[0])), scale


def at_size(logits: Tensor, side: int, scale: float, shape: tuple[int, int]) -> Tensor:
    """Mask logits (n, h, w) of the padded square back on the picture's pixels: (n, H, W)."""
    square = functional.interpolate(logits[None], (side, side), mode="bilinear", align_corners=False)
    cut = square[..., : round(shape[0] * scale), : round(shape[1] * scale)]
    return functional.interpolate(cut, shape, mode="bilinear", align_corners=False, antialias=scale > 1)[0]


def _stability(logits: Tensor, offset: float) -> Tensor:
    """Area with the threshold raised over the area with it lowered, (n,)."""
    inner, outer = (logits > offset).flatten(1).sum(1), (logits > -offset).flatten(1).sum(1)
    return inner / outer.clamp(min=1)


def partition(masks: np.ndarray, quality: np.ndarray, largest_overlap: float) -> np.ndarray:
    """Distinct masks by falling quality, then each pixel to the smallest of them that holds it."""
    kept: list[np.ndarray] = []
    for n in np.argsort(-quality, kind="stable"):
        mask = masks[n]
        overlap = max(((mask & other).sum() / max((mask | other).sum(), 1) for other in kept), default=0.0)
        if mask.any() and overlap <= largest_overlap:
            kept.append(mask)
    labels = np.zeros(masks.shape[1:], dtype=np.int64)
    by_area = sorted(range(len(kept)), key=lambda n: -int(kept[n].sum()))
    for n in by_area:  # smaller masks over larger ones
        labels[kept[n]] = n + 1
    return labels
