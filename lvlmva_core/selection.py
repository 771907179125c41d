"""Which λ, and which epoch: rules over a validation split, and the supervision that each of them needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lvlmva_core.errors import InputError

SUPERVISION = MappingProxyType(
    {
        "pseudo_group": "class labels of the validation split",
        "worst_group": "class and group labels of the validation split",
        "accuracy": "class labels of the validation split",
    }
)


@dataclass(frozen=True)
class Selection:
    """Images that a candidate is judged by; its score is the accuracy of the worst group, 0..1.

    images: float32 (V, C, H, W) in [0, 1]. labels: int64 (V,). groups: int64 (V,), any numbers.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor

    def score(self, logits: Tensor) -> float:
        """Accuracy of the worst group, from logits (V, K)."""
        return float(self.accuracies(logits).min())

    def accuracies(self, logits: Tensor) -> Tensor:
        """Accuracy of each group, float64, in the order of the groups' numbers."""
        correct = (logits.argmax(1) == self.labels).double()
        _, group = torch.unique(self.groups, return_inverse=True)
        counts = torch.bincount(group).double()
        return torch.zeros_like(counts).index_add_(0, group, correct) / counts


def by_accuracy(images: Tensor, labels: Tensor) -> Selection:
    """All of the split as one group. Where it is drawn like the training split, this rule favours λ = 0."""
    return Selection(images, labels, torch.zeros_like(labels))


def by_worst_group(images: Tensor, labels: Tensor, spurious: Tensor) -> Selection:
    """Groups of class and spurious feature: supervision that LVLM-VA is meant to do without."""
    return Selection(images, labels, labels * 2 + spurious.long())


def by_pseudo_group(
    images: Tensor, labels: Tensor, donor_images: Tensor, donor_labels: Tensor, masks: Tensor, seed: int
) -> Selection:
    """Groups that the masks make, without group labels: each class as it is, and with masked pixels of other classes.

    A split drawn like the training split has no samples in which the shortcut misleads. They are made: each image is
    taken once as it is and once with the masked pixels of an alignment sample of another class laid over it. What lies
    in a mask was judged irrelevant to the donor's class, so it must not move the prediction; a model that uses the
    shortcut follows the donor. A class without a donor of another class has only its first group.

    Args:
        images: (V, C, H, W), labels: int64 (V,): the validation split.
        donor_images: (n, C, H, W), donor_labels: (n,), masks: bool (n, H, W): the alignment set; samples whose mask is
            empty are no donors.
        seed: of the draw of donors.

    Raises:
        InputError: no validation image has a donor of another class.
    """
    rng = np.random.default_rng(seed)
    usable = torch.nonzero(masks.flatten(1).any(1)).flatten().cpu().numpy()
    classes = donor_labels.cpu().numpy()[usable]
    receivers, donors = [], []
    for row, label in enumerate(labels.tolist()):
        others = usable[classes != label]
        if len(others):
            receivers.append(row)
            donors.append(int(rng.choice(others)))
    if not receivers:
        raise InputError(
            "selection.rule pseudo_group: no alignment sample with a mask belongs to another class than the validation "
            "samples; set rank.stratify: true, or another rule"
        )
    mask = masks[donors][:, None]
    mixed = torch.where(mask, donor_images[donors], images[receivers])
    return Selection(
        torch.cat([images, mixed]),
        torch.cat([labels, labels[receivers]]),
        torch.cat([labels * 2, labels[receivers] * 2 + 1]),
    )


def best_lambda(scores: Mapping[float, Sequence[float]]) -> float:
    """The λ of the highest mean score over seeds; of equal ones the smallest, which changes the model least."""
    return min(scores, key=lambda rrr_lambda: (-float(np.mean(scores[rrr_lambda])), rrr_lambda))
