"""A study over several bases: rows and comparisons of models whose reliance is known, tables, params."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks import study as runner
from lvlmva.cli import app
from lvlmva.params import params_of
from lvlmva_core.comparison import measure
from lvlmva_core.errors import InputError
from lvlmva_core.outputs import BASE, Outputs
from lvlmva_core.study import COLUMNS, COMPARED, compared, rows_of, tables

ROOT = Path(__file__).parents[2]
N = 80
PAGES = sorted((ROOT / "docs/results").glob("*_compared.csv"))


def _samples() -> pd.DataFrame:
    """Test pictures of two classes, each with the feature in one of two splits; in training it marks class 0."""
    label, has = np.arange(N) % 2, np.arange(N) % 4 < 2
    place = [f"{n:03d}" for n in range(N)]
    parts = [
        pd.DataFrame({"split": split, "label": label, "spurious": there, "source": place})
        for split, there in (("test", has), ("test_twins", ~has), ("train", label == 0))
    ]
    table = pd.concat(parts, ignore_index=True)
    table["id"] = table["split"] + "-" + table["source"]
    table["group"] = table["label"].astype(str) + np.where(table["spurious"], "/spurious", "/plain")
    return table


def _outputs(samples: pd.DataFrame, effect: float, seeds: list[str], base: int) -> Outputs:
    """z_0 - z_1 = the class's sign + noise + effect where the feature is, the noise being the same for both twins."""
    rows = samples[samples["split"] != "train"]
    logits = []
    for seed in seeds:
        noise = np.random.default_rng([base, len(seed), int(seed or 0)]).normal(size=N)[rows["source"].astype(int)]
        contrast = np.where(rows["label"] == 0, 1.0, -1.0) + noise + effect * rows["spurious"]
        logits.append(np.stack([contrast / 2, -contrast / 2], axis=1))
    empty = np.zeros((0, len(seeds), 4, 4), dtype=np.float32)
    stacked = np.stack(logits, axis=1).astype(np.float32)
    return Outputs(seeds, rows["id"].tolist(), stacked, [], empty, {}, np.zeros((N, 1)), [], empty[..., 0])


EFFECTS = {
    BASE: 2.0,
    "lambda_zero": 1.9,
    "lvlm_va_counterexamples": 0.1,
    "counterexamples_random_masks": 1.5,
    "counterexamples_class_matched": 1.2,
}


@pytest.fixture(scope="module")
def found() -> tuple[pd.DataFrame, pd.DataFrame]:
    samples = _samples()
    models = {
        str(base): {
            name: _outputs(samples, effect, [""] if name == BASE else ["0", "1"], base)
            for name, effect in EFFECTS.items()
        }
        for base in range(3)
    }
    models["3"] = {BASE: models["0"][BASE]}  # not complete yet: in the rows, not in the comparisons
    values = {base: measure(of, samples, None)[0] for base, of in models.items()}
    return rows_of(values), compared(models, samples, draws=400)


def test_a_row_is_a_model_and_its_reliance_is_the_effect_that_was_put_in(
    found: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    rows = found[0]
    assert list(rows) == ["method", "base", "seed", *COLUMNS]
    assert rows.groupby("method", sort=False).size().to_dict() == {
        BASE: 4,
        "lambda_zero": 6,
        "counterexamples_random_masks": 6,
        "counterexamples_class_matched": 6,
        "lvlm_va_counterexamples": 6,
    }
    for name, effect in EFFECTS.items():  # the contrast spreads by about sqrt(2) without the feature
        assert rows.loc[rows["method"] == name, "reliance"].mean() == pytest.approx(effect / 2**0.5, rel=0.1)
    assert rows["mu_align"].isna().all()


def test_the_family_is_base_lambda_zero_and_the_best_control(found: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    rows, comparisons = found
    assert list(comparisons) == COMPARED
    reliance = comparisons[comparisons["measure"] == "reliance"]
    assert reliance["against"].tolist() == [BASE, "lambda_zero", "counterexamples_class_matched"]
    complete = rows[rows["base"] != "3"].groupby("method")["reliance"].mean()
    for name in ("wga", "accuracy"):
        means = rows[rows["base"] != "3"].groupby("method")[name].mean()
        for row in comparisons[comparisons["measure"] == name].to_dict("records"):
            assert row["value"] == pytest.approx(means[row["method"]])
            assert row["value_against"] == pytest.approx(means[row["against"]])
    for row in reliance.to_dict("records"):
        assert row["difference"] == pytest.approx(complete[row["method"]] - complete[row["against"]])
        assert row["low"] < row["difference"] < row["high"] < 0
        assert row["p"] == pytest.approx(2 / 401)
        assert row["p_holm"] == pytest.approx(6 / 401)
    accuracy = comparisons[comparisons["measure"] == "accuracy"].set_index("against")
    assert accuracy.loc[BASE, "difference"] > 0


def test_the_command_prints_what_the_rows_hold(found: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path) -> None:
    rows, comparisons = found
    rows.to_csv(tmp_path / "toy.csv", index=False)
    comparisons.to_csv(tmp_path / "toy_compared.csv", index=False)
    printed = CliRunner().invoke(app, ["tables", str(tmp_path / "toy.csv")])
    assert printed.exit_code == 0
    own = rows[rows["method"] == "lambda_zero"]["wga"]
    cells = [cell.strip() for line in printed.stdout.splitlines() if "λ = 0 |" in line for cell in line.split("|")]
    assert cells[2] == "6"
    assert f"{own.mean():.3f} ± {own.std():.3f}" in cells
    assert len(tables(tmp_path / "toy.csv")[1][1]) == 9
    page = tmp_path / "page.md"
    page.write_text(f"above\n<!-- lvlmva tables {tmp_path / 'toy.csv'} -->\nold\n<!-- end -->\nbelow\n")
    assert CliRunner().invoke(app, ["tables", str(tmp_path / "toy.csv"), "--page", str(page)]).exit_code == 0
    assert page.read_text().split(" -->\n")[1] == printed.stdout + "<!-- end"
    assert page.read_text().endswith("<!-- end -->\nbelow\n")
    page.write_text("nothing marked")
    refused = CliRunner().invoke(app, ["tables", str(tmp_path / "toy.csv"), "--page", str(page)])
    assert isinstance(refused.exception, InputError)
    assert "with a '<!-- end -->' after it" in str(refused.exception)
    with pytest.raises(InputError, match=r"none\.csv: not readable"):
        tables(tmp_path / "none.csv")
    rows.drop(columns="wga").to_csv(tmp_path / "toy.csv", index=False)
    with pytest.raises(InputError, match=r"toy\.csv: no column 'wga'"):
        tables(tmp_path / "toy.csv")


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_the_page_shows_the_tables_of_the_rows(file: Path) -> None:
    rows = file.with_name(file.name.replace("_compared", ""))
    page = "".join(each.read_text(encoding="utf-8") for each in sorted((ROOT / "docs").glob("*.md")))
    shown = re.search(rf"<!-- lvlmva tables docs/results/{rows.name} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert shown is not None
    assert shown[1] == CliRunner().invoke(app, ["tables", str(rows)]).stdout


@pytest.mark.parametrize("experiment", list(runner.CHANGES))
def test_the_params_of_a_study_are_the_presets_with_what_was_declared(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    changes = [*runner.changes_of(experiment, 2), "prepare.root=archive"]
    params = params_of(runner.preset_content(experiment, changes), Path("params.yaml"))
    assert params.align.seeds == [0, 1]
    assert params.critique.model_dump()["critic"] == "oracle"
    assert params.critique.model_dump()["false_negative_rate"] == 0.13
    assert {*runner.METHODS} < {*params.chosen_methods()}
    assert not params.evaluate.robustness


def test_the_methods_of_the_literature_are_a_family_of_their_own() -> None:
    samples = _samples()
    effects = {BASE: 2.0, "lambda_zero": 1.9, "random_masks": 1.5, "lvlm_va": 0.1, "jtt": 1.8, "dfr": 0.9}
    models = {
        str(base): {
            name: _outputs(samples, effect, [""] if name == BASE else ["0", "1"], base)
            for name, effect in effects.items()
        }
        for base in range(2)
    }
    reliance = compared(models, samples, draws=300).query("measure == 'reliance'")
    assert reliance["against"].tolist() == [BASE, "lambda_zero", "random_masks", "jtt", "dfr"]
    assert reliance["p"].to_numpy() == pytest.approx(2 / 301)
    assert reliance["p_holm"].tolist() == pytest.approx([6 / 301] * 3 + [4 / 301] * 2)
