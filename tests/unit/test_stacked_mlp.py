from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.alignment import contrast_penalty, rrr_penalty
from lvlmva_core.alignment.stacked_mlp import StackedMlp, linear_layers
from lvlmva_core.models import Mlp, ModelSpec

CHANNELS, HEIGHT, WIDTH, CLASSES = 2, 3, 4, 5


def _mlp(depth: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [*[CHANNELS * HEIGHT * WIDTH, 7, 6, 8][:depth], CLASSES]
        modules: list[nn.Module] = [nn.Flatten()]
        for n, (fan_in, fan_out) in enumerate(pairwise(widths)):
            modules += [nn.ReLU()] if n else []
            modules.append(nn.Linear(fan_in, fan_out))
        return nn.Sequential(*modules).double()


def _stack(models: list[nn.Sequential]) -> StackedMlp:
    layers = linear_layers(models[0])
    assert layers is not None
    stack = StackedMlp(layers, len(models))
    for run, model in enumerate(models):
        own = linear_layers(model)
        assert own is not None
        for n, (_, layer) in enumerate(own):
            stack.weights[n][run], stack.biases[n][run] = layer.weight.detach(), layer.bias.detach()
    return stack


def _batch(n_runs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand((n_runs, 9, CHANNELS, HEIGHT, WIDTH), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (n_runs, 9), generator=generator)
    return images, labels, torch.rand((n_runs, 4, HEIGHT, WIDTH), generator=generator) < 0.5


def _rows(images: Tensor) -> Tensor:
    return torch.cat([images, torch.full_like(images[:, :4], torch.nan)], dim=1).flatten(2)


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_losses_and_gradients_are_those_of_double_backward_for_every_run(depth: int, contrast: bool) -> None:
    models = [_mlp(depth, seed) for seed in range(3)]
    images, labels, masks = _batch(3)
    lambdas = [0.0, 0.7, 30.0]
    stack = _stack(models)
    channels = masks[:, :, None].expand(-1, -1, CHANNELS, -1, -1).flatten(2).double()
    found = stack.backward(
        _rows(images),
        labels,
        channels,
        torch.tensor(lambdas, dtype=torch.float64),
        penalty="contrast" if contrast else "log_probabilities",
    )
    for run, (model, rrr_lambda) in enumerate(zip(models, lambdas, strict=True)):
        cross_entropy = functional.cross_entropy(model(images[run]), labels[run], reduction="sum") / 9
        if contrast:
            penalty = contrast_penalty(model, images[run, :4], masks[run], labels[run, :4]).sum() / 9
        else:
            penalty = rrr_penalty(model, images[run, :4], masks[run]).sum() / 9
        expected = torch.autograd.grad(cross_entropy + rrr_lambda * penalty, list(model.parameters()))
        torch.testing.assert_close(found[0][run], cross_entropy.detach())
        torch.testing.assert_close(found[1][run], penalty.detach() if rrr_lambda else torch.zeros_like(penalty))
        for n in range(depth):
            for stacked, gradient in ((stack.weights[n], expected[2 * n]), (stack.biases[n], expected[2 * n + 1])):
                assert stacked.grad is not None
                torch.testing.assert_close(stacked.grad[run], gradient, rtol=1e-9, atol=1e-12)


def test_without_lambda_only_the_cross_entropy_counts() -> None:
    images, labels, masks = _batch(2)
    channels = masks[:, :, None].expand(-1, -1, CHANNELS, -1, -1).flatten(2).double()
    with_zero, without = _stack([_mlp(2), _mlp(2)]), _stack([_mlp(2), _mlp(2)])
    zero = torch.zeros(2, dtype=torch.float64)
    first = with_zero.backward(_rows(images), labels, channels, zero)
    second = without.backward(_rows(images), labels, channels, None)
    assert torch.equal(first[0], second[0])
    assert first[1].tolist() == second[1].tolist() == [0, 0]
    for one, other in zip(with_zero.parameters(), without.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_logits_and_state_dicts_are_those_of_the_models() -> None:
    models = [_mlp(3, seed) for seed in range(3)]
    images = _batch(1)[0][0]
    stack = _stack(models)
    logits = stack.logits(images, batch_size=4)
    for run, model in enumerate(models):
        torch.testing.assert_close(logits[run], model(images).detach())
        for name, tensor in model.state_dict().items():
            assert torch.equal(stack.state_dict(run)[name], tensor)


def test_only_relu_mlps_are_recognised() -> None:
    linear = nn.Linear(4, 2)
    assert [name for name, _ in linear_layers(Mlp(ModelSpec("mlp", 1, 2, 2, 3, 5))) or []] == ["hidden", "output"]
    assert linear_layers(nn.Sequential(nn.Flatten(), linear)) == [("1", linear)]
    others = [
        linear,
        nn.Sequential(linear),
        nn.Sequential(nn.Flatten(), linear, nn.Tanh(), nn.Linear(2, 2)),
        nn.Sequential(nn.Flatten(), linear, nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)),
        nn.Sequential(nn.Flatten(), linear, nn.BatchNorm1d(2), nn.Linear(2, 2)),
        nn.Sequential(nn.Flatten(2), linear, nn.ReLU(), nn.Linear(2, 2)),
        nn.Sequential(nn.Flatten(), linear, nn.Dropout(), nn.Linear(2, 2)),
    ]
    assert [linear_layers(model) for model in others] == [None] * len(others)
