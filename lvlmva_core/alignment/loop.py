"""Fine-tuning: cross-entropy plus a penalty on input gradients inside masks (LVLM-VA §4.4; Ross et al. 2017), or with
counterexamples (an extension)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from lvlmva_core.alignment.learners import Batches, Graphed, Learner, Single, Stack
from lvlmva_core.alignment.selection import Selection
from lvlmva_core.alignment.stacked_mlp import linear_layers
from lvlmva_core.compute import own_draws
from lvlmva_core.counterexamples import Counterexamples
from lvlmva_core.data_parallel import check_batch, check_plain, mean, number
from lvlmva_core.errors import InputError
from lvlmva_core.penalties import penalty_of
from lvlmva_core.progress import track
from lvlmva_core.resume import Checkpoint, Resume
from lvlmva_core.samples import Split
from lvlmva_core.training import endless_batches

if TYPE_CHECKING:
    from lvlmva_core.align_settings import AlignSettings

# Weights of the MLPs that are trained at a time. On a CPU a larger stack no longer stays in its caches between steps.
CPU_STACK_BYTES = 8 << 20
GPU_STACK_BYTES = 1 << 30


@dataclass(frozen=True)
class AlignedRun:
    """One fine-tuned model.

    weights: state dict of the last epoch, or of the best one where training may stop early. epoch: which that is
    (from 1). curve: one row an epoch, as `align_ensemble` says. score: of these weights on the selection, or None.
    """

    rrr_lambda: float
    seed: int
    epoch: int
    score: float | None
    weights: dict[str, Tensor]
    curve: pd.DataFrame


def align_ensemble(
    model: nn.Module,
    training: Split,
    alignment: Split,
    masks: Tensor,
    validation: Split,
    settings: "AlignSettings",
    *,
    runs: Sequence[tuple[float, int]] | None = None,
    selection: Selection | None = None,
    resume: Resume | None = None,
) -> list[AlignedRun]:
    """Fine-tune copies of `model` with Adam, one for each (λ, seed) of `runs`: with the RRR loss (LVLM-VA §4.4), with
    counterexamples, or with both (extensions), as `settings.correction` says.

    A batch mixes `alignment_batch` masked samples with `training_batch` training samples (whose masks are empty); both
    come from endless streams that run on across epochs, and an epoch is ceil(N_train / training_batch) steps. Both sums
    of the loss are divided by the size of the whole batch. The penalty's forward runs in eval mode, the
    cross-entropy's in train mode, so that only the latter moves running statistics.

    Counterexamples join the batch with draws of their own (`Counterexamples.draw`), and the loss gets pair_weight times
    the mean squared change between swapped pictures and their twins, in eval mode too. Without a penalty
    ("counterexamples") no alignment sample is in the batch as it is.

    The streams of a run depend on its seed alone. ReLU MLPs (`stacked_mlp.linear_layers`) are trained several at a time
    with the gradient in closed form, every other model one after the other by double backward: which of the two
    depends on the model, the penalty and the correction only, and the numbers agree up to rounding. With
    counterexamples every model, ReLU MLPs too, is trained one run after the other.

    Several processes that call this alike (`lvlmva_core.data_parallel`) each take a share of every batch, and return
    the same.

    Args:
        training: all training samples, on the model's device. alignment: n samples. validation: scores each epoch.
        masks: bool (n, H, W) for all runs, or (R, n, H, W) for R runs; or weights in [0, 1] (an extension).
        runs: pairs of λ (for inputs in [0, 1]) and seed, in the place of `settings.runs()`.
        selection: what the curve's `score` is measured on; `settings.selection.patience` needs it. A run ends after
            `patience` epochs without a better score, and its best epoch's weights are kept; without patience the last
            ones are.
        resume: where to keep checkpoints, and to go on from them.

    Returns:
        In the order of the runs. Curves hold epoch (from 1), cross_entropy and penalty (means over the epoch's
        steps of both sums of the loss before λ; penalty is 0 where λ is), val_accuracy, score if there is a
        `selection`, and with counterexamples pair_change (mean over steps, before its weight).

    Raises:
        InputError: the loss stops being finite, "bfloat16" for a ReLU MLP, a batch larger than its source, or smaller
            than the number of processes, or a model that is wrapped in DDP or FSDP.
        ValueError: patience without `selection`, or masks of another shape, type or range.
    """
    check_plain(model)
    runs = settings.runs() if runs is None else runs
    patience = None if settings.selection is None else settings.selection.patience
    if patience is not None and selection is None:
        raise ValueError("patience needs a selection to score each epoch on")
    image = training.images.shape[2:]
    each = (len(masks), *image) if masks.ndim == 3 else (len(runs), len(alignment.images), *image)
    if not (masks.dtype == torch.bool or masks.is_floating_point()) or tuple(masks.shape) != each:
        raise ValueError(f"masks must be bool or floating {each}, not {masks.dtype} {tuple(masks.shape)}")
    if masks.is_floating_point() and not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError("masks that are weights must lie in [0, 1]")
    masked, size = settings.batch()
    for name, wanted, available in (
        ("alignment_batch", masked, len(alignment.images)),
        ("training_batch", settings.training_batch, len(training.images)),
    ):
        if wanted > available:
            raise InputError(f"{name} is {wanted}, but there are {available} such samples; lower it")
    made_like = settings.made_like()
    parts = {"alignment_batch": masked, "training_batch": settings.training_batch}
    if made_like:
        parts |= {"counterexamples.swapped": made_like.swapped, "counterexamples.erased": made_like.erased}
    for name, wanted in parts.items():
        if wanted:
            check_batch(name, wanted)
    in_closed_form = penalty_of(settings.penalty).closed_form and made_like is None
    layers = linear_layers(model) if in_closed_form else None
    if linear_layers(model) is not None and settings.precision != "float32":
        raise InputError(
            f"precision: a ReLU MLP is trained in float32 only, not {settings.precision}; set it to float32"
        )
    groups = _groups(len(runs), 1 if layers is None else _stack_size(layers, training.images.device))
    found = []
    for group in groups:
        of_group = masks if masks.ndim == 3 else masks[group.start : group.stop]
        one = of_group if masks.ndim == 3 else of_group[0]
        data = Batches(
            training.images,
            training.labels,
            alignment.images,
            alignment.labels,
            of_group,
            size,
            Counterexamples(training, alignment, one, made_like) if made_like else None,
        )
        lambdas = [runs[n][0] for n in group]
        learner: Learner
        if layers is None:
            learner = Single(model, data, lambdas[0], settings)
        else:
            learner = Stack(layers, data, lambdas, settings)
        checkpoint = resume.part(f"runs {group.start} to {group.stop}") if resume else None
        found += _train(learner, data, [runs[n] for n in group], validation, settings, selection, checkpoint)
    return found


def _train(
    learner: Learner,
    data: Batches,
    runs: Sequence[tuple[float, int]],
    validation: Split,
    settings: "AlignSettings",
    selection: Selection | None,
    checkpoint: Checkpoint | None,
) -> list[AlignedRun]:
    """Train a group of runs from its checkpoint, or from the start, to its end."""
    steps = math.ceil(len(data.images) / settings.training_batch)
    epochs = settings.epochs
    patience = None if settings.selection is None else settings.selection.patience
    device = data.images.device
    done = 0
    curves: list[list[dict[str, float]]] = [[] for _ in runs]
    best: list[dict[str, Any]] = [{"epoch": 0, "score": -math.inf, "weights": {}} for _ in runs]
    saved = checkpoint.load() if checkpoint else None
    if saved:
        learner.load(saved["learner"])
        done, curves, best = saved["epoch"], saved["curves"], saved["best"]
    seeds = list(dict.fromkeys(seed for _, seed in runs))
    n_all, n_masked, skip = len(data.images), len(data.alignment_images), done * steps
    training = {seed: _stream(n_all, settings.training_batch, 2 * seed, skip) for seed in seeds}
    alignment = {seed: _stream(n_masked, settings.batch()[0], 2 * seed + 1, skip) for seed in seeds}
    step = Graphed(learner.step, device)
    name = f"seed {runs[0][1]}" if len(runs) == 1 else f"{len(runs)} runs"
    for epoch in track(range(done + 1, epochs + 1), f"align, {name}"):
        going = [n for n in range(len(runs)) if patience is None or len(curves[n]) < best[n]["epoch"] + patience]
        if not going:
            break
        rows, chosen = (_epoch(streams, steps, runs).to(device) for streams in (training, alignment))
        made = torch.zeros((steps, len(runs), 0, 2), dtype=torch.int64, device=device)
        if data.counterexamples:
            made = data.counterexamples.draw(steps, runs[0][1], epoch)[:, None].to(device)
        learner.totals.zero_()
        with own_draws(device, runs[0][1], epoch, number()):
            for n in range(steps):
                if settings.learning_rate_schedule == "linear":
                    taken = (epoch - 1) * steps + n
                    rate = settings.learning_rate * (1 - taken / (epochs * steps))
                    learner.optimizer.set_learning_rate(rate)
                step(rows[n], chosen[n], made[n])
        totals = mean(learner.totals).tolist()
        for n in going:
            if not all(math.isfinite(total) for total in totals[n]):
                raise InputError(
                    f"the loss is not finite in epoch {epoch} at λ = {runs[n][0]}; lower λ or the learning rate"
                )
        right = (learner.logits(validation.images).argmax(2) == validation.labels).double().mean(1).tolist()
        scored = learner.logits(selection.images) if selection else None
        for n in going:
            row = {"epoch": epoch, "cross_entropy": totals[n][0] / steps, "penalty": totals[n][1] / steps}
            row["val_accuracy"] = right[n]
            if data.counterexamples:
                row["pair_change"] = totals[n][2] / steps
            if selection is not None and scored is not None:
                row["score"] = selection.score(scored[n])
                if patience is None:
                    best[n] = {"epoch": epoch, "score": row["score"], "weights": {}}
                elif row["score"] > best[n]["score"]:
                    best[n] = {"epoch": epoch, "score": row["score"], "weights": learner.weights(n)}
            curves[n].append(row)
        if checkpoint:
            state = {"learner": learner.state(), "epoch": epoch, "curves": curves, "best": best}
            checkpoint.save(state, always=epoch == epochs)
    return [
        AlignedRun(
            rrr_lambda,
            seed,
            best[n]["epoch"] if selection else len(curves[n]),
            best[n]["score"] if selection else None,
            best[n]["weights"] or learner.weights(n),
            pd.DataFrame(curves[n]),
        )
        for n, (rrr_lambda, seed) in enumerate(runs)
    ]


def _stream(n_samples: int, batch_size: int, seed: int, skip: int) -> Iterator[Tensor]:
    return endless_batches(n_samples, batch_size, torch.Generator().manual_seed(seed), skip)


def _epoch(streams: dict[int, Iterator[Tensor]], steps: int, runs: Sequence[tuple[float, int]]) -> Tensor:
    """Row numbers of an epoch's batches: (steps, R, batch). Runs of one seed draw the same."""
    drawn = {seed: torch.stack([next(stream) for _ in range(steps)]) for seed, stream in streams.items()}
    return torch.stack([drawn[seed] for _, seed in runs], dim=1)


def _stack_size(layers: Sequence[tuple[str, nn.Linear]], device: torch.device) -> int:
    """How many MLPs are trained at a time: on a CPU as many as its caches hold, on a GPU all that fit."""
    size = sum(parameter.numel() * parameter.element_size() for _, layer in layers for parameter in layer.parameters())
    return max(1, (GPU_STACK_BYTES if device.type == "cuda" else CPU_STACK_BYTES) // size)


def _groups(n_runs: int, at_most: int) -> list[range]:
    """Split 0..n_runs - 1 into as few ranges of nearly equal length as possible."""
    n_groups = math.ceil(n_runs / at_most)
    edges = [n_runs * n // n_groups for n in range(n_groups + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]
