"""Runs that are trained together against runs that are trained one after the other by autograd."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lvlmva_core.align_settings import AlignSettings
from lvlmva_core.alignment import AlignedRun, align_ensemble, contrast_penalty, learners, loop, rrr_penalty
from lvlmva_core.alignment.selection import by_accuracy
from lvlmva_core.errors import InputError
from lvlmva_core.resume import Resume
from lvlmva_core.samples import Split
from lvlmva_core.store import Store
from lvlmva_core.training import endless_batches
from tests.unit.test_alignment import transformer

N, N_ALIGN, EPOCHS, STEPS = 90, 10, 3, 3
RUNS = [(0.0, 0), (0.5, 0), (0.5, 1), (20.0, 1), (20.0, 2)]


def _data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    images = 0.5 * torch.rand((N, 1, 4, 5), generator=generator, dtype=torch.float64)
    images[:, 0, 0, 0] += 0.25 * labels
    masks = torch.rand((N_ALIGN, 4, 5), generator=generator) < 0.4
    return {"images": images, "labels": labels, "masks": masks}


def _mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def _cnn(norm: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)] if norm else [nn.Dropout(0.5)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(80 if norm else 20, 3)).double()


def _align(
    model: nn.Module, runs: list[tuple[float, int]], masks: Tensor | None = None, **options: Any
) -> list[AlignedRun]:
    data = _data()
    dtype = next(model.parameters()).dtype
    data["images"] = data["images"].to(dtype)
    kept = {name: options.pop(name) for name in ("selection", "resume") if name in options}
    if (patience := options.pop("patience", None)) is not None:
        options["selection"] = {"rule": "accuracy", "patience": patience}
    everything = Split(data["images"], data["labels"])
    return align_ensemble(
        model,
        everything,
        Split(data["images"][:N_ALIGN], data["labels"][:N_ALIGN]),
        data["masks"] if masks is None else masks,
        everything,
        _settings(**options),
        runs=runs,
        **kept,
    )


def _settings(**options: Any) -> AlignSettings:
    """The settings of `_plainly`; λ and seeds are those of the runs."""
    settings = {"gamma": 0.01, "learning_rate": 0.01, "epochs": EPOCHS, "alignment_batch": 4, "training_batch": 32}
    return AlignSettings.model_validate({"rrr_lambda": 0.0, "seeds": [0], **settings, **options})


def _plainly(
    model: nn.Module,
    rrr_lambda: float,
    seed: int,
    masks: Tensor,
    longest: float = math.inf,
    falling: bool = False,
    contrast: bool = False,
) -> tuple[nn.Module, list[list[float]]]:
    """One run as the field writes it: autograd, torch's own Adam, one step after the other."""
    data, model = _data(), copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    end = 0.0 if falling else 1.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=EPOCHS * STEPS)
    training = endless_batches(N, 32, torch.Generator().manual_seed(2 * seed))
    masked = endless_batches(N_ALIGN, 4, torch.Generator().manual_seed(2 * seed + 1))
    curve = []
    for _ in range(EPOCHS):
        totals = [0.0, 0.0]
        for _ in range(STEPS):
            rows, chosen = next(training), next(masked)
            x = torch.cat([data["images"][chosen], data["images"][rows]])
            y = torch.cat([data["labels"][chosen], data["labels"][rows]])
            model.train()
            cross_entropy = nn.functional.cross_entropy(model(x), y, reduction="sum") / 36
            if contrast:
                each = contrast_penalty(model, data["images"][chosen], masks[chosen], data["labels"][chosen])
            else:
                each = rrr_penalty(model, data["images"][chosen], masks[chosen])
            penalty = each.sum() / 36
            squares = sum(parameter.square().sum() for parameter in model.parameters())
            optimizer.zero_grad()
            (cross_entropy + rrr_lambda * penalty + 0.01 * squares).backward()
            nn.utils.clip_grad_norm_(model.parameters(), longest)
            optimizer.step()
            schedule.step()
            totals[0] += cross_entropy.item() / STEPS
            totals[1] += (penalty.item() if rrr_lambda else 0.0) / STEPS
        model.eval()
        right = (model(data["images"]).argmax(1) == data["labels"]).double().mean().item()
        curve.append([*totals, right])
    return model, curve


def _assert_like_the_plain_loop(model: nn.Module, found: list[AlignedRun], masks: list[Tensor], **options: Any) -> None:
    assert [(run.rrr_lambda, run.seed, run.epoch, run.score) for run in found] == [(*run, EPOCHS, None) for run in RUNS]
    for run, mask in zip(found, masks, strict=True):
        expected, curve = _plainly(model, run.rrr_lambda, run.seed, mask, **options)
        assert list(run.weights) == list(expected.state_dict())
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(run.weights[name], tensor, rtol=1e-9, atol=1e-10)
        assert run.curve["epoch"].tolist() == [1, 2, 3]
        columns = run.curve[["cross_entropy", "penalty", "val_accuracy"]].to_numpy()
        np.testing.assert_allclose(columns, curve, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", [_mlp, _cnn, partial(transformer, 1, 3)])
def test_every_run_is_what_the_plain_loop_makes_of_its_seed_and_lambda(network: Any) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    _assert_like_the_plain_loop(model, _align(model, RUNS), [_data()["masks"]] * len(RUNS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("network", [_mlp, _cnn])
def test_each_run_may_have_masks_of_its_own(network: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    masks = torch.rand((len(RUNS), N_ALIGN, 4, 5), generator=generator) < 0.4
    model = network()
    _assert_like_the_plain_loop(model, _align(model, RUNS, masks), list(masks))


@pytest.mark.parametrize("network", [_mlp, _cnn])
def test_masks_may_be_weights(network: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand((N_ALIGN, 4, 5), generator=generator) * _data()["masks"]
    model = network()
    _assert_like_the_plain_loop(model, _align(model, RUNS, weights), [weights] * len(RUNS))


@pytest.mark.parametrize("network", [_mlp, _cnn])
def test_gradients_are_clipped_and_the_rate_falls_as_in_the_plain_loop(network: Any) -> None:
    longest, model, masks = 0.3, network(), [_data()["masks"]] * len(RUNS)
    settings: dict[str, Any] = {"max_gradient_norm": longest, "learning_rate_schedule": "linear"}
    _assert_like_the_plain_loop(model, _align(model, RUNS, **settings), masks, longest=longest, falling=True)
    free = _align(model, RUNS, learning_rate_schedule="linear")
    _assert_like_the_plain_loop(model, free, masks, falling=True)
    clipped = _align(model, RUNS, max_gradient_norm=longest)
    _assert_like_the_plain_loop(model, clipped, masks, longest=longest)
    unclipped = _align(model, RUNS)
    assert not all(one.curve.equals(other.curve) for one, other in zip(clipped, unclipped, strict=True))


@pytest.mark.parametrize("network", [_mlp, _cnn])
def test_the_contrast_may_be_penalised_in_place_of_the_log_probabilities(network: Any) -> None:
    found = _align(network(), RUNS, penalty="contrast")
    _assert_like_the_plain_loop(network(), found, [_data()["masks"]] * len(RUNS), contrast=True)


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_how_many_are_trained_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    bytes_of_a_model = 8 * (20 * 8 + 8 + 8 * 3 + 3)
    monkeypatch.setattr(loop, "CPU_STACK_BYTES", at_a_time * bytes_of_a_model)
    _assert_like_the_plain_loop(_mlp(), _align(_mlp(), RUNS), [_data()["masks"]] * len(RUNS))


def test_one_run_is_the_same_run_among_others() -> None:
    (alone,) = _align(_mlp(), [RUNS[2]])
    among = _align(_mlp(), RUNS)[2]
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(tensor, among.weights[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", [_mlp, _cnn, lambda: _cnn(norm=False)])
def test_the_same_call_gives_the_same_bits_and_leaves_the_global_generator_alone(network: Any) -> None:
    state = torch.get_rng_state()
    first, second = _align(network(), RUNS), _align(network(), RUNS)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first, second, strict=True):
        assert one.curve.equals(other.curve)
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def _resume(folder: Path) -> Resume:
    return Resume(Store(folder), {"images": _data()["images"].numpy()}, [Path(loop.__file__)], torch.device("cpu"))


class _KilledError(Exception):
    """What stops a training here."""


def _count_steps(monkeypatch: pytest.MonkeyPatch, die_after: float = math.inf) -> list[int]:
    """Count the steps that are taken from now on; the one after `die_after` is not taken any more."""
    taken, graphed = [0], learners.Graphed.__call__

    def counted(self: Any, *batch: Tensor) -> None:
        if taken[0] >= die_after:
            raise _KilledError("killed")
        taken[0] += 1
        graphed(self, *batch)

    monkeypatch.setattr(learners.Graphed, "__call__", counted)
    return taken


@pytest.mark.parametrize("network", [_mlp, _cnn, lambda: _cnn(norm=False)])
@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("killed_after", [4, 11])
def test_a_run_that_died_goes_on_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, network: Any, patience: int | None, killed_after: int
) -> None:
    monkeypatch.setattr("lvlmva_core.resume.MIN_SECONDS", 0.0)
    monkeypatch.setattr("lvlmva_core.resume.COST_FACTOR", 0.0)
    data, epochs = _data(), 6
    options: dict[str, Any] = {"epochs": epochs, "patience": patience, "learning_rate_schedule": "linear"}
    options["selection"] = by_accuracy(data["images"], data["labels"]) if patience else None
    with monkeypatch.context() as patch:
        whole = _count_steps(patch)
        expected = _align(network(), RUNS, **options)
    with monkeypatch.context() as patch:
        _count_steps(patch, killed_after)
        with pytest.raises(_KilledError, match="killed"):
            _align(network(), RUNS, resume=_resume(tmp_path), **options)
    assert list(tmp_path.glob("resume/??/*.pt"))
    resume = _resume(tmp_path)
    with monkeypatch.context() as patch:
        taken = _count_steps(patch)
        found = _align(network(), RUNS, resume=resume, **options)
    assert taken[0] == whole[0] - killed_after // STEPS * STEPS
    for one, other in zip(expected, found, strict=True):
        assert one.curve.equals(other.curve)
        assert (one.epoch, one.score) == (other.epoch, other.score)
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    resume.clear()
    assert not list(tmp_path.glob("resume/??/*"))


def test_a_damaged_checkpoint_is_named_and_the_training_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _align(_mlp(), RUNS, resume=_resume(tmp_path))
    (file,) = tmp_path.glob("resume/??/*.pt")
    file.write_bytes(file.read_bytes()[:500])
    found = _align(_mlp(), RUNS, resume=_resume(tmp_path))
    assert "damaged checkpoint" in caplog.text
    assert all(torch.equal(expected[n].weights["1.weight"], found[n].weights["1.weight"]) for n in range(len(RUNS)))


def test_patience_keeps_the_best_epoch_and_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    scores = iter([0.2, 0.5, 0.5, 0.4, 0.9])  # of one run: the second epoch is best when its patience of 2 ends
    selection = by_accuracy(data["images"], data["labels"])
    monkeypatch.setattr(type(selection), "score", lambda self, logits: next(scores))
    (run,) = _align(_mlp(), [(0.5, 0)], epochs=5, patience=2, selection=selection)
    assert (run.epoch, run.score) == (2, 0.5)
    assert run.curve["score"].tolist() == [0.2, 0.5, 0.5, 0.4]
    (two,) = _align(_mlp(), [(0.5, 0)], epochs=2)
    assert all(torch.equal(run.weights[name], two.weights[name]) for name in two.weights)


def test_a_selection_without_patience_scores_the_last_epoch() -> None:
    data = _data()
    found = _align(_mlp(), RUNS, selection=by_accuracy(data["images"], data["labels"]))
    for run in found:
        assert run.epoch == EPOCHS
        assert run.curve["score"].tolist() == run.curve["val_accuracy"].tolist()
        assert run.score == run.curve["score"].iloc[-1]


def test_patience_without_selection_and_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="patience needs a selection"):
        _align(_mlp(), RUNS, patience=1)
    for wrong in (2.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"weights must lie in \[0, 1\]"):
            _align(_mlp(), RUNS, torch.full((N_ALIGN, 4, 5), wrong))
    with pytest.raises(ValueError, match=r"masks must be bool or floating \(5, 10, 4, 5\)"):
        _align(_mlp(), RUNS, torch.zeros((4, N_ALIGN, 4, 5), dtype=torch.bool))


def test_mixed_precision_is_close_and_not_for_mlps() -> None:
    exact, mixed = _align(_cnn().float(), [(0.5, 0)]), _align(_cnn().float(), [(0.5, 0)], precision="bfloat16")
    assert not torch.equal(exact[0].weights["0.weight"], mixed[0].weights["0.weight"])
    assert all(tensor.dtype != torch.bfloat16 for tensor in mixed[0].weights.values())
    np.testing.assert_allclose(mixed[0].curve["cross_entropy"], exact[0].curve["cross_entropy"], rtol=0.02)
    np.testing.assert_allclose(mixed[0].curve["penalty"][0], exact[0].curve["penalty"][0], rtol=0.05)
    with pytest.raises(InputError, match="a ReLU MLP is trained in float32 only"):
        _align(_mlp(), RUNS, precision="bfloat16")


def test_weights_come_back_as_they_are_saved() -> None:
    (run,) = _align(_cnn(), [(0.5, 0)])
    assert all(tensor.is_contiguous() for tensor in run.weights.values())


def test_streams_can_be_entered_anywhere() -> None:
    whole = endless_batches(10, 4, torch.Generator().manual_seed(7))
    batches = [next(whole).tolist() for _ in range(12)]
    for skip in range(11):
        stream = endless_batches(10, 4, torch.Generator().manual_seed(7), skip)
        assert next(stream).tolist() == batches[skip]
        assert next(stream).tolist() == batches[skip + 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("network", [_mlp, _cnn])
def test_a_replayed_graph_takes_the_same_steps_as_the_cpu(network: Any) -> None:
    data, device = _data(), torch.device("cuda")
    on_cpu = _align(network(), RUNS)
    images, labels, masks = (data[name].to(device) for name in ("images", "labels", "masks"))
    everything, masked = Split(images, labels), Split(images[:N_ALIGN], labels[:N_ALIGN])
    found = align_ensemble(network().to(device), everything, masked, masks, everything, _settings(), runs=RUNS)
    for one, other in zip(on_cpu, found, strict=True):
        for name, tensor in one.weights.items():
            torch.testing.assert_close(other.weights[name].cpu(), tensor, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(one.curve.to_numpy(), other.curve.to_numpy(), rtol=1e-6, atol=1e-8)
