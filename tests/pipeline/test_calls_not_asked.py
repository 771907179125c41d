"""Regions that the prediction does not depend on get no critic: what is sent, what is bought, what is said of them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmva_core.arrays import read_array, write_arrays
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.records import VerdictRow, read_rows
from stages.mask import mask
from tests.pipeline.calls import COUNT, Server, critique_here, judge_here, rows, sample_arrays, write_params

NOTHING_HANGS_ON = {1: {0, 1, 2}, 2: {0}, 3: {2}, 5: {0, 1, 2}}  # sample -> regions
NO = {"message": {"content": "red: no\nblue: no\nyellow: no"}}


def _write_reliance(folder: Path, ids: list[str] | None = None) -> None:
    """Falls of 1, the logit's size, but for regions of NOTHING_HANGS_ON; one falls and rises alike."""
    falls = np.ones((COUNT, 3), np.float32)
    for sample, regions in NOTHING_HANGS_ON.items():
        falls[sample, sorted(regions)] = 0.01
    spread = np.zeros_like(falls)
    own, own_spread = falls.copy(), spread.copy()
    falls[4, 0], own[4, 0], spread[4, 0] = 0.0, 0.0, 1.0  # cancels over donors: it is depended on
    own[0, 2], falls[0, 2] = 1.0, 0.0  # its own class's content changes it: it is depended on
    arrays = {"other": falls, "own": own, "other_spread": spread, "own_spread": own_spread}
    known = ids or [f"patient-{n:04d}" for n in range(COUNT)]
    write_arrays(folder / "data/reliance.zarr", {**arrays, "logit": np.ones(COUNT, np.float32)}, {"ids": known})


def _set(folder: Path, server: Server, at_most: float | None, **more: Any) -> None:
    write_params(folder, server, critique={"independent_at_most": at_most, **more})


def _sent_regions(body: dict[str, Any]) -> set[str]:
    text = body["messages"][0]["content"][0]["text"]
    return set(re.findall(r"\b(red|blue|yellow)\b", text))


def test_what_nothing_hangs_on_is_not_asked_about_and_not_rejected(
    folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_reliance(folder)
    server.set(always=NO)
    critique_here()  # off: all are asked about
    before = (folder / "data/critiques.jsonl").read_bytes()
    assert server.paid() == COUNT
    assert "not_asked" not in before.decode()

    server.set()
    _set(folder, server, 0.0)  # on, but no exchange moves nothing: the calls are those that were bought
    critique_here()
    assert server.log() == []
    assert (folder / "data/critiques.jsonl").read_bytes() == before

    server.set(always=NO)
    _set(folder, server, 0.05)
    capsys.readouterr()
    critique_here()
    _, segments, _ = sample_arrays(COUNT)
    there = [set(np.unique(each).tolist()) for each in segments]
    left = {n: regions & there[n] for n, regions in NOTHING_HANGS_ON.items()}
    whole = [n for n, regions in left.items() if regions == there[n]]
    assert whole == [1, 5]
    assert server.paid() == 2  # of samples 2 and 3, which are shown fewer regions than before
    assert {frozenset(_sent_regions(entry["body"])) for entry in server.log()} == {
        frozenset({"blue", "yellow"}),
        frozenset({"red", "blue"}),
    }
    said = capsys.readouterr().err.splitlines()[-1]
    total, gone = sum(len(each) for each in there), sum(len(each) for each in left.values())
    assert said == (
        f"critique: {gone} of {total} regions were not asked about, since the prediction does not depend on them (not "
        f"rejected); 2 of {COUNT} samples had no other: 2 calls to critics saved, and those to a judge"
    )

    server.set()
    judge_here()
    assert server.paid() <= COUNT - 2  # none about samples without a critique; one call where prompts are the same
    assert len(server.log()) > 0
    found = {row.sample: row for row in read_rows(folder / "data/verdicts.jsonl", VerdictRow)}
    for n, regions in enumerate(there):
        row, needless = found[f"patient-{n:04d}"], left.get(n, set())
        assert row.failure is None
        assert {each.region for each in row.verdicts} == regions - needless
        assert ({each.region for each in row.not_asked.regions} if row.not_asked else set()) == needless
        assert row.by_region() == {region: "yes" if region in needless else "no" for region in regions}
    metrics = json.loads((folder / "metrics.json").read_text())["judge"]
    assert (metrics["regions_not_asked"], metrics["samples_not_asked"], metrics["critic_calls_saved"]) == (gone, 2, 2)
    assert metrics["samples_judged"] == COUNT

    (overrides := folder / "overrides").mkdir()
    data = folder / "data"
    out = (data / "masks.zarr", folder / "mask.json")
    mask(
        Path("params.yaml"),
        data / "segments.zarr",
        data / "verdicts.jsonl",
        overrides,
        *out,
        data / "attributions.zarr",
    )
    wanted = [~np.isin(each, sorted(left.get(n, set()))) for n, each in enumerate(segments)]
    np.testing.assert_array_equal(read_array(data / "masks.zarr", "masks"), np.stack(wanted))


def test_several_answers_vote_on_what_is_left(folder: Path, server: Server) -> None:
    _write_reliance(folder)
    server.set(always=NO)
    _set(folder, server, 0.05, samples=2)
    critique_here()
    assert server.paid() == 2 * (COUNT - 2)
    server.set()
    judge_here()
    found = {row["sample"]: row for row in rows(folder, "verdicts")}
    assert found["patient-0001"]["not_asked"]["calls_saved"] == 2
    assert [each["region"] for each in found["patient-0002"]["not_asked"]["regions"]] == [0]
    assert len(found["patient-0002"]["answers"]) == 2
    assert json.loads((folder / "metrics.json").read_text())["judge"]["critic_calls_saved"] == 4


def test_an_exchange_of_other_samples_is_refused(folder: Path, server: Server) -> None:
    _write_reliance(folder, [f"other-{n}" for n in range(COUNT)])
    _set(folder, server, 0.05)
    with pytest.raises(InputError, match="other samples than the segmentations; run `dvc repro exchange`"):
        critique_here()
    assert server.log() == []
