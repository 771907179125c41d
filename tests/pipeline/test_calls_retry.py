"""`lvlmva calls retry`: failed samples are said, and DVC asks again about them and no others."""

import json
import shutil
from pathlib import Path

from ruamel.yaml import YAML

from tests.pipeline.calls import CRITIQUE, JUDGE, Server, environment, project, rows, run
from tests.pipeline.test_calls_shared import BOTH, COUNT, _first


def test_dvc_asks_again_about_what_failed_and_nothing_else(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    params = one.folder / "params.yaml"
    params.write_text(params.read_text().replace("max_failed_share: 0.1", "max_failed_share: 0.4"))
    server.set(faults=["refusal", "finish:length"])
    said = one.run("dvc repro")
    assert "critique: 2 of 6 samples failed and are left out" in said
    assert "judge: " not in said.partition("Running stage 'judge'")[2].replace("judge.endpoint", "")  # none of its own
    server.set()
    one.run("dvc repro")
    assert server.log() == []  # DVC sees no reason
    said = one.run("lvlmva calls retry")
    assert "2 samples; `dvc repro` asks again about them" in said
    assert said.count("critique: patient-") == 2
    content = YAML(typ="safe", pure=True).load(params.read_text())
    assert content["critique"]["asked_again"] == 1
    assert "asked_again" not in content["judge"]
    said = one.run("dvc repro")
    critiques = [entry for entry in server.log() if isinstance(entry["body"]["messages"][0]["content"], list)]
    assert len(critiques) == 2
    assert all(row["failure"] is None for row in rows(one.folder, "verdicts"))
    assert "no sample failed" in one.run("lvlmva calls retry")
    before = (one.folder / "data" / "critiques.jsonl").read_bytes()
    assert b"asked_again" not in before
    server.set()
    one.again()
    assert server.log() == []
    assert (one.folder / "data" / "critiques.jsonl").read_bytes() == before


def test_a_judge_that_failed_is_asked_again_and_the_critic_is_not(tmp_path: Path, server: Server) -> None:
    one = _first(tmp_path, server, BOTH)
    params = one.folder / "params.yaml"
    params.write_text(params.read_text().replace("max_failed_share: 0.1", "max_failed_share: 1.0"))
    server.set(faults=[None] * COUNT, always="bad:maybe")
    assert f"judge: {COUNT} of {COUNT} samples failed" in one.run("dvc repro")
    one.run("lvlmva calls retry")
    server.set()
    said = one.run("dvc repro")
    assert "Running stage 'critique'" not in said
    assert all(isinstance(entry["body"]["messages"][0]["content"], str) for entry in server.log())
    assert "answers were asked for beyond unusable ones in the store" in said
    assert all(row["failure"] is None for row in rows(one.folder, "verdicts"))


def test_what_asking_cannot_mend_is_not_asked_again(tmp_path: Path, server: Server) -> None:
    import numpy as np

    from lvlmva_core.arrays import write_arrays
    from tests.pipeline.calls import sample_arrays

    here, variables = project(tmp_path / "p", server, 4), environment(tmp_path / "store")
    _, segments, _ = sample_arrays(4)
    segments[1] = 255
    ids = [f"patient-{n:04d}" for n in range(4)]
    status = np.array(["ok", "no_positive_effect", "ok", "ok"]).tolist()
    write_arrays(here / "data" / "segments.zarr", {"segments": segments}, {"ids": ids, "status": status})
    run(here, CRITIQUE, variables)
    run(here, JUDGE, variables)
    before = (here / "params.yaml").read_text()
    assert "no sample failed in a way that asking again can mend" in run(here, "lvlmva.cli calls retry", variables)
    assert (here / "params.yaml").read_text() == before


def test_odd_records_break_no_tool_and_steer_no_terminal(tmp_path: Path, server: Server) -> None:
    here, variables = project(tmp_path / "p", server, 4), environment(tmp_path / "store")
    server.set(always={"message": {"content": "red \x1b[31m\u202e blue \x9b yellow"}, "response": {"created": 10**400}})
    run(here, CRITIQUE, variables)
    file = next((tmp_path / "store" / "calls").glob("??/*.json"))
    record = json.loads(file.read_bytes())
    odd = file.parent.parent / "00"
    odd.mkdir()
    (odd / ("00" * 32 + ".json")).write_text("[" * 100_000)
    (odd / ("00" * 31 + "01.json")).mkdir()
    for number, request in enumerate(({}, [], None)):
        (odd / ("00" * 31 + f"1{number}.json")).write_text(json.dumps({**record, "request": request}))
    for command in ("calls list", f"calls show {file.stem}", f"calls pack {tmp_path / 'all.jsonl.gz'}"):
        said = run(here, f"lvlmva.cli {command}", variables)
        assert "Traceback" not in said
        assert not [each for each in said if not each.isprintable() and each not in "\n\t"], command
    shown = run(here, f"lvlmva.cli calls show {file.stem}", variables)
    assert json.loads(shown)["response"]["choices"] == record["response"]["choices"]
    assert run(here, "lvlmva.cli calls list", variables).count("\n") == 4
    assert "4 records are whole, 0 damaged" in run(here, "lvlmva.cli calls check", variables)
    shutil.rmtree(odd)
    lines = tmp_path / "odd.jsonl"
    lines.write_text("\n".join(["[" * 100_000, "{}", json.dumps({**record, "response": {}}), "nonsense"]) + "\n")
    said = run(here, f"lvlmva.cli calls import {lines}", variables, code=1)
    assert "4 records were refused" in said
    assert "Traceback" not in said
