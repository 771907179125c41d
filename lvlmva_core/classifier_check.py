"""Whether a classifier from elsewhere is read as it was trained: class order and scaling fail without an error.

torchvision sorts class folders as strings and timm as numbers; a network runs on any scale of pixels. So the accuracy
is held against what is expected, and other readings are tried: every order of the classes, the usual normalisations.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lvlmva_core.alignment import rrr_penalty
from lvlmva_core.attribution import deep_lift_shap
from lvlmva_core.errors import InputError
from lvlmva_core.models import Normalised, predict_logits
from lvlmva_core.samples import Split
from lvlmva_core.train_settings import NORMALISATIONS

TRIED = 600  # pictures on which other readings are tried: one half chooses the order of classes, the other measures
SCREENED = 150  # of those that choose; a reading that is worse on them than the one that is set is tried no further
CERTAIN = 3.0  # standard errors by which another reading must be better; some twenty are tried
READINGS = {**NORMALISATIONS, "imagenet_bytes": (NORMALISATIONS["imagenet"][0], (1 / 255,))}  # as Caffe's networks


@dataclass(frozen=True)
class Reading:
    """One way to read a classifier, and its accuracy 0..1 on pictures that did not choose the order of classes.

    normalisation: of READINGS, or "as set". classes: names in the order of the logits.
    """

    normalisation: str
    channel_order: str
    classes: list[str]
    accuracy: float


@dataclass(frozen=True)
class ClassifierCheck:
    """accuracy, expected: split -> 0..1. implausible: what speaks against the reading as set; [] = nothing.

    as_set: the reading as it is set. better: readings that are certainly better on the same pictures, best first.
    """

    accuracy: dict[str, float]
    expected: dict[str, float]
    implausible: list[str]
    as_set: Reading
    better: list[Reading]

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the reading as set."""
        return not self.implausible and not self.better


def check_classifier(
    model: nn.Module,
    splits: Mapping[str, Split],
    class_names: Sequence[str],
    expected: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
) -> ClassifierCheck:
    """Compare a classifier's accuracy on each split with what is expected, and try other readings of it.

    Args:
        model: images in [0, 1] to logits in the data's order of classes, in eval mode. splits: name -> pictures, on its
            device. class_names: of the labels 0..K-1.
        expected: split -> accuracy 0..1. A split without one must beat always naming its most frequent class.

    Raises:
        InputError: `expected` names a split that is not there.
    """
    expected = dict(expected or {})
    if unknown := sorted(set(expected) - set(splits)):
        raise InputError(
            f"train.expected_accuracy names '{unknown[0]}', the data has the splits {', '.join(sorted(splits))}"
        )
    accuracy, implausible, every = {}, [], []
    for name, split in splits.items():
        labels = split.labels
        every.append(predict_logits(model, split.images))
        accuracy[name] = float((every[-1].argmax(1) == labels).double().mean())
        most = float(torch.bincount(labels).max()) / len(labels)
        wanted, reason = (expected[name], "expected") if name in expected else (most, "always naming one class reaches")
        error = math.sqrt(max(wanted * (1 - wanted), 1e-4) / len(labels))
        if accuracy[name] < wanted - 2 * error if name in expected else accuracy[name] <= wanted:
            implausible.append(f"{name}: {accuracy[name]:.3f} of {len(labels)} pictures, {reason} {wanted:.3f}")
    images, labels, logits = _drawn(splits, torch.cat(every), seed)
    halves = np.random.default_rng([seed, 1]).permutation(len(labels))
    choose, measure = halves[: len(halves) // 2], halves[len(halves) // 2 :]
    names = labels.cpu().numpy()
    right = logits.argmax(1).cpu().numpy() == names
    as_set = Reading("as set", "as set", list(class_names), float(right[measure].mean()))
    better = []
    screen = choose[:SCREENED]
    as_it_is: tuple[str, str, nn.Module | None] = ("as set", "as set", None)
    for reading, order, network in itertools.chain([as_it_is], _readings(model, images)):
        if network is not None:
            given = predict_logits(network, images[screen]).argmax(1).cpu().numpy()
            logit_of = best_order(given, names[screen], len(class_names))
            if (np.asarray(logit_of)[names[screen]] == given).sum() < right[screen].sum():
                continue
            logits = predict_logits(network, images)
        given = logits.argmax(1).cpu().numpy()
        logit_of = best_order(given[choose], names[choose], len(class_names))
        hits = np.asarray(logit_of)[names[measure]] == given[measure]
        gain = hits.astype(np.float64) - right[measure]
        if gain.mean() > CERTAIN * max(gain.std() / math.sqrt(len(gain)), 1 / len(gain)):
            classes = [class_names[logit_of.index(k)] for k in range(len(class_names))]
            better.append(Reading(reading, order, classes, float(hits.mean())))
    better.sort(key=lambda each: -each.accuracy)
    return ClassifierCheck(accuracy, expected, implausible, as_set, better)


def best_order(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> list[int]:
    """For each class, the logit that stands for it in the order that makes most predictions right.

    That is the best of all K! orders: the assignment that maximises the trace of the confusion matrix (Kuhn 1955;
    scipy). Of equal ones that is taken which leaves most classes where they are.

    Args:
        predicted, labels: int (n,), 0..K-1.
    """
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((n_classes, n_classes))
    np.add.at(counts, (labels, predicted), 1)
    counts += np.eye(n_classes) / (2 * n_classes)
    return [int(logit) for logit in linear_sum_assignment(-counts)[1]]


def check_differentiation(model: nn.Module, images: Tensor) -> None:
    """Try the two things that are done with a model: exact attribution and the gradient of the penalty.

    Args:
        model: in eval mode. images: float32 (n, C, H, W) in [0, 1], n > 1, on its device.

    Raises:
        UnsupportedOperationError: an operation has no exact attribution rule; named with its place.
        InputError: the squared input gradient cannot be differentiated, or is not finite.
    """
    deep_lift_shap(model, images[:1], images[1:2], 0)
    copied = copy.deepcopy(model)
    masks = torch.ones((2, *images.shape[2:]), dtype=torch.bool, device=images.device)
    try:
        penalty = rrr_penalty(copied, images[:2], masks).sum()
        penalty.backward()
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"the model's input gradient cannot be differentiated again ({' '.join(str(error).split())[:200]}), as the "
            "alignment needs; replace the layer that has its own backward"
        ) from error
    gradients = [each.grad for each in copied.parameters() if each.grad is not None]
    if not gradients or not all(bool(torch.isfinite(each).all()) for each in gradients):
        raise InputError(
            "the gradient of the penalty is not finite or reaches no weight; unfreeze the network's weights"
        )


def _readings(model: nn.Module, images: Tensor) -> Iterator[tuple[str, str, nn.Module]]:
    """The model under each normalisation and channel order; the next one changes it."""
    changed = copy.deepcopy(model)
    layer = next((module for module in changed.modules() if isinstance(module, Normalised)), None)
    if layer is None:
        channels = images.shape[1]
        changed = layer = Normalised(changed, (0.0,) * channels, (1.0,) * channels).to(images.device).eval()
    channels = layer.mean.shape[1]
    for name, (mean, std) in READINGS.items():
        if len(mean) not in (1, channels):
            continue
        for bgr in (False, True) if channels == images.shape[1] == 3 else (False,):
            layer.mean.copy_(torch.tensor(mean).reshape(1, -1, 1, 1).expand_as(layer.mean))
            layer.std.copy_(torch.tensor(std).reshape(1, -1, 1, 1).expand_as(layer.std))
            layer.bgr = bgr
            yield name, "bgr" if bgr else "rgb", changed


def _drawn(splits: Mapping[str, Split], logits: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most TRIED pictures of all splits together, with their labels and logits."""
    images = torch.cat([split.images for split in splits.values()])
    labels = torch.cat([split.labels for split in splits.values()])
    rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:TRIED])
    return images[rows], labels[rows], logits[rows]
