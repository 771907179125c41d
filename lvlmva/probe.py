"""What the stages will take, estimated from small probes of the real model on real pictures (an extension)."""

import copy
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva.params import Params

if TYPE_CHECKING:
    from torch import nn

    from lvlmva_core.samples import Split

WARM = 2  # a probe runs this often, and the last run counts: the first ones fill caches


@dataclass(frozen=True)
class Estimate:
    """Of a stage: seconds, megabytes of memory and US dollars; None = not known. how: what the figures rest on."""

    stage: str
    seconds: float | None
    megabytes: float | None
    cost_usd: float | None
    how: str


@dataclass(frozen=True)
class Probed:
    """estimates: of the stages that run the model. completeness: the largest error of a map, as a share of the sum of
    its absolute attributions; None where the method makes no such promise. segments: uint8 (H, W), of the picture."""

    estimates: list[Estimate]
    completeness: float | None
    picture: np.ndarray
    segments: np.ndarray
    label: int


def probe(
    params: Params, model: "nn.Module", splits: "dict[str, Split]", pictures: np.ndarray, true_masks: bool
) -> Probed:
    """Run each step once or twice at a small size, and scale it up.

    Args:
        model: in eval mode, on the device of `splits`. pictures: uint8 (n, C, H, W), the first of the split train.
        true_masks: whether any test picture has one, so that maps are evaluated.

    Raises:
        InputError: a step cannot be done with this model or these settings.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from lvlmva_core.alignment import rrr_penalty
    from lvlmva_core.corruptions import CORRUPTIONS
    from lvlmva_core.models import predict_logits

    train = splits["train"]
    images, labels = train.images, train.labels
    tests = sum(len(split.labels) for name, split in splits.items() if name.startswith("test"))
    found: list[Estimate] = []
    shown = images[:64]
    forward = _timed(lambda: predict_logits(model, shown)) / len(shown)
    idle = _peak()
    if params.train.start != "checkpoint":
        size = min(params.train.batch_size or 64, len(labels))
        step = _timed(lambda: cross_entropy(_trained(model)(images[:size]), labels[:size]).backward())
        steps = math.ceil(len(labels) / size) * (params.train.epochs or 1)
        found.append(Estimate("train", steps * step, _peak(), None, f"{steps} steps of {step:.3f} s"))
    else:
        found.append(Estimate("train", 0.0, idle, None, "nothing is trained (from: checkpoint)"))
    found.append(Estimate("rank", forward * len(labels), idle, None, f"{len(labels)} pictures"))

    n_samples, method = params.rank.n_samples, params.attribute
    baselines = images[-method.n_baselines :]
    explained: Any = None

    def explain() -> None:
        nonlocal explained
        explained = method.explain(model, images[:1], baselines, labels[:1])

    per_map = _timed(explain)
    pairs = max(1, min(method.batch_size, method.n_baselines * n_samples) / len(baselines))
    memory = idle + (_peak() - idle) * pairs
    found.append(Estimate("attribute", per_map * n_samples, memory, None, f"{n_samples} maps of {per_map:.2f} s"))
    error = float(explained.completeness_error().max()) if method.complete else None

    attribution = explained.attributions.sum(1).cpu().numpy()
    cut: Any = None

    def segment() -> None:
        nonlocal cut
        cut = params.segment.segment(attribution, pictures[:1], ["probe"], images.device)

    per_cut = _timed(segment)
    found.append(Estimate("segment", per_cut * n_samples, _peak(), None, f"{n_samples} maps of {per_cut:.2f} s"))
    exchanged = n_samples * params.segment.n_regions * 2 * params.exchange.n_donors
    found.append(Estimate("exchange", forward * exchanged, _peak(), None, f"{exchanged} pictures at most"))

    chosen = params.chosen_methods()
    aligned = {name: chosen[name] for name in params.methods}
    first: Any = aligned["lvlm_va"]
    masked, plain = min(first.alignment_batch, len(labels)), min(first.training_batch, len(labels))
    masks = torch.ones((masked, *images.shape[2:]), dtype=torch.bool, device=images.device)

    def step_of_alignment() -> None:
        tried = _trained(model)
        loss = cross_entropy(tried(images[:plain]), labels[:plain])
        (loss + rrr_penalty(tried, images[:masked], masks).sum()).backward()

    step = _timed(step_of_alignment)
    steps = sum(math.ceil(len(labels) / plain) * each.epochs * len(each.runs()) for each in _any(aligned))
    runs = sum(len(each.runs()) for each in _any(aligned))
    found.append(Estimate("align", steps * step, _peak(), None, f"{runs} runs, {steps} steps of {step:.2f} s in all"))
    models = 1 + sum(len(each.seeds) for each in _any(chosen))
    trials = 3 * params.exchange.n_held_out + tests * (1 + (5 * len(CORRUPTIONS) if params.evaluate.robustness else 0))
    maps = params.evaluate.attribution_samples if true_masks else 0
    seconds = models * (trials * forward + maps * per_map)
    found.append(
        Estimate("evaluate", seconds, memory, None, f"{models} models, {trials} pictures and {maps} maps each")
    )
    return Probed(found, error, pictures[0], np.asarray(cut["segments"][0]), int(labels[0]))


def megabytes_available() -> float | None:
    """Memory that is free for new programs, where the system says it."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return float(lines["MemAvailable"].split()[0]) / 1024 if "MemAvailable" in lines else None


def _any(settings: dict[str, Any]) -> list[Any]:
    return list(settings.values())


def _trained(model: "nn.Module") -> "nn.Module":
    """A copy in eval mode, so that a step leaves no trace in the model."""
    return copy.deepcopy(model).eval()


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of the last of a few runs."""
    import torch

    seconds = 0.0
    for _ in range(WARM):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds


def _peak() -> float:
    """Most memory that this process has held, megabytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
