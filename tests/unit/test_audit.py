"""The audit's functions against other libraries, closed forms and toys whose shortcut is known."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lvlmva_core import audit
from lvlmva_core.diffuse import diffuse_warning
from lvlmva_core.errors import InputError
from lvlmva_core.report.audit_page import AuditContent, render_audit

RNG = np.random.default_rng(0)


def test_mean_attribution_is_the_mean_of_maps_that_add_up_to_one() -> None:
    maps = RNG.normal(size=(6, 5, 4))
    maps[5] = -1.0
    labels = np.array([0, 0, 1, 1, 1, 1])
    found = audit.mean_attribution(maps, labels, 3)
    expected = np.zeros((5, 4))
    for n in (2, 3, 4):  # the last has no positive value
        whole = sum(max(value, 0.0) for value in maps[n].flat)
        for row in range(5):
            for column in range(4):
                expected[row, column] += max(maps[n, row, column], 0.0) / whole / 3
    np.testing.assert_allclose(found[1], expected)
    assert found[0].sum() == pytest.approx(1)
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize(
    ("row", "column", "name"),
    [(0.1, 0.1, "top left"), (0.5, 0.5, "centre"), (0.9, 0.5, "bottom centre"), (0.5, 1.0, "middle right")],
)
def test_places_are_named_and_a_point_has_all_its_share_there(row: float, column: float, name: str) -> None:
    assert audit.place_name(row, column) == name
    attention = np.zeros((30, 60))
    attention[min(int(row * 30), 29), min(int(column * 60), 59)] = 2.0
    shares = audit.shares_by_place(attention)
    assert (shares.max(), shares.sum()) == (1.0, 1.0)
    place = np.unravel_index(shares.argmax(), (3, 3))
    assert audit.place_name((place[0] + 0.5) / 3, (place[1] + 0.5) / 3) == name


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ([0.9, 0.1, 0.1], "red"),
        ([0.1, 0.8, 0.2], "green"),
        ([0.1, 0.2, 0.9], "blue"),
        ([0.9, 0.9, 0.85], "bright"),
        ([0.1], "dark"),
        ([0.5], "medium grey"),
    ],
)
def test_colours_are_named(colour: list[float], name: str) -> None:
    assert audit.colour_name(np.array(colour)) == name


def test_an_even_square_has_its_centre_and_extent_by_the_closed_form() -> None:
    segments = np.full((1, 40, 40), 255, dtype=np.uint8)
    segments[0, 4:12, 20:36] = 3
    images = np.full((1, 1, 40, 40), 51, dtype=np.uint8)
    members, found = audit.describe_regions(segments, np.ones((1, 40, 40)), images)
    assert members == [(0, 3)]
    discrete = [(side**2 - 1) / 12 / 40**2 for side in (8, 16)]  # variance of `side` even steps
    np.testing.assert_allclose(found[0], [8 / 40, 28 / 40, np.sqrt(sum(discrete)), 0.2])


def _toy(corner: float, middle: float) -> tuple[list[audit.RegionGroup], int]:
    """60 samples with a bright corner (top left for class 0, bottom right for class 1) and a dark middle, whose
    reliances are known: `corner` and `middle` of the logit's size, with noise of a twentieth."""
    rng = np.random.default_rng(1)
    labels = np.arange(60) % 2
    segments = np.full((60, 24, 24), 255, dtype=np.uint8)
    images = np.full((60, 1, 24, 24), 20, dtype=np.uint8)
    for n, label in enumerate(labels):
        where = np.s_[1:6, 1:6] if label == 0 else np.s_[18:23, 18:23]
        segments[n][where], images[n, 0][where] = 0, 230
        segments[n, 9:15, 9:15] = 1
    other = np.stack([np.full(60, corner), np.full(60, middle)], 1) * 4.0 + rng.normal(scale=0.2, size=(60, 2))
    reliance = {"other": other, "own": other / 2, "other_spread": np.full((60, 2), 0.4), "flipped": other * 0}
    maps = np.ones((60, 24, 24))
    return audit.region_groups(segments, maps, images, labels, reliance, 4.0, n_classes=2, seed=0)


def test_corners_that_are_depended_on_come_first_and_are_named() -> None:
    groups, rare = _toy(corner=0.8, middle=0.3)
    assert [group.name for group in groups][2:] == ["centre, dark"]
    assert {group.name for group in groups[:2]} == {"top left, bright", "bottom right, bright"}
    assert rare == 0
    for group in groups[:2]:
        assert group.reliance == pytest.approx(0.8, abs=0.03)
        assert group.low <= group.reliance <= group.high
        assert (group.samples, group.donor_spread) == (30, pytest.approx(0.1))
        assert sorted(group.shares) == [0.0, 1.0]
    verdict = audit.verdict_of(groups, [], ["a", "b"], 0.95, 0.5)
    assert verdict.stands_out
    assert "2 groups of regions at the edge" in verdict.points[0]


def test_corners_that_a_model_ignores_are_not_accused() -> None:
    groups, _ = _toy(corner=0.0, middle=0.6)
    assert groups[0].name == "centre, dark"
    assert [group.depended_on for group in groups] == [True, False, False]
    verdict = audit.verdict_of(groups, [], ["a", "b"], 0.95, 0.5)
    assert (verdict.stands_out, verdict.headline) == (False, "Nothing stands out.")
    assert "No group of regions at the edge" in verdict.points[0]


def test_a_model_that_is_no_better_than_the_commonest_class_is_said() -> None:
    assert "hardly fits" in audit.verdict_of([], [], ["a", "b"], 0.5, 0.5).headline


def test_diffuse_attribution_stands_out_and_is_said_first() -> None:
    groups, _ = _toy(corner=0.0, middle=0.6)
    verdict = audit.verdict_of(groups, [], ["a", "b"], 0.95, 0.5, diffuse_warning(0.95))
    assert (verdict.stands_out, verdict.headline) == (True, "Look closer: attribution is diffuse.")
    assert verdict.points[0].startswith("Attribution is diffuse: 90% of what is positive takes 95% of the pixels")


def test_grouping_does_not_depend_on_the_order_of_the_samples() -> None:
    described = np.concatenate([RNG.normal(place, 0.02, (20, 4)) for place in (0.1, 0.5, 0.9)])
    order = RNG.permutation(60)
    first, second = audit.group_regions(described), audit.group_regions(described[order])
    same = first[order][:, None] == first[order]
    assert (same == (second[:, None] == second)).all()
    assert (len(set(first)), first[0]) == (3, 0)


def test_cues_have_scikit_learns_auc_and_only_true_ones_are_warned_of() -> None:
    labels = RNG.integers(0, 3, 300)
    tied = RNG.integers(0, 5, 300).astype(float)
    cues = {"brightness": labels * 2.0 + RNG.normal(size=300), "contrast": tied, "width": np.full(300, 64.0)}
    found, left_out = audit.measure_cues(cues, labels, 3)
    assert left_out == ["width"]
    for cue in found:
        assert cue.auc == pytest.approx(roc_auc_score(labels == cue.label, cues[cue.cue]))
    assert {(cue.cue, cue.label) for cue in found if cue.high} == {("brightness", 0), ("brightness", 2)}
    assert [cue.label for cue in audit.measure_cues(cues, labels % 2, 2)[0]] == [1, 1]


def test_holm_agrees_with_a_step_down_by_hand() -> None:
    assert audit.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert audit.holm([]) == []


def test_cues_of_pixels_are_what_their_names_say() -> None:
    flat = np.full((2, 3, 16, 16), 100, dtype=np.uint8)
    flat[1, 0] += 60
    cues = audit.pixel_cues(flat)
    np.testing.assert_allclose(cues["brightness"], [100, 100 + 0.299 * 60])
    np.testing.assert_allclose(cues["red against green"], [0, 60])
    np.testing.assert_allclose(cues["yellow against blue"], [0, 30])
    np.testing.assert_allclose([*cues["contrast"], *cues["sharpness"]], 0, atol=1e-9)
    from PIL import Image, ImageFilter

    noise = Image.fromarray(RNG.integers(0, 256, (32, 32)).astype(np.uint8))
    both = np.stack([np.asarray(noise), np.asarray(noise.filter(ImageFilter.GaussianBlur(1)))])[:, None]
    sharp, blurred = audit.pixel_cues(both)["sharpness"]
    assert sharp > 10 * blurred
    assert set(audit.pixel_cues(both)) == {"brightness", "contrast", "sharpness"}


HOSTILE = "<script>alert(1)</script>\"'&"


def _content(side: int, n_classes: int) -> AuditContent:
    """Pictures of noise, which no format makes small."""
    n = 4 * n_classes
    labels = np.arange(n) % n_classes
    images = RNG.integers(0, 256, (n, 3, side, side)).astype(np.uint8)
    segments = np.full((n, side, side), 255, dtype=np.uint8)
    segments[:, : side // 4, : side // 4] = 0
    fall = np.ones((n, 1))
    groups, rare = audit.region_groups(
        segments,
        np.ones((n, side, side)),
        images,
        labels,
        {"other": fall, "own": fall, "other_spread": fall, "flipped": fall},
        1.0,
        n_classes=n_classes,
        seed=0,
    )
    names = [f"{HOSTILE}{k}" for k in range(n_classes)]
    cues = [audit.Cue("brightness", 0, 0.9, 0.001)]
    return AuditContent(
        title=HOSTILE,
        verdict=audit.verdict_of(groups, cues, names, 0.9, 0.1),
        facts={"model": HOSTILE},
        class_names=names,
        accuracies=[0.9] * n_classes,
        counts=[4] * n_classes,
        attention=np.ones((n_classes, side, side)) / side**2,
        means=images[:n_classes],
        images=images,
        segments=segments,
        groups=groups,
        rare=rare,
        cues=cues,
        notes=[HOSTILE],
    )


def test_names_are_escaped_and_nothing_is_fetched_or_run() -> None:
    from html.parser import HTMLParser

    page = render_audit(_content(32, 2), 5_000_000)
    assert "&lt;script&gt;alert(1)" in page
    seen: list[tuple[str, list[tuple[str, str | None]]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, attrs))

    Reader().feed(page)
    assert "script" not in {tag for tag, _ in seen}
    assert not [name for _, attrs in seen for name, _ in attrs if name.startswith("on")]
    addresses = [value or "" for _, attrs in seen for name, value in attrs if name in ("src", "href")]
    assert addresses
    assert all(value.startswith("data:image/") for value in addresses)
    assert "url(" not in page


def test_the_page_stays_below_its_bound_or_says_that_it_cannot() -> None:
    content = _content(256, 12)
    free = len(render_audit(content, 50_000_000).encode())
    bounded = len(render_audit(content, free // 3).encode())
    assert bounded <= free // 3
    with pytest.raises(InputError, match=r"with the smallest pictures, more than 0\.005 MB; raise --at-most-mb"):
        render_audit(content, 5_000)
