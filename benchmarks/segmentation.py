"""PPEPS-WGM against pomegranate and a plain EM loop: seconds a map and log-likelihood, on maps of many kinds.

    python -m benchmarks.segmentation [--attributions data/attributions.zarr] [--out benchmarks/segmentation.md]

pomegranate is measured where it is installed (`pip install pomegranate==1.1.2`, best in an environment of its own).
"""

import argparse
import datetime
import importlib.metadata
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import cpu_model
from lvlmva_core.arrays import read_array
from lvlmva_core.compute import set_up_compute
from lvlmva_core.segmentation import em, fit_chosen_gmm, fit_weighted_gmm
from lvlmva_core.segmentation.choice import Criterion
from lvlmva_core.segmentation.mixture import CELLS_PER_COMPONENT, COARSEST

J, SIDE = 7, 224
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


def attribution_like(n: int, seed: int = 0) -> Tensor:
    """Positive parts of signed, heavy-tailed noise that is strong in two to eight ellipses: (n, 224, 224) float32."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE).float(), torch.arange(SIDE).float(), indexing="ij")
    maps = torch.empty(n, SIDE, SIDE)
    for k in range(n):
        envelope = torch.full((SIDE, SIDE), 0.02)
        for _ in range(int(torch.randint(2, 9, (1,), generator=generator))):
            centre = torch.rand(2, generator=generator) * SIDE
            width = torch.rand(2, generator=generator) * SIDE * 0.1 + 3
            angle = torch.rand(1, generator=generator) * math.pi
            along = (rows - centre[0]) * angle.cos() + (columns - centre[1]) * angle.sin()
            across = (columns - centre[1]) * angle.cos() - (rows - centre[0]) * angle.sin()
            height = torch.rand(1, generator=generator)
            envelope += height * torch.exp(-((along / width[0]) ** 2 + (across / width[1]) ** 2) / 2)
        noise = torch.randn(SIDE, SIDE, generator=generator) * torch.randn(SIDE, SIDE, generator=generator).exp()
        maps[k] = (envelope * (noise + 0.3)).clamp(min=0)
    return maps


def random_fields(n: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Gaussian fields of variance 1 whose power falls with frequency to the -exponent: (n, 224, 224) float32."""
    frequency = torch.hypot(torch.fft.fftfreq(SIDE)[:, None], torch.fft.rfftfreq(SIDE)[None])
    amplitude = frequency.clamp(min=1 / SIDE) ** (-exponent / 2)
    amplitude[0, 0] = 0
    noise = torch.randn(n, SIDE, SIDE, generator=generator)
    fields = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(SIDE, SIDE))
    unit: Tensor = fields / fields.std((1, 2), keepdim=True)
    return unit


def sparse(n: int, generator: torch.Generator) -> Tensor:
    """About one pixel in a hundred, on contour lines."""
    lines = (random_fields(n, 3.0, generator).abs() < 0.06) & (random_fields(n, 2.0, generator) > 0.3)
    noise = torch.randn(n, SIDE, SIDE, generator=generator) * torch.randn(n, SIDE, SIDE, generator=generator).exp()
    return torch.where(lines, noise, 0).clamp(min=0)


def dense(n: int, generator: torch.Generator) -> Tensor:
    """Every pixel, log-normal over all scales, from even to peaked."""
    return (torch.linspace(0.5, 2.0, n)[:, None, None] * random_fields(n, 2.5, generator)).exp()


def noisy(n: int, generator: torch.Generator) -> Tensor:
    """Positive half of white, heavy-tailed noise under a weak envelope."""
    envelope = (0.5 * random_fields(n, 3.0, generator)).exp()
    noise = torch.randn(n, SIDE, SIDE, generator=generator)
    return (envelope * noise * (1.5 * torch.randn(n, SIDE, SIDE, generator=generator)).exp()).clamp(min=0)


def smooth(n: int, generator: torch.Generator) -> Tensor:
    """Positive half of a smooth field, squared."""
    return random_fields(n, 4.0, generator).clamp(min=0) ** 2


def ridges(n: int, generator: torch.Generator) -> Tensor:
    """Contour lines, from wide apart to near, positive where another field is."""
    phase = torch.linspace(2, 6, n)[:, None, None] * random_fields(n, 4.0, generator)
    return (torch.exp(-(((phase % 1) - 0.5) ** 2) / 0.02) * random_fields(n, 2.0, generator)).clamp(min=0)


def planted(n: int, generator: torch.Generator, clumps: int, noise: float) -> Tensor:
    """Fewer Gaussians than regions, each pixel times 1 ± noise."""
    rows, columns = torch.meshgrid(torch.arange(SIDE).float(), torch.arange(SIDE).float(), indexing="ij")
    maps = torch.zeros(n, SIDE, SIDE)
    for k in range(n):
        for _ in range(clumps):
            centre = (0.15 + 0.7 * torch.rand(2, generator=generator)) * SIDE
            width = (0.03 + 0.1 * torch.rand(2, generator=generator)) * SIDE
            distance = ((rows - centre[0]) / width[0]) ** 2 + ((columns - centre[1]) / width[1]) ** 2
            maps[k] += (0.3 + 0.7 * torch.rand(1, generator=generator)) * torch.exp(-distance / 2)
        maps[k] *= 1 + noise * (2 * torch.rand(SIDE, SIDE, generator=generator) - 1)
    return maps


def lines(n: int, generator: torch.Generator) -> Tensor:
    """One to five straight lines, one pixel wide."""
    maps, along = torch.zeros(n, SIDE, SIDE), torch.linspace(0, 1, 2 * SIDE)[:, None]
    for k in range(n):
        for _ in range(1 + k % 5):
            begin, end = torch.rand(2, 2, generator=generator) * (SIDE - 1)
            row, column = (begin * (1 - along) + end * along).round().long().unbind(1)
            maps[k, row, column] = 0.2 + float(torch.rand(1, generator=generator))
    return maps


def constant(n: int, generator: torch.Generator) -> Tensor:
    """A rectangle of one value."""
    maps = torch.zeros(n, SIDE, SIDE)
    for k in range(n):
        top, left, height, width = torch.randint(8, SIDE // 2, (4,), generator=generator).tolist()
        maps[k, top : top + height, left : left + width] = 1
    return maps


Kind = Callable[[int, torch.Generator], Tensor]
KINDS: dict[str, Kind] = {kind.__name__: kind for kind in (sparse, dense, noisy, smooth, ridges, lines, constant)}
for _clumps in (1, 2, 3):
    for _noise in (0.0, 0.5):
        KINDS[f"{_clumps} planted, noise {_noise}"] = partial(planted, clumps=_clumps, noise=_noise)
for _side in (8, 28):
    KINDS[f"noisy, {_side} x {_side}"] = lambda n, generator, side=_side: noisy(n, generator)[:, :side, :side]
CHOSEN = "2 planted, noise 0.5"


def starts_of(maps: Tensor, n_starts: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The starts that `fit_weighted_gmm` draws, as parameters: (shares, means, covariances) of all maps per start."""
    grid = em.pixel_moments(maps)
    while max(grid.shape[2:]) > COARSEST:
        grid = em.halve(grid)
    if bool(((grid[:, 0] > 0).flatten(1).sum(1) < CELLS_PER_COMPONENT * J).any()):
        raise SystemExit("a map has too little weight to draw all starts on one grid; choose other maps")
    points = em.as_points(grid, only_weighted=True)
    uniforms = torch.rand(32, J, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[:n_starts]
    statistics = em.spread_starts(points, uniforms)
    shares, means, triple = em.parameters(statistics)
    size = torch.tensor(maps.shape[1:], dtype=torch.float64)
    covariances = triple[..., [0, 1, 1, 2]].view(*triple.shape[:3], 2, 2) / (size[:, None] * size)
    return [(shares[:, r], means[:, r] / size + 0.5, covariances[:, r]) for r in range(n_starts)]


def plain_em(weights: np.ndarray, start: tuple[np.ndarray, ...], tolerance: float) -> float:
    """Textbook EM of one map over its pixels with weight, NumPy in float64; the log-likelihood."""
    height, width = weights.shape
    rows, columns = np.nonzero(weights)
    points = np.stack([(rows + 0.5) / height, (columns + 0.5) / width], axis=1)
    mass = weights[rows, columns].astype(np.float64)
    mass /= mass.sum()
    shares, means, covariances = start
    before = -math.inf
    while True:
        joint = np.empty((len(points), len(shares)))
        for j, (share, mean, covariance) in enumerate(zip(shares, means, covariances, strict=True)):
            white = np.linalg.solve(np.linalg.cholesky(covariance), (points - mean).T)
            constant = math.log(share) - math.log(2 * math.pi) - np.linalg.slogdet(covariance)[1] / 2
            joint[:, j] = constant - (white**2).sum(0) / 2
        peak = joint.max(1, keepdims=True)
        responsibility = np.exp(joint - peak)
        total = responsibility.sum(1, keepdims=True)
        likelihood = float(mass @ (peak + np.log(total))[:, 0])
        if likelihood - before < tolerance:
            return likelihood
        before = likelihood
        responsibility *= mass[:, None] / total
        shares = responsibility.sum(0)
        means = responsibility.T @ points / shares[:, None]
        covariances = np.stack(
            [
                (responsibility[:, j, None] * (points - means[j])).T @ (points - means[j]) / shares[j]
                + np.diag([1 / height**2, 1 / width**2]) / 1200
                for j in range(len(shares))
            ]
        )


def by_pomegranate(weights: np.ndarray) -> float:
    """pomegranate's mixture over the pixels with weight, its own k-means start; the log-likelihood of its result."""
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    rows, columns = np.nonzero(weights)
    points = torch.from_numpy(np.stack([(rows + 0.5) / SIDE, (columns + 0.5) / SIDE], axis=1)).float()
    mass = torch.from_numpy(weights[rows, columns])
    model = GeneralMixtureModel([Normal() for _ in range(J)], tol=1e-3, random_state=0)
    model.fit(points, sample_weight=(mass * (SIDE * SIDE / mass.sum()))[:, None])
    with torch.no_grad():
        return float((model.log_probability(points).double() * mass.double()).sum() / mass.double().sum())


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds on the clock, CPU seconds of all threads (which other processes disturb less), and the result."""
    begin, cpu = time.perf_counter(), time.process_time()
    result = run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - cpu, result


def other_kinds(n: int, device: torch.device) -> list[str]:
    """A table of n maps of each kind: least CPU time of two runs; and of choosing the number of regions."""
    table = ["| kind of maps | pixels with weight | CPU milliseconds a map | seconds a map |", "|---|---|---|---|"]

    def row(name: str, maps: Tensor, run: Callable[[], Any]) -> str:
        runs = [timed(run)[:2] for _ in range(2)]
        clock, cpu = (min(run[part] for run in runs) / len(maps) for part in (0, 1))
        return f"| {name} | {float((maps > 0).float().mean()):.2f} | {1e3 * cpu:.0f} | {clock:.3f} |"

    for number, (name, kind) in enumerate(KINDS.items()):
        maps = kind(n, torch.Generator().manual_seed(2000 + number)).to(device)
        table.append(row(name, maps, partial(fit_weighted_gmm, maps, J)))
    few = KINDS[CHOSEN](2, torch.Generator().manual_seed(3000))[:, ::4, ::4].to(device)
    for criterion in CRITERIA:
        run = partial(fit_chosen_gmm, few, range(1, J + 1), criterion)
        table.append(row(f"{CHOSEN}, 56 x 56, 1 to {J} regions by {criterion}", few, run))
    return [f"{n} maps of each of other kinds (2 where J is chosen), the least of two runs:", "", *table, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attributions", type=Path, help="an attributions.zarr of 224 x 224; synthetic maps without")
    parser.add_argument(
        "--maps", type=int, default=1024, help="maps that are timed; taken again and again if fewer are given"
    )
    parser.add_argument("--peer-maps", type=int, default=4, help="maps for the slow peers")
    parser.add_argument("--reference-maps", type=int, default=16, help="maps for the full-resolution reference")
    parser.add_argument("--kind-maps", type=int, default=32, help="maps of each of the other kinds; 0 for none")
    parser.add_argument(
        "--device", default="cpu", help="where this library's fits run; the peers' run on the processor"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--title", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.attributions:
        own = torch.from_numpy(np.maximum(read_array(options.attributions, "attributions"), 0))
        maps = own.repeat(-(-options.maps // len(own)), 1, 1)[: options.maps]
    else:
        maps = attribution_like(options.maps)
    some, few = maps[: options.reference_maps], maps[: options.peer_maps]

    device = set_up_compute(options.device, options.threads)
    there = maps.to(device)
    fit_weighted_gmm(there[:2], J)
    load = os.getloadavg()[0]
    seconds, cpu, fit = timed(lambda: fit_weighted_gmm(there, J))
    each = seconds / len(maps)
    ours = fit.log_likelihood.cpu()
    rows = [("this library, 32 starts", len(maps), each, cpu / len(maps), float(ours[: len(few)].double().mean()))]

    starts = starts_of(some, 4)
    reference = torch.stack([fit_weighted_gmm(some.double(), J, init=s, tolerance=1e-9).log_likelihood for s in starts])
    single = fit_weighted_gmm(some, J, n_starts=1).log_likelihood.double()
    four = fit_weighted_gmm(some, J, n_starts=4).log_likelihood.double()

    def plain() -> float:
        first = [tuple(part[n].numpy() for part in starts[0]) for n in range(len(few))]
        return float(np.mean([plain_em(few[n].numpy(), first[n], 1e-6) for n in range(len(few))]))

    seconds, cpu, likelihood = timed(plain)
    rows.append(("plain EM loop, NumPy, 1 start", len(few), seconds / len(few), cpu / len(few), float(likelihood)))
    peers = "numpy " + np.__version__
    try:
        version = importlib.metadata.version("pomegranate")
    except importlib.metadata.PackageNotFoundError:
        sys.stderr.write("pomegranate is not installed: left out\n")
    else:
        peers += f", pomegranate {version}"
        by_pomegranate(few[0].numpy()[::4, ::4].repeat(4, 0).repeat(4, 1))  # warm up
        seconds, cpu, values = timed(lambda: [by_pomegranate(one.numpy()) for one in few])
        rows.append(
            (f"pomegranate {version}, 1 start", len(few), seconds / len(few), cpu / len(few), float(np.mean(values)))
        )

    lines = [
        f"### {options.title or 'Synthetic maps'}",
        "",
        f"{len(maps)} maps of {SIDE} x {SIDE}, J = {J}, {options.threads} threads, {_name(device)}"
        f" ({platform.machine()}, {os.cpu_count()} cores, {cpu_model()}; load average {load:.1f} at the start);"
        f" {datetime.date.today().isoformat()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {peers}.",
        "",
        "| | maps timed | seconds a map | times ours | CPU seconds a map | log-likelihood on the first maps |",
        "|---|---|---|---|---|---|",
        *(f"| {name} | {n} | {t:.4f} | {t / each:.1f} | {c:.4f} | {value:.5f} |" for name, n, t, c, value in rows),
        "",
        f"All {len(maps)} maps: {each * len(maps):.1f} s on the clock, {rows[0][3] * len(maps):.1f} CPU seconds.",
        "",
        f"Against full-resolution EM in float64, run to gains below 1e-9 ({len(some)} maps, mean difference of the"
        " log-likelihood in nats per unit of weight; worst map in brackets):",
        "",
        "| this library | reference | difference |",
        "|---|---|---|",
        *(
            f"| {name} | {against} | {float((value - other).mean()):+.5f} ({float((value - other).min()):+.5f}) |"
            for name, value, against, other in (
                ("1 start", single, "the same start", reference[0]),
                ("4 starts", four, "the best of the same 4 starts", reference.amax(0)),
                ("32 starts", ours[: len(some)].double(), "one start", reference[0]),
                ("32 starts", ours[: len(some)].double(), "the best of 4 starts", reference.amax(0)),
            )
        ),
        "",
    ]
    lines += other_kinds(options.kind_maps, device) if options.kind_maps else []
    text = "\n".join(lines)
    sys.stdout.write(text + "\n")
    if options.out:
        before = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
        options.out.write_text(f"{before}{text}\n", encoding="utf-8")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    main()
