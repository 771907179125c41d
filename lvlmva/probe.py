"""What one operation of each kind takes: small probes of the real model on real pictures (an extension)."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva.params import Params
from lvlmva_core.scaling import Costs, Sizes, network_of

if TYPE_CHECKING:
    from torch import nn

    from lvlmva_core.samples import Split

AT_ONCE = 2  # samples that are explained together
MAPS = 16  # that are segmented together: alone each would take longer
LONG_ENOUGH, MOST = 0.1, 100  # seconds that a probe is repeated for, and how often at most


@dataclass(frozen=True)
class Probed:
    """Seconds of a picture's forward pass, a step of training, a map, a segmentation and a step of alignment.

    completeness: the largest error of a map, as a share of the sum of its absolute attributions; None where the method
    makes no such promise. segments: uint8 (H, W), of the picture.
    """

    forward: float
    train_step: float
    map: float
    cut: float
    align_step: float
    completeness: float | None
    picture: np.ndarray
    segments: np.ndarray
    label: int

    def laid_over(self, costs: Costs) -> Costs:
        """These costs, but for what was probed."""
        return replace(costs, **{name: getattr(self, name) for name in _PROBED})


_PROBED = ("forward", "train_step", "map", "cut", "align_step")


def probe(
    params: Params,
    model: "nn.Module",
    train: "Split",
    pictures: np.ndarray,
    clock: Callable[[], float] = time.perf_counter,
) -> Probed:
    """Run each operation a few times at a small size.

    Args:
        model: in eval mode, on the device of `train`. pictures: uint8 (n, C, H, W), the first of the split train.
        clock: seconds.

    Raises:
        InputError: an operation cannot be done with this model or these settings.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from lvlmva_core.adam import Adam
    from lvlmva_core.alignment import rrr_penalty
    from lvlmva_core.models import predict_logits

    images, labels, method = train.images, train.labels, params.attribute
    shown, few = images[:64], min(AT_ONCE, len(pictures))
    batch, (plain, masked) = min(params.train.batch_size or 64, len(labels)), _aligned_batch(params, len(labels))
    baselines = images[-method.n_baselines :]
    masks = torch.ones((masked, *images.shape[2:]), dtype=torch.bool, device=images.device)
    trained = copy.deepcopy(model).eval()  # so that a step leaves no trace in the model
    optimizer = Adam(trained.parameters(), 1e-6)
    found: dict[str, Any] = {}

    def step(loss: Any) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def train_step() -> None:
        step(cross_entropy(trained(images[:batch]), labels[:batch]))

    def align_step() -> None:
        loss = cross_entropy(trained(images[:plain]), labels[:plain])
        step(loss + rrr_penalty(trained, images[:masked], masks).sum())

    def explain() -> None:
        found["map"] = method.explain(model, images[:few], baselines, labels[:few])

    def segment() -> None:
        maps = found["map"].attributions.sum(1).cpu().numpy()
        if not params.segment.reads_images:  # more maps are the same ones moved
            maps = np.concatenate([np.roll(maps, place, axis=(1, 2)) for place in range(MAPS // few)])
        shown = pictures[:few] if params.segment.reads_images else None
        found["cut"] = params.segment.segment(maps, shown, ["probe"] * len(maps), images.device)

    seconds = {
        "forward": timed(lambda: predict_logits(model, shown), clock) / len(shown),
        "train_step": 0.0 if params.train.start == "checkpoint" else timed(train_step, clock),
        "map": timed(explain, clock) / few,
        "cut": timed(segment, clock) / (few if params.segment.reads_images else MAPS // few * few),
        "align_step": timed(align_step, clock),
    }
    error = float(found["map"].completeness_error().max()) if method.complete else None
    return Probed(
        **seconds, completeness=error, picture=pictures[0], segments=found["cut"]["segments"][0], label=int(labels[0])
    )


def sizes_of(params: Params, model: "nn.Module", splits: "dict[str, Split]", true_masks: bool) -> Sizes:
    """How much the stages have to do.

    Args:
        true_masks: whether any test picture has one, so that maps are evaluated.
    """
    from lvlmva_core.corruptions import CORRUPTIONS, SEVERITIES

    train = splits["train"]
    training, validation = len(train.labels), len(splits["val"].labels)
    channels, height, width = train.images.shape[1:]
    tests = sum(len(split.labels) for name, split in splits.items() if name.startswith("test"))
    chosen = params.chosen_methods()
    aligned: list[Any] = [chosen[name] for name in params.methods]
    every: list[Any] = list(chosen.values())
    plain, masked = _aligned_batch(params, training)
    batch, epochs = min(params.train.batch_size or 64, training), params.train.epochs or 0
    epochs = 0 if params.train.start == "checkpoint" else epochs
    corrupted = SEVERITIES * len(CORRUPTIONS) if params.evaluate.robustness else 0
    return Sizes(
        pictures=sum(len(split.labels) for split in splits.values()),
        training=training,
        samples=params.rank.n_samples,
        height=height,
        width=width,
        channels=channels,
        network=network_of(model, train.images[:1]),
        baselines=params.attribute.n_baselines,
        pairs_at_once=params.attribute.batch_size,
        regions=params.segment.n_regions,
        starts=getattr(params.segment, "n_starts", 1),
        donors=2 * params.exchange.n_donors,
        train_steps=math.ceil(training / batch) * epochs,
        train_batch=batch,
        train_validated=(training + validation) * epochs,
        methods=len(aligned),
        align_runs=sum(len(each.runs()) for each in aligned),
        align_steps=sum(math.ceil(training / plain) * each.epochs * len(each.runs()) for each in aligned),
        align_validated=sum(validation * each.epochs * len(each.runs()) for each in aligned),
        align_batch=plain,
        masked_batch=masked,
        evaluations=1 + len(every),
        models=1 + sum(len(each.seeds) for each in every),
        evaluated_pictures=3 * params.exchange.n_held_out + tests * (1 + corrupted),
        evaluated_maps=params.evaluate.attribution_samples if true_masks else 0,
    )


def _aligned_batch(params: Params, training: int) -> tuple[int, int]:
    first: Any = params.chosen_methods()["lvlm_va"]
    return min(first.training_batch, training), min(first.alignment_batch, training)


def megabytes_available() -> float | None:
    """Memory that is free for new programs, where the system says it."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return float(lines["MemAvailable"].split()[0]) / 1024 if "MemAvailable" in lines else None


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a run, the median of some after one that fills caches."""
    import torch

    def once() -> float:
        started = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - started

    once()
    seconds: list[float] = []
    while not seconds or (sum(seconds) < LONG_ENOUGH and len(seconds) < MOST):
        seconds.append(once())
    return statistics.median(seconds)
