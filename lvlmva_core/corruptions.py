"""Global corruptions of pictures at the severities of MedMNIST-C (Di Salvo et al. 2024, its list of parameters).

Contrast and focus blur are those of its dermatology set; gamma, which that set lacks, those of its chest radiographs.
Blur radii are given for 224 pixels a side and scale with the picture. All code is ours; the disk of the blur is drawn
by area instead of smoothed after drawing.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

SEVERITIES = 5
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
REFERENCE_SIZE = 224
OVERSAMPLING = 16  # of the disk of the blur


def gamma(images: Tensor, exponent: float) -> Tensor:
    """Raise every channel of images (N, C, H, W) in [0, 1] to `exponent`."""
    return images.pow(exponent)


def contrast(images: Tensor, factor: float) -> Tensor:
    """Move every pixel of images (N, C, H, W) in [0, 1] away from its picture's mean luminance by `factor`, clipped."""
    if images.shape[1] == 3:
        weights = images.new_tensor(LUMINANCE)[:, None, None]
        mean = (images * weights).sum(1).mean((1, 2))
    else:
        mean = images.mean((1, 2, 3))
    middle = mean[:, None, None, None]
    return (middle + factor * (images - middle)).clamp(0, 1)


def focus_blur(images: Tensor, radius: float) -> Tensor:
    """Convolve images (N, C, H, W) with a disk of `radius` pixels at 224 a side, mirrored at the edges."""
    kernel = disk(radius * images.shape[-1] / REFERENCE_SIZE).to(images)
    reach = len(kernel) // 2
    channels = images.shape[1]
    padded = functional.pad(images, (reach,) * 4, mode="reflect")
    return functional.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def disk(radius: float) -> Tensor:
    """A disk's share of each pixel: float64 (k, k), k odd, sum 1."""
    reach = max(0, int(-(-(radius - 0.5) // 1)))
    steps = (2 * reach + 1) * OVERSAMPLING
    places = (torch.arange(steps, dtype=torch.float64) + 0.5) / OVERSAMPLING - reach - 0.5
    inside = (places[:, None].square() + places.square() <= radius**2).double()
    shares = functional.avg_pool2d(inside[None], OVERSAMPLING)[0]
    return shares / shares.sum()


# name -> (what it does, its parameter at severities 1..5); one is added by a function and a line
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "gamma_up": (gamma, (1.1, 1.2, 1.3, 1.4, 1.6)),
    "gamma_down": (gamma, (0.9, 0.8, 0.7, 0.6, 0.4)),
    "contrast_up": (contrast, (1.1, 1.2, 1.3, 1.4, 1.6)),
    "contrast_down": (contrast, (0.8, 0.7, 0.6, 0.5, 0.4)),
    "focus_blur": (focus_blur, (4.0, 5.0, 6.0, 7.0, 8.0)),
}


def corrupt(images: Tensor, name: str, severity: int) -> Tensor:
    """Apply one corruption to images (N, C, H, W) in [0, 1].

    Raises:
        ValueError: no corruption of that name, or a severity that is not 1..5.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no corruption '{name}'; expected one of {', '.join(CORRUPTIONS)}")
    if not 1 <= severity <= SEVERITIES:
        raise ValueError(f"severity {severity}: expected 1 to {SEVERITIES}")
    apply, parameters = CORRUPTIONS[name]
    return apply(images, parameters[severity - 1])
