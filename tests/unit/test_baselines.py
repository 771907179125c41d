from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from torch import nn

from lvlmva_core.alignment.selection import Selection, by_worst_group
from lvlmva_core.baselines import Task, dfr, dfr_verdicts, group_dro, group_dro_verdicts, jtt, subg
from lvlmva_core.baselines.dfr import Samples, refit_last_layer
from lvlmva_core.baselines.groups import (
    balanced_rows,
    evenly_drawn,
    pseudo_groups_of_alignment,
    pseudo_groups_of_training,
)
from lvlmva_core.baselines.jtt import error_rows, upweighted_rows
from lvlmva_core.errors import InputError
from lvlmva_core.models import ModelSpec, build_model, penultimate_features, predict_logits
from lvlmva_core.samples import Split
from lvlmva_core.training import train_classifier

SPEC = ModelSpec("mlp", 1, 1, 12, n_classes=2, hidden=16)


def _planted(sizes: dict[tuple[int, int], int], seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Pictures of 12 pixels: the class in the first by a little, a shortcut in the last by much, noise between."""
    rng = np.random.default_rng(seed)
    images, labels, groups = [], [], []
    for (label, shortcut), count in sizes.items():
        pixels = rng.normal(0.5, 0.08, size=(count, 12))
        pixels[:, :6] += 0.06 * (2 * label - 1)
        pixels[:, -1] = 0.5 + 0.4 * (2 * shortcut - 1)
        images.append(pixels)
        labels += [label] * count
        groups += [2 * label + shortcut] * count
    stacked = torch.tensor(np.concatenate(images), dtype=torch.float32)[:, None, None]
    return stacked, torch.tensor(labels), np.array(groups)


TRAIN = {(0, 0): 380, (0, 1): 20, (1, 0): 20, (1, 1): 380}
TEST = {(label, shortcut): 250 for label in (0, 1) for shortcut in (0, 1)}


def _worst_group(model: nn.Module, seed: int = 1) -> float:
    images, labels, groups = _planted(TEST, seed)
    correct = (predict_logits(model.eval(), images).argmax(1) == labels).numpy()
    return min(float(correct[groups == g].mean()) for g in range(4))


def _fit(rows: torch.Tensor | None, epochs: int = 60) -> nn.Module:
    images, labels, _ = _planted(TRAIN, 0)
    model = build_model(SPEC, 0)
    train_classifier(
        model,
        Split(images, labels),
        Split(images, labels),
        learning_rate=1e-2,
        batch_size=32,
        epochs=epochs,
        seed=0,
        rows=rows,
    )
    return model


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return _fit(None, 6)


def test_subg_leaves_every_group_as_large_as_the_smallest() -> None:
    groups = np.array(["a"] * 7 + ["b"] * 3 + ["c"] * 5)
    rows = balanced_rows(groups, 0)
    assert dict(zip(*np.unique(groups[rows], return_counts=True), strict=True)) == {"a": 3, "b": 3, "c": 3}
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, balanced_rows(groups, 0))
    drawn = {tuple(balanced_rows(groups, seed).tolist()) for seed in range(40)}
    assert len(drawn) > 20
    assert {row for rows in drawn for row in rows} == set(range(15))


def test_a_base_model_follows_the_planted_shortcut_and_each_method_mends_it(base: nn.Module) -> None:
    images, labels, groups = _planted(TRAIN, 0)
    before = _worst_group(base)
    assert before < 0.5
    subg = _worst_group(_fit(torch.from_numpy(balanced_rows(groups, 0)), epochs=80))
    errors = error_rows(_fit(None, 2), images, labels)
    jtt = _worst_group(_fit(upweighted_rows(len(images), errors, 20), epochs=12))
    assert subg > before + 0.3
    assert jtt > before + 0.3


def _dfr_toy(rng: np.random.Generator, count: int, agreeing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features that hold the class and a shortcut apart, at other scales, and a dead one; labels; shortcuts."""
    labels, shortcut = rng.integers(0, 2, count), rng.integers(0, 2, count)
    keep = (labels == shortcut) | (rng.random(count) < agreeing)
    labels, shortcut = labels[keep], shortcut[keep]
    features = rng.normal(size=(len(labels), 6))
    features[:, 2] = 1e-3 * (4 * labels + features[:, 2])
    features[:, 4], features[:, 5] = 50 * shortcut, 7.0
    return features, labels, shortcut


def test_dfr_reads_from_the_features_what_the_last_layer_left_aside() -> None:
    """A balanced refit drops the shortcut, whatever its scale."""
    rng = np.random.default_rng(0)
    features, labels, shortcut = _dfr_toy(rng, 800, 0.15)
    samples = Samples(features, labels, 2 * labels + shortcut)
    found = refit_last_layer(samples, 2, c=0.1, n_refits=20, seed=0, scaled_as=features)
    plain = LogisticRegression(max_iter=5000).fit(features, labels)
    unseen, test_labels, test_shortcut = _dfr_toy(rng, 2000, 1.0)
    conflict = test_labels != test_shortcut
    ours = (unseen @ found.weight.T + found.bias).argmax(1) == test_labels
    assert ours[conflict].mean() > 0.95
    assert (plain.predict(unseen) == test_labels)[conflict].mean() < 0.5
    assert abs(found.weight[1, 4] * 50) < 0.2 * abs(found.weight[1, 2] * 4e-3)
    assert found.weight[1, 5] == 0


@pytest.mark.parametrize("n_classes", [2, 3])
def test_refits_are_means_of_scikit_learns_on_features_standardised_as_all_are(n_classes: int) -> None:
    """The authors' final fit: one scaler of all training features, coefficients averaged over balanced sub-samples."""
    rng = np.random.default_rng(1)
    every = rng.normal(size=(400, 5)) * [1, 10, 0.1, 1, 1] + 2
    labels = np.arange(90) % n_classes
    groups = labels * 2 + (rng.random(90) < 0.3)
    features = rng.normal(size=(90, 5)) * [1, 10, 0.1, 1, 1] + labels[:, None]
    found = refit_last_layer(Samples(features, labels, groups), n_classes, c=0.5, n_refits=3, seed=4, scaled_as=every)
    standard = (features - every.mean(0)) / every.std(0)
    logits = features @ found.weight.T + found.bias
    for k in range(n_classes):
        expected = []
        for refit in range(3):
            rows = balanced_rows(groups, 4 * 1_000_003 + 1 + refit)
            binary = LogisticRegression(l1_ratio=1.0, C=0.5, solver="liblinear", max_iter=1000, random_state=4)
            expected.append(binary.fit(standard[rows], labels[rows] == k).decision_function(standard))
        ours = logits[:, k] if n_classes > 2 else logits[:, k] - logits[:, 1 - k]
        np.testing.assert_allclose(ours, np.mean(expected, axis=0), atol=1e-3)


def test_dfr_refuses_a_split_that_it_cannot_be_fitted_on() -> None:
    features = np.zeros((5, 2))
    for labels, groups, n_classes, message in (
        ([0, 0, 1, 1, 1], [0, 0, 1, 1, 2], 2, "the smallest group that it is refitted on has 1 samples"),
        ([0, 0, 1, 1, 1], [0, 0, 1, 1, 1], 3, "2 of 3 classes"),
    ):
        samples = Samples(features, np.array(labels), np.array(groups))
        with pytest.raises(InputError, match=message):
            refit_last_layer(samples, n_classes, c=1.0, n_refits=1, seed=0, scaled_as=features)


def _task(selection: Selection | None, masks: torch.Tensor | None = None) -> Task:
    """The planted pictures; every other one is an alignment sample with a verdict."""
    splits = []
    for seed, sizes in ((0, TRAIN), (5, dict.fromkeys(TRAIN, 30))):
        images, labels, groups = _planted(sizes, seed)
        table = pd.DataFrame({"group": [str(g) for g in groups], "label": labels.numpy(), "spurious": groups % 2 == 1})
        splits.append(Split(images, labels, table))
    training, validation = splits
    rows = np.arange(0, 800, 2)
    alignment = Split(training.images[rows], training.labels[rows], training.table.iloc[rows])
    given = torch.from_numpy(alignment.table["spurious"].to_numpy(copy=True))[:, None, None].expand(-1, 1, 12)
    return Task(
        SPEC,
        _fit(None, 6),
        lambda seed: build_model(SPEC, seed),
        training,
        validation,
        selection,
        lambda: (alignment, given if masks is None else masks),
    )


def _by_worst_group() -> Selection:
    images, labels, groups = _planted(dict.fromkeys(TRAIN, 30), 5)
    return by_worst_group(images, labels, torch.from_numpy(groups % 2 == 1))


OF_WORST_GROUP = {"rule": "worst_group"}
TRAINED = {"seeds": [0, 1], "learning_rate": 1e-2, "batch_size": 32, "epochs": 6, "selection": OF_WORST_GROUP}


def test_dfrs_c_is_chosen_on_the_half_of_the_validation_split_that_it_was_not_fitted_on() -> None:
    task = _task(_by_worst_group())
    settings = dfr.Settings.model_validate(
        {"seeds": [0, 3], "split": "val", "n_refits": 2, "grid": {"c": [1.0, 0.02]}, "selection": OF_WORST_GROUP}
    )
    found = dfr.retrain(task, settings)
    scaled_as = penultimate_features(task.base, task.training.images).numpy()
    features = penultimate_features(task.base, task.validation.images).numpy()
    labels, groups = task.validation.labels.numpy(), task.validation.table["group"].to_numpy()
    scores = {}
    for c in (1.0, 0.02):
        worst = []
        for seed in (0, 3):
            held = dfr.halves(groups, seed)
            assert {g: int(held[groups == g].sum()) for g in np.unique(groups)} == {str(g): 15 for g in range(4)}
            fitted = Samples(features[~held], labels[~held], groups[~held])
            layer = refit_last_layer(fitted, 2, c=c, n_refits=1, seed=seed, scaled_as=scaled_as)
            right = (features[held] @ layer.weight.T + layer.bias).argmax(1) == labels[held]
            worst.append(min(right[groups[held] == g].mean() for g in np.unique(groups)))
        scores[f"c={c}"] = pytest.approx(np.mean(worst))
    selection = found.facts["selection"]
    assert {name: of["score"]["mean"] for name, of in selection["candidates"].items()} == scores
    best = max((1.0, 0.02), key=lambda c: scores[f"c={c}"].expected)
    assert found.facts["c"] == selection["chosen"]["c"] == best


def test_group_dros_weights_are_those_of_the_closed_form_and_of_a_plain_loop() -> None:
    """Sagawa et al. 2020, algorithm 1; where the losses stay, q is a softmax of η · t · loss."""
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    logits, labels = torch.tensor([[2.0, 0.0]] * 2 + [[0.0, 1.0]] * 3 + [[0.0, 0.0]]), torch.zeros(6).long()
    steady = group_dro.GroupLoss(groups, step_size=0.3, adjustment=2.0)
    losses = np.log1p(np.exp([-2.0, 1.0, 0.0])) + 2.0 / np.sqrt([2, 3, 1])
    for step in range(1, 5):
        steady(logits, labels, torch.arange(6))
        grown = np.exp(0.3 * step * losses)
        np.testing.assert_allclose(steady.weights.numpy(), grown / grown.sum(), rtol=1e-5)
    generator = torch.Generator().manual_seed(0)
    loss, q = group_dro.GroupLoss(groups, step_size=0.1, adjustment=0.0), np.full(3, 1 / 3)
    for _ in range(20):
        rows = torch.randint(0, 6, (3,), generator=generator)  # often a group is missing
        logits = torch.randn((3, 2), generator=generator)
        given = float(loss(logits, labels[rows], rows))
        each = (torch.logsumexp(logits, 1) - logits[:, 0]).numpy()
        of_group = groups[rows].numpy()
        means = [each[of_group == g].mean() if (of_group == g).any() else 0.0 for g in range(3)]
        q = q * np.exp(0.1 * np.array(means))
        q /= q.sum()
        assert given == pytest.approx(float(q @ means), rel=1e-5)


def test_with_one_group_group_dro_is_the_ordinary_training() -> None:
    task = _task(None)
    settings = group_dro.Settings.model_validate({**TRAINED, "seeds": [3], "epochs": 2, "selection": None})
    found = group_dro.train_groups(task, settings, np.zeros(len(task.training.labels))).models[3]
    plain = task.fit(settings, 3).model
    for ours, theirs in zip(found.state_dict().values(), plain.state_dict().values(), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)


def test_an_epoch_holds_every_group_alike_and_every_row_of_a_group_alike() -> None:
    groups = np.array(["a"] * 70 + ["b"] * 3 + ["c"] * 16)
    rows = evenly_drawn(groups, 0, 1)
    times = np.bincount(rows, minlength=89)
    assert sorted(np.unique(groups[rows], return_counts=True)[1]) == [29, 30, 30]
    for name in "abc":
        assert np.ptp(times[groups == name]) <= 1
    assert not np.array_equal(rows, evenly_drawn(groups, 0, 2))
    np.testing.assert_array_equal(evenly_drawn(np.zeros(7), 0, 5), np.arange(7))


@pytest.mark.parametrize("module", [group_dro, group_dro_verdicts, dfr, dfr_verdicts, subg, jtt])
def test_each_method_raises_the_worst_group_by_what_one_selection_chooses(module: Any, base: nn.Module) -> None:
    """The verdicts flag the pictures with the shortcut's bright pixel, so that their groups are the true ones here."""
    of_module: dict[Any, dict[str, Any]] = {
        group_dro: {"grid": {"weight_decay": [0.0, 0.1]}, "epochs": 12},
        group_dro_verdicts: {"grid": {"weight_decay": [0.0, 0.1]}, "epochs": 12},
        dfr: {"split": "val", "grid": {"c": [1.0, 0.1]}, "n_refits": 3},
        dfr_verdicts: {"grid": {"c": [1.0, 0.1]}, "n_refits": 3},
        subg: {"grid": {"weight_decay": [0.0, 0.1]}, "epochs": 80},
        jtt: {"grid": {"first_epochs": [2], "up": [1, 20]}, "epochs": 12},
    }
    known = {key: value for key, value in TRAINED.items() if key in module.Settings.model_fields}
    settings = module.Settings.model_validate({**known, **of_module[module]})
    found = module.retrain(_task(_by_worst_group()), settings)
    assert sorted(found.models) == [0, 1]
    assert min(_worst_group(model) for model in found.models.values()) > _worst_group(base) + 0.2
    selection = found.facts["selection"]
    scores = {name: of["score"]["mean"] for name, of in selection["candidates"].items()}
    assert len(scores) == 2
    named = ",".join(f"{key}={value}" for key, value in selection["chosen"].items())
    assert scores[named] == max(scores.values())


def test_patience_keeps_the_first_epoch_of_the_best_score() -> None:
    """Against trainings of one epoch, two, three, ..., each scored at its end."""
    task = _task(_by_worst_group())
    settings = subg.Settings.model_validate({**TRAINED, "epochs": 9, "selection": {**OF_WORST_GROUP, "patience": 3}})
    fitted = task.fit(settings, 0)
    scores = [task.fit(settings, 0, epochs=n, choose_epoch=False).score for n in range(1, 10)]
    best, at = -1.0, 0
    for epoch, score in enumerate(scores, start=1):
        if score > best:
            best, at = score, epoch
        elif epoch - at >= 3:
            break
    assert (fitted.epoch, fitted.score) == (at, pytest.approx(best))
    assert task.score(fitted.model) == fitted.score


def test_flags_are_carried_to_pictures_that_nobody_asked_about() -> None:
    task = _task(None)
    features = task.training.images.flatten(1).numpy()  # hold the shortcut's pixel as it is
    found = pseudo_groups_of_training(task, features)
    assert [str(g) for g in found.groups] == task.training.table["group"].tolist()
    assert found.facts["flags_carried_auc"] == 1.0
    assert found.facts["flagged_in_training"] == 400
    of_alignment = pseudo_groups_of_alignment(task)
    np.testing.assert_array_equal(of_alignment.rows, np.arange(0, 800, 2))
    nothing = pseudo_groups_of_training(_task(None, torch.zeros(400, 1, 12, dtype=torch.bool)), features)
    assert set(nothing.groups) == {0, 2}
    assert nothing.facts["flags_carried_auc"] is None
    mistaken = torch.zeros(400, 1, 12, dtype=torch.bool)
    mistaken[3] = True  # a verdict stands, whatever the features say
    assert pseudo_groups_of_training(_task(None, mistaken), features).groups[6] % 2 == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": {"ups": [1]}}, "grid: 'ups' is no setting of this method; known: batch_size, epochs, first_epochs"),
        ({"grid": {"up": [1, 2]}, "selection": None}, "grid has 2 candidates and nothing chooses among them"),
        ({"grid": {"up": []}}, r"grid\.up: give a list of values to try"),
        ({"grid": {"up": [1, 0.5]}}, r"grid\.up = 0\.5: Input should be a valid integer"),
        ({"selection": {"rule": "accuracy", "rrr_lambdas": [1.0]}, "up": 1}, "there is no penalty here"),
    ],
)
def test_a_grid_that_cannot_be_tried_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        jtt.Settings.model_validate({**TRAINED, "first_epochs": 1, **given})


def test_jtts_errors_are_those_of_eval_mode_and_the_mode_comes_back() -> None:
    """BatchNorm with running statistics far from the batch's: the two modes disagree on most samples."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        model[2].bias.zero_()
        model[1].running_mean.fill_(10.0)  # type: ignore[operator, union-attr]
    images = torch.rand((20, 1, 1, 2), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(20, dtype=torch.int64)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert error_rows(model, images, labels).tolist() == list(range(20))  # x - 10 < 0: class 1 for all
    assert model.training
    assert all(module.training for module in model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    in_train_mode = (model(images).argmax(1) != labels).float().mean()
    assert 0.2 < in_train_mode < 0.8
    labels[3] = 1
    assert error_rows(model, images, labels).tolist() == [n for n in range(20) if n != 3]


def test_errors_count_up_times_in_an_epoch() -> None:
    counts = np.bincount(upweighted_rows(6, torch.tensor([1, 4]), 5))
    assert counts.tolist() == [1, 5, 1, 1, 5, 1]
    assert upweighted_rows(3, torch.tensor([], dtype=torch.int64), 5).tolist() == [0, 1, 2]


def test_training_on_rows_is_training_on_the_pictures_of_these_rows() -> None:
    images, labels, groups = _planted(TRAIN, 0)
    rows = torch.from_numpy(balanced_rows(groups, 3))
    by_rows, by_copy = build_model(SPEC, 0), build_model(SPEC, 0)
    for model, pixels, truth, chosen in (
        (by_rows, images, labels, rows),
        (by_copy, images[rows], labels[rows], None),
    ):
        train_classifier(
            model,
            Split(pixels, truth),
            Split(images, labels),
            learning_rate=1e-3,
            batch_size=16,
            epochs=2,
            seed=0,
            rows=chosen,
        )
    assert all(
        torch.equal(a, b) for a, b in zip(by_rows.state_dict().values(), by_copy.state_dict().values(), strict=True)
    )
