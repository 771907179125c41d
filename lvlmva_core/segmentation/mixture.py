"""Weighted Gaussian mixtures over the pixels of attribution maps (PPEPS-WGM, LVLM-VA §4.1)."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lvlmva_core.errors import InputError
from lvlmva_core.regions import NO_REGION
from lvlmva_core.segmentation import em, newton

COARSEST = 14  # cells: grids are halved while their longer side has more
CELLS_PER_COMPONENT = 8  # starts are compared on the coarsest grid that has this many cells with weight per component
CONTESTS = (  # grids above the coarsest, starts that remain, EM steps before they are chosen
    (0, 8, 15),
    (1, 4, 30),
    (1, 2, 60),
    (1, 1, 120),
)
ROUGH = 1e-5  # nats that a step must gain for EM to go on while starts are compared
GUIDE = 1  # from the grid after this one on, Newton's method takes its corrections from this one: others cost too much
REST = 0.3  # part of the tolerance that Newton's method may leave to gain on the finest grid
CHUNKS_PER_THREAD = 2  # at least, where there are maps enough: no thread idles for long
CPU_PIXELS, DEVICE_PIXELS = 2**20, 2**22  # that a worker takes at once: bounds memory


@dataclass(frozen=True)
class WeightedGMM:
    """Mixtures fitted to B maps of H x W pixels, the floating-point fields in the dtype and on the device of the maps.

    Coordinates are (row, column) in [0, 1]: the centre of pixel (i, k) lies at ((i + 1/2) / H, (k + 1/2) / W).

    Attributes:
        weights: (B, J), falling: the share of the map's weight that each component explains; 0 for empty components.
        means: (B, J, 2).
        covariances: (B, J, 2, 2); measured in squared pixels, their eigenvalues are at least 1/12.
        log_likelihood: (B,), sum(w log p) / sum(w) in nats; 0 for a map without weight.
        labels: (B, H, W) uint8, the component of the largest responsibility at each pixel; 255 in a map without weight.
        status: per map "ok"; "no_positive_effect" (every weight is zero); "too_few_pixels" (fewer pixels have weight
            than there are components: each gets a component of its own, the others stay empty); "collapsed" (a
            component lost its weight during EM and is empty).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    log_likelihood: Tensor
    labels: Tensor
    status: list[str]


def fit_weighted_gmm(
    weights: Tensor | np.ndarray,
    n_components: int,
    *,
    seed: int = 0,
    init: tuple[Tensor, Tensor, Tensor] | None = None,
    n_starts: int = 32,
    tolerance: float = 1e-6,
    max_iterations: int = 5000,
    names: Sequence[str] | None = None,
) -> WeightedGMM:
    """Fit J full-covariance Gaussians to each weight map by weighted maximum likelihood (LVLM-VA §4.1).

    Starts are drawn by weighted k-means++ and compared on a coarse grid; the best goes through ever finer grids to full
    resolution. The random numbers depend on the seed alone and index each map's own distribution, so that neither the
    batch nor the scale of a map matters. On the CPU each map is fitted by itself on a single thread, as many maps at a
    time as torch has threads: bit for bit the same in any batch and with any number of threads. On other devices maps
    are fitted together, and the kernels' choice of summation order may depend on the batch.

    Args:
        weights: (B, H, W), finite and >= 0; denormal numbers count as 0. float32 or float64 is the precision of the
            result; it is computed in float64 in either case.
        n_components: J, 1 to 254.
        seed: of the starts.
        init: (weights (B, J), means (B, J, 2), covariances (B, J, 2, 2)) as in the result, to run plain EM at full
            resolution from there, without starts of its own.
        n_starts: how many starts are compared.
        tolerance: EM ends for a map when a step gains less than this, in nats per unit of weight. Newton's method,
            which follows the comparison of starts where it is quick, ends when it expects to gain less than a third.
        max_iterations: limit on the steps on each grid.
        names: what errors call the maps; "map 0", "map 1", ... by default.

    Raises:
        InputError: a weight is negative or not finite; the map is named.
        ValueError: an argument is out of its range.

    Examples:
        A map with three quarters of its weight on one square and a quarter on another.

        >>> weights = torch.zeros(1, 16, 16)
        >>> weights[0, 2:6, 2:6] = 3.0
        >>> weights[0, 10:14, 10:14] = 1.0
        >>> mixture = fit_weighted_gmm(weights, n_components=2)
        >>> mixture.weights
        tensor([[0.7500, 0.2500]])
        >>> mixture.means[0]
        tensor([[0.2500, 0.2500],
                [0.7500, 0.7500]])
        >>> mixture.labels[0, [4, 12], [4, 12]].tolist()
        [0, 1]
    """
    maps = _checked_maps(weights, names)
    if not 1 <= n_components < NO_REGION:
        raise ValueError(f"n_components = {n_components}: choose 1 to {NO_REGION - 1}")
    if n_starts < 1 or max_iterations < 1 or not tolerance > 0:
        raise ValueError("n_starts and max_iterations must be at least 1 and tolerance must be above 0")
    start = None if init is None else _checked_init(init, maps, n_components)
    uniforms = torch.rand(
        n_starts, n_components, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(maps.device)
    settings = _Settings(n_components, uniforms, tolerance, max_iterations)
    size = max(1, (CPU_PIXELS if maps.device.type == "cpu" else DEVICE_PIXELS) // maps.shape[1:].numel())
    if maps.device.type == "cpu":
        size = max(1, min(size, len(maps) // (CHUNKS_PER_THREAD * torch.get_num_threads())))
    chunks = torch.split(maps, size)
    starts = [None] * len(chunks) if start is None else list(torch.split(start, size))
    with _workers(maps.device) as pool:
        parts = list(pool.map(partial(_fit_chunk, settings=settings), chunks, starts))
    return WeightedGMM(
        weights=torch.cat([part.weights for part in parts]),
        means=torch.cat([part.means for part in parts]),
        covariances=torch.cat([part.covariances for part in parts]),
        log_likelihood=torch.cat([part.log_likelihood for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        status=[status for part in parts for status in part.status],
    )


@torch.no_grad()
def log_likelihood(mixtures: WeightedGMM, weights: Tensor | np.ndarray) -> Tensor:
    """sum(w log p) / sum(w) in nats, (B,) float64, of each mixture on another map of the same size: (B, H, W) weights.

    0 for a map without weight. Raises ValueError as `fit_weighted_gmm`.
    """
    maps = _checked_maps(weights, None)
    if maps.shape != mixtures.labels.shape:
        raise ValueError(
            f"weights must be {tuple(mixtures.labels.shape)} like the maps fitted, not {tuple(maps.shape)}"
        )
    result = torch.zeros(len(maps), dtype=torch.float64, device=maps.device)
    features = em.pixel_features(maps.shape[1], maps.shape[2], maps.device)
    for n, state in enumerate(mixtures.status):
        if state == "no_positive_effect":
            continue
        one = mixtures.weights[n, None], mixtures.means[n, None], mixtures.covariances[n, None]
        statistics = _checked_init(one, maps[n, None], mixtures.weights.shape[1])
        result[n] = torch.dot(em.pixel_weights(maps[n, None]).flatten(), _densities(statistics, features)[0])
    return result


@dataclass(frozen=True)
class _Settings:
    n_components: int
    uniforms: Tensor  # (R, J) in [0, 1)
    tolerance: float
    max_iterations: int


@contextmanager
def _workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """A pool with a worker per CPU thread of torch, each computing on one thread; one worker for other devices."""
    n_threads = torch.get_num_threads()
    on_cpu = device.type == "cpu"
    try:
        with ThreadPoolExecutor(n_threads if on_cpu else 1, initializer=_use_one_thread if on_cpu else None) as pool:
            yield pool
    finally:
        torch.set_num_threads(n_threads)  # torch hands the last number set to the threads that start later


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # of this thread alone: responsibilities below 1e-38 are slow and do not matter


def _checked_maps(weights: Tensor | np.ndarray, names: Sequence[str] | None) -> Tensor:
    maps = torch.as_tensor(weights).detach()
    if maps.dtype not in (torch.float32, torch.float64):
        maps = maps.float() if maps.is_floating_point() else maps.double()
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"weights must be (B, H, W), not {tuple(maps.shape)}")
    bad = (~(torch.isfinite(maps) & (maps >= 0))).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        name = f"map {bad[0]}" if names is None else names[bad[0]]
        more = f" ({len(bad)} such maps)" if len(bad) > 1 else ""
        raise InputError(f"{name}: weights must be finite and at least 0{more}; clip attributions at 0 before")
    return maps


def _checked_init(init: tuple[Tensor, Tensor, Tensor], maps: Tensor, n_components: int) -> Tensor:
    """Sufficient statistics (B, J, 6) of parameters that the caller gave."""
    shape = (len(maps), n_components)
    shares, means, covariances = (torch.as_tensor(part, dtype=torch.float64, device=maps.device) for part in init)
    if shares.shape != shape or means.shape != (*shape, 2) or covariances.shape != (*shape, 2, 2):
        raise ValueError(
            f"init must be weights {shape}, means {(*shape, 2)}, covariances {(*shape, 2, 2)}, "
            f"not {tuple(shares.shape)}, {tuple(means.shape)}, {tuple(covariances.shape)}"
        )
    if not all(bool(torch.isfinite(part).all()) for part in (shares, means, covariances)):
        raise ValueError("init must be finite")
    if bool((shares < 0).any()) or bool((shares.sum(1) <= 0).any()):
        raise ValueError("init: weights must be at least 0, and not all 0 in a map")
    if bool((torch.linalg.eigvalsh(covariances) <= 0).any()):
        raise ValueError("init: covariances must be positive definite")
    size = torch.tensor(maps.shape[1:], dtype=torch.float64, device=maps.device)
    scaled = covariances * size[:, None] * size
    triple = torch.stack([scaled[..., 0, 0], (scaled[..., 0, 1] + scaled[..., 1, 0]) / 2, scaled[..., 1, 1]], dim=-1)
    return em.statistics_of(shares / shares.sum(1, keepdim=True), means * size - size / 2, triple)


@torch.inference_mode()
def _fit_chunk(maps: Tensor, start: Tensor | None, settings: _Settings) -> WeightedGMM:
    n_pixels = (maps > 0).flatten(1).sum(1)
    few = (n_pixels > 0) & (n_pixels < settings.n_components)
    enough = n_pixels >= settings.n_components
    statistics = torch.zeros(len(maps), settings.n_components, 6, dtype=torch.float64, device=maps.device)
    for n in few.nonzero()[:, 0].tolist():
        pixels = em.as_points(em.pixel_moments(maps[n, None]), only_weighted=True).moments[0].mT
        statistics[n, : len(pixels)] = pixels
    if bool(enough.any()):
        in_group = 1 if maps.device.type == "cpu" else len(maps)
        features = em.pixel_features(maps.shape[1], maps.shape[2], maps.device)
        groups = [em.pixel_moments(group, features) for group in maps[enough].split(in_group)]
        if start is None:
            statistics[enough] = _from_coarse_to_fine(groups, settings)
        else:
            points = [em.as_points(group, only_weighted=True) for group in groups]
            fitted, _ = em.maximise(
                points, start[enough][:, None], settings.tolerance, settings.max_iterations, accelerate=False
            )
            statistics[enough] = fitted[:, 0]
    empty = (em.parameters(statistics[:, None])[0][:, 0] == 0).any(1)
    status = ["collapsed" if e else "ok" for e in empty.tolist()]
    for kind, maps_of_kind in (("too_few_pixels", few), ("no_positive_effect", n_pixels == 0)):
        for n in maps_of_kind.nonzero().flatten().tolist():
            status[n] = kind
    return _describe(maps, statistics, status)


def _from_coarse_to_fine(groups: list[Tensor], settings: _Settings) -> Tensor:
    """Fit maps, given as (g, 6, H, W) moments of pixels: starts on the coarsest grid, the best on each finer one.

    groups: of one map each, or one of all maps.
    """
    pyramids = [[group] for group in groups]
    wanted = CELLS_PER_COMPONENT * settings.n_components
    tops = []
    for grids in pyramids:
        while max(grids[-1].shape[2:]) > COARSEST:
            grids.append(em.halve(grids[-1]))
        enough = torch.stack([(grid[:, 0] > 0).flatten(1).sum(1) >= wanted for grid in grids])
        tops.append((enough * torch.arange(len(grids), device=enough.device)[:, None]).amax(0))
    top = torch.cat(tops)
    result = torch.empty(len(top), settings.n_components, 6, dtype=torch.float64, device=top.device)
    for k in top.unique().tolist():
        chosen = [
            [grid if len(grid) == 1 else grid[rows == k] for grid in grids[: k + 1]]
            for grids, rows in zip(pyramids, tops, strict=True)
            if bool((rows == k).any())
        ]
        levels = [[em.as_points(grid, only_weighted=True) for grid in level] for level in zip(*chosen, strict=True)]
        result[top == k] = _from_top(levels, settings)
    return result


def _from_top(levels: list[list[em.Points]], settings: _Settings) -> Tensor:
    """Fit G maps, given as groups of points on grids from fine to coarse; statistics (G, J, 6)."""
    top = len(levels) - 1
    statistics = torch.cat([em.spread_starts(points, settings.uniforms) for points in levels[top]])
    for above, kept, steps in CONTESTS:
        statistics, likelihood = em.maximise(levels[max(top - above, 0)], statistics, ROUGH, steps, accelerate=True)
        order = likelihood.argsort(dim=1, descending=True, stable=True)[:, :kept, None, None]
        statistics = statistics.gather(1, order.expand(-1, -1, *statistics.shape[2:]))
    return _converged(levels[max(top - 1, 0) :: -1], statistics[:, 0], settings)


def _converged(levels: list[list[em.Points]], statistics: Tensor, settings: _Settings) -> Tensor:
    """Each map's mixture (G, J, 6) at its maximum on the last of the grids from coarse to fine.

    By Newton's method as long as that is quick, then, on the same grid and all finer ones, by EM with leaps.
    """
    quick = torch.ones(len(statistics), dtype=torch.bool, device=statistics.device)
    correction = guide_level = None
    for k, level in enumerate(levels):
        if bool(quick.any()):
            guide = None
            if guide_level is not None and correction is not None:
                guide = em.rows_of_groups(guide_level, quick), correction
            tolerance = settings.tolerance * (REST if k == len(levels) - 1 else 1)
            statistics[quick], given_up, correction = newton.climb(
                em.rows_of_groups(level, quick), statistics[quick], tolerance, settings.max_iterations, guide
            )
            quick[quick.clone()] = ~given_up
            correction = correction[~given_up]
            if k == GUIDE:
                guide_level = level
        if not bool(quick.all()):
            fitted, _ = em.maximise(
                em.rows_of_groups(level, ~quick),
                statistics[~quick][:, None],
                settings.tolerance,
                settings.max_iterations,
                accelerate=True,
            )
            statistics[~quick] = fitted[:, 0]
    return statistics


def _densities(statistics: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density in units of the map's area, float64, and the component of largest responsibility (uint8) at pixels.

    statistics: (1, J, 6), of one mixture. features: (6, H, W), of all pixels.
    """
    joint = torch.matmul(em.log_joint_of(statistics[None])[0, 0], features.flatten(1))
    peak = joint.amax(0)
    numbers = torch.arange(len(joint), dtype=torch.uint8, device=joint.device)[:, None]
    component = (joint != peak).view(torch.uint8).neg_().bitwise_or_(numbers).amin(0)  # argmax is much slower
    log_density = joint.sub_(peak).clamp_(min=em.LEAST_EXPONENT).exp_().sum(0).log_().add_(peak)
    return log_density + math.log(features[0].numel()), component


def _describe(maps: Tensor, statistics: Tensor, status: list[str]) -> WeightedGMM:
    """The result for given statistics (G, J, 6): components by falling share, density and labels in float64."""
    n_maps, height, width = maps.shape
    order = statistics[..., 0].argsort(dim=1, descending=True, stable=True)
    statistics = statistics.gather(1, order[..., None].expand(-1, -1, 6))[:, None]
    shares, means, triple = (part[:, 0] for part in em.parameters(statistics))
    labels = torch.full((n_maps, height * width), NO_REGION, dtype=torch.uint8, device=maps.device)
    likelihood = torch.zeros(n_maps, dtype=torch.float64, device=maps.device)
    features = em.pixel_features(height, width, maps.device)
    some = torch.tensor([state != "no_positive_effect" for state in status], dtype=torch.bool, device=maps.device)
    for n in some.nonzero()[:, 0].tolist():
        log_density, labels[n] = _densities(statistics[n], features)
        likelihood[n] = torch.dot(em.pixel_weights(maps[n, None]).flatten(), log_density)
    size = torch.tensor([height, width], dtype=torch.float64, device=maps.device)
    covariances = triple[..., [0, 1, 1, 2]].view(*triple.shape[:2], 2, 2) / (size[:, None] * size)
    return WeightedGMM(
        weights=torch.where(some[:, None], shares, 0.0).to(maps.dtype),
        means=(means / size + 0.5).to(maps.dtype),
        covariances=covariances.to(maps.dtype),
        log_likelihood=likelihood.to(maps.dtype),
        labels=labels.view(n_maps, height, width),
        status=status,
    )
