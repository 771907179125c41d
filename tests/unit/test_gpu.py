"""What runs on a CUDA device, against the same on the CPU and against eager steps."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from torch import Tensor, nn

from lvlmva_core.align_settings import AlignSettings, CounterexampleSettings
from lvlmva_core.alignment import align_ensemble, learners, rrr_penalty
from lvlmva_core.attribution import explain
from lvlmva_core.attribution.deep_lift import attribute_pairs, full_precision
from lvlmva_core.attribution.rules import CONSTANT_OPS, RULES
from lvlmva_core.attribution.tape import record
from lvlmva_core.counterexamples import Counterexamples
from lvlmva_core.evaluation import Rejected, evaluate_models
from lvlmva_core.exchange_settings import Exchange
from lvlmva_core.models import ModelSpec, build_model
from lvlmva_core.samples import Split
from lvlmva_core.segmentation import fit_weighted_gmm
from lvlmva_core.training import train_classifier

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
N, N_ALIGN, SIDE = 96, 24, 8


def images(count: int, seed: int, shape: tuple[int, ...] = (3, SIDE, SIDE)) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, *shape)))


def resnet() -> nn.Module:
    """A ResNet18 in float64 with BatchNorm statistics of noise, so that activations keep their sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=3).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images(8, 9, (3, 64, 64)))
    return model.eval().requires_grad_(False)


def cnn(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Softplus(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4),
            nn.Softplus(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(8 * 16, 3),
        ).double()


def data(device: torch.device) -> tuple[Split, Split, Tensor]:
    """Three classes; two of three alignment samples have a rejected region."""
    labels = torch.arange(N) % 3
    pictures = 0.5 * images(N, 2) + 0.25 * labels[:, None, None, None]
    masks = images(N_ALIGN, 3, (SIDE, SIDE)) < 0.3
    masks &= (torch.arange(N_ALIGN) // 3 % 3 < 2)[:, None, None]
    pictures, labels = pictures.to(device), labels.to(device)
    return Split(pictures, labels), Split(pictures[:N_ALIGN], labels[:N_ALIGN]), masks.to(device)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest distance of two maps, as a share of the absolute sum."""
    gap = (found.cpu().double() - expected.cpu().double()).abs().flatten(1).sum(1)
    return float((gap / expected.cpu().double().abs().flatten(1).sum(1)).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_maps_are_those_of_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    """In float32 TF32, with its 10 bits, would be a hundred times further off."""
    model, x, b = resnet(), images(3, 1, (3, 64, 64)), images(5, 2, (3, 64, 64))
    targets = torch.tensor([0, 1, 2])
    exact = explain(model, x, b, targets).attributions
    model = model.to(DEVICE, dtype)
    before = torch.backends.cudnn.conv.fp32_precision
    for channels_last in (False, True):
        found = explain(
            model,
            x.to(DEVICE, dtype),
            b.to(DEVICE, dtype),
            targets.to(DEVICE),
            batch_size=7,
            channels_last=channels_last,
        )
        assert found.attributions.device.type == DEVICE.type
        assert float(found.completeness_error().max()) <= {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
        assert apart(found.attributions, exact) < tolerance
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_a_batch_of_pairs_is_captured_and_replayed() -> None:
    model, x, b = resnet().to(DEVICE), images(4, 1, (3, 64, 64)).to(DEVICE), images(5, 2, (3, 64, 64)).to(DEVICE)
    targets = torch.tensor([0, 1], device=DEVICE)
    held = x[:2].clone()
    with torch.no_grad(), full_precision(DEVICE):
        baseline = record(model, b, RULES, CONSTANT_OPS)

        def batch(inputs: Tensor) -> Tensor:
            return attribute_pairs(record(model, inputs, RULES, CONSTANT_OPS), baseline, targets)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            batch(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = batch(held)
        for rows in (x[2:], x[:2]):
            held.copy_(rows)
            graph.replay()
            assert apart(out, batch(rows)) < 1e-10


def test_the_penalty_and_its_double_backward_are_those_of_the_cpu_and_of_pytorch() -> None:
    x, masks = images(4, 4), images(4, 5, (SIDE, SIDE)) < 0.5
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = cnn().to(device)
        penalty = rrr_penalty(model, x.to(device), masks.to(device))
        found.append((penalty, *torch.autograd.grad(penalty.sum(), list(model.parameters()), allow_unused=True)))
    model = cnn().to(DEVICE).eval()
    pixels = x.to(DEVICE).requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels).log_softmax(1).sum(), pixels, create_graph=True)
    plain = (gradient * masks.to(DEVICE)[:, None]).square().sum((1, 2, 3))
    found.append((plain, *torch.autograd.grad(plain.sum(), list(model.parameters()), allow_unused=True)))
    for on_cpu, ours, theirs in zip(*([each.detach().cpu() for each in one] for one in found), strict=True):
        assert float(on_cpu.abs().max()) > 0
        for other in (ours, theirs):
            torch.testing.assert_close(other, on_cpu, rtol=1e-8, atol=1e-13)


CORRECTIONS: dict[str, dict[str, Any]] = {
    "rrr": {},
    "frozen": {"batch_norm": "frozen", "max_gradient_norm": 0.5, "learning_rate_schedule": "linear"},
    "counterexamples": {"correction": "counterexamples", "counterexamples": {"swapped": 4, "erased": 2}},
    "both": {"correction": "both", "counterexamples": {"swapped": 4, "erased": 2, "pair_weight": 0.5}},
}


def aligned(model: nn.Module, device: torch.device, options: dict[str, Any]) -> Any:
    training, alignment, masks = data(device)
    settings = AlignSettings.model_validate(
        {
            **{"rrr_lambda": 0.0, "seeds": [0], "learning_rate": 0.01, "epochs": 3},
            **{"alignment_batch": 4, "training_batch": 16, **options},
        }
    )
    runs = [(0.0 if options.get("correction") == "counterexamples" else 0.5, 0), (0.0, 1)]
    return align_ensemble(model.to(device), training, alignment, masks, training, settings, runs=runs)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_replayed_graphs_take_the_steps_that_eager_ones_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    graph = torch.cuda.graph

    def counted(*arguments: Any, **options: Any) -> Any:
        captured.append(name)
        return graph(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "graph", counted)
    on_cpu = aligned(cnn(), torch.device("cpu"), CORRECTIONS[name])
    graphed = aligned(cnn(), DEVICE, CORRECTIONS[name])
    assert len(captured) == (2 if DEVICE.type == "cuda" else 0)  # one a run
    monkeypatch.setattr(learners.Graphed, "eager_steps", 10**9)
    eager = aligned(cnn(), DEVICE, CORRECTIONS[name])
    for each, one, other in zip(graphed, eager, on_cpu, strict=True):
        for expected in (one, other):
            np.testing.assert_allclose(each.curve.to_numpy(), expected.curve.to_numpy(), rtol=1e-6, atol=1e-9)
            for key, tensor in expected.weights.items():
                torch.testing.assert_close(each.weights[key].cpu(), tensor.cpu(), rtol=1e-5, atol=1e-8)


def test_dropout_inside_a_graph_draws_anew_at_every_step() -> None:
    """One mask for all steps would train another model; draws of two devices cannot be compared."""
    kept, dropped = (
        aligned(cnn(p), DEVICE, {"batch_norm": "frozen"})[0].curve["cross_entropy"].to_numpy() for p in (0.0, 0.5)
    )
    again = aligned(cnn(0.5), DEVICE, {"batch_norm": "frozen"})[0].curve["cross_entropy"].to_numpy()
    np.testing.assert_allclose(dropped, again, rtol=1e-9)
    assert not np.allclose(kept, dropped, rtol=1e-3)


def test_mixed_precision_trains() -> None:
    model = cnn().float()
    found = {}
    for precision in ("float32", "bfloat16"):
        training, alignment, masks = data(DEVICE)
        training, alignment = (Split(each.images.float(), each.labels) for each in (training, alignment))
        settings = AlignSettings.model_validate(
            {
                **{"rrr_lambda": 0.5, "seeds": [0], "learning_rate": 1e-3, "epochs": 2, "precision": precision},
                **{"alignment_batch": 4, "training_batch": 16},
            }
        )
        (run,) = align_ensemble(model.to(DEVICE), training, alignment, masks, training, settings)
        found[precision] = run.curve
    for name in ("cross_entropy", "penalty"):
        np.testing.assert_allclose(found["bfloat16"][name], found["float32"][name], rtol=0.1)
    assert not found["bfloat16"].equals(found["float32"])


def test_counterexamples_are_those_of_the_cpu() -> None:
    made_like = CounterexampleSettings.model_validate({"swapped": 6, "erased": 3, "edges": "feathered", "feather": 2.0})
    found = []
    for device in (torch.device("cpu"), DEVICE):
        training, alignment, masks = data(device)
        maker = Counterexamples(training, alignment, masks, made_like)
        drawn = maker.draw(2, seed=0, epoch=1)
        found.append((drawn, maker.make(drawn[1].to(device))))
    assert torch.equal(found[0][0], found[1][0])
    for name in ("swapped", "twins", "swapped_labels", "erased", "erased_labels"):
        on_cpu, there = (getattr(made, name) for _, made in found)
        assert there.device.type == DEVICE.type
        torch.testing.assert_close(there.cpu(), on_cpu, rtol=0, atol=1e-15)


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0], ids=["sparse", "half", "dense"])
def test_regions_are_those_of_the_cpu(share: float) -> None:
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:64, :64] / 64
    maps = np.zeros((6, 64, 64))
    for each in maps:
        for _ in range(3):
            place, width = rng.uniform(0.15, 0.85, 2), rng.uniform(0.03, 0.1)
            each += np.exp(-((rows - place[0]) ** 2 + (columns - place[1]) ** 2) / (2 * width**2))
    weights = torch.from_numpy(maps * (rng.random(maps.shape) < share))
    on_cpu, there = fit_weighted_gmm(weights, 3), fit_weighted_gmm(weights.to(DEVICE), 3)
    assert there.status == on_cpu.status
    torch.testing.assert_close(there.log_likelihood.cpu(), on_cpu.log_likelihood, rtol=0, atol=1e-4)
    torch.testing.assert_close(there.means.cpu(), on_cpu.means, rtol=0, atol=1e-3)
    assert float((there.labels.cpu() == on_cpu.labels).double().mean()) > 0.995


def test_training_is_that_of_the_cpu() -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        training, _, _ = data(device)
        model = cnn().to(device)
        curve = train_classifier(model, training, training, learning_rate=0.01, batch_size=16, epochs=3, seed=0)
        found.append((curve.to_numpy(), {key: tensor.cpu() for key, tensor in model.state_dict().items()}))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)
    for key, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], tensor, rtol=1e-5, atol=1e-8)


def test_evaluation_is_that_of_the_cpu() -> None:
    table = pd.DataFrame({"id": [f"t{n:02d}" for n in range(16)], "split": "test"})
    labels = torch.arange(16) % 2
    found = []
    for device in (torch.device("cpu"), DEVICE):
        models = {
            str(seed): build_model(ModelSpec("small_resnet", 3, SIDE, SIDE, 2, 4), seed).to(device).eval()
            for seed in range(2)
        }
        test = Split(images(16, 6).float().to(device), labels.to(device), table)
        masks = torch.zeros((16, SIDE, SIDE), dtype=torch.bool, device=device)
        masks[:, :3, :3] = True
        rejected = Rejected(test, masks, Exchange(n_donors=2, n_held_out=4))
        probe = Split(test.images[:4], test.labels[:4], table.iloc[:4])
        baselines = images(3, 7).float().to(device)
        outputs = evaluate_models(models, {"test": test}, probe, baselines, rejected, batch_size=8, robustness=True)
        found.append(outputs)
    on_cpu, there = found
    assert (there.ids, there.map_ids, there.exchange_ids) == (on_cpu.ids, on_cpu.map_ids, on_cpu.exchange_ids)
    for name in ("logits", "maps", "features", "exchanged"):
        one, other = getattr(there, name), getattr(on_cpu, name)
        # cuDNN's convolutions of a forward pass may be in TF32, PyTorch's default
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-3 * np.abs(other).max(), err_msg=name)
    for name, predicted in on_cpu.corrupted.items():
        assert (there.corrupted[name] == predicted).mean() > 0.95, name
