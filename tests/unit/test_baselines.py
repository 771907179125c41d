import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from lvlmva_core.baselines.dfr import refit_last_layer
from lvlmva_core.baselines.groups import balanced_rows
from lvlmva_core.baselines.jtt import error_rows, upweighted_rows
from lvlmva_core.errors import InputError
from lvlmva_core.models import ModelSpec, build_model, predict_logits
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


def test_dfr_reads_from_the_features_what_the_last_layer_left_aside() -> None:
    """Features that hold the class and a shortcut apart: a balanced refit drops the shortcut, whatever its scale."""
    rng = np.random.default_rng(0)
    labels, shortcut = rng.integers(0, 2, 800), rng.integers(0, 2, 800)
    keep = (labels == shortcut) | (rng.random(800) < 0.15)
    labels, shortcut = labels[keep], shortcut[keep]
    features = rng.normal(size=(len(labels), 6))
    features[:, 2] = 1e-3 * (4 * labels + features[:, 2])
    features[:, 4] = 50 * shortcut
    features[:, 5] = 7.0  # dead
    found = refit_last_layer(features, labels, 2 * labels + shortcut, 2, c_grid=[1.0, 0.1, 0.03], n_refits=20, seed=0)
    plain = LogisticRegression(max_iter=5000).fit(features, labels)
    test_labels, test_shortcut = rng.integers(0, 2, 2000), rng.integers(0, 2, 2000)
    unseen = rng.normal(size=(2000, 6))
    unseen[:, 2] = 1e-3 * (4 * test_labels + unseen[:, 2])
    unseen[:, 4], unseen[:, 5] = 50 * test_shortcut, 7.0
    conflict = test_labels != test_shortcut
    ours = (unseen @ found.weight.T + found.bias).argmax(1) == test_labels
    assert ours[conflict].mean() > 0.95
    assert (plain.predict(unseen) == test_labels)[conflict].mean() < 0.5
    assert abs(found.weight[1, 4] * 50) < 0.2 * abs(found.weight[1, 2] * 4e-3)
    assert found.weight[1, 5] == 0
    assert found.c == max(found.worst_group_accuracy, key=lambda c: found.worst_group_accuracy[c])
    assert set(found.worst_group_accuracy) == {1.0, 0.1, 0.03}


@pytest.mark.parametrize("n_classes", [2, 3])
def test_one_refit_is_scikit_learns_regression_on_standardised_features(n_classes: int) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(90) % n_classes
    features = rng.normal(size=(90, 5)) * [1, 10, 0.1, 1, 1] + labels[:, None]
    found = refit_last_layer(features, labels, labels, n_classes, c_grid=[0.5], n_refits=1, seed=0)
    standard = (features - features.mean(0)) / features.std(0)
    logits = features @ found.weight.T + found.bias
    assert found.worst_group_accuracy == {}
    for k in range(n_classes):
        binary = LogisticRegression(l1_ratio=1.0, C=0.5, solver="liblinear", max_iter=1000, random_state=0)
        expected = binary.fit(standard, labels == k).decision_function(standard)
        ours = logits[:, k] if n_classes > 2 else logits[:, k] - logits[:, 1 - k]
        np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_dfr_refuses_a_split_that_it_cannot_be_fitted_on() -> None:
    features = np.zeros((5, 2))
    with pytest.raises(InputError, match="the smallest group of the split has 1 samples"):
        refit_last_layer(features, [0, 0, 1, 1, 1], [0, 0, 1, 1, 2], 2, c_grid=[1.0], n_refits=1, seed=0)
    with pytest.raises(InputError, match="2 of 3 classes"):
        refit_last_layer(features, [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], 3, c_grid=[1.0], n_refits=1, seed=0)


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
