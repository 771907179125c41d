"""The overlap rule and the stand-ins for a model: what they see, what they say, and in which form."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.critic import criticise
from lvlmva_core.lvlm.offline import central_stroke, criticise_by_oracle, criticise_by_rules, judge_by_rules
from lvlmva_core.lvlm.settings import OracleCritic
from lvlmva_core.regions import overlaps, regions_present, segmentation_digest
from lvlmva_core.render import COLOUR_NAMES

RULES = ("any", "half_of_feature", "majority_of_attribution")
MAPS = npst.arrays(np.uint8, (5, 4), elements=st.sampled_from([0, 1, 2, 11, 255]))


def _verdicts(critique: str, regions: list[int]) -> dict[int, str]:
    return judge_by_rules(critique, regions)


@given(
    segments=MAPS,
    mask=npst.arrays(bool, (5, 4)),
    attribution=npst.arrays(np.float32, (5, 4), elements=st.integers(-8, 8).map(float)),
)
@settings(max_examples=200, deadline=None)
def test_overlap_rules_agree_with_a_count_pixel_by_pixel(
    segments: np.ndarray, mask: np.ndarray, attribution: np.ndarray
) -> None:
    for rule in RULES:
        expected = {}
        for region in sorted({int(label) for label in segments.flat} - {255}):
            held = feature = 0
            on = total = 0.0
            for row in range(5):
                for column in range(4):
                    inside = segments[row, column] == region
                    feature += int(mask[row, column])
                    held += int(inside and mask[row, column])
                    effect = max(float(attribution[row, column]), 0.0)
                    total += effect if inside else 0.0
                    on += effect if inside and mask[row, column] else 0.0
            expected[region] = {
                "any": held >= 1,
                "half_of_feature": held >= 1 and held / feature >= 0.5,
                "majority_of_attribution": total > 0 and on / total > 0.5,
            }[rule]
        assert overlaps(segments, mask, attribution, rule) == expected


def test_overlap_refuses_unknown_rules_and_shapes_that_differ() -> None:
    segments, mask, effect = np.zeros((2, 2), np.uint8), np.zeros((2, 2), bool), np.zeros((2, 2))
    with pytest.raises(ValueError, match="unknown overlap rule 'most'"):
        overlaps(segments, mask, effect, "most")
    with pytest.raises(ValueError, match="must have one shape"):
        overlaps(segments, mask[:1], effect, "any")


def _digit_with_decoy(shade: int) -> np.ndarray:
    picture = np.zeros((1, 28, 28), np.uint8)
    picture[0, 6:22, 13:16] = 200
    picture[0, 24:28, 24:28] = shade
    return picture


@pytest.mark.parametrize("shade", [30, 130, 255])
def test_the_central_stroke_is_the_digit_without_the_decoy(shade: int) -> None:
    expected = np.zeros((28, 28), bool)
    expected[6:22, 13:16] = True
    np.testing.assert_array_equal(central_stroke(_digit_with_decoy(shade)), expected)


def test_a_broken_stroke_counts_whole_and_an_empty_picture_has_none() -> None:
    picture = np.zeros((1, 28, 28), np.uint8)
    picture[0, 6:10, 13:16] = picture[0, 13:22, 13:16] = 200
    assert central_stroke(picture).sum() == (picture > 0).sum()
    assert not central_stroke(np.zeros((3, 28, 28), np.uint8)).any()


def test_rules_reject_exactly_the_regions_that_miss_the_stroke() -> None:
    segments = np.full((28, 28), 2, np.uint8)
    segments[:, :14] = 0
    segments[23:, 23:] = 1  # the decoy and some background
    verdicts = _verdicts(criticise_by_rules(_digit_with_decoy(130), segments), [0, 1, 2])
    assert verdicts == {0: "yes", 1: "no", 2: "yes"}
    segments[21, 15] = 1  # one pixel of the stroke
    assert _verdicts(criticise_by_rules(_digit_with_decoy(130), segments), [0, 1, 2])[1] == "yes"


@given(segments=MAPS, mask=npst.arrays(bool, (5, 4)))
@settings(max_examples=50, deadline=None)
def test_the_oracle_without_errors_rejects_exactly_what_overlaps(segments: np.ndarray, mask: np.ndarray) -> None:
    effect = np.ones((5, 4))
    for rule in RULES:
        said = criticise_by_oracle(
            "s", segments, mask, effect, rule=rule, false_positive_rate=0.0, false_negative_rate=0.0, seed=0
        )
        regions = regions_present(segments)
        if regions:
            wanted = {region: "no" if hit else "yes" for region, hit in overlaps(segments, mask, effect, rule).items()}
            assert _verdicts(said, regions) == wanted


@given(segments=MAPS, mask=npst.arrays(bool, (5, 4)), spurious=npst.arrays(bool, (5, 4)))
@settings(max_examples=50, deadline=None)
def test_the_oracle_that_knows_the_object_rejects_what_lies_mostly_beside_it(
    segments: np.ndarray, mask: np.ndarray, spurious: np.ndarray
) -> None:
    """By counting: with equal attribution everywhere, a region is relevant if most of its pixels lie on the object."""
    said = criticise_by_oracle(
        "s",
        segments,
        spurious,
        np.ones((5, 4)),
        rule="any",
        false_positive_rate=0.0,
        false_negative_rate=0.0,
        seed=0,
        object_mask=mask,
    )
    assert "lies on it by the rule majority_of_attribution" in said
    if regions := regions_present(segments):
        counted = {region: "yes" if mask[segments == region].mean() > 0.5 else "no" for region in regions}
        assert _verdicts(said, regions) == counted


def _wrong(false_positive_rate: float, false_negative_rate: float, seed: int = 0) -> tuple[set, set]:
    segments = np.array([[0, 1]], np.uint8)
    mask = np.array([[True, False]])
    rejected, accepted = set(), set()
    for sample in range(4000):
        verdicts = _verdicts(
            criticise_by_oracle(
                f"sample-{sample}",
                segments,
                mask,
                np.ones((1, 2)),
                rule="any",
                false_positive_rate=false_positive_rate,
                false_negative_rate=false_negative_rate,
                seed=seed,
            ),
            [0, 1],
        )
        if verdicts[0] == "yes":
            accepted.add(sample)
        if verdicts[1] == "no":
            rejected.add(sample)
    return rejected, accepted


def test_the_oracle_errs_at_the_set_rates_and_more_where_the_rate_is_higher() -> None:
    rejected, accepted = _wrong(0.1, 0.3)
    # four standard deviations of a binomial count
    assert abs(len(rejected) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert abs(len(accepted) - 1200) < 4 * (4000 * 0.3 * 0.7) ** 0.5
    more_rejected, same_accepted = _wrong(0.2, 0.3)
    assert rejected < more_rejected
    assert same_accepted == accepted
    assert _wrong(0.1, 0.3, seed=1)[0] != rejected
    assert _wrong(0.0, 1.0) == (set(), set(range(4000)))


def _errors(kind: Any, rates: tuple[float, float]) -> tuple[list[Case], set[tuple[int, int]]]:
    """60 pictures of six classes, half of each spurious, regions of many sizes; which (sample, region) is wrong."""
    cases = []
    for n in range(60):
        segments = np.zeros((10, 10), np.uint8)
        segments.ravel()[: 1 + n] = 1  # a region of 1 to 60 pixels, and the rest
        mask = np.zeros((10, 10), bool)
        mask.ravel()[: (1 + n) if n % 2 else 0] = True
        cases.append(
            Case(f"s{n}", f"class {n % 6}", np.zeros((1, 10, 10), np.uint8), segments, "ok", np.ones((10, 10)), mask)
        )
    config = OracleCritic(
        critic="oracle",
        prompts="x",
        overlap="any",
        false_positive_rate=rates[0],
        false_negative_rate=rates[1],
        errors=kind,
    )
    wrong = set()
    for n, row in enumerate(criticise(config, cases)):
        assert row.settings["errors"] == kind
        for region, verdict in judge_by_rules(row.critique or "", [0, 1]).items():
            if verdict != ("no" if region == 1 and n % 2 else "yes"):
                wrong.add((n, region))
    return cases, wrong


@pytest.mark.parametrize("kind", ["small_regions", "large_regions"])
def test_errors_by_size_fall_on_the_smallest_or_largest_of_both_kinds_at_the_set_rates(kind: str) -> None:
    cases, wrong = _errors(kind, (0.2, 0.4))
    sizes = {(n, region): (case.segments == region).sum() for n, case in enumerate(cases) for region in (0, 1)}
    spurious = [(n, 1) for n in range(1, 60, 2)]
    for kinds, rate in ((spurious, 0.4), ([key for key in sizes if key not in spurious], 0.2)):
        judged_wrong = [sizes[key] for key in kinds if key in wrong]
        judged_right = [sizes[key] for key in kinds if key not in wrong]
        assert len(judged_wrong) == round(rate * len(kinds))
        if kind == "small_regions":
            assert max(judged_wrong) <= min(judged_right)
        else:
            assert min(judged_wrong) >= max(judged_right)
    assert wrong < _errors(kind, (0.3, 0.5))[1]


def test_errors_by_class_fall_on_whole_classes() -> None:
    _, wrong = _errors("by_class", (0.5, 0.5))
    wrong_of = {k: sum(n % 6 == k for n, _ in wrong) for k in range(6)}
    assert sorted(wrong_of.values()) == [0, 0, 0, 20, 20, 20]
    _, some = _errors("by_class", (0.25, 0.25))
    assert sorted(sum(n % 6 == k for n, _ in some) for k in range(6))[:4] == [0, 0, 0, 0]
    assert some < wrong
    assert 20 < len(some) < 40  # one class, and some of the next


@pytest.mark.parametrize(
    ("critique", "reason"),
    [
        ("It is all relevant.", "states no verdicts"),
        ("Verdicts: red - yes", "expected blue, red"),
        ("Verdicts: red - yes; blue - no; green - no", "expected blue, red"),
        ("Verdicts: red - yes; red - no; blue - no", "no single verdict"),
        ("Verdicts: red - yes; blue - maybe", "no single verdict"),
        ("Verdicts: red - yes; blue - no\nBut I am not sure.", "states no verdicts"),
    ],
)
def test_the_judge_refuses_prose_without_one_verdict_per_region(critique: str, reason: str) -> None:
    assert COLOUR_NAMES[:2] == ("red", "blue")
    with pytest.raises(ValueError, match=reason):
        judge_by_rules(critique, [0, 1])


def test_the_digest_of_a_segmentation_is_the_one_that_overrides_are_tied_to() -> None:
    from lvlmva_core.regions import segmentation_digest as of_the_masks

    segments = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert segmentation_digest(segments) == of_the_masks(segments)
    assert segmentation_digest(segments) != segmentation_digest(segments.reshape(3, 2))


def test_critic_and_judge_import_without_torch() -> None:
    modules = "stages.critique, stages.judge, lvlmva.cli, lvlmva_core.lvlm.critic, lvlmva_core.lvlm.judge, openai"
    code = f"import {modules}, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
