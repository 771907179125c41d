import copy
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from lvlmva_core.compute import own_draws, set_up_compute
from lvlmva_core.errors import InputError
from lvlmva_core.samples import Split
from lvlmva_core.training import epoch_batches, train_classifier

N = 50


def _data() -> tuple[Tensor, Tensor]:
    labels = torch.arange(N) % 3
    images = 0.5 * torch.rand((N, 1, 3, 4), generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] += 0.25 * labels
    return images, labels


def _model(dropout: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [nn.Flatten(), nn.Dropout(0.2 if dropout else 0.0), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(6, 3))


def _train(model: nn.Module, **options: Any) -> pd.DataFrame:
    images, labels = _data()
    settings: dict[str, Any] = {"learning_rate": 0.01, "batch_size": 16, "epochs": 4, "seed": 3}
    return train_classifier(model, Split(images, labels), Split(images[:20], labels[:20]), **{**settings, **options})


def test_a_training_is_adam_over_shuffled_passes() -> None:
    images, labels = _data()
    trained, expected = _model(dropout=False), _model(dropout=False)
    curve = _train(trained)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(3)
    for epoch in range(4):
        losses = []
        expected.train()
        for rows in torch.split(torch.randperm(N, generator=generator), 16):
            log_p = torch.log_softmax(expected(images[rows]), 1)
            each = -log_p[torch.arange(len(rows)), labels[rows]]
            optimizer.zero_grad()
            each.mean().backward()
            optimizer.step()
            losses += each.tolist()
        expected.eval()
        right = expected(images).argmax(1) == labels
        assert curve["loss"][epoch] == pytest.approx(sum(losses) / N, rel=1e-5)
        assert curve["train_accuracy"][epoch] == pytest.approx(right.double().mean().item())
        assert curve["val_accuracy"][epoch] == pytest.approx(right[:20].double().mean().item())
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor)
    assert not trained.training


def test_a_training_on_some_rows_is_one_on_those_samples_alone() -> None:
    images, labels = _data()
    rows = torch.arange(0, N, 2)
    some, alone = _model(dropout=False), _model(dropout=False)
    curve = _train(some, rows=rows)
    settings: dict[str, Any] = {"learning_rate": 0.01, "batch_size": 16, "epochs": 4, "seed": 3}
    expected = train_classifier(alone, Split(images[rows], labels[rows]), Split(images[:20], labels[:20]), **settings)
    pd.testing.assert_frame_equal(curve, expected)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(some.state_dict()[name], tensor)


class _Kept:
    """A checkpoint in memory that keeps the state of one epoch, as it then was."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.states: dict[int, dict[str, Any]] = {}

    def load(self) -> dict[str, Any] | None:
        return self.states.get(self.epoch)

    def save(self, state: dict[str, Any], *, always: bool = False) -> None:
        if len(state["curve"]) == self.epoch:
            self.states[self.epoch] = copy.deepcopy(state)


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_training_goes_on_from_a_checkpoint_to_the_same_bits(epoch: int) -> None:
    kept, whole, resumed = _Kept(epoch), _model(), _model()
    curve = _train(whole, checkpoint=kept)
    assert _train(resumed, checkpoint=kept).equals(curve)
    assert not resumed.training
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_dropout_draws_from_the_seed_and_not_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    first = _train(_model())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert _train(_model()).equals(first)


def test_own_draws_depend_on_seed_and_epoch() -> None:
    def draw(seed: int, epoch: int) -> float:
        with own_draws(torch.device("cpu"), seed, epoch):
            return torch.rand(()).item()

    values = [draw(0, 1), draw(0, 2), draw(1, 1), draw(1, 2)]
    assert len(set(values)) == 4
    assert draw(0, 2) == values[1]


def test_a_pass_holds_every_row_once() -> None:
    batches = list(epoch_batches(10, 4, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(torch.cat(batches).tolist()) == list(range(10))


def test_a_loss_that_is_not_finite_is_named() -> None:
    with pytest.raises(InputError, match=r"not finite in epoch \d; lower train\.learning_rate"):
        _train(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), learning_rate=3e37)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no CUDA device for 'cuda'"):
        set_up_compute("cuda", 1)
