"""RRR training: ours against a plain loop that makes the same steps, in one run.

    LVLMVA_DATA=... python -m benchmarks.alignment [--out benchmarks/alignment.md]

The plain loop is what the field writes: one model after the other, batches from torch's DataLoader, double backward by
autograd, torch's default Adam. Both draw the same batches, so that the trained weights can be compared. MNIST is taken
from LVLMVA_DATA/mnist where it is there, else the digits of scikit-learn; both are 28x28 and get decoys. Rounds of both
alternate, and the median over rounds is reported, since other work on the machine comes and goes. The plain loop has a
process of its own, as Python starts it: what `set_up_compute` does for ours (freed memory is kept) does nothing for it.
"""

import argparse
import concurrent.futures
import copy
import datetime
import functools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.machine import cpu_model
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
TRAINING = 64  # samples of a batch, beside the masked ones
Work = dict[str, Tensor]
Run = tuple[dict[str, Tensor], float, float]  # weights; means of cross-entropy and penalty


class Case(NamedTuple):
    """masked: alignment samples in a batch. frozen: whether BatchNorm stays as it is. precision: of the steps."""

    masked: int = 8
    frozen: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"


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


def pictures(steps: int, device: torch.device, side: int = 64) -> Work:
    """Noise of 3 x side x side pixels in two classes, with random masks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(steps * TRAINING) % 2
    images = 0.5 * torch.rand((len(labels), 3, side, side), generator=generator) + 0.3 * labels[:, None, None, None]
    work = {"images": images, "labels": labels, "masks": torch.rand((128, side, side), generator=generator) < 0.3}
    return {key: tensor.to(device) for key, tensor in work.items()}


def ours(case: Case, model: nn.Module, work: Work, runs: list[tuple[float, int]]) -> list[Run]:
    """Every run in one call."""
    n = len(work["masks"])
    found: list[AlignedRun] = align_ensemble(
        model,
        Split(work["images"], work["labels"]),
        Split(work["images"][:n], work["labels"][:n]),
        work["masks"],
        Split(work["images"][:1], work["labels"][:1]),
        AlignSettings(
            rrr_lambda=0.0,
            seeds=[0],
            learning_rate=RATE,
            epochs=1,
            alignment_batch=case.masked,
            training_batch=TRAINING,
            batch_norm="frozen" if case.frozen else "train",
            precision=case.precision,
        ),
        runs=runs,
    )
    return [(run.weights, float(run.curve["cross_entropy"][0]), float(run.curve["penalty"][0])) for run in found]


def one_by_one(case: Case, model: nn.Module, work: Work, runs: list[tuple[float, int]]) -> list[Run]:
    """The same code, called once a run."""
    return [ours(case, model, work, [run])[0] for run in runs]


def plain(case: Case, model: nn.Module, work: Work, runs: list[tuple[float, int]]) -> list[Run]:
    """A loop for each run."""
    return [_plain_run(case, copy.deepcopy(model), work, *run) for run in runs]


def plain_resident(case: Case, model: nn.Module, work: Work, runs: list[tuple[float, int]]) -> list[Run]:
    """The same with batches picked on the device, where all samples lie."""
    return [_plain_run(case, copy.deepcopy(model), work, *run, resident=True) for run in runs]


def _plain_run(
    case: Case, model: nn.Module, work: Work, rrr_lambda: float, seed: int, *, resident: bool = False
) -> Run:
    n, device = len(work["masks"]), work["images"].device
    size = case.masked + TRAINING
    cpu = {key: tensor.cpu() for key, tensor in work.items()}
    training = TensorDataset(cpu["images"], cpu["labels"])
    masked = TensorDataset(cpu["images"][:n], cpu["labels"][:n], cpu["masks"])
    draws = _lists(len(training), TRAINING, 2 * seed), _lists(n, case.masked, 2 * seed + 1)
    loaders: tuple[Any, Any] = (
        DataLoader(training, batch_sampler=draws[0]),
        iter(DataLoader(masked, batch_sampler=draws[1])),
    )
    if resident:
        loaders = (
            ((work["images"][rows], work["labels"][rows]) for rows in draws[0]),
            ((work["images"][rows], work["labels"][rows], work["masks"][rows]) for rows in draws[1]),
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = math.ceil(len(training) / TRAINING)
    totals = [0.0, 0.0]
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bfloat16")
    for _, (images, labels) in zip(range(steps), loaders[0], strict=False):
        images, labels = images.to(device), labels.to(device)
        masked_images, masked_labels, masks = (tensor.to(device) for tensor in next(loaders[1]))
        model.train()
        for module in model.modules() if case.frozen else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        with mixed:
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


class Timed(NamedTuple):
    """What a way came to, and its wall and processor seconds."""

    runs: list[Run]
    wall: float
    busy: float


def timed(way: Callable[..., list[Run]], model: nn.Module, work: Work, runs: list[tuple[float, int]]) -> Timed:
    """Do it and look at the clocks."""
    started, used = time.perf_counter(), time.process_time()
    found = way(model, work, runs)
    if work["images"].device.type == "cuda":
        torch.cuda.synchronize()
    return Timed(found, time.perf_counter() - started, time.process_time() - used)


def _as_python_starts(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def timed_there(
    way: Callable[..., list[Run]],
    case: Case,
    model: nn.Module,
    work: Work,
    runs: list[tuple[float, int]],
    device: torch.device,
) -> Timed:
    """A way on a device, given and giving back what is on the processor: that crosses to another process."""
    there = {key: tensor.to(device) for key, tensor in work.items()}
    return _on_cpu(timed(functools.partial(way, case), model.to(device), there, runs))


def _on_cpu(found: Timed) -> Timed:
    runs = [({name: tensor.cpu() for name, tensor in weights.items()}, *losses) for weights, *losses in found.runs]
    return found._replace(runs=runs)


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


class Way(NamedTuple):
    """What a way of training took, beside the plain loop: medians over rounds, and the least and most times faster."""

    name: str
    ms: float
    times: float
    least: float
    most: float
    busy: float
    weights: float
    losses: float

    def line(self) -> str:
        """A row of the page."""
        return (
            f"| {self.name} | {self.ms:.2f} | {self.times:.1f} ({self.least:.1f} to {self.most:.1f}) "
            f"| {self.busy:.2f} | {self.weights:.1e} | {self.losses:.1e} |"
        )

    def facts(self) -> dict[str, Any]:
        """The same by the names of the page's columns."""
        return {
            "way": self.name,
            "ms per step and model": self.ms,
            "times faster": self.times,
            "least": self.least,
            "most": self.most,
            "weights": self.weights,
            "losses": self.losses,
        }


def measured(
    case: Case, model: nn.Module, work: Work, runs: list[tuple[float, int]], rounds: int, together: bool
) -> list[Way]:
    """Every way, the plain loop first, with which the others are compared.

    together: whether several runs at a time differ from one after the other.
    """
    device = work["images"].device
    ways: dict[str, Callable[..., list[Run]]] = {"plain loop": plain}
    ways |= {"plain loop, data on the device": plain_resident} if device.type != "cpu" else {}
    ways |= {"ours, one at a time": one_by_one} if together else {}
    ways["ours, all in one call"] = ours
    start = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    steps = math.ceil(len(work["images"]) / TRAINING) * len(runs)
    little = {**work, "images": work["images"][: 4 * TRAINING], "labels": work["labels"][: 4 * TRAINING]}
    found: dict[str, list[Timed]] = {name: [] for name in ways}
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _as_python_starts, (torch.get_num_threads(),)
    ) as elsewhere:
        for number in range(rounds + 1):  # in turn; what happens once (allocations, thread pools) is in the first
            for name, way in ways.items():
                now, some = (work, runs) if number else (little, runs[:2])
                if way in (plain, plain_resident):
                    sent = copy.deepcopy(model).cpu(), {key: tensor.cpu() for key, tensor in now.items()}
                    found[name].append(elsewhere.submit(timed_there, way, case, *sent, some, device).result())
                else:
                    found[name].append(_on_cpu(timed(functools.partial(way, case), model, now, some)))
    lines = []
    base = found["plain loop"][1:]
    for name, (_, *own) in found.items():
        ratios = [theirs.wall / mine.wall for theirs, mine in zip(base, own, strict=True)]
        busy = [theirs.busy / mine.busy for theirs, mine in zip(base, own, strict=True)]
        wall = statistics.median(mine.wall for mine in own) / steps * 1e3
        apart = deviations(own[-1].runs, base[-1].runs, start)
        middle = statistics.median(ratios), min(ratios), max(ratios), statistics.median(busy)
        lines.append(Way(name, wall, *middle, *apart))
        sys.stderr.write(lines[-1].line() + "\n")
    return lines


def rows(
    case: Case, model: nn.Module, work: Work, runs: list[tuple[float, int]], rounds: int, together: bool
) -> list[str]:
    """Lines of a table."""
    return [way.line() for way in measured(case, model, work, runs, rounds, together)]


def trained_mlp(work: Work) -> nn.Module:
    """An MLP 784-256-10 after two epochs, on the device of `work`."""
    mlp = build_model(ModelSpec("mlp", 1, 28, 28, 10, 256), seed=0).to(work["images"].device)
    train_classifier(
        mlp,
        Split(work["images"], work["labels"]),
        Split(work["images"][:1], work["labels"][:1]),
        learning_rate=1e-3,
        batch_size=TRAINING,
        epochs=2,
        seed=0,
    )
    return mlp


def least_of_mlp(models: int, steps: int, masked: int, device: torch.device) -> float:
    """Milliseconds a step and model of the MLP's matrix products, and a fused step of Adam, without anything else.

    For each model: the forward pass, the gradient of its weights, the penalty's gradient in the pixels, and what comes
    back from it through the first layer; both losses' gradients of a weight are one product.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    size = TRAINING + masked
    weights = [(draw(256, 784), draw(10, 256)) for _ in range(models)]
    every = [weight for each in weights for weight in each]
    for weight in every:
        weight.grad = torch.zeros_like(weight)
    pixels, hidden, logits = draw(size + masked, 784), draw(size + masked, 256), draw(size + masked, 10)
    adam = torch.optim.Adam(every, lr=RATE, fused=True)
    times = []
    with torch.inference_mode():
        for _ in range(steps):
            started = time.perf_counter()
            for first, last in weights:
                torch.mm(pixels[:size], first.T)
                torch.mm(hidden[:size], last.T)
                torch.mm(logits, last)
                torch.mm(hidden[:masked], first)
                torch.mm(pixels[:masked], first.T)
                torch.mm(hidden[:masked], last.T)
                torch.mm(hidden.T, pixels, out=first.grad)
                torch.mm(logits.T, hidden, out=last.grad)
            adam.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times) / models * 1e3


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
    mlp = trained_mlp(work)
    runs = [(rrr_lambda, seed) for rrr_lambda in LAMBDAS for seed in SEEDS]
    ways = measured(Case(), mlp, work, runs, arguments.rounds, together=True)
    least = least_of_mlp(len(runs), arguments.steps, Case().masked, device)
    resnet = build_model(ModelSpec("small_resnet", 3, 64, 64, 2, 16), seed=0).to(device)
    images = pictures(arguments.resnet_steps, device)
    two_runs = [(1.0, 0), (1.0, 1)]
    resnet_rows = rows(Case(), resnet, images, two_runs, arguments.rounds, together=False)
    lite = build_model(ModelSpec("efficientnet_lite0", 3, 64, 64, 2, 1), seed=0).to(device)
    for module in lite.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # both draw as they like
    lite_rows = rows(Case(24, True), lite, images, two_runs, arguments.rounds, together=False)
    page = [
        "# RRR training",
        "",
        f"`python -m benchmarks.alignment`, {datetime.date.today().isoformat()}. {_machine(device, arguments.threads)}",
        arguments.note,
        "",
        "The plain loop takes one model after the other, with torch's DataLoader, double backward by autograd and",
        f"torch's default Adam. All ways make the same steps on the same batches (8 alignment and {TRAINING} training",
        f"samples unless said otherwise). Medians over {arguments.rounds} rounds in which the ways take turns.",
        '"weights": how far a tensor of weights is from that of the plain loop, as a share of the way that it went',
        '(norms; the worst tensor of all runs). "losses": the largest relative difference of a mean cross-entropy or',
        "penalty. Both are float32 rounding, which Adam magnifies where a gradient is nearly zero.",
        "",
        f"## MLP 784-256-10 on {name}: {len(SEEDS)} seeds x {len(LAMBDAS)} λ, {arguments.steps} steps",
        "",
        *HEAD,
        *[way.line() for way in ways],
        "",
        "The matrix products of these steps and a fused step of Adam, nothing else, one model after the other,",
        f"take {least:.2f} ms per step and model here: {ways[0].ms / least:.1f} times less than the plain loop.",
        "",
        f"## small_resnet (16 channels) at 3x64x64: 2 seeds, {arguments.resnet_steps} steps",
        "",
        *HEAD,
        *resnet_rows,
        "",
        "## EfficientNet-Lite0 at 3x64x64, BatchNorm frozen, no dropout, 24 alignment samples: 2 seeds, "
        f"{arguments.resnet_steps} steps",
        "",
        *HEAD,
        *lite_rows,
        "",
        "Convolutional models are trained one after the other. The penalty's double backward is made of convolutions",
        "(`lvlmva_core.convolutions`), where PyTorch's takes a depthwise one channel by channel; freed memory is kept.",
    ]
    arguments.out.write_text("\n".join(page) + "\n", encoding="utf-8")


def _machine(device: torch.device, threads: int) -> str:
    graphics = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{os.cpu_count()} cores, {cpu_model()}{graphics}; {threads} thread(s); Python {platform.python_version()}, "
        f"torch {torch.__version__}."
    )


if __name__ == "__main__":
    main()
