import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import align_ensemble, contrast_penalty, rrr_penalty
from lvlmva_core.errors import InputError
from lvlmva_core.samples import Split
from lvlmva_core.training import endless_batches


def _network(smooth: bool = True, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(2, 3, 3, padding=1)]
        layers += [nn.BatchNorm2d(3)] if norm else []
        layers += [nn.Tanh() if smooth else nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 5, 4)]
        return nn.Sequential(*layers).double()


class _Transformer(nn.Module):
    """A pixel is a token; torch's own encoder layer, which has a fused kernel and a fast path for attention."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, 8)
        # without biases: that of the keys has no gradient, of whose rounding Adam would make steps
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, bias=False)
        self.head = nn.Linear(8, classes)
        self.place = nn.Parameter(torch.rand(20, 8) / 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.embed(images.flatten(2).mT) + self.place).mean(1))


def transformer(channels: int = 2, classes: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _Transformer(channels, classes).double()


def _batch(n: int = 3) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.random((n, 2, 4, 5))), torch.from_numpy(rng.random((n, 4, 5)) < 0.5)


def _summed_log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return torch.log_softmax(model(images), dim=1).sum(1)


LABELS = torch.tensor([2, 0, 3])


def _own_against_others(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    own = logits[range(3), LABELS]
    return own - (logits.sum(1) - own) / 3


def _contrast(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    return contrast_penalty(model, images, masks, LABELS)


PENALTIES = [(rrr_penalty, _summed_log_probabilities), (_contrast, _own_against_others)]


@pytest.mark.parametrize(("penalty", "score"), PENALTIES)
@pytest.mark.parametrize("network", [_network, partial(_network, False), transformer])
def test_the_penalty_is_the_squared_central_difference_inside_the_mask(network: Any, penalty: Any, score: Any) -> None:
    model, (images, masks) = network(), _batch()
    step = 1e-6
    expected = torch.zeros(len(images), dtype=torch.float64)
    with torch.no_grad():
        for c in range(2):
            for u in range(4):
                for v in range(5):
                    nudge = torch.zeros_like(images)
                    nudge[:, c, u, v] = step
                    slope = (score(model, images + nudge) - score(model, images - nudge)) / (2 * step)
                    expected += torch.where(masks[:, u, v], slope**2, 0.0)
    torch.testing.assert_close(penalty(model, images, masks).detach(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("penalty", [rrr_penalty, _contrast])
@pytest.mark.parametrize(
    ("network", "name", "places"),
    [
        (_network, "0.weight", [(0, 0, 0, 0), (1, 1, 2, 1), (2, 0, 1, 2)]),
        (transformer, "block.self_attn.in_proj_weight", [(0, 0), (9, 3), (23, 7)]),  # a query, a key and a value
    ],
)
def test_the_gradient_of_the_penalty_in_the_parameters_is_its_central_difference(
    network: Any, name: str, places: list[tuple[int, ...]], penalty: Any
) -> None:
    model, (images, masks) = network(), _batch()
    weight = model.get_parameter(name)
    penalty(model, images, masks).sum().backward()
    step = 1e-6
    for place in places:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            values.append(penalty(model, images, masks).sum().item())
            with torch.no_grad():
                weight[place] -= sign * step
        assert weight.grad is not None
        assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_a_linear_model_has_the_penalty_in_closed_form() -> None:
    # d/dx sum_k log p_k = sum_k W_k - K sum_k p_k W_k for logits W x
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 4)).double()
    images, masks = _batch()
    weight = model[1].weight.detach()
    p = torch.softmax(model(images), dim=1).detach()
    gradient = (weight.sum(0) - 4 * p @ weight).reshape(images.shape)
    expected = (gradient**2 * masks[:, None]).sum((1, 2, 3))
    torch.testing.assert_close(rrr_penalty(model, images, masks).detach(), expected)
    # d/dx (z_y - mean of the others) = W_y - (sum_k W_k - W_y) / (K - 1)
    gradient = (weight[LABELS] - (weight.sum(0) - weight[LABELS]) / 3).reshape(images.shape)
    expected = (gradient**2 * masks[:, None]).sum((1, 2, 3))
    torch.testing.assert_close(_contrast(model, images, masks).detach(), expected, rtol=1e-12, atol=0)


def test_a_region_of_a_share_of_votes_counts_by_its_square() -> None:
    """Regions of 2, 1 and no votes of 3, of a linear model: (2/3)² and (1/3)² of what hard masks of them cost."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 4)).double()
    images, _ = _batch()
    weight, p = model[1].weight.detach(), torch.softmax(model(images), dim=1).detach()
    squares = (weight.sum(0) - 4 * p @ weight).reshape(images.shape).square().sum(1)  # (3, 4, 5)
    shares = torch.zeros((3, 4, 5))
    shares[:, :2], shares[:, 2] = 2 / 3, 1 / 3
    expected = squares[:, :2].sum((1, 2)) * 4 / 9 + squares[:, 2].sum(1) / 9
    torch.testing.assert_close(rrr_penalty(model, images, shares).detach(), expected, rtol=1e-6, atol=0)


def test_only_the_log_probabilities_are_flat_where_two_classes_are_equally_probable() -> None:
    # d/dx sum_k log p_k = (1 - 2 p_1) d(z_1 - z_0)/dx; the contrast is z_1 - z_0 up to its sign
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, 2)).double()
    images, masks = _batch()
    slope = (model[1].weight[1] - model[1].weight[0]).detach()
    labels = torch.tensor([0, 1, 1])
    for bias in (-3.0, 0.4):
        with torch.no_grad():
            model[1].bias.copy_(torch.tensor([0.0, bias]))
            uncertain = nn.Parameter(model[1].bias - torch.tensor([0.0, 1.0]) * (model(images)[0].diff()))
        expected = (slope.reshape(2, 4, 5) ** 2 * masks[:, None]).sum((1, 2, 3))
        torch.testing.assert_close(contrast_penalty(model, images, masks, labels).detach(), expected)
        p = torch.softmax(model(images), dim=1).detach()[:, 1]
        torch.testing.assert_close(rrr_penalty(model, images, masks).detach(), expected * (1 - 2 * p) ** 2)
        model[1].bias = uncertain  # now the first sample's classes are equally probable
        assert rrr_penalty(model, images, masks)[0].item() < 1e-20 < expected[0].item()
        torch.testing.assert_close(contrast_penalty(model, images, masks, labels).detach(), expected)


def test_an_empty_mask_costs_nothing_and_samples_do_not_influence_each_other() -> None:
    model, (images, masks) = _network(norm=True), _batch()
    together = rrr_penalty(model, images, masks).detach()
    alone = torch.cat([rrr_penalty(model, images[i : i + 1], masks[i : i + 1]).detach() for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert rrr_penalty(model, images, torch.zeros_like(masks)).sum().item() == 0


def test_batchnorm_is_in_eval_mode_inside_and_every_mode_is_restored() -> None:
    model, (images, masks) = _network(norm=True), _batch()
    model.train()
    model[3].eval()  # type: ignore[index]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    in_train_mode = rrr_penalty(model, images, masks).detach()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(in_train_mode, rrr_penalty(model.eval(), images, masks).detach())
    model.train()
    with pytest.raises(RuntimeError, match="size"):
        rrr_penalty(model, images[:, :1], masks)
    assert model.training


def test_masks_of_another_shape_or_type_are_refused() -> None:
    model, (images, masks) = _network(), _batch()
    with pytest.raises(ValueError, match=r"masks must be bool or floating \(3, 4, 5\)"):
        rrr_penalty(model, images, masks.long())
    with pytest.raises(ValueError, match=r"masks must be bool or floating \(3, 4, 5\)"):
        rrr_penalty(model, images, masks[:, None])


def test_the_alignment_stream_runs_on_across_passes() -> None:
    stream = endless_batches(10, 4, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(stream) for _ in range(5)])  # two passes of ten in batches of four
    assert sorted(drawn[:10].tolist()) == list(range(10))
    assert sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def _toy(seed: int = 0) -> dict[str, Tensor]:
    """Two classes told apart by pixel 0 (weakly) and by pixel 1 (perfectly: the shortcut)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 2
    images = torch.rand((40, 1, 1, 4), generator=generator) * 0.2
    images[:, 0, 0, 0] += 0.3 * labels
    images[:, 0, 0, 1] += 0.8 * labels
    masks = torch.zeros((40, 1, 4), dtype=torch.bool)
    masks[:, 0, 1] = True
    return {"images": images, "labels": labels, "masks": masks}


def _align(rrr_lambda: float, seed: int = 0, epochs: int = 40, gamma: float = 0.0) -> tuple[nn.Module, pd.DataFrame]:
    toy = _toy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    everything = Split(toy["images"], toy["labels"])
    (run,) = align_ensemble(
        model,
        everything,
        Split(toy["images"][:10], toy["labels"][:10]),
        toy["masks"][:10],
        everything,
        AlignSettings(
            rrr_lambda=rrr_lambda,
            gamma=gamma,
            learning_rate=0.01,
            epochs=epochs,
            alignment_batch=4,
            training_batch=16,
            seeds=[seed],
        ),
    )
    model.load_state_dict(run.weights)
    return model, run.curve


def test_alignment_takes_the_weight_off_the_masked_pixel() -> None:
    def reliance(model: nn.Module) -> float:
        weight = model[1].weight.detach()  # type: ignore[index]
        return float((weight[1] - weight[0]).abs()[1])

    assert reliance(_align(10.0)[0]) < 0.4 * reliance(_align(0.0)[0])


def test_training_is_the_loss_of_the_paper_written_out_sample_by_sample() -> None:
    toy, rrr_lambda, gamma = _toy(), 0.7, 0.01
    trained, curve = _align(rrr_lambda, gamma=gamma, epochs=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    training = endless_batches(40, 16, torch.Generator().manual_seed(0))
    alignment = endless_batches(10, 4, torch.Generator().manual_seed(1))
    penalties = []
    for _ in range(2 * math.ceil(40 / 16)):
        rows, chosen = next(training).tolist(), next(alignment).tolist()
        cross_entropy, penalty = torch.zeros(()), torch.zeros(())
        for sample in chosen + rows:
            log_p = torch.log_softmax(model(toy["images"][sample][None]), dim=1)[0]
            cross_entropy = cross_entropy - log_p[toy["labels"][sample]]
        for sample in chosen:
            pixels = toy["images"][sample][None].clone().requires_grad_(True)
            total = torch.log_softmax(model(pixels), dim=1).sum()
            (slope,) = torch.autograd.grad(total, pixels, create_graph=True)
            penalty = penalty + (toy["masks"][sample].double() * slope[0, 0]).square().sum()
        squares = sum((parameter**2).sum() for parameter in model.parameters())
        loss = cross_entropy / 20 + rrr_lambda * penalty / 20 + gamma * squares
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalties.append(penalty.item() / 20)
    torch.testing.assert_close(trained.state_dict()["1.weight"], model.state_dict()["1.weight"], rtol=1e-4, atol=1e-5)
    assert curve["penalty"].tolist() == pytest.approx([sum(penalties[:3]) / 3, sum(penalties[3:]) / 3], rel=1e-3)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    weights = [_align(1.0, seed, epochs=3)[0][1].weight for seed in (0, 0, 1)]  # type: ignore[index]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_gamma_shrinks_the_weights() -> None:
    assert _align(0.0, gamma=1.0)[0][1].weight.norm() < 0.5 * _align(0.0)[0][1].weight.norm()  # type: ignore[index]


def test_a_loss_that_is_not_finite_is_named() -> None:
    with pytest.raises(InputError, match=r"not finite in epoch 1 at λ = 1e\+40"):
        _align(1e40)
