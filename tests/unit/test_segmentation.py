"""PPEPS-WGM against scikit-learn, SciPy, a loop in plain Python, planted mixtures and symmetries."""

import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from lvlmva_core.segmentation import NO_REGION, WeightedGMM, em, fit_weighted_gmm, log_likelihood, mixture, newton

Init = tuple[Tensor, Tensor, Tensor]
FIELDS = ("weights", "means", "covariances", "log_likelihood", "labels")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Maps are small here: threads only wait for one another, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(n: int, height: int, width: int, seed: int) -> Tensor:
    """Maps like positive attributions: heavy-tailed noise, half of it zero, brighter in a few ellipses."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    maps = []
    for _ in range(n):
        envelope = np.full((height, width), 0.02)
        for _ in range(rng.integers(2, 7)):
            spread = rng.uniform(0.03, 0.15, 2) * [height, width] + 0.5
            offset = (rows - rng.uniform(0, height)) / spread[0], (columns - rng.uniform(0, width)) / spread[1]
            envelope += rng.uniform() * np.exp(-(offset[0] ** 2 + offset[1] ** 2) / 2)
        noise = rng.normal(size=(height, width)) * np.exp(rng.normal(size=(height, width)))
        maps.append(np.maximum(envelope * (noise + 0.3), 0))
    return torch.from_numpy(np.stack(maps))


def random_init(n_maps: int, n_components: int, seed: int) -> Init:
    """Parameters with distinct shares."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(n_components, 5.0), n_maps)
    means = rng.uniform(0.2, 0.8, (n_maps, n_components, 2))
    factor = rng.uniform(-0.05, 0.05, (n_maps, n_components, 2, 2)) + 0.2 * np.eye(2)
    covariances = factor @ np.swapaxes(factor, -1, -2)
    return torch.from_numpy(shares), torch.from_numpy(means), torch.from_numpy(covariances)


def centres(height: int, width: int) -> np.ndarray:
    rows, columns = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return np.stack([rows.ravel(), columns.ravel()], axis=1)


def by_sklearn(points: np.ndarray, init: Init, n_steps: int) -> GaussianMixture:
    shares, means, covariances = (part[0].numpy() for part in init)
    mixture = GaussianMixture(
        len(shares),
        tol=0,
        reg_covar=0,
        max_iter=n_steps,
        weights_init=shares,
        means_init=means,
        precisions_init=np.linalg.inv(covariances),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a set number of steps is what is compared
        return mixture.fit(points)


def assert_same_mixture(fit: WeightedGMM, mixture: GaussianMixture) -> None:
    order = np.argsort(-mixture.weights_, kind="stable")
    np.testing.assert_allclose(fit.weights[0], mixture.weights_[order], rtol=1e-8)
    np.testing.assert_allclose(fit.means[0], mixture.means_[order], rtol=1e-8)
    np.testing.assert_allclose(fit.covariances[0], mixture.covariances_[order], rtol=1e-7, atol=1e-12)


def test_equals_scikit_learn_on_uniform_weights() -> None:
    init, points = random_init(1, 4, seed=1), centres(24, 17)
    fit = fit_weighted_gmm(torch.ones(1, 24, 17).double(), 4, init=init, max_iterations=40, tolerance=1e-300)
    mixture = by_sklearn(points, init, 40)
    assert_same_mixture(fit, mixture)
    assert float(fit.log_likelihood) == pytest.approx(mixture.score(points), rel=1e-9)
    order = np.argsort(-mixture.weights_, kind="stable")
    np.testing.assert_array_equal(order[fit.labels[0].numpy().ravel()], mixture.predict(points))


def test_integer_weights_equal_points_that_are_repeated_and_zero_weights_points_that_are_absent() -> None:
    counts = np.random.default_rng(2).integers(0, 4, (13, 19))
    init, points = random_init(1, 3, seed=2), np.repeat(centres(13, 19), counts.ravel(), axis=0)
    fit = fit_weighted_gmm(counts[None], 3, init=init, max_iterations=30, tolerance=1e-300)
    mixture = by_sklearn(points, init, 30)
    assert_same_mixture(fit, mixture)
    assert float(fit.log_likelihood) == pytest.approx(mixture.score(points), rel=1e-9)


def test_equals_em_written_as_loops() -> None:
    """Weighted EM over single pixels and components, in Python floats."""
    weights = torch.from_numpy(np.random.default_rng(3).uniform(0.1, 1, (1, 9, 7)))
    shares, means, covariances = (part[0].tolist() for part in random_init(1, 3, seed=3))
    points, mass = centres(9, 7).tolist(), weights[0].ravel().tolist()
    for _ in range(12):
        sums = [[0.0] * 6 for _ in shares]
        for (r, c), w in zip(points, mass, strict=True):
            density = []
            for share, (mr, mc), ((a, b), (_, d)) in zip(shares, means, covariances, strict=True):
                det = a * d - b * b
                form = (d * (r - mr) ** 2 - 2 * b * (r - mr) * (c - mc) + a * (c - mc) ** 2) / det
                density.append(share * math.exp(-form / 2) / (2 * math.pi * math.sqrt(det)))
            for total, p in zip(sums, density, strict=True):
                for i, term in enumerate((1, r, c, r * r, r * c, c * c)):
                    total[i] += w * p / sum(density) * term
        shares = [s[0] / sum(mass) for s in sums]
        means = [[s[1] / s[0], s[2] / s[0]] for s in sums]
        covariances = [
            [[s[3] / s[0] - m[0] ** 2, s[4] / s[0] - m[0] * m[1]], [s[4] / s[0] - m[0] * m[1], s[5] / s[0] - m[1] ** 2]]
            for s, m in zip(sums, means, strict=True)
        ]
    fit = fit_weighted_gmm(weights, 3, init=random_init(1, 3, seed=3), max_iterations=12, tolerance=1e-300)
    order = np.argsort(-np.array(shares), kind="stable")
    np.testing.assert_allclose(fit.weights[0], np.array(shares)[order], rtol=1e-8)
    np.testing.assert_allclose(fit.means[0], np.array(means)[order], rtol=1e-8)
    np.testing.assert_allclose(fit.covariances[0], np.array(covariances)[order], rtol=1e-6)


@pytest.mark.parametrize(("shape", "n_components"), [((40, 60), 5), ((28, 28), 3), ((8, 8), 2)])
def test_likelihood_labels_and_shares_follow_from_the_parameters(shape: tuple[int, int], n_components: int) -> None:
    """SciPy evaluates the returned parameters: likelihood, responsibilities, and the share that each explains."""
    weights = blobs(3, *shape, seed=4)
    fit = fit_weighted_gmm(weights, n_components, tolerance=1e-9)
    for n in range(3):
        parameters = zip(fit.weights[n], fit.means[n].numpy(), fit.covariances[n].numpy(), strict=True)
        joint = np.stack([math.log(w) + multivariate_normal(m, c).logpdf(centres(*shape)) for w, m, c in parameters])
        mass = weights[n].ravel().numpy() / weights[n].sum().item()
        assert float(fit.log_likelihood[n]) == pytest.approx(mass @ logsumexp(joint, axis=0), abs=1e-9)
        np.testing.assert_array_equal(fit.labels[n].numpy().ravel(), joint.argmax(0))
        responsibility = np.exp(joint - logsumexp(joint, axis=0))
        np.testing.assert_allclose(fit.weights[n], responsibility @ mass, atol=2e-4)


def test_recovers_a_planted_mixture() -> None:
    shares, means = np.array([0.5, 0.3, 0.2]), np.array([[0.3, 0.3], [0.7, 0.4], [0.4, 0.8]])
    covariances = np.array(
        [[[0.01, 0.004], [0.004, 0.006]], [[0.004, 0], [0, 0.01]], [[0.008, -0.003], [-0.003, 0.005]]]
    )
    parts = zip(shares, means, covariances, strict=True)
    density = sum(w * multivariate_normal(m, c).pdf(centres(96, 80)) for w, m, c in parts)
    fit = fit_weighted_gmm(density.reshape(1, 96, 80).astype(np.float32), 3)
    np.testing.assert_allclose(fit.weights[0], shares, atol=0.01)
    np.testing.assert_allclose(fit.means[0], means, atol=0.01)
    np.testing.assert_allclose(fit.covariances[0], covariances, atol=6e-4)


def mirrored(init: Init) -> Init:
    shares, means, covariances = init
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return shares, means * sign + torch.tensor([0.0, 1.0]), covariances * sign[:, None] * sign


def transposed(init: Init) -> Init:
    shares, means, covariances = init
    return shares, means.flip(-1), covariances.flip(-1, -2)


def test_mirrored_and_transposed_maps_give_mirrored_and_transposed_segments() -> None:
    weights, init = blobs(4, 31, 44, seed=5), random_init(4, 5, seed=5)
    fit = fit_weighted_gmm(weights, 5, init=init)
    mirror = fit_weighted_gmm(weights.flip(2), 5, init=mirrored(init))
    assert torch.equal(mirror.labels, fit.labels.flip(2))
    torch.testing.assert_close(mirror.means[..., 1], 1 - fit.means[..., 1])
    transpose = fit_weighted_gmm(weights.transpose(1, 2), 5, init=transposed(init))
    assert torch.equal(transpose.labels, fit.labels.transpose(1, 2))
    torch.testing.assert_close(transpose.covariances, fit.covariances.flip(-1, -2))


def test_scale_has_no_effect() -> None:
    weights = blobs(3, 40, 40, seed=6)
    fit = fit_weighted_gmm(weights.float(), 4)
    for factor in (2.0**-40, 2.0**60):  # exact in floating point, hence the same bits
        scaled = fit_weighted_gmm(weights.float() * factor, 4)
        assert all(torch.equal(getattr(scaled, name), getattr(fit, name)) for name in FIELDS)
    for factor in (1e-30, 1e30):
        scaled = fit_weighted_gmm(weights * factor, 4)
        torch.testing.assert_close(scaled.log_likelihood.float(), fit.log_likelihood, atol=1e-4, rtol=0)
    scaled = fit_weighted_gmm(weights * 1e300, 4)
    assert torch.equal(scaled.log_likelihood, fit_weighted_gmm(weights * 1e300, 4).log_likelihood)
    assert bool(torch.isfinite(scaled.log_likelihood).all())


def test_pixels_without_weight_have_no_effect_outside_the_map_either() -> None:
    """A margin without weight changes nothing, measured in pixels."""
    weights, init = blobs(2, 20, 30, seed=7), random_init(2, 3, seed=7)
    fit = fit_weighted_gmm(weights, 3, init=init)
    ratio = torch.tensor([20 / 36, 30 / 44], dtype=torch.float64)
    shrunk = init[0], init[1] * ratio, init[2] * ratio[:, None] * ratio
    wide = fit_weighted_gmm(torch.nn.functional.pad(weights, (0, 14, 0, 16)), 3, init=shrunk)
    assert torch.equal(wide.labels[:, :20, :30], fit.labels)
    torch.testing.assert_close(wide.means, fit.means * ratio)
    torch.testing.assert_close(wide.log_likelihood, fit.log_likelihood - ratio.log().sum())


def test_likelihood_never_falls() -> None:
    weights, init = blobs(3, 30, 30, seed=8), random_init(3, 5, seed=8)
    steps = [fit_weighted_gmm(weights, 5, init=init, max_iterations=n, tolerance=1e-300) for n in range(1, 30)]
    for before, after in pairwise(step.log_likelihood for step in steps):
        assert bool((after >= before - 1e-12).all())
    assert bool((steps[-1].log_likelihood > steps[0].log_likelihood + 0.01).all())


def test_likelihood_never_falls_on_cells_and_with_leaps() -> None:
    moments = em.halve(em.pixel_moments(blobs(2, 40, 40, seed=9)))
    points = em.as_points(moments, only_weighted=False)
    uniforms = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = em.spread_starts(points, uniforms)
    likelihoods = []
    for n in (1, 2, 3, 5, 8, 12, 19):
        statistics, _ = em.maximise([points], start, 1e-300, 3 * n, accelerate=True)
        likelihoods.append(em.step([points], statistics)[1])
    for before, after in pairwise(likelihoods):
        assert bool((after >= before - 1e-12).all())
    plain = em.step([points], em.maximise([points], start, 1e-300, 3 * 19, accelerate=False)[0])[1]
    assert float((likelihoods[-1] - plain).mean()) > 0  # the same number of steps gets further


def test_cells_hold_the_exact_moments_of_their_pixels_and_bound_the_likelihood_from_below() -> None:
    weights = blobs(2, 21, 30, seed=10)
    pixels = em.pixel_moments(weights)
    cells = em.halve(em.halve(pixels))
    assert cells.shape == (2, 6, 6, 8)
    rows, columns = np.mgrid[:21, :30]
    rows, columns = rows + 0.5 - 10.5, columns + 0.5 - 15
    for i in range(6):
        for k in range(8):
            block = np.s_[4 * i : 4 * i + 4, 4 * k : 4 * k + 4]
            w, r, c = weights[1].numpy()[block] / weights[1].sum().item(), rows[block], columns[block]
            expected = [(w * term).sum() for term in (1, r, c, r * r, r * c, c * c)]
            np.testing.assert_allclose(cells[1, :, i, k], expected, rtol=1e-10, atol=1e-12)
    fine = em.as_points(pixels, only_weighted=True)
    coarse = em.as_points(cells, only_weighted=True)
    statistics = em.spread_starts(
        coarse, torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    assert bool((em.step([coarse], statistics)[1] <= em.step([fine], statistics)[1]).all())


def test_is_as_good_as_full_resolution_em_from_every_start() -> None:
    weights, n_starts = blobs(6, 96, 96, seed=11), 4
    moments = em.pixel_moments(weights)
    coarse = moments
    while coarse.shape[2] > 14:
        coarse = em.halve(coarse)
    points = em.as_points(coarse, only_weighted=False)
    uniforms = torch.rand(n_starts, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = em.spread_starts(points, uniforms)
    reference = []
    for r in range(n_starts):
        shares, means, triple = em.parameters(starts[:, r, None])
        init = shares[:, 0], means[:, 0] / 96 + 0.5, triple[:, 0][..., [0, 1, 1, 2]].unflatten(-1, (2, 2)) / 96**2
        reference.append(fit_weighted_gmm(weights, 5, init=init, tolerance=1e-9).log_likelihood)
    one = fit_weighted_gmm(weights.float(), 5, n_starts=1).log_likelihood
    assert float((one - reference[0]).mean()) > -1e-3
    best = fit_weighted_gmm(weights.float(), 5, n_starts=n_starts).log_likelihood
    assert float((best - torch.stack(reference).amax(0)).mean()) > -1e-3
    assert float((best - torch.stack(reference).mean(0)).mean()) > 0


def spread_points(weights: Tensor, n_components: int, seed: int) -> tuple[em.Points, Tensor]:
    """Points of one map, and one start."""
    points = em.as_points(em.pixel_moments(weights), only_weighted=True)
    uniforms = torch.rand(1, n_components, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return points, em.spread_starts(points, uniforms)


def test_far_and_many_points_have_the_densities_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.zeros(1, 60, 60, dtype=torch.float64)
    weights[0, ::59, ::59], weights[0, 30, 20:40] = 1.0, 2.0
    points, _ = spread_points(weights, 2, seed=0)
    shares, means = torch.tensor([[[0.25, 0.75]]]).double(), torch.tensor([[[[0.0, -5.0], [1.0, 3.0]]]]).double()
    covariances = torch.tensor([[[[0.1, 0.0, 0.2], [2.0, 0.5, 0.3]]]]).double()
    statistics = em.statistics_of(shares, means, covariances)
    place = points.features[0, 1:3].T.numpy()
    terms = [
        math.log(shares[0, 0, j]) + multivariate_normal(means[0, 0, j], [[a, b], [b, c]]).logpdf(place)
        for j, (a, b, c) in enumerate(covariances[0, 0].tolist())
    ]
    expected = logsumexp(terms, axis=0)
    assert expected.min() < -1000  # exp of it is 0
    responsibility, log_density = em.responsibilities(points, em.log_joint_of(statistics))
    np.testing.assert_allclose(log_density[0, 0], expected, rtol=1e-10)
    np.testing.assert_allclose(responsibility[0, 0], np.exp(np.stack(terms) - expected), rtol=1e-8, atol=1e-12)
    whole = em.step([points], statistics)
    monkeypatch.setattr(em, "BLOCK", 7)
    for part, blocks in zip(whole, em.step([points], statistics), strict=True):
        torch.testing.assert_close(blocks, part, rtol=1e-12, atol=1e-12)


def test_newton_divides_by_the_second_derivative_that_autograd_finds() -> None:
    points, statistics = spread_points(blobs(1, 20, 24, seed=18), 3, seed=1)
    statistics = em.maximise([points], statistics, 1e-300, 30, accelerate=False)[0][:, 0]

    def likelihood(coefficients: Tensor) -> Tensor:
        """Of any sum of bells, less their mass."""
        constant, row, column, row_row, row_column, column_column = coefficients.view(3, 6).unbind(-1)
        precision = -torch.stack([2 * row_row, row_column, row_column, 2 * column_column], -1).view(3, 2, 2)
        slope = torch.stack([row, column], dim=-1)
        peak = constant + (slope * torch.linalg.solve(precision, slope)).sum(-1) / 2
        mass = peak.exp() * 2 * math.pi / torch.linalg.det(precision).sqrt()
        density = torch.logsumexp(coefficients.view(3, 6) @ points.features[0], 0)
        return (points.weights[0] * density).sum() - mass.sum()

    log_joint = em.log_joint_of(statistics[:, None])
    frame = newton._frame(statistics)
    scaled = torch.block_diag(*(frame.polynomials * frame.scale[..., None, None])[0])
    expected = -scaled @ torch.autograd.functional.hessian(likelihood, log_joint.flatten()) @ scaled.T
    factor, hill = newton._correction([points], [em.responsibilities(points, log_joint)[0]], frame)
    assert bool(hill.all()) == bool((torch.linalg.eigvalsh(expected) > 0).all())
    torch.testing.assert_close(factor[0].tril() @ factor[0].tril().T, expected, rtol=1e-6, atol=1e-7)
    slope = scaled @ torch.autograd.functional.jacobian(likelihood, log_joint.flatten())
    gradient = newton._gradient(em.step([points], statistics[:, None])[0][:, 0], frame)
    torch.testing.assert_close(gradient[0], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", [19, 22])
def test_newton_climbs_to_where_em_ends_in_far_fewer_steps(seed: int) -> None:
    moments = em.pixel_moments(blobs(1, 48, 48, seed=seed))
    fine, coarse = (em.as_points(m, only_weighted=True) for m in (moments, em.halve(moments)))
    start = em.spread_starts(fine, torch.rand(1, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    start, _ = em.maximise([fine], start, 1e-300, 60, accelerate=False)
    slow, expected = em.maximise([fine], start, 1e-14, 5000, accelerate=False)
    same_steps = em.maximise([fine], start, 1e-300, newton.MOST_ROUNDS, accelerate=False)[1]
    assert float(expected - same_steps) > 1e-6
    statistics, given_up, _ = newton.climb([fine], start[0], 1e-9, 25)
    assert not bool(given_up.any())
    torch.testing.assert_close(likelihoods([fine], statistics), expected[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(em.parameters(statistics)[1], em.parameters(slow)[1][0], rtol=0, atol=1e-2)
    below, _, correction = newton.climb([coarse], start[0], 1e-9, 25)
    statistics, given_up, _ = newton.climb([fine], below, 1e-9, 25, ([coarse], correction))
    assert not bool(given_up.any())
    torch.testing.assert_close(likelihoods([fine], statistics), expected[0], rtol=0, atol=1e-8)


def likelihoods(groups: list[em.Points], statistics: Tensor) -> Tensor:
    """(N,) of N mixtures (N, J, 6)."""
    return em.step(groups, statistics[:, None])[1][:, 0]


def test_newton_is_given_up_on_a_saddle_and_where_components_are_too_many() -> None:
    """Two components in one place, between two spots; three components on one Gaussian, which one would do for."""
    weights = torch.zeros(1, 40, 40, dtype=torch.float64)
    weights[0, 5:12, 5:12], weights[0, 25:35, 22:30] = 1.0, 0.5
    points, _ = spread_points(weights, 1, seed=0)
    whole = points.moments.sum(2)[:, None]
    saddle = torch.cat([whole / 2, whole / 2], dim=1)
    statistics, given_up, _ = newton.climb([points], saddle, 1e-9, 60)
    assert given_up.tolist() == [True]
    torch.testing.assert_close(statistics, saddle, rtol=1e-6, atol=1e-6)

    points, start = spread_points(planted([(24, 24)], 48, noise=0.5), 3, seed=1)
    statistics, given_up, _ = newton.climb([points], start[:, 0], 1e-9, 60)
    assert given_up.tolist() == [True]
    assert float(likelihoods([points], statistics)) >= float(likelihoods([points], start[:, 0]))


def planted(centres: list[tuple[int, int]], side: int, noise: float) -> Tensor:
    """A round Gaussian at each place, times 1 ± noise: (1, side, side)."""
    rows, columns = np.mgrid[:side, :side]
    density = sum(np.exp(-((rows - r) ** 2 + (columns - c) ** 2) / (side / 6) ** 2) for r, c in centres)
    factor = np.random.default_rng(0).uniform(1 - noise, 1 + noise, (side, side))
    return torch.from_numpy(np.asarray(density * factor)[None])


def lines(side: int) -> Tensor:
    """One pixel wide: a row, half a column, a diagonal."""
    maps = torch.zeros(1, side, side, dtype=torch.float64)
    maps[0, side // 3], maps[0, : side // 2, side // 4] = 1.0, 0.5
    maps[0].diagonal()[side // 2 :] = 2.0
    return maps


OVERFITTED = {
    "one clump": planted([(24, 20)], 48, noise=0),
    "one clump with noise": planted([(24, 20)], 48, noise=0.5),
    "two clumps": planted([(12, 14), (34, 30)], 48, noise=0),
    "two clumps with noise": planted([(12, 14), (34, 30)], 48, noise=0.5),
    "three clumps with noise": planted([(12, 14), (34, 30), (12, 36)], 48, noise=0.9),
    "lines": lines(48),
    "constant": torch.ones(1, 48, 40, dtype=torch.float64),
    "tiny": blobs(1, 8, 8, seed=21),
    "small": blobs(1, 28, 28, seed=21),
}


@pytest.mark.parametrize("kind", OVERFITTED)
def test_maps_with_fewer_clumps_than_components(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton's method is bounded; the likelihood is above that of one Gaussian, which has a closed form."""
    weights = OVERFITTED[kind]
    leaps = []
    leap = newton._leap

    def counted(gradient: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        leaps.append(len(gradient))
        return leap(gradient, *rest)

    monkeypatch.setattr(newton, "_leap", counted)
    fit = fit_weighted_gmm(weights, 7, n_starts=8)
    n_grids = 3  # the coarsest has no maximum of its own, and two leaps a round are computed where there is a guide
    assert 0 < len(leaps) <= 2 * newton.MOST_ROUNDS * n_grids
    place = centres(*weights.shape[1:])
    share = weights[0].flatten().numpy() / weights.sum().item()
    covariance = np.cov(place.T, aweights=share, bias=True)
    of_one = -math.log(2 * math.pi) - 1 - np.linalg.slogdet(covariance)[1] / 2
    assert float(fit.log_likelihood[0]) > of_one - 1e-6
    assert fit.status[0] in ("ok", "collapsed")
    explained = (fit.weights[0, :, None] * fit.means[0]).sum(0)
    np.testing.assert_allclose(explained, share @ place, atol=1e-6)  # of every step of EM


@pytest.mark.parametrize(("shape", "n_components"), [((64, 64), 5), ((28, 28), 3), ((61, 75), 4), ((8, 8), 3)])
def test_neither_batch_nor_threads_change_a_bit(shape: tuple[int, int], n_components: int) -> None:
    weights = blobs(9, *shape, seed=12).float()
    weights[3] = 0
    torch.set_num_threads(2)
    whole = fit_weighted_gmm(weights, n_components)
    assert torch.get_num_threads() == 2
    for n_threads, rows in ((1, [8, 7, 6, 5, 4, 3, 2, 1, 0]), (2, [0]), (1, [4]), (2, [2, 2, 7, 1, 1])):
        torch.set_num_threads(n_threads)
        part = fit_weighted_gmm(weights[rows], n_components)
        for name in FIELDS:
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


def test_maps_fitted_together_have_the_likelihood_of_maps_fitted_by_themselves() -> None:
    """As on a GPU, where all maps are one group, padded to the longest."""
    maps = blobs(4, 80, 72, seed=20)
    maps[1, 20:] = 0
    uniforms = torch.rand(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = mixture._Settings(4, uniforms, 1e-6, 5000)
    together = mixture._from_coarse_to_fine([em.pixel_moments(maps)], chosen)
    alone = mixture._from_coarse_to_fine([em.pixel_moments(one) for one in maps.split(1)], chosen)
    points = [em.as_points(em.pixel_moments(maps), only_weighted=True)]
    likelihoods = [em.step(points, statistics[:, None])[1] for statistics in (together, alone)]
    torch.testing.assert_close(likelihoods[0], likelihoods[1], rtol=0, atol=1e-6)


def test_seed_decides_the_starts_and_global_generators_are_not_touched() -> None:
    weights, state = blobs(8, 48, 48, seed=13).float(), torch.get_rng_state()
    one, same = (fit_weighted_gmm(weights, 6, seed=1, n_starts=1) for _ in range(2))
    assert torch.equal(one.labels, same.labels)
    assert not torch.equal(one.labels, fit_weighted_gmm(weights, 6, seed=2, n_starts=1).labels)
    assert torch.equal(torch.get_rng_state(), state)


def one_pixel() -> Tensor:
    weights = torch.zeros(16, 16)
    weights[3, 5] = 2.0
    return weights


def on_a_line() -> Tensor:
    weights = torch.zeros(40, 40)
    weights[7] = torch.arange(40) + 1.0
    return weights


def on_a_diagonal() -> Tensor:
    return torch.diag(torch.arange(40) + 1.0)


def an_outlier() -> Tensor:
    weights = blobs(1, 32, 32, seed=14)[0].float() + 1e-3
    weights[30, 2] = 1e30
    return weights


def three_pixels() -> Tensor:
    weights = torch.zeros(224, 200)
    weights[0, 0], weights[100, 30], weights[223, 199] = 1.0, 3.0, 2.0
    return weights


UGLY = [
    (one_pixel(), 7, {"too_few_pixels"}, 1),
    (one_pixel(), 1, {"ok"}, 1),
    (three_pixels(), 4, {"too_few_pixels"}, 3),
    (three_pixels(), 3, {"ok"}, 3),
    (on_a_line(), 7, {"ok"}, 7),
    (on_a_diagonal(), 7, {"ok"}, 7),
    (torch.ones(8, 8), 7, {"ok", "collapsed"}, None),
    (an_outlier(), 7, {"collapsed"}, 1),
    (torch.ones(1, 1), 3, {"too_few_pixels"}, 1),
    (torch.ones(1, 50), 3, {"ok"}, 3),
    (torch.ones(50, 1), 3, {"ok"}, 3),
    (blobs(1, 30, 30, seed=15)[0].float() * 1e-30, 5, {"ok"}, 5),
    (blobs(1, 30, 30, seed=15)[0].float() * 1e30, 5, {"ok"}, 5),
    (blobs(1, 1024, 1024, seed=16)[0].float(), 5, {"ok"}, 5),
    (blobs(1, 8, 300, seed=17)[0].float(), 12, {"ok", "collapsed"}, None),
]


@pytest.mark.parametrize(("weights", "n_components", "states", "n_full"), UGLY)
def test_ugly_maps_have_finite_results(
    weights: Tensor, n_components: int, states: set[str], n_full: int | None
) -> None:
    fit = fit_weighted_gmm(weights[None], n_components)
    assert_valid(fit, weights[None], n_components)
    assert fit.status[0] in states
    if n_full is not None:
        assert int((fit.weights > 0).sum()) == n_full


def test_mass_on_one_pixel_is_a_gaussian_of_a_pixel_s_variance() -> None:
    fit = fit_weighted_gmm(one_pixel()[None], 1)
    torch.testing.assert_close(fit.means[0, 0], torch.tensor([3.5 / 16, 5.5 / 16]))
    torch.testing.assert_close(fit.covariances[0, 0], torch.eye(2) / 12 / 256)
    assert float(fit.log_likelihood) == pytest.approx(-math.log(2 * math.pi / 12 / 256), rel=1e-5)


def test_a_map_without_weight_is_an_outcome_of_its_own() -> None:
    fit = fit_weighted_gmm(torch.stack([torch.zeros(9, 9), torch.ones(9, 9)]), 2)
    assert fit.status == ["no_positive_effect", "ok"]
    assert bool((fit.labels[0] == NO_REGION).all())
    assert not fit.weights[0].any()
    assert float(fit.log_likelihood[0]) == 0
    assert bool(torch.isfinite(fit.means).all())
    assert bool(torch.isfinite(fit.covariances).all())


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
def test_weights_that_are_none_are_refused_by_name(bad: float) -> None:
    weights = torch.ones(4, 5, 6)
    weights[2, 1, 1] = bad
    with pytest.raises(ValueError, match=r"map 2: weights must be finite and at least 0"):
        fit_weighted_gmm(weights, 2)
    with pytest.raises(ValueError, match=r"knee-7: weights must be finite"):
        fit_weighted_gmm(weights, 2, names=["a", "b", "knee-7", "c"])


def test_wrong_arguments_are_refused() -> None:
    weights = torch.ones(2, 5, 6)
    with pytest.raises(ValueError, match=r"must be \(B, H, W\)"):
        fit_weighted_gmm(weights[0], 2)
    with pytest.raises(ValueError, match="n_components = 0"):
        fit_weighted_gmm(weights, 0)
    with pytest.raises(ValueError, match="n_starts"):
        fit_weighted_gmm(weights, 2, n_starts=0)
    shares, means, covariances = random_init(2, 2, seed=0)
    with pytest.raises(ValueError, match="init must be weights"):
        fit_weighted_gmm(weights, 3, init=(shares, means, covariances))
    with pytest.raises(ValueError, match="positive definite"):
        fit_weighted_gmm(weights, 2, init=(shares, means, -covariances))
    with pytest.raises(ValueError, match="at least 0, and not all 0"):
        fit_weighted_gmm(weights, 2, init=(shares * 0, means, covariances))
    with pytest.raises(ValueError, match="finite"):
        fit_weighted_gmm(weights, 2, init=(shares, means * math.nan, covariances))


def test_likelihood_of_another_map() -> None:
    weights = blobs(2, 30, 20, seed=18)
    fit = fit_weighted_gmm(weights, 3)
    torch.testing.assert_close(log_likelihood(fit, weights), fit.log_likelihood)
    other = blobs(2, 30, 20, seed=19)
    mixture = zip(fit.weights[0], fit.means[0].numpy(), fit.covariances[0].numpy(), strict=True)
    density = sum(w.item() * multivariate_normal(m, c).pdf(centres(30, 20)) for w, m, c in mixture)
    expected = np.average(np.log(density), weights=other[0].ravel())
    assert float(log_likelihood(fit, other)[0]) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match=r"must be \(2, 30, 20\)"):
        log_likelihood(fit, other[:1])


def assert_valid(fit: WeightedGMM, weights: Tensor, n_components: int) -> None:
    n_maps, height, width = weights.shape
    for part in (fit.weights, fit.means, fit.covariances, fit.log_likelihood):
        assert bool(torch.isfinite(part).all())
    assert fit.labels.dtype == torch.uint8
    scale = torch.tensor([height, width], dtype=torch.float64)
    for n in range(n_maps):
        full = fit.weights[n] > 0
        if fit.status[n] == "no_positive_effect":
            assert not bool((weights[n] >= torch.finfo(weights.dtype).tiny).any())  # what is denormal counts as 0
            assert bool((fit.labels[n] == NO_REGION).all())
            continue
        assert float(fit.weights[n].sum()) == pytest.approx(1, abs=1e-5)
        assert bool((fit.weights[n].diff() <= 0).all())
        assert set(fit.labels[n].unique().tolist()) <= set(torch.arange(n_components)[full].tolist())
        in_pixels = fit.covariances[n].double() * scale[:, None] * scale
        assert float(torch.linalg.eigvalsh(in_pixels)[full].min()) >= (1 / 12) * (1 - 1e-4)
        assert bool((fit.status[n] == "ok") == bool(full.all()))


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
        elements=st.one_of(st.just(0.0), st.floats(0, 1e300, width=64)),
    ),
    st.integers(1, 5),
)
def test_any_map_has_a_valid_result(weights: np.ndarray, n_components: int) -> None:
    fit = fit_weighted_gmm(weights, n_components, n_starts=2, max_iterations=60)
    assert_valid(fit, torch.from_numpy(weights), n_components)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_agrees_with_the_cpu() -> None:
    weights = blobs(12, 224, 224, seed=20).float()
    weights[5] = 0
    on_cpu, on_gpu = fit_weighted_gmm(weights, 7), fit_weighted_gmm(weights.cuda(), 7)
    assert on_gpu.labels.device.type == "cuda"
    assert on_gpu.status == on_cpu.status
    torch.testing.assert_close(on_gpu.log_likelihood.cpu(), on_cpu.log_likelihood, atol=5e-3, rtol=0)
