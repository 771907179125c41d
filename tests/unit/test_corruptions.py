import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy import ndimage
from torchvision.transforms.functional import adjust_gamma

from lvlmva_core.corruptions import CORRUPTIONS, SEVERITIES, contrast, corrupt, disk, focus_blur, gamma


def _pictures(channels: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, channels, size, size), dtype=np.uint8)


def _unit(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures / 255).float()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.4, 1.6])
def test_contrast_is_pillows(channels: int, factor: float) -> None:
    pictures = _pictures(channels)
    ours = contrast(_unit(pictures), factor).numpy() * 255
    for picture, found in zip(pictures, ours, strict=True):
        image = Image.fromarray(picture[0] if channels == 1 else picture.transpose(1, 2, 0))
        expected = np.atleast_3d(np.asarray(ImageEnhance.Contrast(image).enhance(factor))).transpose(2, 0, 1)
        assert np.abs(found - expected).max() < 1.5  # Pillow rounds the mean and the result


@pytest.mark.parametrize("exponent", [0.4, 1.6])
def test_gamma_is_torchvisions(exponent: float) -> None:
    images = _unit(_pictures(3))
    torch.testing.assert_close(gamma(images, exponent), adjust_gamma(images, exponent))


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.3, 8.0])
def test_the_disk_is_round_and_of_its_area(radius: float) -> None:
    kernel = disk(radius)
    assert float(kernel.sum()) == pytest.approx(1.0)
    assert torch.equal(kernel, kernel.flip(0))
    assert torch.equal(kernel, kernel.T)
    if radius > 0.5:
        whole = 1 / float(kernel.max())  # in pixels, where the middle is covered as a whole
        assert whole == pytest.approx(math.pi * radius**2, rel=0.02)


def test_focus_blur_is_scipys_convolution_and_scales_with_the_picture() -> None:
    pictures = _pictures(3, 56)
    ours = focus_blur(_unit(pictures), 8.0).numpy()
    kernel = disk(8.0 * 56 / 224).numpy()
    for n, channel in np.ndindex(3, 3):
        expected = ndimage.convolve(pictures[n, channel] / 255, kernel, mode="mirror")
        np.testing.assert_allclose(ours[n, channel], expected, atol=1e-5)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_severity_stays_in_range_and_departs_further(name: str) -> None:
    images = _unit(_pictures(3, 64))
    images = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    changes = []
    for severity in range(1, SEVERITIES + 1):
        changed = corrupt(images, name, severity)
        assert changed.shape == images.shape
        assert float(changed.min()) >= -1e-6
        assert float(changed.max()) <= 1 + 1e-6
        changes.append(float((changed - images).abs().mean()))
    assert all(a < b for a, b in itertools.pairwise(changes))
