"""Wrong orders of classes and wrong scalings are found; what fits is left alone."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lvlmva_core.attribution import UnsupportedOperationError
from lvlmva_core.classifier_check import best_order, check_classifier, check_differentiation
from lvlmva_core.errors import InputError
from lvlmva_core.models import Normalised
from lvlmva_core.samples import Split

NAMES = ["red", "green", "blue"]


class _BrightestChannel(nn.Module):
    """Right for pictures on ImageNet's normalisation: which channel is above its threshold most."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        # saturates on other scales, so that these lose accuracy
        return torch.tanh(self.scale * x.mean((2, 3)) * 3)[:, self.order]


def _split(n: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    values = torch.randn((n, 3, 4, 4), generator=generator) * 0.6
    values[torch.arange(n), labels] += 0.5
    return Split((values * std + mean).clamp(0, 1), labels)


def _model(order: list[int], mean: tuple[float, ...], std: tuple[float, ...], bgr: bool = False) -> nn.Module:
    return Normalised(_BrightestChannel(order), mean, std, bgr).eval()


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SPLITS = {"train": _split(900, 0), "test": _split(600, 1)}


def test_a_right_reading_passes() -> None:
    found = check_classifier(_model([0, 1, 2], *IMAGENET), SPLITS, NAMES, {"test": 0.9})
    assert found.passed
    assert found.accuracy["test"] > 0.85


def test_a_wrong_order_is_found_and_named() -> None:
    found = check_classifier(_model([2, 0, 1], *IMAGENET), SPLITS, NAMES, {"train": 0.9, "test": 0.9})
    assert len(found.implausible) == 2
    assert found.better[0].classes == ["blue", "red", "green"]  # logit 0 is channel 2
    assert found.better[0].accuracy > 0.85


@pytest.mark.parametrize(("mean", "std"), [((0.0,) * 3, (1.0,) * 3), ((0.0,) * 3, (1 / 255,) * 3)])
def test_a_wrong_scaling_is_found_and_named(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    found = check_classifier(_model([0, 1, 2], mean, std), SPLITS, NAMES)
    assert found.better[0].normalisation == "imagenet"
    assert found.better[0].channel_order == "rgb"
    assert found.better[0].classes == NAMES


def test_turned_channels_are_found_where_each_channel_means_a_class() -> None:
    found = check_classifier(_model([0, 1, 2], *IMAGENET, bgr=True), SPLITS, NAMES)
    assert not found.passed
    assert found.better[0].accuracy > 0.85


def test_a_model_that_knows_nothing_is_implausible_and_no_reading_is_made_up() -> None:
    model = _model([0, 1, 2], *IMAGENET)
    shuffled = {
        name: Split(
            split.images, split.labels[torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(3))]
        )
        for name, split in SPLITS.items()
    }
    found = check_classifier(model, shuffled, NAMES, {"test": 0.9})
    assert found.better == []
    assert any("test: " in reason and "expected 0.900" in reason for reason in found.implausible)


def test_an_expectation_of_a_split_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"train\.expected_accuracy names 'tset'"):
        check_classifier(_model([0, 1, 2], *IMAGENET), SPLITS, NAMES, {"tset": 0.9})


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_the_best_order_is_the_best_of_all(n_classes: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        labels, predicted = rng.integers(0, n_classes, (2, 60))
        hits = [int((np.asarray(p)[labels] == predicted).sum()) for p in permutations(range(n_classes))]
        found = np.asarray(best_order(predicted, labels, n_classes))
        assert int((found[labels] == predicted).sum()) == max(hits)


class _NoRule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = _Odd()
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(x.flatten(1)))


class _Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x) + x.sort(1).values


class _OneWay(torch.autograd.Function):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1.0


class _NoSecondDerivative(_NoRule):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(_OneWay.apply(x.flatten(1)).relu())  # type: ignore[no-untyped-call]


def test_a_transformer_has_rules_and_a_second_derivative() -> None:
    """torch's fused attention kernels have no second derivative; its parts do."""
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3).eval()
    check_differentiation(model, torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(0)))


def test_a_layer_without_a_rule_is_named_with_its_place_and_a_second_derivative_is_tried() -> None:
    images = torch.rand((3, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedOperationError, match=r"odd.*: no attribution rule for"):
        check_differentiation(_NoRule().eval(), images)
    with pytest.raises(InputError, match="input gradient cannot be differentiated again"):
        check_differentiation(_NoSecondDerivative().eval(), images)
    check_differentiation(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), images)
