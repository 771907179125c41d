"""What each stage takes, as functions of the sizes: time, memory, storage and money (an extension).

Three things are kept apart. `Sizes` says how much there is. `Costs` says what one operation takes: a forward pass, a
map, a segmentation. `forecast` multiplies, stage by stage. Costs come from `costs_of`, by constants that were measured
once (`python -m benchmarks.scaling --measure`), or from a probe of the user's own model (`lvlmva check`).

Left out are the stages that take the same few seconds at any size: settings, explain, compare and report.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from lvlmva_core.arrays import SHARD_ROWS
from lvlmva_core.lvlm.budget import cost_usd, price_is_known
from lvlmva_core.lvlm.settings import Endpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

FLOAT, MIB = 4, 2**20  # bytes
RUN_AT_ONCE = 500  # pictures of a pass without gradients, of which a layer's input, output and one more are held
PROBED_AT_ONCE = 64  # pictures of a forward pass that share a layer's overhead
BACKWARD = 2  # a backward pass takes as many operations as two forward passes
COPIES = 12  # bytes of a value of a picture: float32, and two more while it is scaled or digested
BLOCK = 4096  # bytes that a file takes on a disk at least


class Constants(BaseModel):
    """What `benchmarks.scaling` measured.

    machine: where and with which versions. seconds: operation -> unit -> processor seconds of each unit on one thread
    ("each": of the operation itself). bytes: what of memory or of storage -> bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    machine: str
    seconds: dict[str, dict[str, float]]
    bytes: dict[str, float]


def measured_constants() -> Constants:
    """The constants that this version was delivered with."""
    return Constants.model_validate(json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Network:
    """parameters: numbers that are learned. flops: operations of one picture's forward pass (a multiplication and an
    addition are two). layers: modules that are run, each of which has an overhead. activations: numbers that they give
    out, together; largest: one of them, at most."""

    parameters: int
    flops: float
    activations: int
    layers: int
    largest: int


def network_of(model: "nn.Module", picture: "Tensor") -> Network:
    """Count by running one picture (1, C, H, W). Operations by torch's counter: matrix products and convolutions."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counted: list[int] = []

    def add(module: "nn.Module", _: object, output: object) -> None:
        if not list(module.children()) and isinstance(output, torch.Tensor):
            counted.append(output.numel())

    hooks = [module.register_forward_hook(add) for module in model.modules()]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(picture)
    finally:
        for hook in hooks:
            hook.remove()
    parameters = sum(each.numel() for each in model.parameters())
    return Network(parameters, float(counter.get_total_flops()), sum(counted), len(counted), max(counted))


@dataclass(frozen=True)
class Calls:
    """Questions to a language model. seconds: of one answer, None = not known."""

    endpoint: Endpoint
    count: int
    input_tokens: int
    output_tokens: int
    seconds: float | None = None


@dataclass(frozen=True)
class Sizes:
    """How much there is.

    pictures: that are prepared. training: of the split train. samples: N, that are explained. height, width, channels:
    of a picture. baselines: R. pairs_at_once: of a sample and a baseline. regions: J. starts: of a segmentation.
    donors: pictures that a region is exchanged for, of both kinds together. train_steps, train_batch: of the base
    model. methods: that are aligned, with align_runs and align_steps of all methods, seeds and values of λ together;
    align_batch, masked_batch: pictures of a step with the loss, and with the penalty. train_validated,
    align_validated: pictures that are run after epochs. models: that are evaluated, by evaluations processes, each
    model on evaluated_pictures and evaluated_maps.
    calls: stage ("critique", "judge") -> its questions; a stage that is not there asks no model.
    """

    pictures: int
    training: int
    samples: int
    height: int
    width: int
    channels: int
    network: Network
    baselines: int = 25
    pairs_at_once: int = 800
    regions: int = 7
    starts: int = 32
    donors: int = 16
    train_steps: int = 0
    train_batch: int = 64
    train_validated: int = 0
    align_steps: int = 0
    align_validated: int = 0
    methods: int = 1
    align_runs: int = 0
    align_batch: int = 64
    masked_batch: int = 8
    evaluations: int = 1
    models: int = 0
    evaluated_pictures: int = 0
    evaluated_maps: int = 0
    calls: Mapping[str, Calls] = field(default_factory=dict)

    @property
    def pixels(self) -> int:
        """Of one channel of a picture."""
        return self.height * self.width

    @property
    def values(self) -> int:
        """Of a picture."""
        return self.pixels * self.channels


@dataclass(frozen=True)
class Costs:
    """Seconds of one operation: preparing a picture, reading one, a forward pass of one, a step of training, explaining
    a sample, cutting a map, a step of alignment; keeping a map and a segmentation (key, record, output); a sample of a
    critic and of a judge that ask no model, and of masks. start, start_plain: of a process with torch and without."""

    picture: float
    read: float
    forward: float
    train_step: float
    map: float
    cut: float
    align_step: float
    kept_map: float
    kept_cut: float
    criticise: float
    judge: float
    mask: float
    start: float
    start_plain: float


@dataclass(frozen=True)
class Forecast:
    """Of a stage: processor seconds, most megabytes (2**20 bytes) of memory, megabytes and files of its outputs and its
    records in the store, and US dollars; None = not known. how: what the time rests on."""

    stage: str
    seconds: float | None
    megabytes: float | None
    stored_megabytes: float
    files: int
    cost_usd: float | None
    how: str


def costs_of(constants: Constants, sizes: Sizes) -> Costs:
    """What the operations take on the machine that the constants are of, on one thread, at these sizes."""
    network, seconds = sizes.network, constants.seconds
    layers, batch = network.layers, {"flops": network.flops, "activations": network.activations}
    rows = {"align": sizes.align_batch, "masked": sizes.masked_batch}
    return Costs(
        picture=_sum(seconds["picture"], values=sizes.values),
        read=_sum(seconds["read"], values=sizes.values),
        forward=_sum(seconds["forward"], layers=layers / PROBED_AT_ONCE, **batch),
        train_step=_sum(
            seconds["train_step"],
            layers=layers,
            parameters=network.parameters,
            flops=sizes.train_batch * network.flops * (1 + BACKWARD),
            activations=sizes.train_batch * network.activations,
        ),
        map=_sum(
            seconds["map"],
            layers=layers,
            flops=sizes.baselines * network.flops * (1 + BACKWARD),
            activations=sizes.baselines * network.activations,
        ),
        cut=_sum(seconds["cut"], starts=sizes.starts * sizes.regions, pixels=sizes.pixels * sizes.regions),
        align_step=_sum(
            seconds["align_step"],
            layers=layers,
            parameters=network.parameters,
            # the penalty is differentiated twice: a forward and a backward pass, and each is run back
            flops=network.flops * (1 + BACKWARD) * (rows["align"] + rows["masked"] * (1 + BACKWARD)),
            activations=network.activations * (rows["align"] + rows["masked"] * (1 + BACKWARD)),
        ),
        kept_map=_sum(seconds["kept"], bytes=FLOAT * (sizes.pixels + sizes.values)),
        kept_cut=_sum(seconds["kept"], bytes=(FLOAT + 1) * sizes.pixels),
        criticise=_sum(seconds["criticise"], values=sizes.values),
        judge=_sum(seconds["judge"]),
        mask=_sum(seconds["mask"], pixels=sizes.pixels),
        start=_sum(seconds["start"]),
        start_plain=_sum(seconds["start_plain"]),
    )


def forecast(sizes: Sizes, costs: Costs, constants: Constants) -> list[Forecast]:
    """Each stage in turn. Memory and storage follow from the sizes and from `constants.bytes` alone."""
    n, training, size = sizes.samples, sizes.training, constants.bytes
    exchanged = n * sizes.regions * sizes.donors
    kept = costs.map + costs.kept_map, costs.cut + costs.kept_cut
    step, aligned = costs.train_step, costs.align_step
    asked = f"{n} samples, no model is asked"
    seconds: dict[str, tuple[float, str]] = {
        "prepare": (costs.start_plain + sizes.pictures * costs.picture, f"{sizes.pictures} pictures"),
        "train": (
            costs.start + training * costs.read + sizes.train_steps * step + sizes.train_validated * costs.forward,
            _times(sizes.train_steps, "steps", step),
        ),
        "rank": (costs.start + training * (costs.read + costs.forward), f"{training} pictures"),
        "attribute": (costs.start + n * kept[0], _times(n, "maps", kept[0])),
        "segment": (costs.start + n * kept[1], _times(n, "maps", kept[1])),
        "exchange": (
            costs.start + (training + n) * costs.read + exchanged * costs.forward,
            f"{exchanged} pictures at most",
        ),
        "critique": (costs.start_plain + n * costs.criticise, asked),
        "judge": (costs.start_plain + n * costs.judge, asked),
        "mask": (costs.start_plain + n * costs.mask, f"{n} samples"),
        "align": (
            sizes.methods * (costs.start + (training + n) * costs.read)
            + sizes.align_steps * aligned
            + sizes.align_validated * costs.forward,
            f"{sizes.align_runs} runs, {_times(sizes.align_steps, 'steps', aligned)} in all",
        ),
        "evaluate": (
            sizes.evaluations * costs.start
            + sizes.models * (sizes.evaluated_pictures * costs.forward + sizes.evaluated_maps * costs.map),
            f"{sizes.models} models, {sizes.evaluated_pictures} pictures and {sizes.evaluated_maps} maps each",
        ),
    }
    memory, stored, files = memory_of(sizes, size), storage_of(sizes, size), files_of(sizes)
    found = []
    for stage, (took, how) in seconds.items():
        most, bytes_, count = memory[stage] / MIB, stored.get(stage, 0.0) / MIB, files.get(stage, 0)
        if stage in sizes.calls:
            calls = sizes.calls[stage]
            waits = None if calls.seconds is None else calls.count * calls.seconds / calls.endpoint.concurrency
            found.append(Forecast(stage, waits, most, bytes_, count, money(calls), _said(calls)))
        else:
            found.append(Forecast(stage, took, most, bytes_, count, None, how))
    return found


def money(calls: Calls) -> float | None:
    """US dollars at the prices of the endpoint; None where they are not stated."""
    if not price_is_known(calls.endpoint):
        return None
    return cost_usd(calls.endpoint, calls.count * calls.input_tokens, calls.count * calls.output_tokens)


def memory_of(sizes: Sizes, size: Mapping[str, float]) -> dict[str, float]:
    """Most bytes that the process of each stage holds.

    A picture of a split is float32 beside the bytes it comes from and a copy that is being scaled or digested; a stage
    that reads a shard at a time holds SHARD_ROWS samples. Of every sample a row of the table, its id and its key stay.
    """
    n, table = sizes.samples, sizes.pictures * size["row"]
    of_split = sizes.training * sizes.values * COPIES
    chunk = min(n, SHARD_ROWS) * sizes.values * COPIES
    label_maps = n * (sizes.pixels + size["sample"])
    pairs = min(sizes.pairs_at_once, sizes.baselines)
    weights = FLOAT * sizes.network.parameters
    held = FLOAT * sizes.network.activations * size["activation_copies"]
    plain, torch = size["plain"] + table, size["torch"] + table + weights
    run = 3 * FLOAT * sizes.network.largest * min(sizes.training, RUN_AT_ONCE)
    return {
        "prepare": plain,
        "train": torch + of_split + 3 * weights + sizes.train_batch * held,
        "rank": torch + min(sizes.training, RUN_AT_ONCE) * sizes.values * COPIES + run,
        "attribute": torch + chunk + n * size["sample"] + pairs * held,
        "segment": torch + chunk + n * size["sample"],
        "exchange": torch + run + of_split + n * (sizes.values * COPIES + sizes.pixels),
        "critique": plain + label_maps + n * sizes.values,
        "judge": plain + n * size["critique"],
        "mask": plain + label_maps + n * sizes.pixels,
        "align": torch + of_split + n * sizes.values * COPIES + (sizes.align_batch + 3 * sizes.masked_batch) * held,
        "evaluate": torch + sizes.evaluated_pictures * sizes.values * COPIES + max(run, pairs * held),
    }


def storage_of(sizes: Sizes, size: Mapping[str, float]) -> dict[str, float]:
    """Bytes of each stage's outputs and of its records in the store, where they grow with the samples."""
    n, pixels = sizes.samples, sizes.pixels
    record = size["record"]
    return {
        "prepare": sizes.pictures * (sizes.values * size["image"] + size["table_row"]),
        "attribute": n * (FLOAT * pixels * size["map"] + _on_disk(FLOAT * pixels + record) + size["attrs"]),
        "segment": n * (pixels * size["segments"] + _on_disk(pixels + record) + size["attrs"]),
        "critique": n * size["critique"],
        "judge": n * size["verdict"],
        "mask": n * pixels * size["segments"],
        "exchange": n * 5 * 8.0 * sizes.regions,
    }


def files_of(sizes: Sizes) -> dict[str, int]:
    """Files of each stage's outputs (a file a shard and array) and records (a file each, as with calls)."""
    n, shards = sizes.samples, math.ceil(sizes.samples / SHARD_ROWS)
    return {
        "prepare": 3 * math.ceil(sizes.pictures / SHARD_ROWS),
        "attribute": n + 2 * shards,
        "segment": n + 5 * shards,
        "exchange": 6 * shards,
        "critique": sizes.calls["critique"].count if "critique" in sizes.calls else 0,
        "judge": sizes.calls["judge"].count if "judge" in sizes.calls else 0,
        "mask": shards,
    }


def operations_of(sizes: Sizes) -> dict[str, float]:
    """Operations of the stages that run the model: what another processor's time is reckoned from."""
    picture, pair = sizes.network.flops, sizes.network.flops * (1 + BACKWARD)
    step = sizes.align_batch * pair + sizes.masked_batch * pair * (1 + BACKWARD)
    return {
        "train": sizes.train_steps * sizes.train_batch * pair + sizes.train_validated * picture,
        "rank": sizes.training * picture,
        "attribute": sizes.samples * sizes.baselines * pair,
        "exchange": sizes.samples * sizes.regions * sizes.donors * picture,
        "align": sizes.align_steps * step + sizes.align_validated * picture,
        "evaluate": sizes.models * (sizes.evaluated_pictures * picture + sizes.evaluated_maps * sizes.baselines * pair),
    }


def total(found: Sequence[Forecast]) -> Forecast:
    """The stages one after the other: sums, and the most memory. What is not known of a stage is left out."""
    return Forecast(
        "all",
        sum(each.seconds or 0.0 for each in found),
        max((each.megabytes or 0.0 for each in found), default=0.0),
        sum(each.stored_megabytes for each in found),
        sum(each.files for each in found),
        sum(each.cost_usd or 0.0 for each in found),
        "",
    )


def _sum(coefficients: Mapping[str, float], **units: float) -> float:
    """`each`, and a coefficient for each unit. Raises KeyError where a coefficient is missing."""
    return coefficients["each"] + sum(coefficients[name] * count for name, count in units.items())


def _on_disk(size: float) -> float:
    return BLOCK * math.ceil(size / BLOCK)


def _times(count: int, what: str, seconds: float) -> str:
    return f"{count} {what} of {seconds:.3f} s"


def _said(calls: Calls) -> str:
    tokens = f"{calls.count * calls.input_tokens} tokens in, at most {calls.count * calls.output_tokens} out"
    unknown = "; `lvlmva check --ask` measures the critic's time" if calls.seconds is None else ""
    return f"{calls.count} calls at most, {tokens}{unknown}"
