"""Double backward through convolutions: PyTorch's own is the oracle."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.convolutions import InputGradientsOnly, safe_weight_gradients
from lvlmva_core.penalties import rrr_penalty


class Net(nn.Module):
    """Convolutions of every kind that is rewritten, and one that is not (padding by name)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.Softplus(),  # curved, so that second derivatives do not vanish
            nn.Conv2d(4, 8, (3, 1), padding=(1, 0), groups=4, bias=False),
            nn.BatchNorm2d(8, affine=False),
            nn.Softplus(),
            nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2),
            nn.Softplus(),
            nn.Conv2d(6, 6, 3, padding="same"),
            nn.Flatten(),
            nn.LazyLinear(3),
        )

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.layers(images)
        return found


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().double()
    net(torch.zeros(1, 2, 9, 9, dtype=torch.float64))  # gives the last layer its shape
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return net


def plain_penalty(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    pixels = images.clone().requires_grad_()
    score = model.eval()(pixels).log_softmax(1).sum()
    (gradient,) = torch.autograd.grad(score, pixels, create_graph=True)
    return (gradient * masks[:, None]).square().sum((1, 2, 3))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_penalty_and_its_gradient_are_those_of_plain_double_backward(
    net: nn.Module, memory: torch.memory_format
) -> None:
    net = net.to(memory_format=memory)
    images = torch.rand(3, 2, 9, 9, dtype=torch.float64)
    masks = torch.rand(3, 9, 9) < 0.5
    found, expected = rrr_penalty(net, images, masks), plain_penalty(net, images, masks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert expected.min() > 0
    own = torch.autograd.grad(found.sum(), list(net.parameters()), allow_unused=True)
    plain = torch.autograd.grad(expected.sum(), list(net.parameters()), allow_unused=True)
    for name, of_own, of_plain in zip([name for name, _ in net.named_parameters()], own, plain, strict=True):
        assert of_plain is not None, name
        assert of_plain.abs().max() > 0, name
        torch.testing.assert_close(of_own, of_plain, rtol=1e-9, atol=1e-14, msg=name)


def test_third_derivatives_are_there_too(net: nn.Module) -> None:
    images = torch.rand(2, 2, 9, 9, dtype=torch.float64)
    masks = torch.ones(2, 9, 9, dtype=torch.bool)
    weight = net.layers[3].weight  # type: ignore[index]
    found = []
    for penalty in (rrr_penalty, plain_penalty):
        (first,) = torch.autograd.grad(penalty(net, images, masks).sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), list(net.parameters()), allow_unused=True))
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-8, atol=1e-14)


def test_an_ordinary_backward_through_what_was_built_under_it_is_whole(net: nn.Module) -> None:
    images = torch.rand(2, 2, 9, 9, dtype=torch.float64)
    net.eval()
    with InputGradientsOnly():
        inside = functional.cross_entropy(net(images), torch.tensor([0, 1]))
    outside = functional.cross_entropy(net(images), torch.tensor([0, 1]))
    for own, plain in zip(
        *(torch.autograd.grad(loss, list(net.parameters())) for loss in (inside, outside)), strict=True
    ):
        torch.testing.assert_close(own, plain, rtol=1e-10, atol=1e-14)


def test_batch_norm_in_training_still_moves(net: nn.Module) -> None:
    other = copy.deepcopy(net)
    images = torch.rand(4, 2, 9, 9, dtype=torch.float64)
    with InputGradientsOnly():
        own = net.train()(images)
    torch.testing.assert_close(own, other.train()(images), rtol=1e-12, atol=1e-14)
    for moved, expected in zip(net.buffers(), other.buffers(), strict=True):
        assert torch.equal(moved, expected) or torch.allclose(moved, expected, rtol=1e-12)


def test_autocast_lowers_them_as_it_does_pytorchs(net: nn.Module) -> None:
    net = net.float().eval()
    images = torch.rand(2, 2, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(images)
        with InputGradientsOnly():
            own = net(images)
    assert own.dtype == plain.dtype == torch.bfloat16
    assert (own - plain).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize(("samples", "channels", "made", "stride"), [(1, 8, 16, 2), (8, 4, 8, 2), (8, 12, 16, (1, 2))])
def test_narrow_strided_points_give_the_gradients_of_double_precision(
    samples: int, channels: int, made: int, stride: int | tuple[int, int]
) -> None:
    """At these sizes oneDNN's own gradient of the weights overruns its memory: the process dies (docs/alignment.md)."""
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Conv2d(channels, made, 1, stride, bias=False), nn.Softplus(), nn.Flatten()).double()
    exact.append(nn.Linear(exact(torch.zeros(1, channels, 64, 64).double()).shape[1], 2).double())
    single = copy.deepcopy(exact).float().to(memory_format=torch.channels_last)
    images = torch.rand(samples, channels, 64, 64, dtype=torch.float64)
    masks = torch.rand(samples, 64, 64) < 0.5
    found = {}
    for name, model, given in (("exact", exact, images), ("single", single, images.float())):
        given = given.to(memory_format=torch.channels_last)
        with safe_weight_gradients(model):
            loss = model(given).log_softmax(1)[:, 0].sum() + plain_penalty(model, given, masks).sum()
            loss = loss + rrr_penalty(model, given, masks).sum()
            found[name] = torch.autograd.grad(loss, list(model.parameters()))
    for got, expected in zip(found["single"], found["exact"], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
