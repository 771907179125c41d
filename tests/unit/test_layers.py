"""The order of docs/architecture.md: no module of the core imports one that stands to its right."""

from pathlib import Path

import pytest

from lvlmva.pipeline import _imports

ROOT = Path(__file__).parents[2]
LAYERS = [
    [
        "errors",
        "progress",
        "arrays",
        "settings",
        "leases",
        "store",
        "shared_store",
        "rows",
        "shares",
        "statistics",
        "compute",
        "convolutions",
    ],
    ["penalties"],
    ["align_settings", "train_settings", "exchange_settings"],
    [
        "samples",
        "corruptions",
        "fills",
        "regions",
        "independence",
        "agreement",
        "spreadsheet",
        "overrides",
        "mailed_reviews",
        "questionnaire",
    ],
    ["datasets"],
    ["adam", "checkpoints", "models", "efficientnet_lite", "foreign", "splits", "data_parallel", "training", "resume"],
    ["ranking", "exchange", "counterexamples", "concepts", "found_text"],
    ["attribution", "attribution_methods", "attribution_maps"],
    ["segmentation", "segmenters", "segmentations", "render"],
    ["lvlm"],
    ["scaling"],
    ["masks", "controls", "planting", "calibration"],
    ["metrics", "diffuse"],
    ["alignment", "baselines"],
    ["outputs", "evaluation", "classifier_check", "export", "audit"],
    ["patterns"],
    ["pattern_names"],
    ["corrections", "proposal"],
    ["comparison"],
    ["methods"],
    ["study"],
    ["report"],
    ["testing"],
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
CORE = ROOT / "lvlmva_core"
FILES = sorted(file for file in CORE.rglob("*.py") if file != CORE / "__init__.py")


def _name(file: Path) -> str:
    return file.relative_to(CORE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_imports_point_left(file: Path) -> None:
    imported = {
        _name(path) for path in _imports(file, ROOT) if path.is_relative_to(CORE) and path != CORE / "__init__.py"
    }
    assert {name for name in imported if LAYER_OF[name] > LAYER_OF[_name(file)]} == set()


def test_the_core_knows_no_stage_no_dvc_and_no_command_line() -> None:
    for file in FILES:
        text = file.read_text()
        for foreign in ("stages", "lvlmva", "dvc", "typer"):
            assert f"from {foreign} " not in text, f"{file}: {foreign}"
            assert f"from {foreign}." not in text, f"{file}: {foreign}"
            assert f"import {foreign}\n" not in text, f"{file}: {foreign}"


def test_the_middle_floor_imports_no_stage() -> None:
    for file in (ROOT / "lvlmva").glob("*.py"):
        assert not [path for path in _imports(file, ROOT) if path.is_relative_to(ROOT / "stages")], file
