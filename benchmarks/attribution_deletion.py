"""Do the pixels of a small vision transformer matter in the order that a map says? Deletion and insertion curves.

    python -m benchmarks.attribution_deletion [--out benchmarks/attribution_deletion.md]

A ViT of two blocks learns scikit-learn's digits. Pixels of test digits are replaced by those of baselines, from the
highest attribution down (deletion), or the digit's are put into the baselines in this order (insertion); what is left
of the true class's logit above the baselines' is averaged over the curve. Methods see the same baselines.
"""

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.attribution import processor
from lvlmva_core.attribution import deep_lift_shap, gradient, integrated_gradients, rules

BASELINES, REPLACED_BY, IMAGES, PACE, SEEDS = 25, 3, 80, 4, (0, 1, 2)


class SmallViT(nn.Module):
    """17 tokens of width 32, two pre-norm blocks of torch's own encoder, the class token's head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.places = nn.Parameter(torch.randn(1, 17, 32) * 0.02)
        block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 8, 8) to logits (n, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        return self.head(self.blocks(tokens)[:, 0])  # type: ignore[no-any-return]


def trained(seed: int, images: Tensor, labels: Tensor) -> nn.Module:
    """Adam for 600 steps of 64."""
    torch.manual_seed(seed)
    model = SmallViT()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(600):
        part = torch.randint(len(images), (64,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


def by_midpoint(model: nn.Module, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Ours, but softmax as the product of exp and 1/Σexp, of which each gets the other's mean."""

    def softmax(step: rules.Step, g: list[Tensor]) -> list[Tensor | None]:
        (dim,) = rules._reduced_dims(step)
        u, v = (t.double() for t in step.inputs(0))
        shift = torch.maximum(u.amax(dim, keepdim=True), v.amax(dim, keepdim=True))
        e_u, e_v = (u - shift).exp(), (v - shift).exp()
        r_u, r_v = 1 / e_u.sum(dim, keepdim=True), 1 / e_v.sum(dim, keepdim=True)
        out = step.lift(g[0]).double()
        through_sum = (out * (e_u + e_v) * 0.5).sum(dim, keepdim=True) * -(r_u * r_v)
        slope = rules._divided_difference(torch.exp, u - shift, v - shift)
        return [step.lower(((out * (r_u + r_v) * 0.5 + through_sum) * slope).to(g[0].dtype))]

    ops = [op for op in rules.RULES if "softmax" in str(op) and "log" not in str(op)]
    before: dict[Any, Any] = {op: rules.RULES[op] for op in ops}
    rules.RULES.update({op: before[op]._replace(backward=lambda step, g, owned: softmax(step, g)) for op in ops})
    try:
        return deep_lift_shap(model, x, b, y, batch_size=250)
    finally:
        rules.RULES.update(before)


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = {
    "deep_lift_shap": lambda model, x, b, y: deep_lift_shap(model, x, b, y, batch_size=250),
    "the same, softmax by the midpoint": by_midpoint,
    "integrated gradients, 16 points": lambda model, x, b, y: integrated_gradients(
        model, x, b, y, steps=16, batch_size=2000
    ),
    "gradient x input": lambda model, x, b, y: gradient(model, x, y) * x,
    "gradient x (input - mean baseline)": lambda model, x, b, y: gradient(model, x, y) * (x - b.mean(0)),
    "random order": lambda model, x, b, y: torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x),
}


@torch.no_grad()
def curves(model: nn.Module, x: Tensor, b: Tensor, y: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Areas under the deletion and the insertion curve, each (B,), as a share of the digit's logit above baselines'."""
    rank = maps.flatten(1).argsort(1, descending=True).argsort(1).view_as(x)
    areas = []
    for delete in (True, False):
        steps = []
        for count in range(0, 65, PACE):
            digit = (rank >= count) == delete
            mixed = torch.where(digit[:, None], x[:, None], b[None, :REPLACED_BY])
            logits = model(mixed.flatten(0, 1)).view(len(x), REPLACED_BY, -1).mean(1)
            steps.append(logits.gather(1, y[:, None])[:, 0])
        curve = torch.stack(steps, 1)
        start, end = (0, -1) if delete else (-1, 0)
        areas.append(((curve - curve[:, end, None]) / (curve[:, start] - curve[:, end])[:, None]).mean(1))
    return areas[0], areas[1]


def interval(values: Tensor) -> str:
    """The mean, and a 95 % interval of it by resampling images."""
    generator = np.random.default_rng(0)
    drawn = values.numpy()[generator.integers(0, len(values), (4000, len(values)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{float(values.mean()):+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    """Train, explain, delete and insert; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/attribution_deletion.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    images = torch.from_numpy(data.images[order] / 16.0).float()[:, None]
    labels = torch.from_numpy(data.target[order].astype(np.int64))
    train = slice(0, 1400)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in METHODS}
    sizes: dict[str, list[float]] = {name: [] for name in METHODS}
    accuracies = []
    for seed in SEEDS:
        model = trained(seed, images[train], labels[train])
        with torch.no_grad():
            right = model(images[1400:]).argmax(1) == labels[1400:]
        accuracies.append(float(right.float().mean()))
        pick = torch.nonzero(right)[:IMAGES, 0] + 1400
        baselines = images[torch.randperm(1400, generator=torch.Generator().manual_seed(seed))[:BASELINES]]
        x, y = images[pick], labels[pick]
        for name, method in METHODS.items():
            maps = method(model, x, baselines, y)
            found[name].append(curves(model, x, baselines, y, maps))
            sizes[name].append(float(maps.abs().flatten(1).sum(1).mean()))
    areas = {name: [torch.cat(each) for each in zip(*rows, strict=True)] for name, rows in found.items()}
    ours = areas["deep_lift_shap"]
    lines = []
    for name, (deletion, insertion) in areas.items():
        differs = (
            "" if name == "deep_lift_shap" else f"{interval(deletion - ours[0])} | {interval(insertion - ours[1])}"
        )
        size = "" if "random" in name else f"{np.mean(sizes[name]):.1f}"
        lines.append(f"| {name} | {interval(deletion)} | {interval(insertion)} | {differs or ' | '} | {size} |")
    shown = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
    text = [
        "# Deletion and insertion on a small vision transformer",
        "",
        "`python -m benchmarks.attribution_deletion`; a ViT of two blocks (17 tokens, width 32) on scikit-learn's",
        f"digits, {len(SEEDS)} seeds (test accuracy {shown}), {IMAGES} test digits each that it gets right, and",
        f"{BASELINES} training digits as baselines. Pixels are replaced by those of {REPLACED_BY} of these, {PACE}",
        "at a time, signed maps from the highest down. The area is the mean over the curve of the true class's",
        "logit, 1 for the digit and 0 for the baselines: low is good for deletion, high for insertion. In brackets",
        "95 % intervals over images; of the difference on each image in the columns that say so.",
        "",
        "| order | deletion | insertion | deletion less ours | insertion less ours | mean Σ abs Φ |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
        f"{datetime.datetime.now(datetime.UTC).date()}, 1 of {processor('cpu')}; torch {torch.__version__}.",
    ]
    arguments.out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
