import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lvlmva_core.adam import Adam

STEPS = 30


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))


def _loss(model: nn.Module, step: int) -> Tensor:
    images = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(step))
    return model(images).square().sum()


def _rate(step: int) -> float:
    return 1e-2 * (1 - step / STEPS)


def _train(model: nn.Module, optimiser: Any, first: int = 0) -> list[Tensor]:
    for step in range(first, STEPS):
        if isinstance(optimiser, Adam):
            optimiser.set_learning_rate(_rate(step))
        else:
            optimiser.param_groups[0]["lr"] = _rate(step)
        optimiser.zero_grad()
        _loss(model, step).backward()
        optimiser.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_bits_are_those_of_torchs_optimisers(fused: bool, decoupled: bool, weight_decay: float) -> None:
    ours, theirs = _model(), _model()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind(theirs.parameters(), lr=1.0, weight_decay=weight_decay, fused=fused or None)
    optimiser = Adam(ours.parameters(), 1.0, weight_decay=weight_decay, decoupled=decoupled, fused=fused)
    for one, other in zip(_train(ours, optimiser), _train(theirs, reference), strict=True):
        assert torch.equal(one, other)


def test_a_training_goes_on_from_its_state_to_the_same_bits() -> None:
    whole, first, second = _model(), _model(), _model()
    expected = _train(whole, Adam(whole.parameters(), 1.0, fused=True))
    optimiser = Adam(first.parameters(), 1.0, fused=True)
    for step in range(10):
        optimiser.set_learning_rate(_rate(step))
        optimiser.zero_grad()
        _loss(first, step).backward()
        optimiser.step()
    second.load_state_dict(first.state_dict())
    resumed = Adam(second.parameters(), 1.0, fused=True)
    resumed.load_state_dict(optimiser.state_dict())
    for one, other in zip(_train(second, resumed, 10), expected, strict=True):
        assert torch.equal(one, other)


def test_a_parameter_without_a_gradient_stays() -> None:
    parameters = [torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimiser = Adam(parameters, 0.1, weight_decay=0.1)
    parameters[0].grad = torch.ones(3)
    optimiser.step()
    assert not torch.equal(parameters[0].detach(), torch.ones(3))
    assert torch.equal(parameters[1].detach(), torch.ones(3))


def test_a_step_imports_no_compiler() -> None:
    code = (
        "import sys, torch; from lvlmva_core.adam import Adam; p = torch.ones(2, requires_grad=True)\n"
        "a = Adam([p], 0.1, fused=True); p.grad = torch.ones(2); a.step(); a.zero_grad()\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
