import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lvlmva_core.alignment.selection import at_edge, best_lambda, by_accuracy, by_pseudo_group, by_worst_group
from lvlmva_core.errors import InputError
from lvlmva_core.metrics import group_accuracies


def _split(seed: int = 0, n: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((n, 1, 2, 3), generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    spurious = torch.rand(n, generator=generator) < 0.4
    return images, labels, spurious, torch.rand((n, 3), generator=generator)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_scores_are_the_accuracies_that_the_metrics_count(seed: int) -> None:
    images, labels, spurious, logits = _split(seed)
    predictions = logits.argmax(1).numpy()
    table = group_accuracies(predictions, labels.numpy(), spurious.numpy())
    by_group = by_worst_group(images, labels, spurious)
    assert by_group.score(logits) == table["accuracy"].min()
    np.testing.assert_array_equal(by_group.accuracies(logits).numpy(), table["accuracy"].to_numpy())
    assert by_accuracy(images, labels).score(logits) == pytest.approx((predictions == labels.numpy()).mean())


def test_pseudo_groups_hold_each_image_and_each_with_masked_pixels_of_another_class() -> None:
    images, labels, _, _ = _split()
    donors, donor_labels, _, _ = _split(1, 20)
    masks = torch.rand((20, 2, 3), generator=torch.Generator().manual_seed(2)) < 0.5
    masks[::4] = False
    found = by_pseudo_group(images, labels, donors, donor_labels, masks, seed=0)
    assert torch.equal(found.images[:60], images)
    assert torch.equal(found.labels, torch.cat([labels, labels]))
    assert torch.equal(found.groups, torch.cat([labels * 2, labels * 2 + 1]))
    used = set()
    for row in range(60):
        fitting = [
            n
            for n in range(20)
            if masks[n].any()
            and donor_labels[n] != labels[row]
            and torch.equal(found.images[60 + row], torch.where(masks[n], donors[n], images[row]))
        ]
        assert len(fitting) == 1
        used.update(fitting)
    assert len(used) > 8
    again = by_pseudo_group(images, labels, donors, donor_labels, masks, seed=0)
    assert torch.equal(again.images, found.images)
    assert not torch.equal(by_pseudo_group(images, labels, donors, donor_labels, masks, seed=1).images, found.images)


def test_pseudo_groups_see_the_shortcut_that_a_split_like_training_hides() -> None:
    # pixel 0 tells the class (weakly), pixel 1 too (perfectly: the shortcut); masks cover pixel 1
    labels = torch.arange(40) % 2
    images = torch.zeros((40, 1, 1, 3))
    images[:, 0, 0, 0] = torch.where(torch.arange(40) % 10 < 8, labels, 1 - labels).float()
    images[:, 0, 0, 1] = labels.float()
    masks = torch.zeros((10, 1, 3), dtype=torch.bool)
    masks[:, 0, 1] = True
    pseudo = by_pseudo_group(images, labels, images[:10], labels[:10], masks, seed=0)

    def logits(of: Tensor, pixel: int) -> Tensor:
        return torch.stack([1 - of[:, 0, 0, pixel], of[:, 0, 0, pixel]], 1)

    assert by_accuracy(images, labels).score(logits(images, 1)) == 1.0
    assert by_accuracy(images, labels).score(logits(images, 0)) == pytest.approx(0.8)
    assert pseudo.score(logits(pseudo.images, 1)) == 0.0
    assert pseudo.score(logits(pseudo.images, 0)) == pytest.approx(0.8)


def test_a_class_without_donors_has_only_its_images_as_they_are() -> None:
    images, labels, _, _ = _split()
    masks = torch.ones((4, 2, 3), dtype=torch.bool)
    found = by_pseudo_group(images, labels, images[:4], torch.zeros(4, dtype=torch.int64), masks, seed=0)
    assert sorted(found.groups.unique().tolist()) == [0, 2, 3, 4, 5]
    with pytest.raises(InputError, match=r"no alignment sample with a mask.*rank\.stratify"):
        by_pseudo_group(images, labels, images[:4], torch.zeros(4, dtype=torch.int64), ~masks, seed=0)


def test_the_best_lambda_has_the_highest_mean_and_of_equals_the_smallest() -> None:
    assert best_lambda({10.0: [0.2, 0.8], 0.1: [0.5, 0.5], 1.0: [0.1, 0.9]}) == 0.1
    assert best_lambda({0.1: [0.2, 0.8], 1.0: [0.9, 0.2]}) == 1.0


def test_a_choice_is_at_the_edge_where_nothing_beyond_was_tried() -> None:
    grid = {"a": [3, 1, 2], "b": [3, 1, 2], "c": [3, 1, 2], "d": [1, 2], "e": [7]}
    assert at_edge({"a": 1, "b": 2, "c": 3, "d": 1, "e": 7}, grid) == {"a": "lowest", "c": "highest"}


def test_some_of_the_pictures_can_be_scored_alone() -> None:
    """As DFR needs, which is fitted on one half of the validation split."""
    images, labels, spurious, logits = _split()
    masks = torch.ones((20, 2, 3), dtype=torch.bool)
    donors, donor_labels, _, _ = _split(1, 20)
    pseudo = by_pseudo_group(images, labels, donors, donor_labels, masks, seed=0)
    assert torch.equal(pseudo.rows, torch.arange(60).repeat(2))
    half = torch.arange(60) % 2 == 0
    of_half = by_worst_group(images[half], labels[half], spurious[half])
    assert by_worst_group(images, labels, spurious).score(logits, half) == of_half.score(logits[half])
    twice = half[pseudo.rows]
    alone = by_pseudo_group(images, labels, donors, donor_labels, masks, seed=0)
    worst = min(
        float((logits.repeat(2, 1).argmax(1) == alone.labels)[twice & (alone.groups == g)].double().mean())
        for g in alone.groups[twice].unique()
    )
    assert pseudo.score(logits.repeat(2, 1), twice) == pytest.approx(worst)
