"""Vision models that `deep_lift_shap` is held to, each at its own size and at a small one for the tests.

Weights are drawn, nothing is downloaded. Models of libraries that are not installed are left out by name.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3


@dataclass(frozen=True)
class Entry:
    """A model by its library and name.

    build: the model, from the arguments that make it small, or none. small: those arguments, and the side of its small
    pictures. side: of its own. float64: whether it can be run in float64.
    """

    library: str
    build: Callable[..., nn.Module]
    small: dict[str, Any]
    small_side: int
    side: int = 224
    float64: bool = True
    tags: frozenset[str] = field(default_factory=frozenset)


class Logits(nn.Module):
    """One tensor of what a model returns, with a linear head on it where it is not logits yet."""

    def __init__(self, model: nn.Module, name: str, width: int | None = None) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.head = nn.Identity() if width is None else nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) to (n, CLASSES)."""
        return self.head(getattr(self.model(pixels), self.name))  # type: ignore[no-any-return]


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def build(**small: Any) -> nn.Module:
        from torchvision import models
        from torchvision.models.convnext import CNBlockConfig
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

        if not small:
            return getattr(models, name)(weights=None, num_classes=CLASSES)  # type: ignore[no-any-return]
        if name.startswith("vit"):
            return models.VisionTransformer(**small, num_classes=CLASSES)
        if name.startswith("swin"):
            second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if "v2" in name else {}
            return models.SwinTransformer(**small, **second, num_classes=CLASSES)
        if name.startswith("maxvit"):
            return models.MaxVit(**small, num_classes=CLASSES)
        widths = small["widths"]
        blocks = [CNBlockConfig(width, then, 1) for width, then in zip(widths, [*widths[1:], None], strict=True)]
        return models.ConvNeXt(blocks, num_classes=CLASSES)

    return build


def _timm(name: str) -> Callable[..., nn.Module]:
    def build(**small: Any) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **small)  # type: ignore[no-any-return]

    return build


def _transformers(name: str) -> Callable[..., nn.Module]:
    def build(**small: Any) -> nn.Module:
        import transformers

        if name == "siglip":
            vision = transformers.SiglipVisionConfig(**small)
            return Logits(transformers.SiglipVisionModel(vision), "pooler_output", vision.hidden_size)
        family = {"vit": "ViT", "dinov2": "Dinov2"}[name]
        config = getattr(transformers, f"{family}Config")(**small, num_labels=CLASSES)
        return Logits(getattr(transformers, f"{family}ForImageClassification")(config), "logits")

    return build


def _normed(norm: Callable[[int], nn.Module]) -> Callable[..., nn.Module]:
    def build(width: int = 64) -> nn.Module:
        layers = [nn.Conv2d(3, width, 3, padding=1), norm(width), nn.SiLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(width, width, 3, padding=1), norm(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, CLASSES))

    return build


def _exported(**small: Any) -> nn.Module:
    """A program of torch.export, whose graph calls ATen operations; the number of samples is left open."""
    model = _torchvision("vit_b_16")(**small).eval()
    side = small.get("image_size", 224)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (torch.zeros(2, 3, side, side),), dynamic_shapes=({0: batch},))
    return program.module()


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
_HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
_TV_VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
_TV_SWIN = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
_TV_MAXVIT = {
    **{"input_size": (32, 32), "stem_channels": 16, "partition_size": 4, "block_channels": [16, 32]},
    **{"block_layers": [1, 1], "head_dim": 8, "stochastic_depth_prob": 0.1},
}

ZOO: dict[str, Entry] = {
    "torchvision vit_b_16": Entry("torchvision", _torchvision("vit_b_16"), _TV_VIT, 32),
    "torchvision swin_t": Entry(
        "torchvision", _torchvision("swin_t"), {**_TV_SWIN, "stochastic_depth_prob": 0.1}, 36
    ),
    "torchvision swin_v2_t": Entry("torchvision", _torchvision("swin_v2_t"), _TV_SWIN, 32, 256),
    "torchvision maxvit_t": Entry("torchvision", _torchvision("maxvit_t"), _TV_MAXVIT, 32),
    "torchvision convnext_tiny": Entry("torchvision", _torchvision("convnext_tiny"), {"widths": (8, 16)}, 32),
    "timm vit_small_patch16_224": Entry("timm", _timm("vit_small_patch16_224"), _VIT, 32),
    "timm deit3_small_patch16_224": Entry("timm", _timm("deit3_small_patch16_224"), _VIT, 32),
    "timm beit_base_patch16_224": Entry("timm", _timm("beit_base_patch16_224"), _VIT, 32),
    "timm eva02_tiny_patch14_224": Entry("timm", _timm("eva02_tiny_patch14_224"), _VIT, 32),
    "timm swin_tiny_patch4_window7_224": Entry("timm", _timm("swin_tiny_patch4_window7_224"), _SWIN, 32),
    "timm convnextv2_atto": Entry(
        "timm", _timm("convnextv2_atto"), {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 32
    ),
    "timm efficientformerv2_s0": Entry(
        "timm",
        _timm("efficientformerv2_s0"),
        {"depths": (1, 1, 2, 2), "embed_dims": (8, 8, 16, 16), "mlp_ratios": (2, 2, (2, 2), (2, 2)), "num_vit": 1},
        224,
    ),
    "timm mobilevit_xxs": Entry("timm", _timm("mobilevit_xxs"), {}, 32, 256),
    "timm mobilenetv4_hybrid_medium": Entry("timm", _timm("mobilenetv4_hybrid_medium"), {}, 32),
    "timm tiny_vit_5m_224": Entry(
        "timm",
        _timm("tiny_vit_5m_224"),
        {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_sizes": (4, 4, 4, 2)},
        32,
    ),
    "transformers ViTForImageClassification": Entry("transformers", _transformers("vit"), {**_HF, "patch_size": 8}, 32),
    "transformers Dinov2ForImageClassification": Entry(
        # pictures of another size than its position embeddings, which are interpolated
        "transformers", _transformers("dinov2"), {**_HF, "patch_size": 8}, 40
    ),
    "transformers SiglipVisionModel": Entry("transformers", _transformers("siglip"), {**_HF, "patch_size": 8}, 32),
    "InstanceNorm": Entry("torch", _normed(lambda width: nn.InstanceNorm2d(width, affine=True)), {"width": 8}, 16, 64),
    "GroupNorm": Entry("torch", _normed(lambda width: nn.GroupNorm(4, width)), {"width": 8}, 16, 64),
    "torch.export of vit_b_16": Entry("torchvision", _exported, _TV_VIT, 32, float64=False),
    "timm hiera_tiny_224": Entry("timm", _timm("hiera_tiny_224"), {"embed_dim": 8, "stages": (1, 1, 1, 1)}, 224),
    "timm mvitv2_tiny": Entry("timm", _timm("mvitv2_tiny"), {}, 64),
    "timm sequencer2d_s": Entry("timm", _timm("sequencer2d_s"), {}, 224),
}  # fmt: skip


def build(name: str, *, small: bool) -> nn.Module:
    """A model of the zoo in eval mode on the CPU, float32, with weights drawn and moved from where they start, since
    biases start at 0 and gains at 1 or 1e-6. Raises ImportError where its library is not installed."""
    entry = ZOO[name]
    if importlib.util.find_spec(entry.library) is None:
        raise ImportError(f"{entry.library} is not installed")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say of names and versions
        torch.manual_seed(0)
        model = entry.build(**(entry.small if small else {}))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim < 2 else 0.02)
        side = entry.small_side if small else entry.side
        _settle(model, pictures(4, side, 9))
    for module in model.modules():
        module.training = False
    return model.requires_grad_(False)


def _settle(model: nn.Module, images: Tensor) -> None:
    """BatchNorm statistics of some pictures, so that activations keep their sizes as after training."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for module in model.modules():
        module.training = False
    for norm in norms:
        norm.training, norm.momentum = True, None  # the mean over all that is seen
    with torch.no_grad():
        model(images)


def pictures(count: int, side: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth noise in [0, 1], (count, 3, side, side)."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth + torch.rand(smooth.shape, generator=torch.Generator().manual_seed(-seed), dtype=dtype)) / 2
