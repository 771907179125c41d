"""Where captum's DeepLift misses the difference of outputs: small cases in float64, beside ours.

python -m benchmarks.attribution_captum [--out benchmarks/attribution_captum.md]
"""

import argparse
import copy
import datetime
import importlib.metadata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from captum.attr import DeepLift
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.attribution import unshare_relus
from lvlmva_core.attribution import deep_lift_shap

SIDE = 8


class Functional(nn.Module):
    """A ReLU called as a function."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x.relu()


def head(channels: int, side: int) -> list[nn.Module]:
    """Flatten and one linear layer to 10 logits."""
    return [nn.Flatten(), nn.Linear(channels * side * side, 10)]


def conv() -> nn.Module:
    """3 to 4 channels, same size."""
    return nn.Conv2d(3, 4, 3, padding=1)


CASES: dict[str, Callable[[], nn.Module]] = {
    "conv, ReLU": lambda: nn.Sequential(conv(), nn.ReLU(), *head(4, 8)),
    "conv, max-pool 2x2": lambda: nn.Sequential(conv(), nn.MaxPool2d(2), *head(4, 4)),
    "conv, max-pool 3x3 stride 2": lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 2, 1), *head(4, 4)),
    "conv, ReLU, max-pool 2x2": lambda: nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), *head(4, 4)),
    "conv, max-pool 2x2, ReLU": lambda: nn.Sequential(conv(), nn.MaxPool2d(2), nn.ReLU(), *head(4, 4)),
    "conv, ReLU as a function": lambda: nn.Sequential(conv(), Functional(), *head(4, 8)),
    "conv, GELU": lambda: nn.Sequential(conv(), nn.GELU(), *head(4, 8)),
    "conv, SiLU": lambda: nn.Sequential(conv(), nn.SiLU(), *head(4, 8)),
    "conv, LayerNorm": lambda: nn.Sequential(conv(), nn.LayerNorm([4, 8, 8]), *head(4, 8)),
}


def digits(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Handwritten digits as colour images (count, 3, side, side) float64 in [0, 1], and their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images[:count] / 16.0)[:, None]
    images = nn.functional.interpolate(images, size=(side, side), mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(data.target[:count].astype(np.int64))


def trained_resnet() -> nn.Module:
    """A ResNet of four blocks, trained for 48 steps on 256 digits of 32x32."""
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    images, labels = digits(256, 32)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(48):
        part = slice(step % 8 * 32, (step % 8 + 1) * 32)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[part].float()), labels[part]).backward()
        optimiser.step()
    return model.double().eval()


def compare(model: nn.Module, inputs: Tensor, baselines: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Worst completeness errors of captum and ours, and the mean IoU of the top 10 % of pixels of their maps."""
    with torch.no_grad():
        difference = model(inputs).gather(1, targets[:, None])[:, 0] - model(baselines).mean(0)[targets]
    ours = deep_lift_shap(model, inputs, baselines, targets)
    theirs = torch.stack(
        [DeepLift(model).attribute(inputs, b.expand_as(inputs).clone(), target=targets).detach() for b in baselines]
    ).mean(0)
    errors = [
        float(((maps.flatten(1).sum(1) - difference).abs() / maps.abs().flatten(1).sum(1)).max())
        for maps in (theirs, ours)
    ]
    k = inputs[0, 0].numel() // 10
    tops = [torch.zeros(len(inputs), inputs[0, 0].numel()).bool() for _ in range(2)]
    for top, maps in zip(tops, (theirs, ours), strict=True):
        top.scatter_(1, maps.sum(1).flatten(1).topk(k).indices, True)
    overlap = float(((tops[0] & tops[1]).sum(1) / (tops[0] | tops[1]).sum(1)).mean())
    return errors[0], errors[1], overlap


def main() -> None:
    """Compute all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/attribution_captum.md"))
    out = parser.parse_args().out
    warnings.simplefilter("ignore")  # captum announces its hooks
    lines = []
    for name, build in CASES.items():
        torch.manual_seed(0)
        model = build().double().eval()
        images = torch.from_numpy(np.random.default_rng(0).random((12, 3, SIDE, SIDE)))
        lines.append((name, compare(model, images[:4], images[4:], torch.arange(4))))
    images, labels = digits(33, 32)
    resnet = unshare_relus(copy.deepcopy(trained_resnet()))
    lines.append(("ResNet of four blocks, trained on digits", compare(resnet, images[:8], images[8:], labels[:8])))
    rows = [f"| {name} | {theirs:.1e} | {ours:.1e} | {iou:.2f} |" for name, (theirs, ours, iou) in lines]
    content = [
        "# Where captum misses the difference of outputs",
        "",
        "`python -m benchmarks.attribution_captum`; float64, random weights unless said. The completeness error is",
        "|Σ attributions - (f(x) - mean f(b))| as a share of Σ|attributions|, the worst of 4 images against 8",
        "baselines (8 against 25 for the ResNet, whose ReLUs are modules of their own, as captum needs). The IoU",
        "compares the tenth of the pixels with the highest attribution in captum's maps and in ours.",
        "",
        "| model | captum's error | our error | IoU |",
        "|---|---|---|---|",
        *rows,
        "",
        f"{datetime.datetime.now(datetime.UTC).date()}, captum {importlib.metadata.version('captum')}, torch "
        f"{torch.__version__}.",
    ]
    out.write_text("\n".join(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
