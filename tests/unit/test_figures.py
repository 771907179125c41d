"""What is drawn, read back from the figures."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from lvlmva.sweep import read_experiments, sweep
from lvlmva_core.comparison import over_seeds
from lvlmva_core.errors import InputError
from lvlmva_core.report.chain import chain_figure
from lvlmva_core.report.figures import differences_figure, outcome_figure, sweep_figure
from lvlmva_core.report.panel import panel_of
from lvlmva_core.report.tables import before_and_after, supervision


def test_differences_are_drawn_with_a_star_where_they_are_significant() -> None:
    found = {
        "WGA": {"lvlm_va": (0.3, 0.05, 0.016), "lambda_zero": (-0.1, 0.02, 0.3)},
        "accuracy": {"lvlm_va": (0.0, 0.0, 1.0), "lambda_zero": (0.0, 0.0, 1.0)},
        "AGA": {"lvlm_va": (0.3, 0.05, 0.016), "lambda_zero": (0.01, 0.2, 0.9)},
    }
    figure = differences_figure(found, 7, "oracle")
    wga = figure.axes[0]
    assert [bar.get_width() for bar in wga.patches] == [-0.1, 0.3]  # in the order of the table of methods
    assert [label.get_text() for label in wga.get_yticklabels()] == ["control: λ = 0", "LVLM-VA"]
    assert [text.get_text() for text in wga.texts] == ["-0.100", "+0.300 *"]
    low, high = wga.get_xlim()
    assert low < -0.12
    assert high > 0.35
    assert figure.axes[2].get_xlim()[0] < 0.01 - 0.2  # a whisker is drawn to its end
    assert "7 seeds; * two-sided p < 0.05" in figure.get_supxlabel()
    assert "too few for a significant difference" in differences_figure(found, 3, "oracle").get_supxlabel()


def test_who_judged_is_never_cut_off() -> None:
    caption = "skin; critic: oracle (a stand-in, not a vision-language model)" + ", with settings that take room" * 9
    found = {"WGA": {"lvlm_va": (0.3, 0.05, 0.016)}}
    bars = {"WGA": {"lvlm_va": (0.3, 0.05)}}
    for figure in (differences_figure(found, 7, caption), outcome_figure(bars, caption)):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (title,) = [text for text in figure.findobj(Text) if "stand-in" in text.get_text()]
        assert title.get_text().replace("\n", " ") == caption
        box, page = title.get_window_extent(canvas.get_renderer()), figure.bbox
        assert page.x0 < box.x0
        assert box.x1 < page.x1
        assert box.y1 < page.y1
        assert all(box.y0 > axes.bbox.y1 for axes in figure.axes)


@pytest.mark.parametrize(
    ("xs", "scale"), [([10.0, 0.1, 1.0], "log"), ([1.0, 2.0, 3.0], "linear"), ([0, 1, 9], "linear")]
)
def test_a_sweep_is_drawn_in_the_order_of_its_values(xs: list[float], scale: str) -> None:
    sweep = pd.DataFrame({"x": xs, "method": "lvlm_va", "metric": "WGA", "mean": xs, "std": 0.1})
    axes = sweep_figure(sweep, "align.rrr_lambda").axes[0]
    x, y = axes.lines[0].get_data()
    assert np.array_equal(x, sorted(xs))
    assert np.array_equal(y, sorted(xs))
    assert axes.get_xscale() == scale
    words = sweep.assign(x=["low_entropy", "random", "high_entropy"])
    assert [tick.get_text() for tick in sweep_figure(words, "rank.strategy").axes[0].get_xticklabels()] == words[
        "x"
    ].tolist()


SHOWN = """\
Experiment,rev,typ,params.yaml:rank.strategy,align.rrr_lambda,\
{lvlm}.accuracy.mean,{lvlm}.accuracy.std,metrics/evaluate.json:{lvlm}.wga.mean,metrics/evaluate.json:{lvlm}.wga.std
,workspace,baseline,random,5.0,0.1,0.1,0.1,0.1
,main,baseline,low_entropy,1.0,0.9,0.01,0.5,0.02
a,123,branch_base,random,1.0,0.8,0.03,0.4,0.04
b,124,branch_commit,high_entropy,1.0,,,,
"""


def test_experiments_are_read_as_dvc_shows_them(tmp_path: Path) -> None:
    file = tmp_path / "sweep.csv"
    file.write_text(SHOWN.format(lvlm="methods.lvlm_va.test"))
    found, columns = read_experiments(file, "rank.strategy", ["align.rrr_lambda"])
    assert columns["align.rrr_lambda"].to_dict() == {"low_entropy": 1.0, "random": 1.0, "high_entropy": 1.0}
    assert found.to_dict("list") == {
        "x": ["low_entropy", "random"] * 2,
        "method": ["lvlm_va"] * 4,
        "metric": ["accuracy", "accuracy", "WGA", "WGA"],
        "mean": [0.9, 0.8, 0.5, 0.4],
        "std": [0.01, 0.03, 0.02, 0.04],
    }
    assert len(read_experiments(file, "align.rrr_lambda")[0]) == 2  # the first of equal values
    with pytest.raises(InputError, match=r"no column 'rank\.seed'; name a key"):
        read_experiments(file, "rank.seed")
    with pytest.raises(InputError, match="write it with `dvc exp show --csv"):
        read_experiments(tmp_path / "gone.csv", "rank.seed")
    file.write_text(SHOWN.format(lvlm="other"))
    with pytest.raises(InputError, match="no experiment has metrics of lvlm_va"):
        read_experiments(file, "rank.strategy")


def test_a_sweep_is_printed_with_the_columns_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.csv"
    file.write_text(SHOWN.format(lvlm="methods.lvlm_va.test"))
    sweep(file, "rank.strategy", also="align.rrr_lambda", out=tmp_path / "sweep.png")
    assert capsys.readouterr().out.splitlines() == [
        "| rank.strategy | align.rrr_lambda | LVLM-VA: accuracy | LVLM-VA: WGA |",
        "| --- | --- | --- | --- |",
        "| low_entropy | 1 | 0.900 ± 0.010 | 0.500 ± 0.020 |",
        "| random | 1 | 0.800 ± 0.030 | 0.400 ± 0.040 |",
    ]
    assert (tmp_path / "sweep.png").stat().st_size > 0
    with pytest.raises(InputError, match=r"no column 'rank\.share'; its first line"):
        read_experiments(file, "rank.strategy", ["rank.share"])


def test_supervision_says_what_was_used_in_this_run() -> None:
    methods: dict[str, dict[str, float]] = {
        "base": {},
        "random_masks": {},
        "lvlm_va": {},
        "lvlm_va_counterexamples": {},
    }
    for critic, said in (
        ("oracle", " (here drawn from true masks)"),
        ("rules", " (here by a rule that knows where digits lie)"),
        ("text", " (here by a trained detector)"),
        ("gpt-4o@1", ""),
    ):
        found = supervision({"methods": methods, "verdicts": {"critic": [critic]}})
        assert found[:2] == ["none", f"which pictures LVLM-VA masks{said}, and how much of each"]
        described = "a description per class; " if critic == "gpt-4o@1" else ""  # the others read none
        assert set(found[2:]) == {f"{described}verdicts of the critic{said}"}


def test_one_seed_has_no_spread_in_the_table() -> None:
    runs = {"base": {"": {"test.accuracy": 0.5}}, "lvlm_va": {"0": {"test.accuracy": 0.6}, "1": {"test.accuracy": 0.8}}}
    one = {"base": runs["base"], "lvlm_va": {"0": {"test.accuracy": 0.6}}}
    assert [row[1] for row in before_and_after({"methods": over_seeds(runs)})[1]] == ["0.500", "0.700 ± 0.141"]
    assert [row[1] for row in before_and_after({"methods": over_seeds(one)})[1]] == ["0.500", "0.600"]


@pytest.mark.parametrize("overlay", ["grey", "colour"])
def test_the_overlay_is_drawn_as_the_critic_was_shown_it(overlay: Literal["grey", "colour"]) -> None:
    """Of a picture all orange: the stripes leave it as it is between them, the grey one nowhere."""
    picture = np.broadcast_to(np.array([250, 140, 10], np.uint8)[:, None, None], (3, 32, 32))
    segments = np.repeat(np.array([0, 1], np.uint8), 512).reshape(32, 32)
    parts = {"before": np.ones((32, 32)), "after": np.ones((32, 32)), "segments": segments, "mask": segments == 1}
    named = {"masks" if name == "mask" else name: ({"ids": ["a"]}, part[None]) for name, part in parts.items()}
    samples = pd.DataFrame({"id": ["a"], "label": [0]})
    panel = panel_of(samples, ["a"], picture[None], ["k"], "who", named, np.ones(1), overlay)
    chain = chain_figure("a", picture, parts, [], None, "who", overlay)
    for figure in (panel, chain):
        titled = next(axes for axes in figure.axes if axes.get_title() == "overlay")
        shown = np.asarray(titled.images[0].get_array())
        assert (shown == [250, 140, 10]).all(axis=2).any() == (overlay == "colour")
