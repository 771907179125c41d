"""Forecasts against sums by hand, and the page against the files that it is made from."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.scaling import COMMAND, PAGE, fit, made
from lvlmva.tables import put_tables
from lvlmva_core.arrays import write_arrays
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.scaling import (
    COPIES,
    Calls,
    Costs,
    Forecast,
    Network,
    Sizes,
    costs_of,
    files_of,
    forecast,
    measured_constants,
    memory_of,
    money,
    network_of,
    operations_of,
    storage_of,
    total,
)

COSTS = Costs(
    picture=1e-3,
    read=1e-4,
    forward=2e-3,
    train_step=0.5,
    map=0.25,
    cut=0.05,
    align_step=0.75,
    kept_map=0.01,
    kept_cut=0.002,
    criticise=0.004,
    judge=0.001,
    mask=0.0005,
    start=3.0,
    start_plain=1.0,
)
SIZES = Sizes(
    pictures=1200,
    training=1000,
    samples=200,
    height=20,
    width=30,
    channels=3,
    network=Network(1000, 1e6, 500, 10, 100),
    regions=4,
    donors=6,
    train_steps=32,
    train_validated=2200,
    methods=2,
    align_runs=6,
    align_steps=48,
    align_validated=300,
    evaluations=3,
    models=7,
    evaluated_pictures=100,
    evaluated_maps=10,
)
ENDPOINT = Endpoint(
    base_url="https://host.example/v1",
    model="m",
    api_key_variable=None,
    concurrency=8,
    usd_per_million_input_tokens=0.15,
    usd_per_million_output_tokens=0.6,
)


def by_stage(sizes: Sizes, costs: Costs = COSTS) -> dict[str, Forecast]:
    return {each.stage: each for each in forecast(sizes, costs, measured_constants())}


def test_times_are_the_sums_by_hand() -> None:
    found = {stage: each.seconds for stage, each in by_stage(SIZES).items()}
    assert found == pytest.approx(
        {
            "prepare": 1 + 1.2,
            "train": 3 + 0.1 + 16 + 4.4,
            "rank": 3 + 2.1,
            "attribute": 3 + 200 * 0.26,
            "segment": 3 + 200 * 0.052,
            "exchange": 3 + 0.12 + 200 * 4 * 6 * 2e-3,
            "critique": 1 + 0.8,
            "judge": 1 + 0.2,
            "mask": 1 + 0.1,
            "align": 2 * (3 + 0.12) + 36 + 0.6,
            "evaluate": 9 + 7 * (0.2 + 2.5),
        }
    )


def test_money_and_waiting_are_those_of_the_calls() -> None:
    calls = Calls(ENDPOINT, 1000, 800, 300, seconds=2.0)
    assert money(calls) == pytest.approx((800 * 0.15 + 300 * 0.6) * 1000 / 1e6)
    found = by_stage(replace(SIZES, calls={"critique": calls}))
    assert found["critique"].cost_usd == money(calls)
    assert found["critique"].seconds == 1000 * 2.0 / 8
    assert found["critique"].files == 1000
    assert found["judge"].cost_usd is None  # a stand-in
    unknown = replace(calls, endpoint=ENDPOINT.model_copy(update={"usd_per_million_input_tokens": None}), seconds=None)
    assert money(unknown) is None
    assert by_stage(replace(SIZES, calls={"judge": unknown}))["judge"].seconds is None


def test_operations_by_hand() -> None:
    """A pair, and a picture of a step, takes three forward passes; a penalised picture nine."""
    assert operations_of(SIZES) == {
        "train": 1e6 * (32 * 64 * 3 + 2200),
        "rank": 1e6 * 1000,
        "attribute": 1e6 * 200 * 25 * 3,
        "exchange": 1e6 * 200 * 4 * 6,
        "align": 1e6 * (48 * (64 * 3 + 8 * 9) + 300),
        "evaluate": 1e6 * 7 * (100 + 10 * 25 * 3),
    }


def test_the_sum_over_stages() -> None:
    stages = [Forecast("a", 1.0, 10.0, 3.0, 4, 0.5, ""), Forecast("b", None, 20.0, 1.0, 1, None, "")]
    assert total(stages) == Forecast("all", 1.0, 20.0, 4.0, 5, 0.5, "")


def test_a_network_is_counted() -> None:
    """A convolution takes 2 x out x in x kernel operations at each place, a linear layer 2 x in x out."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    found = network_of(model, torch.zeros(1, 3, 6, 6))
    assert found.parameters == 3 * 8 * 9 + 288 * 5 + 5
    assert found.flops == 2 * (36 * 8 * 3 * 9 + 288 * 5)
    assert found.activations == 288 + 288 + 288 + 5
    assert (found.layers, found.largest) == (4, 288)
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    "more",
    [
        {"samples": 400},
        {"baselines": 50},
        {"regions": 7},
        {"starts": 64},
        {"height": 40},
        {"channels": 4},
        {"network": Network(2000, 3e6, 900, 12, 200)},
        {"pictures": 5000, "training": 4000},
        {"align_steps": 96},
    ],
)
def test_more_of_anything_takes_no_less(more: dict[str, object]) -> None:
    constants = measured_constants()
    larger = replace(SIZES, **more)  # type: ignore[arg-type]
    before, after = (forecast(sizes, costs_of(constants, sizes), constants) for sizes in (SIZES, larger))
    for small, large in zip(before, after, strict=True):
        assert small.seconds is not None
        assert large.seconds is not None
        assert large.seconds >= small.seconds
        assert large.megabytes >= small.megabytes  # type: ignore[operator]
        assert large.stored_megabytes >= small.stored_megabytes


def test_memory_of_streamed_stages_grows_by_names_and_keys_alone() -> None:
    size = {"row": 700.0, "sample": 360.0, "torch": 1e9, "plain": 2e8, "activation_copies": 3.0, "critique": 900.0}
    few, many = (memory_of(replace(SIZES, samples=n), size) for n in (10_000, 20_000))
    for stage in ("attribute", "segment"):
        assert many[stage] - few[stage] == pytest.approx(10_000 * 360)
    assert many["prepare"] == few["prepare"] == 2e8 + 1200 * 700
    held = memory_of(replace(SIZES, training=2000), size)["train"] - memory_of(SIZES, size)["train"]
    assert held == 1000 * COPIES * 20 * 30 * 3


def test_storage_of_what_does_not_compress(tmp_path: Path) -> None:
    """Against an array of noise as it is written: four bytes a pixel but for what a shard and a chunk add."""
    noise = np.frombuffer(np.random.default_rng(0).bytes(130 * 20 * 30 * 4), dtype=np.float32).reshape(130, 20, 30)
    write_arrays(tmp_path / "a.zarr", {"x": noise}, {})
    files = [file for file in (tmp_path / "a.zarr/x/c").rglob("*") if file.is_file()]
    size = {"image": 1.0, "table_row": 0.0, "map": 1.0, "segments": 0.0, "attrs": 0.0, "record": 0.0}
    size |= {"critique": 0.0, "verdict": 0.0}
    sizes = replace(SIZES, samples=130)
    outputs = storage_of(sizes, size)["attribute"] - 130 * 4096  # a record of 2400 bytes takes a block
    assert outputs == pytest.approx(sum(file.stat().st_size for file in files), rel=0.02)
    assert files_of(sizes)["attribute"] == 130 + 2 * len(files)


def test_the_committed_constants_give_every_cost() -> None:
    constants = measured_constants()
    assert all(value >= 0 for units in constants.seconds.values() for value in units.values())
    assert all(value >= 0 for value in constants.bytes.values())
    costs = costs_of(constants, SIZES)
    assert all(math.isfinite(value) and value > 0 for value in vars(costs).values())


def test_a_fit_finds_the_coefficients_that_made_the_times() -> None:
    draws = np.random.default_rng(0)
    rows = [{"pixels": float(a), "flops": float(b)} for a, b in draws.uniform(1, 1e6, (6, 2))]
    found = fit(rows, [0.01 + 2e-6 * row["pixels"] + 3e-7 * row["flops"] for row in rows])
    assert found == pytest.approx({"each": 0.01, "pixels": 2e-6, "flops": 3e-7})


def test_the_page_is_what_its_command_makes(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    shutil.copy(PAGE, page)
    put_tables(page, COMMAND, made())
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
