"""What is counted of critics on planted shortcuts: intervals in closed form, tables by hand, the oracle's rates."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from lvlmva_core.calibration import (
    UNTOUCHED,
    Item,
    cheapest,
    cost,
    make_items,
    proportion,
    quality,
    regions_table,
    unusable,
    with_regions,
)
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.critic import criticise
from lvlmva_core.lvlm.judge import judge_by_stand_in
from lvlmva_core.lvlm.settings import Endpoint, OracleCritic, StandInJudge
from lvlmva_core.regions import MAX_REGIONS, regions_present

COUNT = 150
NAMES = ["sample", "kind", "size", "place", "made", "region", "area", "truth", "verdict", "before"]


def _wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson 1927: the roots of (p - hits/total)^2 = z^2 p (1 - p) / total."""
    z2 = 1.959963984540054**2
    roots = np.roots([1 + z2 / total, -2 * hits / total - z2 / total, (hits / total) ** 2])
    return float(roots.real.min()), float(roots.real.max())


@pytest.mark.parametrize(("hits", "total"), [(0, 1), (1, 1), (3, 7), (22, 90), (50, 50), (899, 1000)])
def test_intervals_are_the_roots_of_wilsons_equation(hits: int, total: int) -> None:
    found = proportion(hits, total)
    assert found["share"] == hits / total
    assert (found["low"], found["high"]) == pytest.approx(_wilson(hits, total), abs=1e-7)


def test_without_any_region_there_is_no_share() -> None:
    assert proportion(0, 0) == {"hits": 0, "total": 0, "share": None, "low": None, "high": None}


def _items(channels: int = 3, objects: bool = True, kinds: tuple[str, ...] = ("patch", "blur")) -> list[Item]:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 40, (COUNT, channels, 32, 32)).astype(np.uint8)
    discs = np.broadcast_to(np.hypot(*(np.indices((32, 32)) - 15.5)) < 9, (COUNT, 32, 32))
    ids = [f"s{n:03d}" for n in range(COUNT)]
    return make_items(ids, ["a"] * COUNT, pictures, [None] * COUNT, discs if objects else None, kinds, 3)


def _regions(items: list[Item], present: int = 3, keep: bool = True) -> list[Item]:
    """Horizontal bands under an attribution that is positive in the middle alone."""
    own = [item for item in items if item.local or item.kind == UNTOUCHED]
    bands = np.broadcast_to((np.arange(32) * present // 32).astype(np.uint8)[:, None], (len(own), 32, 32))
    effect = np.zeros((len(own), 32, 32), np.float32)
    effect[:, :, 12:20] = 1
    return with_regions(items, bands, effect, "half_of_feature", keep=keep)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_rates_of_the_oracle_are_found(rate: float) -> None:
    items = _regions(_items(kinds=("patch", "letter", "strip", "blur")))
    settings = OracleCritic(
        critic="oracle", prompts="generic", false_negative_rate=rate, false_positive_rate=rate / 2, seed=2
    )
    critiques = criticise(settings, [item.case for item in items])
    verdicts = judge_by_stand_in(StandInJudge(judge="rules", prompts="generic"), critiques)
    found = quality(regions_table(items, verdicts, "half_of_feature"))
    for measured in (found["recall"], *(kind["recall"] for kind in found["by"]["kind"].values())):
        assert measured["low"] <= 1 - rate <= measured["high"]
    assert found["recall"]["total"] == 3 * COUNT
    alarms = found["false_alarms"]
    assert alarms["low"] <= rate / 2 <= alarms["high"]
    if rate == 0:
        assert found["precision"]["share"] == 1
        assert found["global"]["blur"]["changed"]["share"] == 0
    assert unusable(items, critiques, verdicts) == {
        "critic": 0,
        "judge": 0,
        "without_regions": 0,
        "pictures": len(items),
    }


def test_a_shortcut_that_the_model_does_not_react_to_gets_a_region_of_its_mask() -> None:
    items = _items()
    for item in _regions(items):
        if item.local:
            own = int(item.case.segments[item.mask][0])
            if item.made:
                assert np.array_equal(item.case.segments == own, item.mask)
            truth = item.truth("half_of_feature")
            assert list(truth.values()).count("planted") == 1
            for rule in (
                "any",
                "majority_of_attribution",
            ):  # by every rule, where the model's own map has nothing there
                assert not item.made or item.truth(rule)[own] == "planted"  # type: ignore[arg-type]
    assert all(item.made for item in _regions(items, keep=False) if item.local)


def test_a_shortcut_that_the_model_reacts_to_keeps_the_models_regions() -> None:
    items = _items(kinds=("patch",))
    own = [item for item in items if item.local or item.kind == UNTOUCHED]
    effect = np.stack([item.mask for item in own]).astype(np.float32)
    segments = np.stack([(item.mask | np.roll(item.mask, 1, axis=0)).astype(np.uint8) for item in own])
    found = with_regions(items, segments, effect, "half_of_feature", keep=True)
    for item, before in zip(found, segments, strict=True):
        assert not item.made
        assert np.array_equal(item.case.segments, before)
        assert not item.local or item.truth("half_of_feature")[1] == "planted"


def test_where_all_colours_are_taken_the_last_region_gives_its_own_up() -> None:
    for item in _regions(_items(), present=MAX_REGIONS, keep=False):
        assert len(regions_present(item.case.segments)) <= MAX_REGIONS
        assert not item.local or np.array_equal(item.case.segments == MAX_REGIONS - 1, item.mask)


def test_every_kind_has_each_size_and_place_equally_often_and_the_same_pictures() -> None:
    items = _items(kinds=("patch", "strip"))
    for kind in ("patch", "strip"):
        of_kind = [item for item in items if item.kind == kind]
        assert [item.base for item in of_kind] == [f"s{n:03d}" for n in range(COUNT)]
        turns = pd.Series([(item.size, item.place) for item in of_kind]).value_counts()
        assert set(turns) == {COUNT // 6}
    again = _items(kinds=("patch", "strip"))
    assert all(np.array_equal(a.case.picture, b.case.picture) for a, b in zip(items, again, strict=True))


def test_other_kinds_do_not_change_what_is_drawn_for_one() -> None:
    alone = [item.case.picture for item in _items(kinds=("strip",)) if item.kind == "strip"]
    beside = [item.case.picture for item in _items(kinds=("patch", "strip")) if item.kind == "strip"]
    assert np.array_equal(np.stack(alone), np.stack(beside))


def test_a_kind_that_the_pictures_cannot_show_is_refused() -> None:
    with pytest.raises(InputError, match="'colour_cast': these pictures can show patch, letter, strip, blur"):
        _items(channels=1, kinds=("colour_cast",))


def test_counts_of_a_small_table_by_hand() -> None:
    rows = [
        # two patches: one found, one missed; a rejected region on the object, one beside it, a shortcut of its own
        ("a", "patch", "small", "on", True, 3, 0.02, "planted", "no", None),
        ("a", "patch", "small", "on", True, 0, 0.40, "object", "no", None),
        ("a", "patch", "small", "on", True, 1, 0.40, "elsewhere", "no", None),
        ("a", "patch", "small", "on", True, 2, 0.10, "known_shortcut", "no", None),
        ("b", "patch", "large", "off", False, 0, 0.10, "planted", "yes", None),
        ("b", "letter", "large", "off", True, 3, 0.10, "planted", "no", None),
        ("a", UNTOUCHED, None, None, False, 0, 0.4, "object", "no", None),
        ("a", UNTOUCHED, None, None, False, 1, 0.4, "object", "yes", None),
        ("a", UNTOUCHED, None, None, False, 2, 0.1, "elsewhere", "no", None),
        ("a", "blur", "small", None, False, 0, 0.4, "object", "no", "no"),
        ("a", "blur", "small", None, False, 1, 0.4, "object", "no", "yes"),
        ("a", "blur", "small", None, False, 2, 0.1, "elsewhere", "no", None),
    ]
    found = quality(pd.DataFrame(rows, columns=NAMES))

    def counts(of: dict[str, Any]) -> tuple[int, int]:
        return of["hits"], of["total"]

    assert counts(found["recall"]) == (2, 3)
    assert counts(found["precision"]) == (2, 4)
    assert counts(found["precision_on_object"]) == (2, 3)
    assert counts(found["by"]["kind"]["patch"]["recall"]) == (1, 2)
    assert counts(found["by"]["region size"]["below 5 %"]["recall"]) == (1, 1)
    assert counts(found["by"]["region size"]["5 to 20 %"]["recall"]) == (1, 2)
    assert counts(found["by"]["region size"]["above 20 %"]["precision"]) == (0, 2)
    assert counts(found["by"]["kind and region size"]["letter, 5 to 20 %"]["recall"]) == (1, 1)
    assert counts(found["by"]["place"]["off the object"]["recall"]) == (1, 2)
    assert counts(found["by"]["region"]["from attributions"]["recall"]) == (0, 1)
    assert counts(found["false_alarms"]) == (1, 2)
    assert counts(found["rejected_elsewhere"]) == (1, 1)
    assert counts(found["global"]["blur"]["changed"]) == (1, 2)
    assert counts(found["global"]["blur"]["false_alarms"]) == (2, 2)


def _critic(name: str, hits: int, usd: float | None, stand_in: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "stand_in": stand_in,
        "quality": {"recall": proportion(hits, 100)},
        "cost": {"usd_per_1000_pictures": usd},
    }


def test_the_cheapest_is_chosen_by_the_lower_end_of_the_interval() -> None:
    critics = [
        _critic("free", 100, 0.0, stand_in=True),
        _critic("poor", 60, 0.1),
        _critic("perhaps", 88, 0.5),  # 0.88, but at least 0.80
        _critic("good", 95, 2.0),
        _critic("best", 99, 9.0),
        _critic("unpriced", 99, None),
    ]
    best, reasons = cheapest(critics, 0.85)
    assert best == "good"
    assert "stand-in" in reasons["free"]
    assert "more pictures may show" in reasons["perhaps"]
    assert "more pictures" not in reasons["poor"]
    assert "price is unknown" in reasons["unpriced"]
    assert cheapest(critics, 0.75)[0] == "perhaps"
    assert cheapest(critics[:3], 0.85)[0] is None


def test_costs_count_a_shared_answer_once_and_know_when_they_are_unknown() -> None:
    priced = Endpoint(
        base_url="http://localhost:1/v1",
        model="m",
        usd_per_million_input_tokens=2.0,
        usd_per_million_output_tokens=10.0,
    )
    unpriced = Endpoint(base_url="https://example.org/v1", model="m", api_key_variable=None)
    answers = [
        {"key": key, "response": {"usage": {"prompt_tokens": 1000, "completion_tokens": 100}}}
        for key in ("a", "b", "a")
    ]
    found = cost([(priced, answer) for answer in answers], 4)
    assert (found["answers"], found["input_tokens"], found["output_tokens"]) == (2, 2000, 200)
    assert found["usd"] == pytest.approx(0.006)
    assert found["usd_per_1000_pictures"] == pytest.approx(1.5)
    assert cost([(priced, answers[0]), (unpriced, answers[1])], 4)["usd"] is None
