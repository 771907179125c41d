import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lvlmva_core.alignment.selection import by_pseudo_group
from lvlmva_core.controls import masks_on_random_pictures, random_masks_like
from lvlmva_core.errors import InputError
from lvlmva_core.masks import assemble_mask, assemble_masks, why_stale
from lvlmva_core.overrides import Override
from lvlmva_core.regions import highest_attribution, segmentation_digest

SEGMENTS = np.array([[0, 0, 1], [2, 1, 255]], dtype=np.uint8)


def test_the_mask_is_true_where_the_judge_said_no_and_nowhere_else() -> None:
    # the Judge says "no" to region 1 (spurious): its gradient is to vanish, so its pixels, and they alone, are True
    mask = assemble_mask(torch.from_numpy(SEGMENTS), {0: "yes", 1: "no", 2: "yes"})
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, False, True], [False, True, False]]


def test_of_a_rejected_region_only_what_is_kept_is_masked() -> None:
    kept = np.array([[[True, False, True], [True, False, True]]])
    verdicts = {"a": {0: "yes", 1: "no", 2: "no"}}
    shares = {"a": {0: 0.2, 1: 0.7, 2: 0.6}}
    found = assemble_masks(["a"], SEGMENTS[None], verdicts, {}, [], shares, kept)
    assert found.masks.tolist() == [[[False, False, True], [True, False, False]]]
    assert found.weights is not None
    np.testing.assert_allclose(found.weights, [[[0.2, 0, 0.7], [0.6, 0, 0]]], rtol=1e-6)
    whole = assemble_masks(["a"], SEGMENTS[None], verdicts, {}, [])
    assert (whole.masks & kept).tolist() == found.masks.tolist()


@given(
    attribution=npst.arrays(np.float32, (4, 5), elements=st.integers(-3, 6).map(float)),
    segments=npst.arrays(np.uint8, (4, 5), elements=st.sampled_from([0, 1, 255])),
    share=st.sampled_from([0.1, 0.5, 0.8, 1.0]),
)
@settings(max_examples=100, deadline=None)
def test_the_highest_attribution_is_the_fewest_pixels_that_hold_the_share(
    attribution: np.ndarray, segments: np.ndarray, share: float
) -> None:
    kept = highest_attribution(attribution, segments, share)
    assert not kept[segments == 255].any()
    for region in {0, 1} & set(segments.ravel().tolist()):
        inside = segments == region
        effect = sorted((max(float(v), 0.0) for v in attribution[inside]), reverse=True)
        count = int((kept & inside).sum())
        if sum(effect) == 0:
            assert count == inside.sum()
            continue
        assert sum(effect[:count]) >= share * sum(effect) - 1e-9 > sum(effect[: count - 1]) - 2e-9
        assert attribution[kept & inside].min() >= attribution[inside & ~kept].max(initial=-9)


def test_pixels_of_no_region_are_never_masked_and_unsure_masks_nothing() -> None:
    assert assemble_mask(torch.from_numpy(SEGMENTS), dict.fromkeys(range(3), "no")).tolist() == [
        [True, True, True],
        [True, True, False],
    ]
    assert not assemble_mask(torch.from_numpy(SEGMENTS), {0: "unsure", 1: "yes", 2: "unsure"}).any()


def test_every_region_present_needs_a_verdict_and_others_need_none() -> None:
    with pytest.raises(ValueError, match="region 2 has no verdict"):
        assemble_mask(torch.from_numpy(SEGMENTS), {0: "yes", 1: "no"})
    with pytest.raises(ValueError, match="region 0 has verdict 'maybe'"):
        assemble_mask(torch.from_numpy(SEGMENTS), {0: "maybe", 1: "no", 2: "no"})
    absent_region = {0: "yes", 1: "yes", 2: "yes", 3: "no"}
    assert not assemble_mask(torch.from_numpy(SEGMENTS), absent_region).any()


def test_segments_must_be_a_label_map() -> None:
    with pytest.raises(ValueError, match=r"must be \(H, W\) of integers"):
        assemble_mask(torch.zeros(2, 2), {0: "no"})


YES = {0: "yes", 1: "yes", 2: "yes"}


def test_failed_samples_are_left_out_with_their_reason() -> None:
    empty = np.full_like(SEGMENTS, 255)
    result = assemble_masks(
        ["a", "b", "c"], np.stack([SEGMENTS, empty, SEGMENTS]), {"a": {**YES, 1: "no"}}, {"c": "refused"}, []
    )
    assert result.ids == ["a"]
    assert result.left_out == {"b": "no_region", "c": "refused"}
    assert result.masks.sum() == 2


def test_votes_weigh_regions_and_an_expert_counts_as_all() -> None:
    given = {0: "no", 1: "yes", 2: "no"}
    shares = {0: 2 / 3, 1: 1 / 3, 2: 1.0}
    one = {"a": given, "b": given}
    overrides = [Override("b", segmentation_digest(SEGMENTS), region, v) for region, v in ((0, "yes"), (1, "no"))]
    segments = np.stack([SEGMENTS] * 2)
    result = assemble_masks(["a", "b"], segments, one, {}, overrides, {"a": shares, "b": shares})
    assert result.weights is not None
    assert result.weights.dtype == np.float32
    np.testing.assert_allclose(result.weights[0], [[2 / 3, 2 / 3, 1 / 3], [1, 1 / 3, 0]], rtol=1e-6)
    np.testing.assert_array_equal(result.weights[1], [[0, 0, 1], [1, 1, 0]])
    np.testing.assert_array_equal(result.weights > 0.5, result.masks)  # what the majority says
    assert result.summary()["samples_split"] == 1
    assert result.summary()["mean_weight"] == pytest.approx((3 + 3) / 12)
    hard = assemble_masks(["a", "b"], segments, one, {}, overrides)
    np.testing.assert_array_equal(hard.masks, result.masks)
    assert hard.weights is None
    assert "weights" not in hard.summary()


def test_controls_move_weights_as_they_move_masks() -> None:
    weights = np.random.default_rng(0).random((6, 5, 4), dtype=np.float32)
    for move in (random_masks_like, masks_on_random_pictures):
        moved = move(weights, 3)
        assert moved.dtype == np.float32
        np.testing.assert_array_equal(moved > 0.5, move(weights > 0.5, 3))
        np.testing.assert_array_equal(np.sort(moved.ravel()), np.sort(weights.ravel()))


def test_pseudo_groups_are_of_what_more_than_half_reject() -> None:
    generator = torch.Generator().manual_seed(0)
    images, donors = torch.rand((6, 1, 5, 4), generator=generator), torch.rand((4, 1, 5, 4), generator=generator)
    weights = torch.rand((4, 5, 4), generator=generator)
    weights[0] = 0.5  # no more than half: no donor
    given = (images, torch.arange(6) % 2, donors, torch.arange(4) % 2)
    soft, hard = (by_pseudo_group(*given, masks, 0) for masks in (weights, weights > 0.5))
    assert torch.equal(soft.images, hard.images)
    assert torch.equal(soft.groups, hard.groups)


def test_none_left_is_an_error_that_says_why() -> None:
    with pytest.raises(InputError, match=r"no sample of the alignment set has verdicts \(no_positive_effect\)"):
        assemble_masks(["a"], SEGMENTS[None], {}, {"a": "no_positive_effect"}, [])


def test_a_sample_that_the_judge_forgot_is_an_error() -> None:
    with pytest.raises(InputError, match="'b' has neither verdicts nor a failure"):
        assemble_masks(["a", "b"], np.stack([SEGMENTS] * 2), {"a": YES}, {}, [])


def test_an_override_counts_for_its_segmentation_only() -> None:
    digest = segmentation_digest(SEGMENTS)
    fresh, stale = Override("a", digest, 2, "no"), Override("a", "0" * 64, 0, "no")
    absent = Override("a", digest, 3, "no")
    result = assemble_masks(["a"], SEGMENTS[None], {"a": YES}, {}, [fresh, stale, absent])
    assert result.masks[0].tolist() == (SEGMENTS == 2).tolist()
    assert result.overridden == 1
    assert result.stale == [stale, absent]


def test_an_expert_can_stand_in_for_a_judge_that_failed() -> None:
    digest = segmentation_digest(SEGMENTS)
    complete = [Override("a", digest, region, "no") for region in range(3)]
    assert assemble_masks(["a"], SEGMENTS[None], {}, {"a": "refused"}, complete).masks.sum() == 5
    with pytest.raises(InputError, match="no sample"):
        assemble_masks(["a"], SEGMENTS[None], {}, {"a": "refused"}, complete[:2])


def test_the_digest_tells_shape_and_pixels_apart() -> None:
    other = SEGMENTS.copy()
    other[0, 0] = 2
    assert len({segmentation_digest(a) for a in (SEGMENTS, other, SEGMENTS.reshape(3, 2))}) == 3


def test_random_masks_keep_area_and_form() -> None:
    masks = np.zeros((20, 9, 11), dtype=bool)
    masks[:, 2:5, 3:9] = True
    shifted = random_masks_like(masks, seed=0)
    np.testing.assert_array_equal(shifted.sum(axis=(1, 2)), masks.sum(axis=(1, 2)))
    # a shift changes the phase of a Fourier transform, not its magnitude
    np.testing.assert_allclose(abs(np.fft.fft2(shifted)), abs(np.fft.fft2(masks)), atol=1e-9)
    assert (shifted != masks).any(axis=(1, 2)).sum() > 15
    np.testing.assert_array_equal(random_masks_like(masks, seed=0), shifted)


def test_masks_on_random_pictures_are_the_same_masks_dealt_anew() -> None:
    masks = np.zeros((40, 9, 11), dtype=bool)
    for n in range(20):  # as many forms as masks; the other half is empty
        masks[n, : n % 5 + 1, : n // 5 + 1] = True
    dealt = masks_on_random_pictures(masks, seed=0)

    def forms(of: np.ndarray) -> np.ndarray:  # which a shift does not change
        return np.abs(np.fft.fft2(of)).round(6).reshape(len(of), -1)

    order = np.lexsort(forms(masks).T), np.lexsort(forms(dealt).T)
    np.testing.assert_allclose(forms(dealt)[order[1]], forms(masks)[order[0]])
    assert 5 < dealt[:20].any(axis=(1, 2)).sum() < 15  # half of the pictures, whichever they were
    np.testing.assert_array_equal(masks_on_random_pictures(masks, seed=0), dealt)
    assert (masks_on_random_pictures(masks, seed=1) != dealt).any()


def test_a_stale_override_says_what_it_does_not_fit() -> None:
    digests = {"a": "d"}
    assert why_stale(Override("b", "d", 0, "no"), digests) == "the alignment set has no such sample"
    assert why_stale(Override("a", "e", 0, "no"), digests) == "it is of another segmentation"
    assert why_stale(Override("a", "d", 9, "no"), digests) == "the segmentation has no such region"
