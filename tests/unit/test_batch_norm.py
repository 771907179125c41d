"""Alignment with BatchNorm frozen, against a loop that never leaves eval mode."""

import torch
from torch import nn
from torch.nn import functional

from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import align_ensemble, rrr_penalty
from lvlmva_core.samples import Split
from lvlmva_core.training import endless_batches

N, N_ALIGN, STEPS = 60, 12, 2


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)).double()
        model[1].running_mean.uniform_(-0.2, 0.2)  # type: ignore[operator, union-attr]
        model[1].running_var.uniform_(0.5, 2.0)  # type: ignore[operator, union-attr]
        return model


def test_frozen_batchnorm_keeps_its_statistics_and_takes_the_steps_of_eval_mode() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((N, 1, 5, 5), generator=generator, dtype=torch.float64)
    labels = torch.arange(N) % 2
    masks = torch.rand((N_ALIGN, 5, 5), generator=generator) < 0.5
    found = {}
    for mode in ("train", "frozen"):
        (run,) = align_ensemble(
            _model(),
            Split(images, labels),
            Split(images[:N_ALIGN], labels[:N_ALIGN]),
            masks,
            Split(images, labels),
            AlignSettings.model_validate(
                {
                    "rrr_lambda": 0.3,
                    "seeds": [4],
                    "learning_rate": 0.01,
                    "epochs": 3,
                    "alignment_batch": 4,
                    "training_batch": 30,
                    "batch_norm": mode,
                }
            ),
        )
        found[mode] = run.weights
    model = _model().eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    training = endless_batches(N, 30, torch.Generator().manual_seed(8))
    alignment = endless_batches(N_ALIGN, 4, torch.Generator().manual_seed(9))
    for _ in range(3 * STEPS):
        rows, chosen = next(training), next(alignment)
        both = torch.cat([images[chosen], images[rows]])
        loss = functional.cross_entropy(model(both), torch.cat([labels[chosen], labels[rows]]), reduction="sum") / 34
        loss = loss + 0.3 * rrr_penalty(model, images[chosen], masks[chosen]).sum() / 34
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found["frozen"][name], expected)
    before = _model().state_dict()
    assert torch.equal(found["frozen"]["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(found["train"]["1.running_mean"], before["1.running_mean"])
