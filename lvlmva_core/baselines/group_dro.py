"""GroupDRO: weigh groups by their loss, exponentially, with strong weight decay (Sagawa et al. 2020)."""

from typing import TYPE_CHECKING

import numpy as np

from lvlmva_core.baselines import Fitted, Retrained, Task, train_each
from lvlmva_core.baselines.groups import evenly_drawn
from lvlmva_core.baselines.settings import RetrainSettings
from lvlmva_core.settings import NonNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor


class Settings(RetrainSettings):
    """GroupDRO: step_size: η of the groups' weights. adjustment: C; C / √n_g is added to the loss of a group of n_g.

    Its authors take η = 0.01 and try C from 0 to 5, with weight decays to 1.
    """

    step_size: Positive = 0.01
    adjustment: NonNegative = 0.0


class GroupLoss:
    """Σ_g q_g · (mean cross-entropy of group g in the batch), with q moved at each step (Sagawa et al. 2020, alg. 1).

    q_g starts alike and is multiplied by exp(η · (loss_g + C / √n_g)), then normalised, before it weighs the loss of
    this very step. A group that the batch lacks has loss 0, as in the authors' code.

    Args:
        groups: int64 (N,), 0..G-1, each of which occurs, of all samples.
    """

    def __init__(self, groups: "Tensor", step_size: float, adjustment: float) -> None:
        import torch

        self.groups, self.step_size = groups, step_size
        counts = torch.bincount(groups).float()
        self.added = adjustment / counts.sqrt()
        self.weights = torch.full_like(counts, 1 / len(counts))

    def __call__(self, logits: "Tensor", labels: "Tensor", rows: "Tensor") -> "Tensor":
        """The loss of a batch: logits (B, K), labels (B,), rows (B,), the samples' places in `groups`."""
        import torch
        from torch.nn import functional

        losses = functional.cross_entropy(logits, labels, reduction="none")
        group = self.groups[rows.to(self.groups.device)]
        counts = torch.bincount(group, minlength=len(self.weights)).clamp(min=1)
        means = torch.zeros_like(self.weights).index_add(0, group, losses) / counts
        moved = self.weights * torch.exp(self.step_size * (means.detach() + self.added))
        self.weights = moved / moved.sum()
        return means @ self.weights


def train_groups(task: Task, settings: Settings, groups: np.ndarray) -> Retrained:
    """Train anew by GroupDRO on groups of the training split, (N,) of any names; batches hold each group alike."""
    import torch

    numbers = np.unique(groups, return_inverse=True)[1]
    on_device = torch.from_numpy(numbers).to(task.training.images.device)

    def fit(candidate: Settings, seed: int) -> Fitted:
        return task.fit(
            candidate,
            seed,
            epoch_rows=lambda epoch: torch.from_numpy(evenly_drawn(numbers, seed, epoch)),
            objective=GroupLoss(on_device, candidate.step_size, candidate.adjustment),
        )

    found = train_each(task, settings, fit)
    counts = np.bincount(numbers)
    return Retrained(found.models, {**found.facts, "groups": len(counts), "smallest_group": int(counts.min())})


def retrain(task: Task, settings: Settings) -> Retrained:
    """GroupDRO on the true groups, class and spurious feature."""
    return train_groups(task, settings, task.training.table["group"].to_numpy())
