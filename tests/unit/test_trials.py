"""The benchmarks on wrong verdicts and on shortcuts without a place: their pages, and what they count."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import critic_errors, supports
from benchmarks.trials import differences, values_of
from lvlmva.tables import END
from lvlmva_core.outputs import Outputs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("made", [critic_errors, supports])
def test_a_page_shows_the_tables_of_the_committed_rows(made: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows, compared = pd.read_csv(made.ROWS), pd.read_csv(made.COMPARED)  # type: ignore[attr-defined]
    start = f"<!-- {made.COMMAND} -->\n"  # type: ignore[attr-defined]
    shown = made.PAGE.read_text().partition(start)[2].partition(END)[0]  # type: ignore[attr-defined]
    assert shown == made.tables(rows, compared)  # type: ignore[attr-defined]
    assert shown.count("\n| ---") >= 3


def _compared() -> pd.DataFrame:
    """Differences that are 10 · false negatives + false positives, of every cell."""
    return pd.DataFrame(
        [
            {
                **dict(zip(("errors", "false_negatives", "false_positives"), cell, strict=True)),
                **{"method": "lvlm_va", "measure": "wga", "against": "base", "difference": 10 * cell[1] + cell[2]},
            }
            for cell in critic_errors.cells()
        ]
    )


def test_a_grid_has_every_cell_in_its_place_and_none_where_nothing_was_run() -> None:
    compared = _compared()
    full = critic_errors.grid_of(compared, "independent", "lvlm_va", "wga", "difference", "base")
    wanted = 10 * np.array(critic_errors.MISSED)[None] + np.array(critic_errors.FALSE_ALARMS)[:, None]
    np.testing.assert_allclose(full, wanted)
    some = critic_errors.grid_of(compared, "by_class", "lvlm_va", "wga", "difference", "base")
    there = np.zeros((6, 6), bool)
    there[::2, ::2] = True
    np.testing.assert_array_equal(np.isfinite(some), there)
    np.testing.assert_allclose(some[there], wanted[there])
    assert len(critic_errors.cells()) == len(set(critic_errors.cells())) == 36 + 2 * 8


@pytest.mark.parametrize(
    ("local", "diffuse", "cut"),
    [((0.1, 0.3), (0.5, 0.9), 0.4), ((0.1, 0.6), (0.5, 0.9), 0.5), ((0.1, 0.2), (0.15,), 0.15)],
)
def test_the_threshold_lies_between_or_errs_least(
    local: tuple[float, ...], diffuse: tuple[float, ...], cut: float
) -> None:
    rows = [("decoy", 0.02, share) for share in local] + [("brightness", 1.0, share) for share in diffuse]
    rows += [("brightness", 0.3, 0.0), ("texture", 1.0, 0.0)]  # between, and of a kind that it is not set on
    table = pd.DataFrame(rows, columns=["kind", "support", "diffuse_share"]).assign(method="base")
    assert supports.threshold_of(table) == pytest.approx(cut)


class _Toy:
    """Stands for a trial: 40 test pictures of two classes, each with its own class's feature and without."""

    def __init__(self) -> None:
        rows = []
        for split in ("test", "test_agreeing", "test_plain"):
            rows += [(f"{split}-{n:02d}", split, n % 2, split != "test_plain", f"s{n}") for n in range(40)]
        rows.append(("train-0", "train", 0, True, "t"))
        columns = ["id", "split", "label", "spurious", "source"]
        self.samples = pd.DataFrame(rows, columns=columns).sort_values("id", ignore_index=True)

    def outputs(self, reliance: float, wrong: int) -> Outputs:
        """A model whose contrasts the feature moves by `reliance`, and that errs on `wrong` pictures of class 0."""
        rows = self.samples[self.samples["split"].str.startswith("test")]
        place, label = rows["id"].str[-2:].astype(int).to_numpy(), rows["label"].to_numpy()
        contrast = np.where(place // 2 % 2, 3.0, 1.0) + reliance * (rows["split"] == "test_agreeing").to_numpy()
        errs = (rows["split"] == "test").to_numpy() & (label == 0) & (place // 2 < wrong)
        own = np.where(errs, -contrast, contrast) / 2
        logits = np.stack([np.where(label == 0, own, -own), np.where(label == 1, own, -own)], axis=1)
        nothing = np.zeros((0, 1, 3), np.float32)
        ids = rows["id"].tolist()
        return Outputs(["0"], ids, logits[:, None].astype(np.float32), [], nothing, {}, nothing[:, 0], [], nothing)


def test_a_models_values_and_differences_are_the_closed_form() -> None:
    """Contrasts of 1 and 3 spread by 1; a feature that adds 2 is a reliance of 2; 4 of 20 wrong is a WGA of 0.8."""
    toy = _Toy()
    model, other = toy.outputs(2.0, 4), toy.outputs(-0.5, 0)
    assert values_of(toy, model) == pytest.approx({"reliance": 2.0, "wga": 0.8, "accuracy": 0.9})  # type: ignore[arg-type]
    found = differences(toy, [model] * 3, [other] * 3, draws=200)  # type: ignore[arg-type]
    assert found["reliance"][0] == pytest.approx(1.5)
    assert found["wga"][0] == pytest.approx(-0.2)
    for value, low, high in found.values():
        assert low <= value <= high
    same = differences(toy, [model] * 2, [model] * 2, draws=50)  # type: ignore[arg-type]
    assert all(value == pytest.approx((0, 0, 0)) for value in same.values())
