"""Many experiments as a process: rows against outputs; killed, it goes on to the same bytes, whatever the workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvlmva_core.outputs import read_outputs
from lvlmva_core.samples import read_samples

ROOT = Path(__file__).parents[2]
WORDS = ("bases=0..1", "seeds=0,1", "methods=lvlm_va,lambda_zero")
TINY = (
    *("train.epochs=2", "rank.n_samples=16", "attribute.n_baselines=4", "segment.n_starts=2", "align.epochs=1"),
    *("evaluate.attribution_samples=4", "evaluate.robustness=false", "exchange.n_held_out=1", "exchange.n_donors=1"),
)

pytestmark = pytest.mark.usefixtures("warm_stages")


def start(folder: Path, workers: int) -> "subprocess.Popen[str]":
    changes = [word for change in TINY for word in ("--set", change)]
    command = [sys.executable, "-m", "lvlmva.cli", "study", *WORDS, *changes]
    variables = {**os.environ, "LVLMVA_STORE": str(folder / "store"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--folder", str(folder), "--workers", str(workers)],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    said = process.communicate(timeout=500)[0]
    assert process.returncode == code, said
    return str(said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, warm_stages: None) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(start(folder, 1))


def test_rows_are_what_the_outputs_say(whole: tuple[Path, str]) -> None:
    """Accuracy, worst group and reliance of each model, counted anew from logits and labels."""
    folder, said = whole
    rows = pd.read_csv(folder / "rows.csv", dtype={"seed": str}).fillna({"seed": ""})
    assert rows[["method", "base", "seed"]].to_numpy().tolist() == [
        *(["base", base, ""] for base in (0, 1)),
        *([method, base, seed] for method in ("lambda_zero", "lvlm_va") for base in (0, 1) for seed in ("0", "1")),
    ]
    samples = read_samples(folder / "samples.parquet").set_index("id")
    for row in rows.to_dict("records"):
        found = read_outputs(folder / f"base={row['base']}/data/evaluations/{row['method']}.safetensors")
        logits = pd.DataFrame(found.logits[:, found.seeds.index(row["seed"])].astype(np.float64), index=found.ids)
        table = samples.loc[found.ids].assign(right=logits.to_numpy().argmax(axis=1) == samples.loc[found.ids, "label"])
        test = table[table["split"] == "test"]
        assert row["accuracy"] == pytest.approx(test["right"].mean(), abs=1e-6)
        assert row["wga"] == pytest.approx(test.groupby(["label", "spurious"])["right"].mean().min(), abs=1e-6)
        shown, without = (
            table[table["split"] == split].reset_index().set_index("source").sort_index()
            for split in ("test_agreeing", "test_plain")
        )
        contrasts = []
        for part in (shown, without):
            of_part = logits.loc[part["id"]].to_numpy()
            own = of_part[np.arange(len(part)), part["label"]]
            contrasts.append(own - (of_part.sum(axis=1) - own) / (of_part.shape[1] - 1))
        effect = (contrasts[0] - contrasts[1]).mean() / contrasts[1].std()
        assert row["reliance"] == pytest.approx(effect, rel=1e-3)
    compared = pd.read_csv(folder / "rows_compared.csv")
    assert compared["against"].tolist() == ["base", "lambda_zero"] * 3
    means = rows.groupby("method")["accuracy"].mean()
    for row in compared[compared["measure"] == "accuracy"].to_dict("records"):
        assert row["difference"] == pytest.approx(means["lvlm_va"] - means[row["against"]], abs=2e-6)
    page = (folder / "rows.md").read_text()
    assert "critic: rules (a stand-in, not a vision-language model)" in page
    assert "Primary measure: reliance (less is better)." in page
    assert page.count("\n- LVLM-VA is ") == 2
    for line in page.splitlines():
        if line.startswith("- "):
            assert line.removeprefix("- ") in said
    assert (folder / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_it_goes_on_after_a_kill_to_the_same_bytes(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Two workers, all killed with the first base's regions there; what was done is not done again."""
    with start(tmp_path, 2) as process:
        while not (tmp_path / "done/base=0-segment").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)  # its workers go on with what they are at
    assert not (tmp_path / "rows.csv").exists()
    marks = {mark.name: mark.stat().st_mtime_ns for mark in (tmp_path / "done").iterdir()}
    finish(start(tmp_path, 2))
    assert {name: (tmp_path / "done" / name).stat().st_mtime_ns for name in marks} == marks
    folder, _ = whole
    assert {mark.name for mark in (tmp_path / "done").iterdir()} == {mark.name for mark in (folder / "done").iterdir()}
    for name in ("rows.csv", "rows_compared.csv", "rows.md", "rows.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
