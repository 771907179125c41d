"""Patterns against ones that were planted, words against their closed form, names against what is in the file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lvlmva_core import patterns as module
from lvlmva_core.errors import InputError
from lvlmva_core.overrides import Key, read_reviews
from lvlmva_core.pattern_names import give_name, read_names, with_names
from lvlmva_core.patterns import Pattern, find_patterns, group_patterns, terms_of, tf_idf, words_of_regions
from lvlmva_core.report.gallery import Gallery

SIDE, PER_CLASS = 24, 20
# what is planted: class -> (row, column) of a square's corner, grey value, in how many of the class's samples
PLANTED = {0: ((18, 0), 250, 12), 1: ((0, 18), 90, 7)}


@pytest.fixture(scope="module")
def planted() -> dict[str, np.ndarray]:
    """Two classes: noise, a region 0 in the middle, a region 1 where something was planted; 1 is rejected there."""
    rng = np.random.default_rng(0)
    n = 2 * PER_CLASS
    labels = np.repeat([0, 1], PER_CLASS)
    images = rng.integers(0, 40, (n, 1, SIDE, SIDE), dtype=np.uint8)
    segments = np.zeros((n, SIDE, SIDE), dtype=np.uint8)
    attributions = rng.uniform(-0.1, 0.1, (n, SIDE, SIDE)).astype(np.float32)
    reliance = np.full((n, 2), np.nan)
    reliance[:, 0] = 0.5
    rejected = np.zeros(n, dtype=bool)
    for label, ((row, column), grey, many) in PLANTED.items():
        for place in range(many):
            sample = label * PER_CLASS + place
            square = (slice(row, row + 6), slice(column, column + 6))
            images[sample, 0][square] = grey
            segments[sample][square] = 1
            attributions[sample][square] = 2.0
            reliance[sample, 1] = 0.3 + 0.1 * (place % 2)
            rejected[sample] = True
    return {
        "segments": segments,
        "attributions": attributions,
        "images": images,
        "labels": labels,
        "reliance": reliance,
        "rejected": rejected,
    }


def find(of: dict[str, np.ndarray], order: Sequence[int] | None = None) -> tuple[list[Pattern], int]:
    rows = np.arange(len(of["labels"])) if order is None else np.asarray(order)
    words = {0: "a bright marker of lead", 1: "a dark stain at the edge"}
    return find_patterns(
        of["segments"][rows],
        [[1] if of["rejected"][n] else [] for n in rows],
        of["attributions"][rows],
        of["images"][rows],
        of["labels"][rows],
        [{1: words[int(of["labels"][n])]} for n in rows],
        of["reliance"][rows],
        n_classes=2,
    )


def test_what_was_planted_is_found_and_told(planted: dict[str, np.ndarray]) -> None:
    found, rare = find(planted)
    assert rare == 0
    assert [(pattern.name, pattern.samples) for pattern in found] == [
        ("bottom left, bright: bright, lead, marker", 12),
        ("top right, medium grey: dark, edge, stain", 7),
    ]
    for label, pattern in enumerate(found):
        (row, column), _, many = PLANTED[label]
        assert pattern.members == [(label * PER_CLASS + place, 1) for place in range(many)]
        assert pattern.anchor in pattern.members
        assert pattern.shares == pytest.approx([many / PER_CLASS * (k == label) for k in (0, 1)])
        falls = [planted["reliance"][n, region] for n, region in pattern.members]
        assert pattern.reliance == pytest.approx(np.mean(falls))
        assert pattern.low is not None
        assert pattern.high is not None
        assert min(falls) <= pattern.low < np.mean(falls) < pattern.high <= max(falls)
        # the share of each sample's positive attribution that lies in the square, pixel by pixel
        shares = []
        for n, _ in pattern.members:
            positive = [max(float(value), 0.0) for value in planted["attributions"][n].ravel()]
            inside = planted["attributions"][n][row : row + 6, column : column + 6].astype(float).sum()
            shares.append(inside / sum(positive))
        assert pattern.attribution == pytest.approx(np.mean(shares))
        assert pattern.heat[label].sum() == pytest.approx(sum(shares) / PER_CLASS, rel=1e-5)
        assert pattern.heat[1 - label].sum() == 0
        outside = pattern.heat[label].copy()
        outside[row : row + 6, column : column + 6] = 0
        assert outside.sum() == 0


def test_the_order_of_samples_changes_no_pattern(planted: dict[str, np.ndarray]) -> None:
    order = np.random.default_rng(1).permutation(2 * PER_CLASS)
    found, _ = find(planted)
    shuffled, _ = find(planted, order.tolist())
    for one, other in zip(found, shuffled, strict=True):
        assert {(int(order[n]), region) for n, region in other.members} == set(one.members)
        assert (one.name, one.samples) == (other.name, other.samples)
        np.testing.assert_allclose(one.heat, other.heat, rtol=1e-5)


def test_what_is_rare_is_counted_and_nothing_rejected_is_no_pattern(planted: dict[str, np.ndarray]) -> None:
    few = {**planted, "rejected": planted["rejected"] & (np.arange(2 * PER_CLASS) < PER_CLASS + 2)}
    found, rare = find(few)
    assert ([pattern.samples for pattern in found], rare) == ([12], 2)
    assert find({**planted, "rejected": np.zeros(2 * PER_CLASS, dtype=bool)}) == ([], 0)


def test_without_an_exchange_there_is_no_reliance(planted: dict[str, np.ndarray]) -> None:
    n = 2 * PER_CLASS
    arrays = (planted[name] for name in ("attributions", "images", "labels"))
    found, _ = find_patterns(
        planted["segments"],
        [[1] if each else [] for each in planted["rejected"]],
        *arrays,
        [{}] * n,
        None,
        n_classes=2,
    )
    assert [(each.name, each.reliance, each.low, each.words) for each in found] == [
        ("bottom left, bright", None, None, []),
        ("top right, medium grey", None, None, []),
    ]


def test_more_regions_than_are_compared_pair_by_pair_give_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    corners = np.array([[0.1, 0.1], [0.9, 0.9], [0.1, 0.9]])
    truth = rng.integers(0, 3, 300)
    described = np.concatenate([corners[truth] + rng.normal(0, 0.01, (300, 2)), np.full((300, 2), 0.1)], axis=1)
    whole = group_patterns(described, np.zeros((300, 0)))
    monkeypatch.setattr(module, "MOST_JOINED", 40)
    parted = group_patterns(described, np.zeros((300, 0)))
    np.testing.assert_array_equal(whole, parted)
    assert len({(group, true) for group, true in zip(whole.tolist(), truth.tolist(), strict=True)}) == 3


def test_words_decide_where_place_and_likeness_do_not() -> None:
    """Two heaps a quarter of a side apart: with the same words they join, with different ones they do not."""
    described = np.zeros((8, 4))
    described[4:, 1] = 0.25
    same, _ = tf_idf(["the lead marker"] * 8)
    apart, _ = tf_idf(["the lead marker"] * 4 + ["a fold of skin"] * 4)
    assert group_patterns(described, same).tolist() == [0] * 8
    assert group_patterns(described, apart).tolist() == [0] * 4 + [1] * 4


def test_tf_idf_is_its_closed_form() -> None:
    texts = ["The red marker is lead, lead!", "a marker", "Lead and bone; BONE", "nothing"]
    weights, terms = tf_idf(texts)
    assert terms == ["lead", "marker"]  # bone stands in one text only, red is a region's colour
    held = [set(terms_of(text)) for text in texts]
    for n, words in enumerate(held):
        raw = [(math.log(5 / (1 + 2)) + 1) * (term in words) for term in terms]
        length = math.sqrt(sum(each**2 for each in raw)) or 1.0
        assert weights[n] == pytest.approx([each / length for each in raw])
    assert tf_idf(["", "..."])[0].shape == (2, 0)


def test_each_region_gets_the_sentences_about_it() -> None:
    critique = (
        "The picture shows a knee. The Red region holds a letter. It lies off the bone.\n"
        "The blue region and the yellow one lie on the joint! Red, blue and yellow fill the picture.\nCoverage is good"
    )
    found = words_of_regions(critique, {0: "red", 1: "blue", 2: "yellow", 3: "green"})
    assert found == {
        0: "The Red region holds a letter. It lies off the bone.",
        1: "The blue region and the yellow one lie on the joint!",
        2: "The blue region and the yellow one lie on the joint!",
        3: "",
    }


@dataclass
class Samples:
    ids: list[str]
    digests: list[str]


def named(patterns: list[Pattern], names: dict[Key, str], digests: list[str]) -> list[str]:
    samples = Samples([f"s{n}" for n in range(2 * PER_CLASS)], digests)
    return [pattern.name for pattern in with_names(patterns, samples, names)]


def test_a_name_is_tied_to_a_region_and_falls_with_its_segmentation(
    planted: dict[str, np.ndarray], tmp_path: Path
) -> None:
    found, _ = find(planted)
    n, region = found[0].anchor
    digests = ["d"] * 2 * PER_CLASS
    assert give_name(tmp_path, (f"s{n}", "d", region), '  the lead,\n "L" ', "anna") == 'the lead, "L"'
    give_name(tmp_path, ("s39", "d", 0), "elsewhere", "anna")
    names = read_names(tmp_path)
    assert names == {(f"s{n}", "d", region): 'the lead, "L"', ("s39", "d", 0): "elsewhere"}
    assert named(found, names, digests) == ['the lead, "L"', found[1].name]
    assert named(found, names, ["e"] * len(digests)) == [pattern.name for pattern in found]  # a new segmentation
    give_name(tmp_path, (f"s{n}", "d", region), "markers", "anna")
    assert named(found, read_names(tmp_path), digests)[0] == "markers"
    assert read_reviews(tmp_path).events == []  # the folder of names is none of verdicts
    assert read_reviews(tmp_path).notes == []
    with pytest.raises(InputError, match="has 81 characters; between 1 and 80 are kept"):
        give_name(tmp_path, ("s1", "d", 0), "x" * 81, "anna")
    with pytest.raises(InputError, match="expected a name of 1 to 60"):
        give_name(tmp_path, ("s1", "d", 0), "x", "../anna")
    (tmp_path / "patterns/bert.csv").write_text("sample,name\n")
    with pytest.raises(InputError, match=r"bert\.csv: the first line must be 'sample,segmentation,region,name,"):
        read_names(tmp_path)


def test_the_gallery_satisfies_what_names_need() -> None:
    assert {"ids", "digests"} <= set(Gallery.__dataclass_fields__)
