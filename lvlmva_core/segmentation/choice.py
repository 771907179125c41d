"""How many components a map needs: by BIC or by likelihood on pixels that were held out."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lvlmva_core.segmentation import em
from lvlmva_core.segmentation.mixture import WeightedGMM, fit_weighted_gmm, log_likelihood

Criterion = Literal["bic", "held_out"]
PARAMETERS_PER_COMPONENT = 6  # share, two of the mean, three of the covariance; the shares sum to 1


def fit_chosen_gmm(
    weights: Tensor | np.ndarray,
    candidates: Sequence[int],
    criterion: Criterion,
    *,
    seed: int = 0,
    n_starts: int = 32,
    names: Sequence[str] | None = None,
) -> tuple[WeightedGMM, Tensor]:
    """Fit each map with each number of components, and keep for each map the number that the criterion likes best.

    "bic": least -2 n L + (6 J - 1) log n, where L is the log-likelihood per unit of weight. Weights have no natural
    sample size, so that n is Kish's effective one, sum(w)² / sum(w²): the number of equally weighted pixels with the
    same variance of a mean. "held_out": largest mean log-likelihood on the half of the pixels that was not fitted, over
    the two ways to use a random split drawn from the seed. Ties go to the smaller number.

    Args:
        weights, seed, n_starts, names: as for `fit_weighted_gmm`.
        candidates: numbers of components.

    Returns:
        The mixtures with J = max(candidates), the surplus components empty, and the numbers chosen, (B,) int64.

    Raises:
        ValueError: as `fit_weighted_gmm`, or an unknown criterion or no candidate.
    """
    if criterion not in ("bic", "held_out") or not candidates:
        raise ValueError(f"criterion '{criterion}': expected bic or held_out, and at least one candidate")
    maps = torch.as_tensor(weights)
    numbers = sorted(set(candidates))
    fits = [fit_weighted_gmm(maps, j, seed=seed, n_starts=n_starts, names=names) for j in numbers]
    if criterion == "bic":
        shares = em.pixel_weights(maps).flatten(1)
        size = 1 / shares.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
        losses = [
            -2 * size * fit.log_likelihood + (PARAMETERS_PER_COMPONENT * j - 1) * size.log()
            for fit, j in zip(fits, numbers, strict=True)
        ]
    else:
        generator = torch.Generator().manual_seed(seed)
        chosen = (torch.rand(maps.shape[1:], generator=generator) < 0.5).to(maps.device)
        halves = torch.where(chosen, maps, 0), torch.where(chosen, 0, maps)
        losses = []
        for j in numbers:
            one, other = (fit_weighted_gmm(half, j, seed=seed, n_starts=n_starts) for half in halves)
            losses.append(-log_likelihood(one, halves[1]) - log_likelihood(other, halves[0]))
    best = torch.stack(losses).argmin(0)
    padded = [_padded(fit, numbers[-1]) for fit in fits]
    pick = list(enumerate(best.tolist()))
    fit = WeightedGMM(
        weights=torch.stack([padded[k].weights[n] for n, k in pick]),
        means=torch.stack([padded[k].means[n] for n, k in pick]),
        covariances=torch.stack([padded[k].covariances[n] for n, k in pick]),
        log_likelihood=torch.stack([padded[k].log_likelihood[n] for n, k in pick]),
        labels=torch.stack([padded[k].labels[n] for n, k in pick]),
        status=[padded[k].status[n] for n, k in pick],
    )
    return fit, torch.tensor(numbers)[best.cpu()]


def _padded(fit: WeightedGMM, n_components: int) -> WeightedGMM:
    """The same mixtures with empty components at the end."""
    n_maps, n_fitted = fit.weights.shape
    surplus = (n_maps, n_components - n_fitted)
    size = torch.tensor(fit.labels.shape[1:], dtype=fit.means.dtype, device=fit.means.device)
    covariance = torch.diag(em.FLOOR / size**2)
    return WeightedGMM(
        weights=torch.cat([fit.weights, fit.weights.new_zeros(surplus)], dim=1),
        means=torch.cat([fit.means, fit.means.new_full((*surplus, 2), 0.5)], dim=1),
        covariances=torch.cat([fit.covariances, covariance.expand(*surplus, 2, 2)], dim=1),
        log_likelihood=fit.log_likelihood,
        labels=fit.labels,
        status=fit.status,
    )
