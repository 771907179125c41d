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
LONGEST_STRIDE = 8.0  # limit on how far a leap extrapolates
UNIT = 30.0  # pixels: the length of a mean's move that counts like a factor e in a width, when strides are measured


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


def as_points(moments: Tensor, dtype: torch.dtype, *, cells: bool, only_weighted: bool) -> Points:
    """Points of (G, H, W, 6) moments, their coordinates held in `dtype`.

    Args:
        cells: whether these are cells of several pixels.
        only_weighted: leave out what has no weight (it has no effect, but takes time); P is then the largest number of
            points with weight in any of the maps, else H · W.
    """
    flat = moments.flatten(1, 2)
    if only_weighted:
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
    The share of an empty component is 0, its mean and covariance are finite.
    """
    share = statistics[..., 0]
    share = torch.where(share < EMPTY_SHARE, 0.0, share)
    mean = statistics[..., 1:] / statistics[..., :1].clamp(min=EMPTY_SHARE)
    row, column, row_row, row_column, column_column = mean.unbind(-1)
    a = torch.addcmul(row_row, row, row, value=-1)
    b = torch.addcmul(row_column, row, column, value=-1)
    c = torch.addcmul(column_column, column, column, value=-1)
    return share, mean[..., :2], _raise_eigenvalues(a, b, c)


def _raise_eigenvalues(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Raise the eigenvalues of [[a, b], [b, c]] to `FLOOR`; a matrix that needs no change is not touched."""
    matrix = torch.stack([a, b, c], dim=-1)
    middle, skew = (a + c) / 2, (a - c) / 2
    radius = torch.hypot(skew, b)
    low = middle - radius
    if not bool((low < FLOOR).any()):  # saves the rest in nearly every step
        return matrix
    high, raised_low = (middle + radius).clamp(min=FLOOR), low.clamp(min=FLOOR)
    shrink = (high - raised_low) / 2 / torch.where(radius > 0, radius, 1.0)
    centre = (high + raised_low) / 2
    raised = torch.stack([centre + shrink * skew, shrink * b, centre - shrink * skew], dim=-1)
    return torch.where((low < FLOOR)[..., None], raised, matrix)


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
    row, column = means.unbind(-1)
    l11, ratio, l22 = _cholesky(covariances)
    constant = (shares / (2 * math.pi * l11 * l22)).log()
    a11, a22 = math.sqrt(0.5) / l11, math.sqrt(0.5) / l22
    a21 = -a22 * ratio
    first = torch.stack([a11, torch.zeros_like(a11), -a11 * row], dim=-1)
    second = torch.stack([a21, a22, -torch.addcmul(a21 * row, a22, column)], dim=-1)
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
    peak = joint.amax(2)
    responsibility = joint.softmax(2)  # several times as fast as exp, which is slow where it underflows
    log_density = (peak - responsibility.amax(2).log_()).double()
    log_likelihood = torch.matmul(log_density, points.moments[..., :1]).squeeze(-1)
    moments = torch.matmul(responsibility.flatten(1, 2).double(), points.moments)
    return moments.view(*joint.shape[:3], 6), log_likelihood


def maximise(
    points: Points, statistics: Tensor, tolerance: float, max_steps: int, *, accelerate: bool
) -> tuple[Tensor, Tensor]:
    """EM from `statistics` until a step gains less than `tolerance` in each mixture of a map.

    With `accelerate` two steps and an extrapolation along them make a round (SQUAREM, Varadhan and Roland 2008); where
    the extrapolation loses likelihood the two steps stand, so that the likelihood never falls.

    Returns:
        statistics (G, R, J, 6) and the log-likelihood (G, R) of the ones before the last step, nats per unit of weight.
    """
    result = statistics.clone()
    likelihood = torch.full(statistics.shape[:2], -math.inf, dtype=torch.float64, device=statistics.device)
    active = torch.arange(len(statistics), device=statistics.device)
    current, before = statistics, likelihood.clone()
    for _ in range(0, max_steps, 3 if accelerate else 1):
        following, now = _accelerated_step(points, current) if accelerate else step(points, current)
        result[active], likelihood[active] = following, now
        going = (now - before >= tolerance).any(1)
        if not bool(going.all()):
            if not bool(going.any()):
                break
            active, points, following, now = active[going], points.rows(going), following[going], now[going]
        current, before = following, now
    return result, likelihood


def _accelerated_step(points: Points, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Two steps of EM, an extrapolation along them and a step from there; the result of `step`, monotone."""
    once, _ = step(points, statistics)
    twice, likelihood = step(points, once)
    place, place_once, place_twice = (_unconstrained(s) for s in (statistics, once, twice))
    first = place_once - place
    bend = place_twice - place_once - first
    length = (
        first.square().sum((2, 3), keepdim=True) / bend.square().sum((2, 3), keepdim=True).clamp(min=1e-300)
    ).sqrt()
    length = length.clamp(1, LONGEST_STRIDE)
    leap = _constrained(place + 2 * length * first + length**2 * bend)
    landed, likelihood_of_leap = step(points, leap)
    better = likelihood_of_leap >= likelihood  # False where the leap is not finite
    statistics = torch.where(better[..., None, None], landed, twice)
    return statistics, torch.where(better, likelihood_of_leap, likelihood)


def _unconstrained(statistics: Tensor) -> Tensor:
    """Coordinates (G, R, J, 6) of mixtures that know no constraints: logs of shares and widths, means, slopes."""
    shares, means, covariances = parameters(statistics)
    l11, ratio, l22 = _cholesky(covariances)
    place = torch.stack([shares.clamp(min=EMPTY_SHARE), l11, l22], dim=-1).log()
    return torch.cat([place, means / UNIT, ratio[..., None]], dim=-1)


def _constrained(place: Tensor) -> Tensor:
    """Statistics of the mixtures at `_unconstrained` coordinates."""
    l11, l22 = place[..., 1:3].exp().unbind(-1)
    l21 = place[..., 5] * l11
    covariances = torch.stack([l11**2, l11 * l21, l21**2 + l22**2], dim=-1)
    return statistics_of(place[..., 0].softmax(-1), place[..., 3:5] * UNIT, covariances)


def _cholesky(covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factor of (rr, rc, cc): its diagonal, and between them the ratio of the first column, l21 / l11."""
    row_row, row_column, column_column = covariances.unbind(-1)
    l11 = row_row.sqrt()
    ratio = row_column / row_row
    l22 = torch.addcmul(column_column, ratio, row_column, value=-1).clamp(min=FLOOR / 4).sqrt()
    return l11, ratio, l22


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
