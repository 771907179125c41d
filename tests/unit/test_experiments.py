"""Many experiments: what can be asked for, which pieces that is, and how they run, on stages that only leave a line."""

import contextlib
import os
import shutil
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lvlmva import experiments as command
from lvlmva.changes import read_content
from lvlmva.cli import app
from lvlmva.engines import Execution
from lvlmva.experiments import asked_params, conclude, declare, parse_words, run_study
from lvlmva.experiments_folder import Piece, Study, is_done, mark_of, paths_of, set_up
from lvlmva_core.arrays import write_table
from lvlmva_core.errors import InputError
from lvlmva_core.outputs import BASE, Outputs, write_outputs
from lvlmva_core.statistics import holm
from lvlmva_core.study import compared, compared_over, complete_bases, conclusions, measures_of
from tests.unit.test_study import _outputs, _samples

ROOT = Path(__file__).parents[2]


def test_words_are_numbers_ranges_and_names() -> None:
    assert parse_words(["bases=0..4", "seeds=0,2,5..6", "methods=lvlm_va,lambda_zero", "lambdas=0.1,1e-3"]) == {
        "bases": [0, 1, 2, 3, 4],
        "seeds": [0, 2, 5, 6],
        "methods": ["lambda_zero", "lvlm_va"],
        "lambdas": ["0.001", "0.1"],
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seeds=0..2"], "say which base models, e.g. bases=0..4"),
        (["bases=0..4", "bases=5"], "bases stands there twice"),
        (["base=0..4"], r"did you mean 'bases=\.\.\.'\?"),
        (["bases"], r"'bases': did you mean 'bases=\.\.\.'\?"),
        (["bases=4..0"], r"'4\.\.0' ends before it begins; write 0\.\.4"),
        (["bases=0-4"], "'0-4' is no number and no range; write 0..4 or 0,2,5"),
        (["bases="], "'' is no number and no range"),
        (["bases=0..4,3"], "3 stands there twice; copies of a run would pass for spread"),
        (["bases=0..100000"], "a range has 1000 numbers at most"),
        (["bases=0", "methods=lvlmva"], "no method 'lvlmva'; did you mean 'lvlm_va'"),
        (["bases=0", "methods=base"], "the base model itself is always there"),
        (["bases=0", "methods=lvlm_va,lvlm_va"], "lvlm_va stands there twice"),
        (["bases=0", "lambdas=0"], "for 0 there is the method lambda_zero"),
        (["bases=0", "lambdas=x"], "'x' is no number; write lambdas=0.01,0.1"),
        (["bases=0", "lambdas=0.1,0.10"], "0.1 stands there twice"),
    ],
)
def test_a_wrong_word_is_named_with_its_remedy(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_words(words)


def test_study_with_words_is_experiments_and_without_the_user_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["bases=0..1", "methods=lvlm_va,rrr_gt", "lambdas=0.1,1", "--folder", str(tmp_path / "s"), "--dry-run"]
    said = [CliRunner().invoke(app, [name, *words]) for name in ("study", "experiments")]
    assert said[0].exit_code == 0, said[0].output
    assert said[0].stdout == said[1].stdout
    assert "2 bases, 24 models of 2 methods (lvlm_va, rrr_gt)" in said[0].stdout  # 2 λ, 3 seeds
    # prepare, and of each base 8 up to the masks, its evaluation, and at each λ settings and two of each method
    assert f"0 of {1 + 2 * (8 + 1 + 2 * (1 + 2 * 2))} pieces of work are done" in said[0].stdout
    assert not (tmp_path / "s").exists()
    empty = CliRunner().invoke(app, ["study", "--summary", "--participant", "a=b", "--folder", str(tmp_path / "q")])
    assert "no study there; begin one with `lvlmva study`" in str(empty.exception)
    for name, other in (("study", "lvlmva experiments --help"), ("experiments", "lvlmva study")):
        assert other in " ".join(CliRunner().invoke(app, [name, "--help"], terminal_width=200).output.split())
    with pytest.raises(InputError, match="did you mean 'bases"):
        CliRunner().invoke(app, ["study", "base=0"], catch_exceptions=False)


def _content(changes: dict[str, Any] | None = None, **asked: Any) -> dict[str, Any]:
    given = [f"{key}={value}" for key, value in (changes or {}).items()]
    return asked_params(ROOT / "params.yaml", given, asked)


def test_other_params_are_another_study_and_more_of_the_same_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = Study(tmp_path, (0, 1), ("lvlm_va",))
    set_up(study, _content(seeds=[0, 1]))
    first = read_content(tmp_path / "base=1/params.yaml")
    assert (first["train"]["seed"], first["align"]["seeds"]) == (1, [0, 1])
    with pytest.raises(
        InputError, match=r"base=0/params.yaml: of another study \('rank' differs\); take another --folder"
    ):
        set_up(study, _content({"rank.n_samples": 8}, seeds=[0, 1]))
    with pytest.raises(InputError, match="the settings of 'lvlm_va' differ"):
        set_up(study, _content({"methods.lvlm_va.rrr_lambda": 3}, seeds=[0, 1]))
    with pytest.raises(InputError, match="has seeds 0, 1; name them all"):
        set_up(study, _content(seeds=[1, 2]))
    with pytest.raises(InputError, match=r"base=[01]: has other seeds; name this base too"):
        set_up(Study(tmp_path, (2,), ("lvlm_va",)), _content(seeds=[0, 1, 2]))
    assert read_content(tmp_path / "base=1/params.yaml") == first
    assert not (tmp_path / "base=2").exists()
    kept = tmp_path / "base=0/data/settings/judge_prompts.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"sha256": "of others"}')
    with pytest.raises(InputError, match="made with other prompts than prompts/decoy_digits holds now"):
        set_up(study, _content(seeds=[0, 1]))
    kept.unlink()
    marks = ["settings", "train", "align-lvlm_va", "evaluate-lvlm_va", "evaluate-base"]
    for name in marks:
        mark_of(tmp_path, Piece.named(f"base=0-{name}")).parent.mkdir(exist_ok=True)
        mark_of(tmp_path, Piece.named(f"base=0-{name}")).touch()
    more = {"compare.overlap": "any", "execution.workers": 7, "judge.endpoint": "null"}
    set_up(study, _content(more, seeds=[0, 1], methods=["lvlm_va", "class_matched"]))
    assert [name for name in marks if (tmp_path / "done" / f"base=0-{name}").exists()] == marks[1:]
    set_up(study, _content(seeds=[0, 1, 2]))
    assert [name for name in marks if (tmp_path / "done" / f"base=0-{name}").exists()] == ["train", "evaluate-base"]


def test_what_decides_is_declared_before_the_first_run(tmp_path: Path) -> None:
    declare(tmp_path, "wga")
    declare(tmp_path, None)
    with pytest.raises(InputError, match="'wga' was declared before the first run; another folder is another study"):
        declare(tmp_path, "accuracy")
    with pytest.raises(InputError, match="expected one of reliance, wga, accuracy"):
        declare(tmp_path, "auc")


STAGES = {
    "prepare": "images",
    **dict.fromkeys(["settings", "train", "rank", "attribute", "segment", "critique", "judge", "mask"], ""),
    **dict.fromkeys(["align", "evaluate"], "method"),
}
STAGE = """
from pathlib import Path
from lvlmva_core.errors import InputError

def {name}(params: Path{more}) -> None:
    place = f"{{params.parent.name}} {name} {said}"
    if Path("ill").exists() and Path("ill").read_text() == place:
        raise InputError("this one is ill")
    with open("ran", "a") as lines:
        lines.write(place + chr(10))
"""


@pytest.fixture
def small_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose stages write down that they ran, and fail where the file `ill` says so."""
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text().partition("\nstages:")[0])
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").touch()
    for name, kind in STAGES.items():
        more, said = (", method: str", "{method}") if kind == "method" else ("", "")
        (tmp_path / f"stages/{name}.py").write_text(STAGE.format(name=name, more=more, said=said))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(command, "warm", contextlib.nullcontext)  # to have PyTorch in memory takes longer than all this
    return tmp_path


def test_a_failing_task_stops_no_other_and_nothing_is_done_twice(
    small_project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = Study(small_project / "study", (0, 1), ("lambda_zero", "lvlm_va"))
    set_up(study, _content())
    (small_project / "ill").write_text("base=1 attribute ")
    failed = run_study(study, Execution(workers=2))
    assert failed == ["base=1-evaluate-base", "base=1-evaluate-lambda_zero", "base=1-evaluate-lvlm_va"]
    said = capfd.readouterr()
    assert "base=1-evaluate-base failed, exit code 1: error: base=1-attribute: this one is ill" in said.err
    ran = Counter((small_project / "ran").read_text().splitlines())
    assert set(ran.values()) == {1}
    assert "base=0 evaluate lvlm_va" in ran
    assert "base=1 rank " in ran
    assert not [line for line in ran if line.startswith(("base=1 segment", "base=1 align"))]
    (small_project / "ill").unlink()
    (small_project / "study/done/base=0-evaluate-lvlm_va").unlink()
    assert run_study(study, Execution(workers=1)) == []
    lines = (small_project / "ran").read_text().splitlines()
    assert Counter(lines) == Counter(dict.fromkeys(lines, 1)) + Counter({"base=0 evaluate lvlm_va": 1})
    assert len(set(lines)) == 1 + 2 * (8 + 1 + 2 * 2)
    assert capfd.readouterr().out.splitlines()[-1] == "base=1-evaluate-lvlm_va: 27 of 27, about 0 min of work left"
    old = small_project / "study/done"
    (old / "prepare").rename(old / "base=0-prepare")  # as it was called once
    assert is_done(study.folder, Piece("prepare"))


def test_every_name_of_a_piece_leads_back_to_it() -> None:
    study = Study(
        Path("s"), (3, 12), ("lambda_zero", "lvlm_va", "lvlm_va_counterexamples", "jtt"), ("1e-05", "0.1"), True
    )
    pieces = [piece for job in study.jobs() for piece in (*job.after, *job.pieces)]
    assert {Piece.named(piece.name) for piece in pieces} == set(pieces)
    assert sum(piece.stage == "align" for piece in pieces) == 2 * (2 + 2)
    assert sum(piece.stage == "exchange" for piece in pieces) == 2
    with pytest.raises(InputError, match="'base=0' is no piece of a study"):
        Piece.named("base=0")


EFFECTS = {BASE: 2.0, "lambda_zero": 1.9, "random_masks": 1.2, "lvlm_va": 1.2}


def _models(own: float, seeds: list[str]) -> dict[str, dict[str, Outputs]]:
    effects = {**EFFECTS, "lvlm_va": own}
    return {
        str(base): {
            name: _outputs(_samples(), effect, [""] if name == BASE else seeds, base)
            for name, effect in effects.items()
        }
        for base in range(2)
    }


def test_several_lambdas_are_one_family() -> None:
    samples = _samples()
    by_lambda = {"0.1": _models(1.9, ["0", "1"]), "1": _models(0.2, ["0", "1"])}
    both = compared_over(by_lambda, samples, draws=500)
    single = {value: compared(models, samples, draws=500) for value, models in by_lambda.items()}
    for value, table in single.items():
        own = both[both["rrr_lambda"] == value].drop(columns=["rrr_lambda", "p_holm"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(own, table.drop(columns="p_holm"))
    for _, rows in both.groupby("measure"):
        assert len(rows) == 6
        expected = holm({str(n): p for n, p in enumerate(rows["p"])})
        np.testing.assert_allclose(rows["p_holm"], list(expected.values()))
    said = conclusions(both, "reliance")
    assert len(said) == 6
    assert said[1].startswith("LVLM-VA, λ = 0.1 is not better than 'control: λ = 0' by reliance: ")
    assert said[2].startswith("LVLM-VA, λ = 0.1 is worse than 'control: random masks' by reliance: ")
    assert said[5].startswith("LVLM-VA, λ = 1 is better than 'control: random masks' by reliance: ")


def test_a_method_without_lambda_stands_once_and_not_against_what_has_one() -> None:
    samples = _samples()
    models = _models(1.9, ["0", "1"])
    for base, of in models.items():
        of["lvlm_va_counterexamples"], of["rrr_gt"] = (
            _outputs(samples, effect, ["0", "1"], int(base)) for effect in (0.3, 0.1)
        )
    both = compared_over({"0.1": models, "1": models}, samples, draws=20)
    counted = both[both["measure"] == "wga"].groupby(["method", "rrr_lambda"])["against"].agg(list).to_dict()
    assert counted == {
        ("lvlm_va", "0.1"): [BASE, "lambda_zero", "random_masks", "rrr_gt"],
        ("lvlm_va", "1"): [BASE, "lambda_zero", "random_masks", "rrr_gt"],
        ("lvlm_va_counterexamples", ""): [BASE, "lambda_zero"],
    }
    bound = both[(both["against"] == "rrr_gt") & (both["measure"] == "wga")]  # a family of its own
    np.testing.assert_allclose(bound["p_holm"], np.minimum(1, 2 * bound["p"]))


def test_results_at_two_lambdas_of_pictures_whose_groups_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy alone decides; what has no λ stands once; a method at params' own λ is in the rows and not compared."""
    monkeypatch.chdir(ROOT)
    samples = _samples().query("split != 'test_twins'").sort_values("id", ignore_index=True)
    unknown = pd.array([None] * len(samples), dtype="boolean")
    table = samples.assign(spurious=unknown, group=samples["label"].astype(str), sha256="")
    write_table(tmp_path / "samples.parquet", table)
    effects = {"": {BASE: 2.0, "lambda_zero": 1.9, "lvlm_va": 1.0}, "0.1": {"lvlm_va": 0.5}, "1": {"lvlm_va": 0.1}}
    for base in range(2):
        for rrr_lambda, of_methods in effects.items():
            for method, effect in of_methods.items():
                piece = Piece("evaluate", base, rrr_lambda, method)
                found = _outputs(samples, effect, [""] if method == BASE else ["0", "1"], base)
                known = paths_of(tmp_path, piece.folder(tmp_path))
                write_outputs(known["evaluations"] / f"{method}.safetensors", found)
                mark_of(tmp_path, piece).parent.mkdir(exist_ok=True)
                mark_of(tmp_path, piece).touch()
        verdicts = ROOT / "tests/fixtures/format1/rules_verdicts.jsonl"
        shutil.copy(verdicts, paths_of(tmp_path, tmp_path / f"base={base}")["verdicts"])
    declare(tmp_path, None)
    said = StringIO()
    with contextlib.redirect_stdout(said):
        conclude(tmp_path)
    rows = pd.read_csv(tmp_path / "rows.csv", dtype=str).fillna("")
    counted = rows.groupby(["method", "rrr_lambda"]).size().to_dict()
    assert counted == {
        (BASE, ""): 2,
        ("lambda_zero", ""): 4,
        **{("lvlm_va", rrr_lambda): 4 for rrr_lambda in effects},
    }
    assert set(rows["wga"]) == set(rows["reliance"]) == {""}
    compared_rows = pd.read_csv(tmp_path / "rows_compared.csv", dtype={"rrr_lambda": str})
    assert compared_rows[["rrr_lambda", "measure", "against"]].to_numpy().tolist() == [
        [rrr_lambda, "accuracy", other] for rrr_lambda in ("0.1", "1") for other in (BASE, "lambda_zero")
    ]
    page = (tmp_path / "rows.md").read_text()
    assert page.startswith("18 models; critic: rules (a stand-in, not a vision-language model)")
    assert "Primary measure: accuracy (more is better)." in page
    assert said.getvalue().count("LVLM-VA, λ = ") == 4
    (tmp_path / "declared.json").write_text('{"primary": "wga"}')
    with pytest.raises(InputError, match="'wga' was declared, and the data set does not hold what it needs"):
        conclude(tmp_path)


def test_a_base_that_lacks_a_seed_is_not_compared() -> None:
    models = _models(0.2, ["0", "1"])
    models["2"] = {**models["0"], "lvlm_va": _outputs(_samples(), 0.2, ["0"], 2)}
    assert list(complete_bases(models, ["lvlm_va", *EFFECTS])) == ["0", "1"]


def test_a_data_set_without_groups_or_pairs_is_measured_by_accuracy() -> None:
    samples = _samples()
    assert list(measures_of(samples)) == ["reliance", "wga", "accuracy"]
    plain = samples[samples["split"] != "test_twins"]
    assert list(measures_of(plain)) == ["wga", "accuracy"]
    unknown = plain.assign(spurious=None, group=plain["label"].astype(str))
    assert list(measures_of(unknown)) == ["accuracy"]
