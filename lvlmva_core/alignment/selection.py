"""Which λ, and which epoch: rules over a validation split, and the supervision that each of them needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lvlmva_core.errors import InputError
from lvlmva_core.samples import Split, groups_known
from lvlmva_core.statistics import mean_and_std

if TYPE_CHECKING:
    from lvlmva_core.align_settings import AlignSettings
    from lvlmva_core.alignment.loop import AlignedRun
    from lvlmva_core.baselines.settings import Retraining

SUPERVISION = MappingProxyType(
    {
        "pseudo_group": "class labels of the validation split, verdicts of the critic",
        "worst_group": "class and group labels of the validation split",
        "accuracy": "class labels of the validation split",
    }
)


@dataclass(frozen=True)
class Selection:
    """Images that a candidate is judged by; its score is the accuracy of the worst group, 0..1.

    images: float32 (V, C, H, W) in [0, 1]. labels: int64 (V,). groups: int64 (V,), any numbers. rows: int64 (V,), the
    place in the validation split of what each is made of.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    rows: Tensor

    def score(self, logits: Tensor, of: Tensor | None = None) -> float:
        """Accuracy of the worst group, from logits (V, K); of some of the images, bool (V,), where `of` is given."""
        return float(self.accuracies(logits, of).min())

    def accuracies(self, logits: Tensor, of: Tensor | None = None) -> Tensor:
        """Accuracy of each group that occurs, float64, in the order of the groups' numbers."""
        chosen = slice(None) if of is None else of
        correct = (logits.argmax(1) == self.labels)[chosen].double()
        _, group = torch.unique(self.groups[chosen], return_inverse=True)
        counts = torch.bincount(group).double()
        return torch.zeros_like(counts).index_add_(0, group, correct) / counts


def by_accuracy(images: Tensor, labels: Tensor) -> Selection:
    """All of the split as one group. Where it is drawn like the training split, this rule favours λ = 0."""
    return Selection(images, labels, torch.zeros_like(labels), torch.arange(len(labels), device=labels.device))


def by_worst_group(images: Tensor, labels: Tensor, spurious: Tensor) -> Selection:
    """Groups of class and spurious feature: supervision that LVLM-VA is meant to do without."""
    rows = torch.arange(len(labels), device=labels.device)
    return Selection(images, labels, labels * 2 + spurious.long(), rows)


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
            empty are no donors. Of weights in [0, 1] those above a half are masked.
        seed: of the draw of donors.

    Raises:
        InputError: no validation image has a donor of another class.
    """
    rng = np.random.default_rng(seed)
    rejected = masks if masks.dtype == torch.bool else masks > 0.5  # more than half of the votes, as the verdict is
    usable = torch.nonzero(rejected.flatten(1).any(1)).flatten().cpu().numpy()
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
    mixed = torch.where(rejected[donors][:, None], donor_images[donors], images[receivers])
    return Selection(
        torch.cat([images, mixed]),
        torch.cat([labels, labels[receivers]]),
        torch.cat([labels * 2, labels[receivers] * 2 + 1]),
        torch.tensor([*range(len(labels)), *receivers], device=labels.device),
    )


def best_lambda(scores: Mapping[float, Sequence[float]]) -> float:
    """The λ of the highest mean score over seeds; of equal ones the smallest, which changes the model least."""
    return min(scores, key=lambda rrr_lambda: (-float(np.mean(scores[rrr_lambda])), rrr_lambda))


def at_edge(chosen: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Settings whose chosen value is the "lowest" or "highest" of three or more: what lies beyond was not looked at.

    Examples:
        >>> at_edge({"c": 0.1, "up": 5}, {"c": [0.1, 0.3, 1.0], "up": [5, 20]})
        {'c': 'lowest'}
    """
    found = {}
    for key, values in grid.items():
        if len(set(values)) > 2 and chosen[key] in (min(values), max(values)):
            found[key] = "lowest" if chosen[key] == min(values) else "highest"
    return found


def selection_of(
    settings: "AlignSettings | Retraining", validation: Split, donors: Callable[[], tuple[Split, Tensor]]
) -> Selection | None:
    """What the candidates are judged by, or None where nothing is chosen.

    Args:
        donors: gives n alignment samples and what was rejected in them, bool (n, H, W), which make the pseudo-groups:
            the same for every method, whatever masks it is trained on, lest each be chosen by what it likes.

    Raises:
        ValueError: another rule than those of SUPERVISION.
    """
    chosen = settings.selection
    if chosen is None:
        return None
    images, labels = validation.images, validation.labels
    if chosen.rule == "accuracy":
        return by_accuracy(images, labels)
    if chosen.rule == "worst_group":
        if not groups_known(validation.table):
            raise InputError(
                "selection.rule worst_group needs group labels, which the data set does not have; set it to "
                "pseudo_group, which needs none"
            )
        has_spurious = torch.from_numpy(validation.table["spurious"].to_numpy(dtype=bool, copy=True)).to(images.device)
        return by_worst_group(images, labels, has_spurious)
    if chosen.rule != "pseudo_group":
        raise ValueError(f"rule '{chosen.rule}': expected one of {', '.join(SUPERVISION)}")
    alignment, masks = donors()
    return by_pseudo_group(images, labels, alignment.images, alignment.labels, masks, chosen.seed)


def best_runs(runs: "Sequence[AlignedRun]", settings: "AlignSettings") -> "list[AlignedRun]":
    """The runs of the λ that is kept: the best by the selection, or the only one."""
    by_lambda = _by_lambda(runs)
    if settings.selection is None:
        return by_lambda[settings.rrr_lambda]
    return by_lambda[best_lambda({value: [one.score or 0.0 for one in those] for value, those in by_lambda.items()})]


def summary_of(runs: "Sequence[AlignedRun]", settings: "AlignSettings") -> dict[str, Any]:
    """For the metrics file. λ on two scales of inputs: the squared gradient for pixels in 0..255 is smaller by 255².

    Args:
        runs: of every λ and seed.
    """
    best = best_runs(runs, settings)
    rrr_lambda = best[0].rrr_lambda
    summary: dict[str, Any] = {
        "val_accuracy": _over_seeds(best)["val_accuracy"],
        "rrr_lambda": {"inputs_0_to_1": rrr_lambda, "inputs_0_to_255": rrr_lambda * 255**2},
    }
    if settings.correction != "counterexamples":
        summary["penalty"] = settings.penalty
    if made_like := settings.made_like():
        summary |= {"correction": f"{settings.correction} (an extension)", "counterexamples": made_like.model_dump()}
    if settings.selection is not None:
        summary["selection"] = {
            "rule": settings.selection.rule,
            "supervision": SUPERVISION[settings.selection.rule],
            "epoch": mean_and_std([one.epoch for one in best]),
            "chosen": {"rrr_lambda": rrr_lambda} if len(settings.candidates()) > 1 else {},
            "at_edge": at_edge({"rrr_lambda": rrr_lambda}, {"rrr_lambda": settings.candidates()}),
            "candidates": {f"lambda={value:g}": _over_seeds(those) for value, those in _by_lambda(runs).items()},
        }
    return summary


def _by_lambda(runs: "Sequence[AlignedRun]") -> "dict[float, list[AlignedRun]]":
    grouped: dict[float, list[AlignedRun]] = {}
    for run in runs:
        grouped.setdefault(run.rrr_lambda, []).append(run)
    return grouped


def _over_seeds(runs: "Sequence[AlignedRun]") -> dict[str, dict[str, float]]:
    """Validation accuracy, and score where there is one, of the weights that are kept."""
    rows = [one.curve.loc[one.curve["epoch"] == one.epoch].iloc[0] for one in runs]
    return {
        name: mean_and_std([float(row[name]) for row in rows])
        for name in ("val_accuracy", "score")
        if name in runs[0].curve
    }
