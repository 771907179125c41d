"""`lvlmva calibrate` against critics whose error rates are known: a model server on loopback, and the oracle."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from lvlmva_core.arrays import write_arrays, write_table
from tests.kinds import RATES, decide, kind_of, scene
from tests.pipeline.calls import ROOT, Server, endpoint, environment, run, running_server, write_params

COUNT = 48
PRICES = {"dear": 10.0, "cheap": 1.0}  # USD a million tokens in; ten times as much out
COMMAND = "lvlmva.cli calibrate --kinds patch,letter,strip"
BOTH = "--critic critics/dear --critic critics/cheap"


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    with running_server("--decide", f"{decide.__module__}:{decide.__name__}") as server:
        yield server


@pytest.fixture
def server(process: Server) -> Server:
    process.set(keep=False)
    return process


@pytest.fixture
def folder(tmp_path: Path, server: Server) -> Path:
    """A project with prepared data alone: COUNT pictures of validation with their objects' masks, none for training."""
    here = tmp_path / "project"
    (here / "presets" / "critics").mkdir(parents=True)
    (here / "prompts").symlink_to(ROOT / "prompts")
    shutil.copy(ROOT / "dvc.yaml", here)
    write_params(here, server, critique={"critic": "oracle", "false_negative_rate": 0.3}, judge={"judge": "rules"})
    for model, price in PRICES.items():
        known = endpoint(
            server,
            model=model,
            usd_per_million_input_tokens=price,
            usd_per_million_output_tokens=10 * price,
            concurrency=8,
        )
        preset = {"critique": {"critic": "model", "endpoint": known}, "judge": {"judge": "model", "endpoint": known}}
        with (here / "presets" / "critics" / f"{model}.yaml").open("w") as file:
            YAML(typ="safe", pure=True).dump(json.loads(json.dumps(preset)), file)
    pictures, discs = (np.stack(each) for each in zip(*map(scene, range(COUNT)), strict=True))
    ids = [f"val-{n:03d}" for n in range(COUNT)]
    table = {"id": ids, "split": ["val"] * COUNT, "label": np.arange(COUNT) % 10, "spurious": [False] * COUNT}
    table |= {name: ["x"] * COUNT for name in ("group", "source", "sha256")}
    data = here / "data"
    data.mkdir()
    write_table(data / "samples.parquet", pd.DataFrame(table))
    write_arrays(data / "images.zarr", {"images": pictures}, {"class_names": [str(k) for k in range(10)]})
    masks = {"spurious_masks": np.zeros_like(discs), "known": np.ones(COUNT, bool), "object_masks": discs}
    write_arrays(data / "spurious_masks.zarr", masks, {})
    return here


def _json(folder: Path, arguments: str) -> dict[str, Any]:
    said = run(folder, f"{COMMAND} --json {arguments}", environment(folder.parent / "store"))
    found: dict[str, Any] = json.loads(said[said.index("\n{") :])
    return found


def test_it_finds_the_known_rates_of_two_critics_once_paid_and_names_the_cheapest(folder: Path, server: Server) -> None:
    found = _json(folder, f"-n {COUNT} {BOTH}")
    assert [each["name"] for each in found["critics"]] == ["critics/dear", "critics/cheap"]
    paid = server.paid()
    assert sum(each["cost"]["answers"] for each in found["critics"]) == paid
    for each in found["critics"]:
        rates, measured = RATES[each["critic"].partition(" ")[0]], each["quality"]
        for kind in ("patch", "letter", "strip"):
            recall = measured["by"]["kind"][kind]["recall"]
            assert recall["total"] == COUNT
            assert recall["low"] <= 1 - rates[kind] <= recall["high"], (each["name"], kind)
        assert measured["false_alarms"]["low"] <= rates["plain"] <= measured["false_alarms"]["high"]
        assert measured["false_alarms"]["total"] >= COUNT
        assert each["unusable"] == {"critic": 0, "judge": 0, "without_regions": 0, "pictures": 4 * COUNT}
        assert not each["stand_in"]
        price = PRICES[each["critic"].partition(" ")[0]]  # an answer has 1,000 tokens in and 100 out
        assert each["cost"]["usd"] == pytest.approx(each["cost"]["answers"] * 2000 * price / 1e6)
    cheap = found["critics"][1]["quality"]["by"]["kind"]
    assert cheap["letter"]["recall"]["high"] < cheap["patch"]["recall"]["low"]  # so that the kinds are told apart
    assert found["cheapest_that_is_enough"] == "critics/dear"
    again = _json(folder, f"-n {COUNT} {BOTH} --recall-at-least 0.5")
    assert server.paid() == paid  # all of it from the store
    assert again["critics"] == found["critics"]
    assert again["cheapest_that_is_enough"] == "critics/cheap"


def test_the_oracle_is_found_out_and_named_as_a_stand_in(folder: Path, server: Server) -> None:
    found = _json(folder, f"-n {COUNT} -S critique.false_positive_rate=0.2")
    (oracle,) = found["critics"]
    for kind in ("patch", "letter", "strip"):
        recall = oracle["quality"]["by"]["kind"][kind]["recall"]
        assert recall["low"] <= 0.7 <= recall["high"]
    assert oracle["quality"]["false_alarms"]["low"] <= 0.2 <= oracle["quality"]["false_alarms"]["high"]
    assert oracle["stand_in"]
    assert oracle["stand_ins"] == ["oracle", "rules"]
    assert found["cheapest_that_is_enough"] is None
    assert "stand-in" in found["reasons"]["params"]
    assert server.count()[0] == 0


def test_unusable_answers_are_counted_and_asked_again(folder: Path, server: Server) -> None:
    server.set(faults=["refusal", "refusal"])
    first = _json(folder, "-n 3 --critic critics/cheap")
    assert first["critics"][0]["unusable"] == {"critic": 2, "judge": 0, "without_regions": 0, "pictures": 12}
    asked = server.count()[0]
    second = _json(folder, "-n 3 --critic critics/cheap")
    assert second["critics"][0]["unusable"]["critic"] == 0
    assert server.count()[0] > asked


def test_tables_files_and_the_sheet(folder: Path, server: Server) -> None:
    variables = environment(folder.parent / "store")
    said = run(folder, f"{COMMAND} -n 6 --out out/regions.csv --show out/sheet.png", variables)
    assert "oracle (a stand-in)" in said
    assert "a grid of tiles, since there is no base model" in said
    table = pd.read_csv(folder / "out" / "regions.csv")
    assert set(table["truth"]) == {"planted", "object", "elsewhere"}
    assert (table["truth"] == "planted").sum() == 18
    with Image.open(folder / "out" / "sheet.png") as sheet:
        assert sheet.width > 7 * 224
    run(folder, f"{COMMAND} -n 6 --out out/tables.md", variables)
    assert "| patch |" in (folder / "out" / "tables.md").read_text()
    said = run(folder, f"{COMMAND} -n 6 {BOTH} --dry-run", variables)
    assert said.count("24 calls to buy") == 2
    assert server.count()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--split train", "the model has seen these"),
        ("--split nowhere", "has no 'nowhere' split"),
        ("--kinds hat", "these pictures can show patch, letter"),
        ("--overlap much", "expected one of any"),
        ("--out table.txt", "ends in .csv or .md"),
        ("--critic critics/none", "no preset 'critics/none'"),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: str, message: str) -> None:
    said = run(folder, f"lvlmva.cli calibrate -n 3 {arguments}", environment(folder.parent / "store"), code=1)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


def test_the_server_tells_the_kinds_apart() -> None:
    """Its oracle is only as good as this: every kind, size and place is known for what it is."""
    from lvlmva_core.planting import plant
    from lvlmva_core.render import enlarge

    for n in range(60):
        picture, disc = scene(n)
        for kind in ("patch", "letter", "strip"):
            planted = plant(picture, kind, "small", "on" if n % 2 else "off", disc, np.random.default_rng(n))  # type: ignore[arg-type]
            image = np.moveaxis(planted.picture, 0, -1)
            assert kind_of(enlarge(image), enlarge(planted.mask)) == kind
            assert kind_of(enlarge(image), ~enlarge(planted.mask)) == "plain"
