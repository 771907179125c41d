"""Expectation maximisation for Gaussian mixtures over weighted pixels, on grids from coarse to fine.

Shapes: G maps, R mixtures per map, J components, P points. Coordinates are (row, column) in pixels from the centre of
the map. A mixture is held as its sufficient statistics (G, R, J, 6) in float64: the weight that each component is
responsible for, times 1, row, column, row², row · column, column².
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1 / 12  # least eigenvalue of a covariance, in squared pixels: the variance of mass spread evenly over a pixel
EMPTY_SHARE = 1e-12  # a component with less of the weight than this is empty: it is dropped


@dataclass(frozen=True)
class Points:
    """Pixels with weight, or cells of pixels, of G maps; rows of fewer than P points are padded with weight zero.

    A cell enters through its exact moments and has one responsibility for all of its pixels, chosen by their mean
    log-density. That is EM on a lower bound of the likelihood over pixels, hence monotone as well.
    """

    coordinates: Tensor  # (G, 3, P): row, column, 1
    spread: Tensor | None  # (G, 4, P) for cells: variance of rows, twice the covariance, variance of columns, 1
    moments: Tensor  # (G, P, 6) float64: weight times 1, row, column, row², row · column, column²

    @property
    def device(self) -> torch.device:
        return self.moments.device

    def rows(self, index: Tensor) -> "Points":
        """The points of some of the maps."""
        spread = None if self.spread is None else self.spread[index]
        return Points(self.coordinates[index], spread, self.moments[index])


def pixel_moments(maps: Tensor) -> Tensor:
    """(G, H, W) weights -> (G, H, W, 6) float64 moments of the pixels, each map's weight being 1 unless it is 0."""
    weights = maps.double()
    weights = weights / weights.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)  # no overflow
    weights = weights / weights.sum((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    rows, columns = centred_coordinates(maps.shape[1], maps.shape[2], maps.device)
    weighted_rows, weighted_columns = weights * rows, weights * columns
    second = weighted_rows * rows, weighted_rows * columns, weighted_columns * columns
    return torch.stack([weights, weighted_rows, weighted_columns, *second], dim=-1)


def centred_coordinates(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows (H, 1) and columns (1, W) of pixel centres, in pixels from the centre of the map, float64."""
    rows = torch.arange(height, dtype=torch.float64, device=device) - (height - 1) / 2
    columns = torch.arange(width, dtype=torch.float64, device=device) - (width - 1) / 2
    return rows[:, None], columns[None, :]


def halve(moments: Tensor) -> Tensor:
    """Moments of cells of 2 x 2: (G, H, W, 6) -> (G, ceil(H/2), ceil(W/2), 6)."""
    height, width = moments.shape[1:3]
    padded = torch.nn.functional.pad(moments, (0, 0, 0, width % 2, 0, height % 2))
    return padded[:, ::2, ::2] + padded[:, 1::2, ::2] + padded[:, ::2, 1::2] + padded[:, 1::2, 1::2]


def points_with_weight(moments: Tensor, dtype: torch.dtype, *, cells: bool) -> Points:
    """Gather what has weight from (G, H, W, 6) moments; coordinates are held in `dtype`."""
    flat = moments.flatten(1, 2)
    has_weight = flat[..., 0] > 0
    if len(flat) == 1:
        flat = flat[:, has_weight[0]]
    else:
        size = int(has_weight.sum(1).max())
        order = has_weight.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
        flat = flat.gather(1, order[..., None].expand(-1, -1, 6))
    weight = torch.where(flat[..., 0] > 0, flat[..., 0], 1.0)
    _, row, column, row_row, row_column, column_column = (flat / weight[..., None]).unbind(-1)
    one = torch.ones_like(row)
    coordinates = torch.stack([row, column, one], dim=1)
    spread = None
    if cells:
        covariance = [row_row - row**2, 2 * (row_column - row * column), column_column - column**2]
        spread = torch.stack([*covariance, one], dim=1).to(dtype)
    return Points(coordinates.to(dtype), spread, flat)


def parameters(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares (G, R, J), means (G, R, J, 2) and covariances (G, R, J, 3: rr, rc, cc) of the largest likelihood.

    Largest among covariances whose eigenvalues are at least `FLOOR`, for which it is optimal to raise the smaller ones.
    An empty component has share 0, its mean at the centre, and the covariance FLOOR · 1.
    """
    weight = statistics[..., 0]
    weight = torch.where(weight < EMPTY_SHARE * weight.sum(-1, keepdim=True), 0.0, weight)
    full = weight > 0
    mean = torch.where(full[..., None], statistics, 0.0) / torch.where(full, weight, 1.0)[..., None]
    _, row, column, row_row, row_column, column_column = mean.unbind(-1)
    covariance = _raise_eigenvalues(row_row - row**2, row_column - row * column, column_column - column**2)
    return weight / weight.sum(-1, keepdim=True), mean[..., 1:3], covariance


def _raise_eigenvalues(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Raise the eigenvalues of [[a, b], [b, c]] to `FLOOR`; a matrix that needs no change is not touched."""
    middle, skew = (a + c) / 2, (a - c) / 2
    radius = torch.hypot(skew, b)
    high, low = (middle + radius).clamp(min=FLOOR), (middle - radius).clamp(min=FLOOR)
    shrink = (high - low) / 2 / torch.where(radius > 0, radius, 1.0)
    centre = (high + low) / 2
    raised = torch.stack([centre + shrink * skew, shrink * b, centre - shrink * skew], dim=-1)
    return torch.where((middle - radius < FLOOR)[..., None], raised, torch.stack([a, b, c], dim=-1))


def statistics_of(shares: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """The statistics of which `parameters` gives these parameters."""
    (row, column), (row_row, row_column, column_column) = means.unbind(-1), covariances.unbind(-1)
    second = row_row + row**2, row_column + row * column, column_column + column**2
    return shares[..., None] * torch.stack([torch.ones_like(row), row, column, *second], dim=-1)


def log_joint(points: Points, statistics: Tensor) -> Tensor:
    """log(share_j · density_j) at the points (its mean over each cell), (G, R, J, P), density per squared pixel.

    Points are whitened by each component's Cholesky factor before they are squared: expanding the square would cancel
    catastrophically in float32 for narrow components.
    """
    shares, means, covariances = parameters(statistics)
    dtype = points.coordinates.dtype
    (row, column), (row_row, row_column, column_column) = means.unbind(-1), covariances.unbind(-1)
    l11 = row_row.sqrt()
    l21 = row_column / l11
    l22 = (column_column - l21**2).clamp(min=FLOOR / 4).sqrt()
    constant = shares.log() - math.log(2 * math.pi) - l11.log() - l22.log()
    a11, a22 = math.sqrt(0.5) / l11, math.sqrt(0.5) / l22
    a21 = -a22 * l21 / l11
    first = torch.stack([a11, torch.zeros_like(a11), -a11 * row], dim=-1)
    second = torch.stack([a21, a22, -a21 * row - a22 * column], dim=-1)
    whiten = torch.stack([first, second], dim=1)  # (G, 2, R, J, 3)
    white = torch.matmul(whiten.flatten(1, 3).to(dtype), points.coordinates)
    white = white.view(*whiten.shape[:4], points.coordinates.shape[-1])
    if points.spread is None:
        result = torch.addcmul(constant.to(dtype)[..., None], white[:, 0], white[:, 0], value=-1)
    else:
        inner = torch.stack([-(a11**2) - a21**2, -a21 * a22, -(a22**2), constant], dim=-1)
        result = torch.matmul(inner.flatten(1, 2).to(dtype), points.spread).view(
            *inner.shape[:3], points.spread.shape[-1]
        )
        result.addcmul_(white[:, 0], white[:, 0], value=-1)
    return result.addcmul_(white[:, 1], white[:, 1], value=-1)


def step(points: Points, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """One E-step and the sums of the M-step.

    Returns:
        the next statistics (G, R, J, 6), and the log-likelihood (G, R) of the given ones: nats per unit of weight.
    """
    joint = log_joint(points, statistics)
    peak = joint.amax(2, keepdim=True)
    joint.sub_(peak).exp_()
    total = joint.sum(2, keepdim=True)
    joint.div_(total)
    log_density = (peak + total.log_()).squeeze(2).double()
    log_likelihood = torch.matmul(log_density, points.moments[..., :1]).squeeze(-1)
    moments = torch.matmul(joint.flatten(1, 2).double(), points.moments)
    return moments.view(*joint.shape[:3], 6), log_likelihood


def maximise(points: Points, statistics: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """EM from `statistics` until a step gains less than `tolerance` in each mixture of a map.

    Returns:
        statistics (G, R, J, 6) and their log-likelihood (G, R).
    """
    result, likelihood = statistics.clone(), torch.full(statistics.shape[:2], -math.inf, dtype=torch.float64)
    likelihood = likelihood.to(points.device)
    active = torch.arange(len(statistics), device=points.device)
    current, before = statistics, likelihood.clone()
    for _ in range(max_steps):
        following, now = step(points, current)
        result[active], likelihood[active] = current, now
        going = (now - before >= tolerance).any(1)
        if not bool(going.all()):
            if not bool(going.any()):
                break
            active, points, following, now = active[going], points.rows(going), following[going], now[going]
        current, before = following, now
    return result, likelihood


def spread_starts(points: Points, uniforms: Tensor) -> Tensor:
    """Starts by weighted k-means++: centres drawn in turn by weight x squared distance to the nearest centre so far.

    Args:
        uniforms: (R, J) in [0, 1), the random numbers.

    Returns:
        statistics (G, R, J, 6) of the points nearest to each centre.
    """
    place = points.coordinates[:, :2].transpose(1, 2).double()
    weight = points.moments[..., 0]
    (n_starts, n_components), n_points = uniforms.shape, weight.shape[1]
    distance = torch.full((len(weight), n_starts, n_points), math.inf, dtype=torch.float64, device=points.device)
    nearest = torch.zeros(distance.shape, dtype=torch.int64, device=points.device)
    chance = weight[:, None].expand_as(distance)
    for j in range(n_components):
        cumulative = chance.cumsum(-1)
        target = uniforms[:, j, None] * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=n_points - 1)
        centre = place.gather(1, drawn.expand(-1, -1, 2))
        to_centre = (place[:, None] - centre[:, :, None]).square().sum(-1)
        closer = to_centre < distance
        nearest[closer] = j
        distance = torch.where(closer, to_centre, distance)
        chance = weight[:, None] * distance
    member = torch.nn.functional.one_hot(nearest, n_components).transpose(2, 3).double()
    statistics: Tensor = torch.matmul(member.flatten(1, 2), points.moments)
    return statistics.view(len(weight), n_starts, n_components, 6)
