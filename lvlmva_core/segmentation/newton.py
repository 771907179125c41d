"""Newton's method for mixtures over weighted points: far fewer steps than EM takes where components overlap.

As a function of the coefficients of log(share · density), and with the sum of the shares in place of their constraint
(it is 1 at every maximum), the log-likelihood has a second derivative in closed form: what the data would tell if the
component of each point were known, less what the responsibilities leave open (Louis 1982). In coordinates in which the
first part is the identity, Newton's step is the step of EM, each of its directions divided by 1 - rate, where rate is
that at which EM converges along it.

Shapes: N mixtures, each with points of its own, J components, P points, K = 6 J coordinates. The coordinates of a
component are factors of the polynomials 1, u, v, (u² - 1)/√2, u v, (v² - 1)/√2, orthonormal under its own density; here
(u, v) are the standardised row and column; they are scaled by the root of its share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvlmva_core.segmentation import em
from lvlmva_core.segmentation.em import Points

ROUNDING = 1e-12  # nats: a likelihood that is lower by less has not fallen
LONGEST_LEAP = 1.0  # in standard deviations of a component, and in logarithms of its share and squared widths
MOST_ROUNDS = 8  # before it is given up for a mixture


@dataclass(frozen=True)
class _Frame:
    """Where mixtures are, and the coordinates of their components."""

    shares: Tensor  # (N, J)
    means: Tensor  # (N, J, 2)
    factor: tuple[Tensor, Tensor, Tensor]  # of the covariances, by Cholesky: l11, l21, l22, each (N, J)
    scale: Tensor  # (N, J): 1 / root of the share, 0 for an empty component
    polynomials: Tensor  # (N, J, 6, 6): coefficients of the features in the six polynomials
    bound: Tensor  # bool (N, J): components whose width `em.FLOOR` holds

    def rows(self, index: Tensor) -> "_Frame":
        l11, l21, l22 = (part[index] for part in self.factor)
        return _Frame(
            self.shares[index],
            self.means[index],
            (l11, l21, l22),
            self.scale[index],
            self.polynomials[index],
            self.bound[index],
        )


def climb(
    groups: Sequence[Points],
    statistics: Tensor,
    tolerance: float,
    max_steps: int,
    guide: tuple[Sequence[Points], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's method from `statistics` (N, J, 6) until it expects to gain less than `tolerance` nats more.

    It is given up for a mixture after `MOST_ROUNDS` and wherever the likelihood is no hill: on a ridge, as where a map
    has fewer clumps than components, and on a saddle. A leap that loses likelihood is taken back: a step of EM stands
    in its place, and the next leap is shorter. The widths of components that `em.FLOOR` holds follow EM.

    Args:
        groups: points of the N mixtures.
        guide: the same maps on a coarser grid, in groups alike, and the last correction on it. It serves as long as it
            helps, and is then renewed on the coarser grid. Without a guide each step has a correction of its own.

    Returns:
        statistics (N, J, 6), one step of EM beyond the last place; whether (N,) each was given up; and the last
        corrections (N, K, K).
    """
    n_mixtures, n_components = statistics.shape[:2]
    result, given_up = statistics.clone(), torch.ones(n_mixtures, dtype=torch.bool, device=statistics.device)
    last = statistics.new_zeros(n_mixtures, *[6 * n_components] * 2)
    coarse, correction = guide or (groups, last)
    active = torch.arange(n_mixtures, device=statistics.device)
    current, kept, before = statistics, statistics, statistics.new_full((n_mixtures,), -math.inf)
    left_before, reach = torch.full_like(before, math.inf), torch.full_like(before, LONGEST_LEAP)
    for _ in range(min(MOST_ROUNDS, max_steps)):
        log_joint = em.log_joint_of(current[:, None])
        if guide is None:
            expected = [em.responsibilities(points, part) for points, part in em.of_groups(groups, log_joint)]
            summed = [em.sums(points, *part) for points, part in zip(groups, expected, strict=True)]
        else:
            expected, summed = [], [em.totals(points, part) for points, part in em.of_groups(groups, log_joint)]
        following, now = (torch.cat(part)[:, 0] for part in zip(*summed, strict=True))
        lost = ~(now >= before - ROUNDING)
        reach = torch.where(lost, reach / 4, (reach * 2).clamp(max=LONGEST_LEAP))
        kept = torch.where(lost[:, None, None], kept, following)
        before = torch.where(lost, before, now)
        frame = _frame(current)
        gradient = _gradient(following, frame)
        hill = torch.ones_like(lost)
        if guide is None:
            correction, hill = _correction(groups, [part[0] for part in expected], frame)
        leap, left = _leap(gradient, frame, correction, reach)
        if guide is not None:
            correction, hill = _renewed(correction, coarse, log_joint, frame, lost | (left > left_before / 4))
            leap, left = _leap(gradient, frame, correction, reach)
        left_before = torch.where(lost, math.inf, left)
        current = torch.where(lost[:, None, None], kept, leap)
        result[active], last[active] = kept, correction
        done = hill & ~lost & (left < tolerance)
        given_up[active] = ~done
        going = hill & ~done
        if not bool(going.all()):
            if not bool(going.any()):
                break
            groups, coarse = em.rows_of_groups(groups, going), em.rows_of_groups(coarse, going)
            active, correction = active[going], correction[going]
            current, kept, before = current[going], kept[going], before[going]
            left_before, reach = left_before[going], reach[going]
    return result, given_up, last


def _frame(statistics: Tensor) -> _Frame:
    shares, means, covariances = em.parameters(statistics)
    l11, ratio, l22 = em.cholesky(covariances)
    a, b = 1 / l11, 1 / l22
    k = -b * ratio  # u = a row + p, v = k row + b column + q
    p = -a * means[..., 0]
    q = -torch.addcmul(b * means[..., 1], k, means[..., 0])
    none, one, root = torch.zeros_like(a), torch.ones_like(a), math.sqrt(0.5)
    polynomials = [
        (one, none, none, none, none, none),
        (p, a, none, none, none, none),
        (q, k, b, none, none, none),
        ((p * p - 1) * root, a * p * (2 * root), none, a * a * root, none, none),
        (p * q, torch.addcmul(a * q, k, p), b * p, a * k, a * b, none),
        ((q * q - 1) * root, k * q * (2 * root), b * q * (2 * root), k * k * root, k * b * (2 * root), b * b * root),
    ]
    stacked = torch.stack([term for row in polynomials for term in row], dim=-1).unflatten(-1, (6, 6))
    scale = torch.where(shares > 0, shares.clamp(min=em.EMPTY_SHARE).rsqrt(), 0.0)
    least = (covariances[..., 0] + covariances[..., 2]) / 2 - torch.hypot(
        (covariances[..., 0] - covariances[..., 2]) / 2, covariances[..., 1]
    )
    return _Frame(shares, means, (l11, ratio * l11, l22), scale, stacked, least < em.FLOOR * (1 + 1e-6))


def _gradient(following: Tensor, frame: _Frame) -> Tensor:
    """The gradient (N, K) in the coordinates: how far a step of EM goes along each."""
    if bool(frame.bound.any()):
        allowed = em.statistics_of(*em.parameters(following))
        following = torch.where(frame.bound[..., None], allowed, following)
    place = torch.matmul(frame.polynomials, following[..., None]).squeeze(-1)
    place[..., 0] -= frame.shares
    return place.mul_(frame.scale[..., None]).flatten(1)


def _renewed(
    correction: Tensor, groups: Sequence[Points], log_joint: Tensor, frame: _Frame, stale: Tensor
) -> tuple[Tensor, Tensor]:
    """The correction, taken anew from `groups` where (N,) `stale`; whether (N,) the likelihood is a hill."""
    hill = torch.ones_like(stale)
    if not bool(stale.any()):
        return correction, hill
    groups = em.rows_of_groups(groups, stale)
    expected = [em.responsibilities(points, part)[0] for points, part in em.of_groups(groups, log_joint[stale])]
    correction = correction.clone()
    correction[stale], hill[stale] = _correction(groups, expected, frame.rows(stale))
    return correction, hill


def _correction(groups: Sequence[Points], responsibilities: Sequence[Tensor], frame: _Frame) -> tuple[Tensor, Tensor]:
    """Cholesky factors (N, K, K) of what a step of EM is divided by; whether (N,) the likelihood is a hill.

    responsibilities: (n, 1, J, P) of each group's mixtures.
    """
    scaled = frame.polynomials * frame.scale[..., None, None]
    if bool(frame.bound.any()):
        scaled[:, :, 3:].mul_(~frame.bound[..., None, None])
    parts = zip(em.of_groups(groups, scaled), responsibilities, strict=True)
    information = torch.cat([_information(points, part, r[:, 0]) for (points, part), r in parts])
    factor, failed = torch.linalg.cholesky_ex(information)
    return factor, failed == 0


def _information(points: Points, polynomials: Tensor, responsibility: Tensor) -> Tensor:
    """The identity less the information that responsibilities (n, J, P) miss: (n, K, K)."""
    n_mixtures, n_components, n_points = responsibility.shape
    root = responsibility.sqrt()
    values = torch.matmul(polynomials.flatten(1, 2), points.features)
    values = values.view(n_mixtures, n_components, 6, n_points)
    values.mul_((root * points.weights.sqrt()[:, None])[:, :, None])
    known = torch.matmul(values, values.mT)
    shared = values.mul_(root[:, :, None]).view(n_mixtures, 6 * n_components, n_points)
    information = torch.matmul(shared, shared.mT)
    blocks = information.view(n_mixtures, n_components, 6, n_components, 6).diagonal(dim1=1, dim2=3)
    blocks.sub_(known.permute(0, 2, 3, 1))
    information.diagonal(dim1=1, dim2=2).add_(1)
    return information


def _leap(gradient: Tensor, frame: _Frame, correction: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics (N, J, 6) after a step of Newton, at most `reach` (N,) far; and what it may gain."""
    direction = torch.cholesky_solve(gradient[..., None], correction).squeeze(-1)
    gain = (direction * gradient).sum(1) / 2
    move = direction.view(*frame.shares.shape, 6) * frame.scale[..., None]
    farthest = move.abs().amax((1, 2))
    share, u, v, uu, uv, vv = (move * (reach / torch.maximum(farthest, reach))[:, None, None]).unbind(-1)
    l11, l21, l22 = frame.factor
    means = torch.stack([l11 * u, torch.addcmul(l21 * u, l22, v)], dim=-1) + frame.means
    grow, grow_across = (uu * math.sqrt(0.5)).exp(), (vv * math.sqrt(0.5)).exp()
    l11, l21, l22 = l11 * grow, torch.addcmul(l21 * grow, l22, uv), l22 * grow_across
    covariances = torch.stack([l11 * l11, l11 * l21, torch.addcmul(l21 * l21, l22, l22)], dim=-1)
    shares = frame.shares * share.exp()
    return em.statistics_of(shares / shares.sum(1, keepdim=True), means, covariances), gain
