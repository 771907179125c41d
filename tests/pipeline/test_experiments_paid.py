"""One budget over all base models of a study, with a model server on loopback that counts what it was paid for."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from lvlmva.experiments_folder import Piece, Study, is_done, mark_of
from lvlmva.experiments_paid import LEDGER, ask_models, is_paid
from lvlmva.params import load_params
from lvlmva_core.errors import InputError
from tests.pipeline.calls import KEY, ROOT, Server, environment, sample_arrays, start, write_data, write_params

COUNT = 5
BASES = (0, 1)


@pytest.fixture
def study(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two bases whose regions are there, each with its own."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "prompts").symlink_to(ROOT / "prompts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LVLMVA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LVLMVA_TEST_API_KEY", KEY)
    found = Study(tmp_path / "study", BASES, ("lvlm_va",), paid=True)
    for base in BASES:
        here = found.folder / f"base={base}"
        segments = sample_arrays(COUNT)[1]
        segments[:, : 3 * base] = 1
        write_data(here, COUNT, segments)
        for piece in found.before_critics(base):
            mark = mark_of(found.folder, piece)
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
    for name in ("images.zarr", "samples.parquet", "spurious_masks.zarr"):
        (found.folder / "base=0/data" / name).rename(found.folder / name)
    return found


def limits(study: Study, server: Server, **endpoint: object) -> None:
    for base in BASES:
        write_params(study.folder / f"base={base}", server, endpoint=endpoint)


def done(study: Study) -> list[str]:
    return [
        f"{stage} {base}"
        for stage in ("critique", "judge")
        for base in BASES
        if is_done(study.folder, Piece(stage, base))
    ]


def test_the_limit_holds_for_all_bases_together(
    study: Study, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    limits(study, server, max_calls=COUNT + 2)
    assert is_paid(load_params(study.folder / "base=0/params.yaml"))
    with pytest.raises(InputError, match=r"critique: .* may go beyond max_calls = 7; raise .* nothing was bought"):
        ask_models(study, yes=False)
    said = capfd.readouterr().err
    assert f"critique of 2 bases: {2 * COUNT} calls to buy, at most " in said
    assert "7 calls at most, over all bases" in said
    assert server.paid() == 0
    failed = ask_models(study, yes=True)
    assert [piece.name for piece in failed] == ["base=1-critique"]
    assert _criticised(server) == COUNT + 2
    said = capfd.readouterr().err
    assert f"(and {COUNT} and " in said
    assert "before, under this budget): max_calls = 7; all answers are kept" in said
    assert done(study) == ["critique 0", "judge 0"]
    assert ask_models(study, yes=True) != []  # a further start of the study buys nothing more
    assert _criticised(server) == COUNT + 2
    limits(study, server, max_calls=100)
    capfd.readouterr()
    assert ask_models(study, yes=False) == []
    assert f"critique of 1 bases: {COUNT - 2} calls to buy" in capfd.readouterr().err
    assert done(study) == ["critique 0", "critique 1", "judge 0", "judge 1"]
    assert _criticised(server) == 2 * COUNT  # one call each, though it was stopped and started
    paid = [json.loads(line)["stage"] for line in (study.folder / LEDGER).read_text().splitlines()]
    assert (paid.count("critique"), len(paid)) == (2 * COUNT, server.paid())
    assert ask_models(study, yes=False) == []
    assert server.paid() == len(paid)


def _criticised(server: Server) -> int:
    return sum(entry["paid"] for entry in server.log() if "image_url" in json.dumps(entry["body"]))


def test_a_cost_that_was_paid_before_a_kill_counts(study: Study, server: Server, tmp_path: Path) -> None:
    limits(study, server, concurrency=1)
    server.set(latency_s=0.2)
    script = tmp_path / "asks.py"
    script.write_text(
        "from pathlib import Path\nfrom lvlmva.experiments_folder import Study\n"
        "from lvlmva.experiments_paid import ask_models\n"
        f"ask_models(Study(Path({str(study.folder)!r}), {BASES}, ('lvlm_va',), paid=True), yes=True)\n"
    )
    variables = environment(tmp_path / "store", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    with start(tmp_path, "asks", variables) as process:
        while server.paid() < 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    lines = (study.folder / LEDGER).read_text().splitlines()
    assert len(lines) in (server.paid() - 1, server.paid())  # an answer may be on its way
    each = json.loads(lines[0])["cost_usd"]
    assert each > 0
    server.set(keep=True, forget=False)
    worst = 500 * 10 / 1e6  # USD of an answer that takes token_limit, which is set aside for each that is under way
    limits(study, server, concurrency=1, max_cost_usd=len(lines) * each + worst + each)
    assert ask_models(study, yes=True) != []
    total = sum(json.loads(line)["cost_usd"] for line in (study.folder / LEDGER).read_text().splitlines())
    assert len(lines) * each < total <= len(lines) * each + worst + each
