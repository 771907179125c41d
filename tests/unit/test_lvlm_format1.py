"""Records of the first version, written by its own code: read, kept byte for byte, and never bought again."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lvlmva_core.lvlm.calls import check_record
from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow, read_rows, write_rows
from lvlmva_core.store import canonical_json
from tests.pipeline.calls import KEY, Server, critique_here, judge_here, running_server, write_data

FORMAT1 = Path(__file__).parents[1] / "fixtures" / "format1"
STORED = sorted(FORMAT1.glob("*store/calls/*/*.json"))


@pytest.mark.parametrize("name", ["critiques", "rules_critiques", "oracle_critiques"])
def test_critiques_are_written_again_as_they_were(tmp_path: Path, name: str) -> None:
    file = FORMAT1 / f"{name}.jsonl"
    write_rows(tmp_path / "again.jsonl", read_rows(file, CritiqueRow))
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["verdicts", "rules_verdicts", "oracle_verdicts"])
def test_verdicts_are_written_again_as_they_were(tmp_path: Path, name: str) -> None:
    file = FORMAT1 / f"{name}.jsonl"
    write_rows(tmp_path / "again.jsonl", read_rows(file, VerdictRow))
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.stem[:6])
def test_records_of_calls_are_whole_and_their_bytes_are_canonical(file: Path) -> None:
    record = json.loads(file.read_bytes())
    checked = check_record(record, file.stem)
    assert canonical_json({**checked, "meta": record["meta"]}) == file.read_bytes()


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def here(process: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project of the fixture: its params, prompts and store, and the data that it was made from."""
    process.set()
    folder = tmp_path / "project"
    write_data(folder, 4)
    shutil.copytree(FORMAT1 / "prompts", folder / "prompts")
    shutil.copytree(FORMAT1 / "store", tmp_path / "store")
    _params(folder, process, {})
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LVLMVA_TEST_API_KEY", KEY)
    monkeypatch.delenv("LVLMVA_OFFLINE", raising=False)
    return folder


def _params(folder: Path, server: Server, endpoint: dict[str, Any], **sections: dict[str, Any]) -> None:
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((FORMAT1 / "params.yaml").read_text())
    for section in ("critique", "judge"):
        content[section]["endpoint"] |= {"base_url": f"{server.url}/v1", **endpoint}
        content[section] |= sections.get(section, {})
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)


def test_what_was_bought_is_found_and_only_what_had_failed_is_asked_for(here: Path, process: Server) -> None:
    critique_here()
    assert len(process.log()) == 1  # the sample that was refused, of which the first version kept nothing
    shutil.copy(FORMAT1 / "critiques.jsonl", here / "data" / "critiques.jsonl")
    process.set()
    judge_here()
    assert process.log() == []  # an invalid answer and the one after it are among them
    assert (here / "data" / "verdicts.jsonl").read_bytes() == (FORMAT1 / "verdicts.jsonl").read_bytes()


@pytest.mark.parametrize("tier", [{}, {"service_tier": "flex"}, {"extra_body": {"service_tier": "flex"}}])
def test_what_was_bought_by_the_flex_tier_is_found_whatever_the_tier_now(
    here: Path, process: Server, tier: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(FORMAT1 / "flex_store", tmp_path / "flex")
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "flex"))
    _params(here, process, tier)
    critique_here()
    assert process.log() == []
    assert len([row for row in read_rows(here / "data" / "critiques.jsonl", CritiqueRow) if row.critique]) == 4


@pytest.mark.parametrize("critic", ["rules", "oracle"])
def test_the_stand_ins_say_what_they_said(here: Path, process: Server, critic: str) -> None:
    rates = {"critic": critic, "false_positive_rate": 0.3}
    _params(here, process, {}, critique=rates, judge={"judge": "rules"})
    critique_here()
    judge_here()
    for name in ("critiques", "verdicts"):
        assert (here / "data" / f"{name}.jsonl").read_bytes() == (FORMAT1 / f"{critic}_{name}.jsonl").read_bytes()
