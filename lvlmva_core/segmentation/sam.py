"""Regions by Segment Anything (Kirillov et al. 2023), through transformers' `SamModel` (the extra `sam`)."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvlmva_core.errors import InputError


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

    The masks are those of transformers' pipeline `mask-generation` with one crop, the whole picture.

    Args:
        image: uint8 (C, H, W), C in {1, 3}.
        points_per_side: the grid asks at the centres of this many squared tiles.
        points_per_batch: how many points are decoded at once.
        least_quality: masks are kept whose intersection over union is above this by the model's own word.
        least_stability: and whose area changes less than this when their logits move by `stability_offset`.
        largest_overlap: of masks whose boxes overlap more than this (intersection over union), the best one is kept.

    Returns:
        int64 (H, W): 0 where there is no mask, else the number of the smallest mask that holds the pixel; masks are
        numbered from 1 by falling quality.
    """
    from PIL import Image
    from transformers import MaskGenerationPipeline, SamImageProcessor

    side = model.config.vision_config.image_size
    processor = SamImageProcessor(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    rgb = np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))
    generate: Any = MaskGenerationPipeline
    found = generate(model=model, image_processor=processor, device=model.device)(
        Image.fromarray(rgb),
        points_per_crop=points_per_side,
        points_per_batch=points_per_batch,
        pred_iou_thresh=least_quality,
        stability_score_thresh=least_stability,
        stability_score_offset=stability_offset,
        crops_nms_thresh=largest_overlap,
    )
    masks = np.array(found["masks"], dtype=bool).reshape(-1, *image.shape[1:])
    return smallest_on_top(masks[masks.any(axis=(1, 2))])


def smallest_on_top(masks: np.ndarray) -> np.ndarray:
    """Number from 1 of the smallest mask that holds each pixel, 0 where none does; of equal ones the later.

    Args:
        masks: bool (n, H, W).

    Returns:
        int64 (H, W).
    """
    labels = np.zeros(masks.shape[1:], dtype=np.int64)
    for n in np.argsort(-masks.sum(axis=(1, 2)), kind="stable"):  # smaller masks over larger ones
        labels[masks[n]] = n + 1
    return labels
