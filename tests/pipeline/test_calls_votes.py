"""Several answers through the real client against a server on loopback whose answers disagree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from lvlmva_core.arrays import read_array
from lvlmva_core.samples import read_penalised
from stages.mask import mask
from tests.pipeline.calls import CRITIQUE, JUDGE, Server, endpoint, environment, project, rows, run

COUNT = 4
ALL_NO = {"message": {"content": "red: no\nblue: no\nyellow: no"}}


def _metrics(here: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((here / "metrics" / "judge.json").read_text())["judge"]
    return content


def _assert_votes_weigh_masks(here: Path) -> None:
    """The stage mask, soft and hard, against a count of the answers in each row, pixel by pixel."""
    (here / "overrides").mkdir()
    files = {name: here / f"{name}.json" for name in ("soft", "hard")}
    params = here / "params.yaml"
    text = params.read_text()
    for name in files:
        yaml = YAML(typ="safe", pure=True)
        content = yaml.load(text)
        content["mask"] |= {"weights": "votes"} if name == "soft" else {}
        with params.open("w") as file:
            yaml.dump(content, file)
        data = here / "data"
        given = (params, data / "segments.zarr", data / "verdicts.jsonl", here / "overrides")
        mask(*given, here / f"{name}.zarr", files[name], data / "attributions.zarr")
    params.write_text(text)
    ids, weights = read_penalised(here / "soft.zarr")
    assert weights.dtype == np.float32
    segments = read_array(here / "data" / "segments.zarr", "segments")
    split = 0
    for row in rows(here, "verdicts"):
        votes = [answer["verdicts"] for answer in row["answers"]]
        for region in np.unique(segments[ids.index(row["sample"])]):
            share = sum(vote[str(region)] == "no" for vote in votes) / len(votes)
            inside = weights[ids.index(row["sample"])][segments[ids.index(row["sample"])] == region]
            assert inside == pytest.approx(share)
            split += 0 < share < 1
    assert split > 0
    hard, masks = read_array(here / "hard.zarr", "masks"), read_array(here / "soft.zarr", "masks")
    np.testing.assert_array_equal(hard, masks)
    np.testing.assert_array_equal(weights > 0.5, masks)
    assert read_penalised(here / "hard.zarr")[1].dtype == bool
    assert json.loads(files["soft"].read_text())["mask"]["weights"] == "share of votes (an extension)"
    assert "weights" not in json.loads(files["hard"].read_text())["mask"]


def test_three_answers_vote_and_the_first_is_the_one_bought_before(tmp_path: Path, server: Server) -> None:
    variables = environment(tmp_path / "store")
    here = project(tmp_path / "p", server, COUNT)
    run(here, CRITIQUE, variables)
    run(here, JUDGE, variables)
    single = rows(here, "verdicts")
    assert "answers" not in single[0]
    project(here, server, COUNT, critique={"samples": 3})
    server.set(always=ALL_NO)
    said = run(here, CRITIQUE, variables)
    assert f"{COUNT} answers in the store, {2 * COUNT} calls to buy" in said
    assert "may be copies" in said
    server.set()
    run(here, JUDGE, variables)
    for row, before in zip(rows(here, "verdicts"), single, strict=True):
        first = {entry["region"]: entry["verdict"] for entry in before["verdicts"]}
        assert {int(r): v for r, v in row["answers"][0]["verdicts"].items()} == first
        for entry in row["verdicts"]:  # two of three say no
            assert entry["verdict"] == "no"
            assert entry["certainty"] == (1.0 if first[entry["region"]] == "no" else pytest.approx(2 / 3))
    assert _metrics(here)["answers"]["answers"] == 3 * COUNT
    before = [(here / "data" / f"{name}.jsonl").read_bytes() for name in ("critiques", "verdicts")]
    server.set()
    run(here, CRITIQUE, variables)
    run(here, JUDGE, variables)
    assert server.log() == []
    assert [(here / "data" / f"{name}.jsonl").read_bytes() for name in ("critiques", "verdicts")] == before
    _assert_votes_weigh_masks(here)
    project(here, server, COUNT, critique={"samples": 3}, judge={"votes": "unanimous"})
    run(here, JUDGE, variables)
    assert [r["verdicts"][0]["verdict"] for r in rows(here, "verdicts")] == [
        r["verdicts"][0]["verdict"] for r in single
    ]


def test_a_cascade_asks_further_where_answers_disagree(tmp_path: Path, server: Server) -> None:
    variables = environment(tmp_path / "store")
    critique = {
        "critics": [{"critic": "rules"}, {"critic": "model", "endpoint": endpoint(server, model="big")}],
        "cascade": {"disagreement": True},
        "endpoint": endpoint(server, concurrency=1),
    }
    here = project(tmp_path / "p", server, COUNT, critique=critique, judge={"judge": "rules"})
    prose = {"message": {"content": "Verdicts: red - no; blue - no; yellow - no"}}
    server.set(always=prose)
    said = run(here, CRITIQUE, variables)
    found = rows(here, "critiques")
    further = [row for row in found if "further" in row]
    assert further
    assert all(row["further"] == ["disagreement"] for row in further)
    assert len([e for e in server.log() if e["body"]["model"] == "big"]) == len(further)
    assert f"'big (1)' was asked about {len(further)} of {COUNT} samples" in said
    run(here, JUDGE, variables)
    metrics = _metrics(here)
    assert metrics["critic"] == ["big (1)", "rules", "tester (1)"]
    assert metrics["answers"]["asked_further"]["samples"] == len(further)
    server.set()
    run(here, CRITIQUE, variables)
    assert server.log() == []


def test_one_budget_holds_over_all_critics_and_a_stop_loses_nothing(tmp_path: Path, server: Server) -> None:
    variables = environment(tmp_path / "store")
    limited = {"max_calls": COUNT + 1}
    critics = [{"critic": "model", "endpoint": endpoint(server, model="big", **limited)}]
    critique = {"critics": critics, "endpoint": endpoint(server, **limited)}
    here = project(tmp_path / "p", server, COUNT, critique=critique)
    said = run(here, CRITIQUE, variables, code=1)
    assert "critique.critics[0].endpoint.max_calls" in said
    assert server.paid() == COUNT + 1
    run(here, CRITIQUE, variables)
    assert server.paid() == 2 * COUNT


def test_a_sample_is_judged_by_the_answers_that_it_has(tmp_path: Path, server: Server) -> None:
    variables = environment(tmp_path / "store")
    critique = {"samples": 3, "least_answers": 2, "max_attempts": 1, "max_failed_share": 0.5}
    here = project(tmp_path / "p", server, COUNT, critique={**critique, "endpoint": endpoint(server, concurrency=1)})
    server.set(faults=["refusal"])
    run(here, CRITIQUE, variables)
    run(here, JUDGE, variables)
    row = rows(here, "verdicts")[0]
    assert [each["failure"] is None for each in row["answers"]] == [False, True, True]
    assert row["failure"] is None
    assert {entry["certainty"] for entry in row["verdicts"]} == {1.0}
    assert _metrics(here)["answers"]["answers_failed"] == 1
