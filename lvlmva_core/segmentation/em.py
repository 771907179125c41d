"""Expectation maximisation for Gaussian mixtures over weighted pixels, on grids from coarse to fine.

Shapes: G maps, R mixtures per map, J components, P points. Maps come in groups: what needs their points is computed
group by group, all else for all of them at once. Coordinates are (row, column) in pixels from the centre of the map.
A mixture is held as its sufficient statistics (G, R, J, 6) in float64: the weight that each component is
responsible for, times 1, row, column, row², row · column, column².
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FLOOR = 1 / 12  # least eigenvalue of a covariance, in squared pixels: the variance of mass spread evenly over a pixel
EMPTY_SHARE = 1e-12  # a component with less of the weight than this is empty: it is dropped
LEAST_EXPONENT = -700.0  # below it exp underflows, which takes fifty times as long
LEAST_DENSITY = 1e-280  # that is far above what `LEAST_EXPONENT` leaves of components
NEVER = -1e300  # the logarithm of an empty component's density
BLOCK = 8192  # points
LONGEST_STRIDE = 8.0  # limit on how far a leap extrapolates
UNIT = 30.0  # pixels: the length of a mean's move that counts like a factor e in a width, when strides are measured


@dataclass(frozen=True)
class Points:
    """Pixels with weight, or cells of pixels, of G maps, in float64.

    A cell enters through its exact moments and has one responsibility for all of its pixels, chosen by their mean
    log-density. That is EM on a lower bound of the likelihood over pixels, hence monotone as well.
    """

    features: Tensor  # (G, 6, P): 1, row, column, row², row · column, column²; their mean over a cell
    moments: Tensor  # (G, 6, P): the same times weight

    @property
    def weights(self) -> Tensor:
        return self.moments[:, 0]

    def __len__(self) -> int:
        return len(self.moments)

    def rows(self, index: Tensor) -> "Points":
        """The points of some of the maps."""
        return Points(self.features[index], self.moments[index])


def of_groups(groups: Sequence[Points], values: Tensor) -> Iterator[tuple[Points, Tensor]]:
    """The groups, each with its maps' rows of (G, ...) values."""
    return zip(groups, values.split([len(points) for points in groups]), strict=True)


def rows_of_groups(groups: Sequence[Points], chosen: Tensor) -> list[Points]:
    """The groups with the maps where (G,) `chosen` is True."""
    parts = [(points, part.nonzero()[:, 0]) for points, part in of_groups(groups, chosen)]
    return [points if len(part) == len(points) else points.rows(part) for points, part in parts if len(part)]


def pixel_features(height: int, width: int, device: torch.device) -> Tensor:
    """`Points.features` of all pixels, (6, H, W) float64."""
    row = torch.arange(height, dtype=torch.float64, device=device) - (height - 1) / 2
    column = torch.arange(width, dtype=torch.float64, device=device) - (width - 1) / 2
    rows, columns = torch.meshgrid(row, column, indexing="ij")
    return torch.stack([torch.ones_like(rows), rows, columns, rows * rows, rows * columns, columns * columns])


def pixel_weights(maps: Tensor) -> Tensor:
    """(G, H, W) weights in float64, of sum 1 in each map unless it is 0."""
    weights = maps.double()
    weights = weights / weights.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)  # no overflow
    return weights.div_(weights.sum((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny))


def pixel_moments(maps: Tensor, features: Tensor | None = None) -> Tensor:
    """Moments (G, 6, H, W) of the pixels of (G, H, W) weights, float64; `pixel_features`, if they are at hand."""
    if features is None:
        features = pixel_features(maps.shape[1], maps.shape[2], maps.device)
    return pixel_weights(maps)[:, None] * features


def halve(moments: Tensor) -> Tensor:
    """Moments of cells of 2 x 2: (G, 6, H, W) -> (G, 6, ceil(H/2), ceil(W/2))."""
    height, width = moments.shape[2:]
    if height % 2 or width % 2:
        moments = torch.nn.functional.pad(moments, (0, width % 2, 0, height % 2))
    half = moments[..., ::2, :] + moments[..., 1::2, :]
    return half[..., ::2] + half[..., 1::2]


def as_points(moments: Tensor, *, only_weighted: bool) -> Points:
    """Points of (G, 6, H, W) moments; rows of fewer than P points are padded with weight zero.

    Args:
        only_weighted: leave out what has no weight (it has no effect, but takes time); P is then the largest number of
            points with weight in any of the maps, else H · W.
    """
    flat = moments.flatten(2)
    has_weight = flat[:, 0] > 0
    if only_weighted and not bool(has_weight.all()):
        if moments.device.type == "cpu" and len(flat) == 1:  # NumPy is several times as fast here as torch
            flat = torch.from_numpy(np.take(flat.numpy(), np.flatnonzero(has_weight.numpy()), axis=2))
        else:
            order = has_weight.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            order = order[:, : int(has_weight.sum(1).max())]
            flat = flat.gather(2, order[:, None].expand(-1, 6, -1))
    features = flat / torch.where(flat[:, :1] > 0, flat[:, :1], 1.0)
    features[:, 0] = 1.0
    return Points(features, flat)


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


def log_joint_of(statistics: Tensor) -> Tensor:
    """Coefficients (G, R, J, 6) of the features in log(share_j · density_j), density per squared pixel.

    Sums of them are exact to about 1e-11 even where components are as narrow as a pixel: far from the centre of the map
    their terms cancel, which float64 can afford.
    """
    shares, means, covariances = parameters(statistics)
    (row, column), (a, b, c) = means.unbind(-1), covariances.unbind(-1)
    determinant = torch.addcmul(a * c, b, b, value=-1).clamp(min=FLOOR**2 / 4)
    row_row, row_column, column_column = c / determinant, -b / determinant, a / determinant
    along_row = torch.addcmul(row_row * row, row_column, column)
    along_column = torch.addcmul(column_column * column, row_column, row)
    constant = (shares / determinant.sqrt()).clamp(min=1e-300).log() - math.log(2 * math.pi)
    constant = torch.where(shares > 0, constant - (row * along_row + column * along_column) / 2, NEVER)
    return torch.stack([constant, along_row, along_column, row_row / -2, -row_column, column_column / -2], dim=-1)


def responsibilities(points: Points, log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """The E-step for `log_joint_of` mixtures: responsibilities (G, R, J, P), and log-densities (G, R, P)."""
    shape = (*log_joint.shape[:3], points.features.shape[2])
    joint = torch.matmul(log_joint.flatten(1, 2), points.features).view(shape)
    total = joint.clamp_(min=LEAST_EXPONENT).exp_().sum(2, keepdim=True)  # the largest density there is is 2
    if bool((total > LEAST_DENSITY).all()):
        log_density = total.log()
    else:  # points far from every component
        joint = torch.matmul(log_joint.flatten(1, 2), points.features).view(shape)
        peak = joint.amax(2, keepdim=True)
        total = joint.sub_(peak).clamp_(min=LEAST_EXPONENT).exp_().sum(2, keepdim=True)
        log_density = total.log().add_(peak)
    return joint.mul_(total.reciprocal_()), log_density.squeeze(2)


def sums(points: Points, responsibility: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
    """What the M-step needs of `responsibilities`: the next statistics (G, R, J, 6), and the log-likelihood (G, R)."""
    log_likelihood = torch.matmul(log_density, points.weights[..., None]).squeeze(-1)
    statistics = torch.matmul(responsibility.flatten(1, 2), points.moments.mT)
    return statistics.view(*responsibility.shape[:3], 6), log_likelihood


def step(groups: Sequence[Points], statistics: Tensor) -> tuple[Tensor, Tensor]:
    """One E-step and the sums of the M-step.

    Returns:
        the next statistics (G, R, J, 6), and the log-likelihood (G, R) of the given ones: nats per unit of weight.
    """
    parts = [totals(points, log_joint) for points, log_joint in of_groups(groups, log_joint_of(statistics))]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def totals(points: Points, log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """`sums` of `responsibilities`, which are held for some points at a time, as many as stay in a core's cache."""
    n_points = points.weights.shape[1]
    size = n_points if points.weights.is_cuda else BLOCK
    if n_points <= size:
        return sums(points, *responsibilities(points, log_joint))
    blocks = [
        Points(points.features[..., begin : begin + size], points.moments[..., begin : begin + size])
        for begin in range(0, n_points, size)
    ]
    parts = [sums(block, *responsibilities(block, log_joint)) for block in blocks]
    return torch.stack([part[0] for part in parts]).sum(0), torch.stack([part[1] for part in parts]).sum(0)


def maximise(
    groups: Sequence[Points], statistics: Tensor, tolerance: float, max_steps: int, *, accelerate: bool
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
        following, now = _accelerated_step(groups, current) if accelerate else step(groups, current)
        result[active], likelihood[active] = following, now
        going = (now - before >= tolerance).any(1)
        if not bool(going.all()):
            if not bool(going.any()):
                break
            groups = rows_of_groups(groups, going)
            active, following, now = active[going], following[going], now[going]
        current, before = following, now
    return result, likelihood


def _accelerated_step(groups: Sequence[Points], statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Two steps of EM, an extrapolation along them and a step from there; the result of `step`, monotone."""
    once, _ = step(groups, statistics)
    twice, likelihood = step(groups, once)
    place, place_once, place_twice = _unconstrained(torch.stack([statistics, once, twice])).unbind(0)
    first = place_once - place
    bend = place_twice - place_once - first
    length = (
        first.square().sum((2, 3), keepdim=True) / bend.square().sum((2, 3), keepdim=True).clamp(min=1e-300)
    ).sqrt()
    length = length.clamp(1, LONGEST_STRIDE)
    leap = _constrained(place + 2 * length * first + length**2 * bend)
    landed, likelihood_of_leap = step(groups, leap)
    better = likelihood_of_leap >= likelihood  # False where the leap is not finite
    statistics = torch.where(better[..., None, None], landed, twice)
    return statistics, torch.where(better, likelihood_of_leap, likelihood)


def _unconstrained(statistics: Tensor) -> Tensor:
    """Coordinates (..., J, 6) of mixtures that know no constraints: logs of shares and widths, means, slopes."""
    shares, means, covariances = parameters(statistics)
    l11, ratio, l22 = cholesky(covariances)
    place = torch.stack([shares.clamp(min=EMPTY_SHARE), l11, l22], dim=-1).log()
    return torch.cat([place, means / UNIT, ratio[..., None]], dim=-1)


def _constrained(place: Tensor) -> Tensor:
    """Statistics of the mixtures at `_unconstrained` coordinates."""
    l11, l22 = place[..., 1:3].exp().unbind(-1)
    l21 = place[..., 5] * l11
    covariances = torch.stack([l11**2, l11 * l21, l21**2 + l22**2], dim=-1)
    return statistics_of(place[..., 0].softmax(-1), place[..., 3:5] * UNIT, covariances)


def cholesky(covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    row, column, weight = points.features[:, 1, None], points.features[:, 2, None], points.weights
    (n_starts, n_components), n_points = uniforms.shape, weight.shape[1]
    distance = torch.full((len(weight), n_starts, n_points), math.inf, dtype=torch.float64, device=weight.device)
    nearest = torch.zeros(distance.shape, dtype=torch.int64, device=weight.device)
    chance = weight[:, None].expand_as(distance)
    for j in range(n_components):
        cumulative = chance.cumsum(-1)
        target = uniforms[:, j, None] * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=n_points - 1)
        to_row, to_column = (axis[:, 0].gather(1, drawn[..., 0])[..., None] for axis in (row, column))
        to_centre = (row - to_row).square_().add_((column - to_column).square_())
        nearest = torch.where(to_centre < distance, j, nearest)
        distance = torch.minimum(distance, to_centre)
        chance = weight[:, None] * distance
    components = torch.arange(n_components, device=weight.device)
    member = (nearest[:, :, None] == components[:, None]).double()
    statistics = torch.matmul(member.flatten(1, 2), points.moments.mT)
    return statistics.view(len(weight), n_starts, n_components, 6)
