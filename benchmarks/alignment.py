"""RRR training: ours against a plain loop that makes the same steps, in one run.

    LVLMVA_DATA=... python -m benchmarks.alignment [--out benchmarks/alignment.md]

The plain loop is what the field writes: one model after the other, batches from torch's DataLoader, double backward by
autograd, torch's default Adam. Both draw the same batches, so that the trained weights can be compared. MNIST is taken
from LVLMVA_DATA/mnist where it is there, else the digits of scikit-learn; both are 28x28 and get decoys. Rounds of both
alternate, and the median over rounds is reported, since other work on the machine comes and goes.
"""

import argparse
import copy
import datetime
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import AlignedRun, align_ensemble
from lvlmva_core.compute import set_up_compute
from lvlmva_core.datasets.decoy import DecoyDigits, DecoyMnist
from lvlmva_core.models import ModelSpec, build_model
from lvlmva_core.samples import Split
from lvlmva_core.training import endless_batches, train_classifier

LAMBDAS = [1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0]
SEEDS = list(range(7))
RATE = 1e-4
MASKED, TRAINING = 8, 64  # samples of a batch
Work = dict[str, Tensor]
Run = tuple[dict[str, Tensor], float, float]  # weights; means of cross-entropy and penalty


def digits(steps: int, device: torch.device) -> tuple[str, Work]:
    """Digits with decoys: as many training samples as an epoch of `steps` needs, 256 alignment samples, true masks."""
    root = Path(os.environ.get("LVLMVA_DATA", "")) / "mnist"
    found = (root / "MNIST").is_dir()
    name = "decoy_mnist" if found else "decoy_digits"
    data = (DecoyMnist(root=str(root), seed=0) if found else DecoyDigits(seed=0)).prepare()
    rows = (data.samples["split"] == "train").to_numpy().nonzero()[0][: steps * TRAINING]
    if len(rows) < steps * TRAINING:  # a small set is passed over several times
        rows = rows.repeat(math.ceil(steps * TRAINING / len(rows)))[: steps * TRAINING]
    images = torch.from_numpy(data.images[rows]).float().div(255)
    labels = torch.from_numpy(data.samples["label"].to_numpy(copy=True)[rows])
    work = {"images": images, "labels": labels, "masks": torch.from_numpy(data.spurious_masks[rows[:256]])}
    return name, {key: tensor.to(device) for key, tensor in work.items()}


def pictures(steps: int, device: torch.device) -> Work:
    """Noise of 3x64x64 pixels in two classes, with random masks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(steps * TRAINING) % 2
    images = 0.5 * torch.rand((len(labels), 3, 64, 64), generator=generator) + 0.3 * labels[:, None, None, None]
    work = {"images": images, "labels": labels, "masks": torch.rand((128, 64, 64), generator=generator) < 0.3}
    return {key: tensor.to(device) for key, tensor in work.items()}


def ours(model: nn.Module, work: Work, runs: list[tuple[float, int]]) -> list[Run]:
    """Every run in one call."""
    n = len(work["masks"])
    found: list[AlignedRun] = align_ensemble(
        model,
        Split(work["images"], work["labels"]),
        Split(work["images"][:n], work["labels"][:n]),
        work["masks"],
        Split(work["images"][:1], work["labels"][:1]),
        AlignSettings(
            rrr_lambda=0.0, seeds=[0], learning_rate=RATE, epochs=1, alignment_batch=MASKED, training_batch=TRAINING
        ),
        runs=runs,
    )
    return [(run.weights, float(run.curve["cross_entropy"][0]), float(run.curve["penalty"][0])) for run in found]


def one_by_one(model: nn.Module, work: Work, runs: list[tuple[float, int]]) -> list[Run]:
    """The same code, called once a run."""
    return [ours(model, work, [run])[0] for run in runs]


def plain(model: nn.Module, work: Work, runs: list[tuple[float, int]]) -> list[Run]:
    """A loop for each run."""
    return [_plain_run(copy.deepcopy(model), work, *run) for run in runs]


def _plain_run(model: nn.Module, work: Work, rrr_lambda: float, seed: int) -> Run:
    n, device = len(work["masks"]), work["images"].device
    size = MASKED + TRAINING
    cpu = {key: tensor.cpu() for key, tensor in work.items()}
    training = TensorDataset(cpu["images"], cpu["labels"])
    masked = TensorDataset(cpu["images"][:n], cpu["labels"][:n], cpu["masks"])
    draws = _lists(len(training), TRAINING, 2 * seed), _lists(n, MASKED, 2 * seed + 1)
    loaders = DataLoader(training, batch_sampler=draws[0]), iter(DataLoader(masked, batch_sampler=draws[1]))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = math.ceil(len(training) / TRAINING)
    totals = [0.0, 0.0]
    for _, (images, labels) in zip(range(steps), loaders[0], strict=False):
        images, labels = images.to(device), labels.to(device)
        masked_images, masked_labels, masks = (tensor.to(device) for tensor in next(loaders[1]))
        model.train()
        logits = model(torch.cat([masked_images, images]))
        cross_entropy = functional.cross_entropy(logits, torch.cat([masked_labels, labels]), reduction="sum") / size
        model.eval()
        pixels = masked_images.requires_grad_(True)
        log_p = functional.log_softmax(model(pixels), dim=1)
        (gradient,) = torch.autograd.grad(log_p.sum(), pixels, create_graph=True)
        penalty = (gradient * masks[:, None]).square().sum() / size
        optimizer.zero_grad()
        (cross_entropy + rrr_lambda * penalty).backward()
        optimizer.step()
        totals[0] += cross_entropy.item() / steps
        totals[1] += penalty.item() / steps
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, totals[0], totals[1]


class _lists:  # noqa: N801 - stands where a function would
    """Row numbers of the batches, as a sampler of batches gives them."""

    def __init__(self, n_samples: int, batch_size: int, seed: int) -> None:
        self.arguments = n_samples, batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        for rows in endless_batches(*self.arguments, torch.Generator().manual_seed(self.seed)):
            yield rows.tolist()


def measure(
    ways: dict[str, Callable[[], list[Run]]], rounds: int, device: torch.device
) -> tuple[dict[str, list[Run]], dict[str, list[tuple[float, float]]]]:
    """Results of each way, and its wall and processor seconds a round; the ways take turns."""
    results: dict[str, list[Run]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started, used = time.perf_counter(), time.process_time()
            results[name] = way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - started, time.process_time() - used))
    return results, seconds


def deviations(found: list[Run], expected: list[Run], start: dict[str, Tensor]) -> tuple[float, float]:
    """Largest difference between two sets of runs: of a tensor's weights, in norm, relative to the way they went from
    `start`; of a loss, relative."""
    weights, losses = 0.0, 0.0
    for one, other in zip(found, expected, strict=True):
        for name, tensor in other[0].items():
            if tensor.is_floating_point():
                way, apart = (tensor - start[name]).norm(), (one[0][name] - tensor).norm()
                weights = max(weights, float(apart) / max(float(way), 1e-30))
        for mine, theirs in zip(one[1:], other[1:], strict=True):
            losses = max(losses, abs(mine - theirs) / max(abs(theirs), 1e-30))
    return weights, losses


def rows(
    model: nn.Module, work: Work, runs: list[tuple[float, int]], rounds: int, ways: dict[str, Callable[..., list[Run]]]
) -> list[str]:
    """Lines of a table; the first way is what the others are compared with."""
    device = work["images"].device
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    steps = math.ceil(len(work["images"]) / TRAINING) * len(runs)
    for way in ways.values():  # what happens once: allocations, thread pools
        way(
            model,
            {**work, "images": work["images"][: 4 * TRAINING], "labels": work["labels"][: 4 * TRAINING]},
            runs[:2],
        )
    calls = {name: (lambda way=way: way(model, work, runs)) for name, way in ways.items()}  # type: ignore[misc]
    results, seconds = measure(calls, rounds, device)
    lines = []
    base = next(iter(ways))
    for name in ways:
        ratios = [theirs[0] / own[0] for theirs, own in zip(seconds[base], seconds[name], strict=True)]
        busy = [theirs[1] / own[1] for theirs, own in zip(seconds[base], seconds[name], strict=True)]
        wall = statistics.median(pair[0] for pair in seconds[name]) / steps * 1e3
        weights, losses = deviations(results[name], results[base], start)
        lines.append(
            f"| {name} | {wall:.2f} | {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) "
            f"| {statistics.median(busy):.1f} | {weights:.1e} | {losses:.1e} |"
        )
        sys.stderr.write(lines[-1] + "\n")
    return lines


HEAD = [
    "| way | ms per step and model | times faster (least to most over rounds) | processor time | weights | losses |",
    "|---|---|---|---|---|---|",
]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/alignment.md"))
    parser.add_argument("--steps", type=int, default=20, help="of each of the 42 MLPs, in a round")
    parser.add_argument("--resnet-steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", default="", help="a remark on the machine's state for the page")
    arguments = parser.parse_args()
    device = set_up_compute(arguments.device, arguments.threads)

    name, work = digits(arguments.steps, device)
    mlp = build_model(ModelSpec("mlp", 1, 28, 28, 10, 256), seed=0).to(device)
    train_classifier(
        mlp,
        Split(work["images"], work["labels"]),
        Split(work["images"][:1], work["labels"][:1]),
        learning_rate=1e-3,
        batch_size=TRAINING,
        epochs=2,
        seed=0,
    )
    runs = [(rrr_lambda, seed) for rrr_lambda in LAMBDAS for seed in SEEDS]
    ways: dict[str, Callable[..., list[Run]]] = {"plain loop": plain, "ours, one at a time": one_by_one}
    mlp_rows = rows(mlp, work, runs, arguments.rounds, {**ways, "ours, all in one call": ours})
    resnet = build_model(ModelSpec("small_resnet", 3, 64, 64, 2, 16), seed=0).to(device)
    resnet_rows = rows(
        resnet,
        pictures(arguments.resnet_steps, device),
        [(1.0, 0), (1.0, 1)],
        arguments.rounds,
        {"plain loop": plain, "ours, all in one call": ours},
    )
    page = [
        "# RRR training",
        "",
        f"`python -m benchmarks.alignment`, {datetime.date.today().isoformat()}. {_machine(device, arguments.threads)}",
        arguments.note,
        "",
        "The plain loop takes one model after the other, with torch's DataLoader, double backward by autograd and",
        f"torch's default Adam. All ways make the same steps on the same batches ({MASKED} alignment and {TRAINING}",
        f'training samples). Medians over {arguments.rounds} rounds in which the ways take turns. "weights": how far a',
        "tensor of weights is from the plain loop's, as a share of the way that it went in training (norms; the worst",
        'tensor of all runs). "losses": the largest relative difference of a mean cross-entropy or penalty. Both are',
        "float32 rounding, which Adam magnifies where a gradient is nearly zero.",
        "",
        f"## MLP 784-256-10 on {name}: {len(SEEDS)} seeds x {len(LAMBDAS)} λ, {arguments.steps} steps",
        "",
        *HEAD,
        *mlp_rows,
        "",
        f"## small_resnet (16 channels) at 3x64x64: 2 seeds, {arguments.resnet_steps} steps",
        "",
        *HEAD,
        *resnet_rows,
        "",
        "Convolutional models are trained one after the other, by the same double backward as in the plain loop.",
    ]
    arguments.out.write_text("\n".join(page) + "\n", encoding="utf-8")


def _machine(device: torch.device, threads: int) -> str:
    cpu: Any = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    graphics = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{os.cpu_count()} cores, {cpu}{graphics}; {threads} thread(s); Python {platform.python_version()}, "
        f"torch {torch.__version__}."
    )


if __name__ == "__main__":
    main()
