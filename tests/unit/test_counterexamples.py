"""Counterexample alignment, against pictures made by hand, a plain loop, and a toy whose shortcut is known."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ruamel.yaml import YAML
from torch import Tensor, nn
from torch.nn import functional

from lvlmva.params import load_params
from lvlmva_core.align_settings import AlignSettings, CounterexampleSettings
from lvlmva_core.alignment import align_ensemble, learners, rrr_penalty
from lvlmva_core.alignment.loop import AlignedRun
from lvlmva_core.controls import masks_on_random_pictures, random_masks_like, shares_per_class
from lvlmva_core.counterexamples import Counterexamples, opacity_of, pair_change
from lvlmva_core.errors import InputError
from lvlmva_core.fills import fill_by_blur, fill_smoothly
from lvlmva_core.resume import Resume
from lvlmva_core.samples import Split
from lvlmva_core.store import Store
from lvlmva_core.training import endless_batches

ROOT = Path(__file__).parents[2]
N, N_ALIGN, SIDE = 60, 24, 5


def _data(seed: int = 0) -> tuple[Split, Split, Tensor]:
    """Three classes; of the alignment set's 8 pictures of each, 6, 3 and 0 have a rejected region."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((N, 2, SIDE, SIDE), generator=generator, dtype=torch.float64)
    labels = torch.arange(N) % 3
    masks = torch.rand((N_ALIGN, SIDE, SIDE), generator=generator) < 0.3
    for place in range(N_ALIGN):
        masks[place] &= place // 3 < (6, 3, 0)[place % 3]
    return Split(images, labels), Split(images[:N_ALIGN].clone(), labels[:N_ALIGN].clone()), masks


def _made_like(**options: Any) -> CounterexampleSettings:
    return CounterexampleSettings.model_validate({"swapped": 6, "erased": 4, **options})


def test_swapped_and_erased_pictures_are_those_made_by_hand() -> None:
    training, alignment, masks = _data()
    drawn = Counterexamples(training, alignment, masks, _made_like())
    step = drawn.draw(3, seed=1, epoch=2)[1]
    made = drawn.make(step)
    for n in range(6):
        donor, receiver = step[n].tolist()
        assert masks[donor].any()
        assert alignment.labels[donor] != training.labels[receiver]
        assert made.swapped_labels[n] == training.labels[receiver]
        assert torch.equal(made.twins[n], training.images[receiver])
        for c in range(2):
            for y in range(SIDE):
                for x in range(SIDE):
                    source = alignment.images[donor] if masks[donor, y, x] else training.images[receiver]
                    assert made.swapped[n, c, y, x] == source[c, y, x]
    for n in range(4):
        donor, filler = step[6 + n].tolist()
        assert masks[donor].any()
        assert not masks[filler].any()
        assert alignment.labels[donor] == alignment.labels[filler] == made.erased_labels[n]
        for c in range(2):
            for y in range(SIDE):
                for x in range(SIDE):
                    source = alignment.images[filler] if masks[donor, y, x] else alignment.images[donor]
                    assert made.erased[n, c, y, x] == source[c, y, x]


@pytest.mark.parametrize(("fill", "by"), [("blur", fill_by_blur), ("inpaint", fill_smoothly)])
def test_erased_pictures_may_be_filled_from_what_lies_around(fill: str, by: Any) -> None:
    training, alignment, masks = _data()
    drawn = Counterexamples(training, alignment, masks, _made_like(fill=fill))
    assert drawn.donors_per_class()["erased"] == {0: 6, 1: 3}
    step = drawn.draw(2, seed=1, epoch=1)[1]
    made = drawn.make(step)
    for n in range(4):
        donor = int(step[6 + n, 0])
        expected = by(alignment.images[donor].numpy(), masks[donor].numpy())
        np.testing.assert_allclose(made.erased[n].numpy(), expected)
        assert made.erased_labels[n] == alignment.labels[donor]
    # no picture of the class is needed
    Counterexamples(training, alignment, torch.ones_like(masks), _made_like(fill=fill))


def test_blended_edges_keep_the_donor_s_gradients_and_the_receiver_s_edge() -> None:
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    receivers = torch.stack([0.2 + 0.03 * rows + 0.01 * columns] * 8)[:, None].double()
    donor = (0.6 + 0.1 * torch.sin(rows) * torch.cos(columns)).double()
    donors = torch.stack([donor] * 4)[:, None]
    mask = torch.zeros((4, 12, 12), dtype=torch.bool)
    mask[:, 3:8, 4:9] = True
    training, alignment = Split(receivers, torch.ones(8).long()), Split(donors, torch.zeros(4).long())
    made_like = _made_like(edges="blended", erased=0)
    drawn = Counterexamples(training, alignment, mask, made_like)
    swapped = drawn.make(drawn.draw(1, 0, 1)[0]).swapped[0, 0]
    assert torch.equal(swapped[~mask[0]], receivers[0, 0][~mask[0]])

    def laplace(surface: Tensor) -> Tensor:
        around = surface[:-2, 1:-1] + surface[2:, 1:-1] + surface[1:-1, :-2] + surface[1:-1, 2:]
        return (around - 4 * surface[1:-1, 1:-1])[2:7, 3:8]  # of the pixels in the mask

    torch.testing.assert_close(laplace(swapped), laplace(donor), atol=1e-9, rtol=0)  # Poisson's equation
    hard = Counterexamples(training, alignment, mask, _made_like(erased=0))
    seam = hard.make(hard.draw(1, 0, 1)[0]).swapped[0, 0].diff(dim=0).abs().max()
    assert swapped.diff(dim=0).abs().max() < 0.6 * seam


def test_where_a_class_has_no_unmasked_picture_the_filler_has_nothing_rejected_at_that_place() -> None:
    training, alignment, masks = _data()
    masks[:] = False
    for place in range(N_ALIGN):
        masks[place, :, place // 3 % 4] = True  # a column of its own: every picture has a rejected region
    drawn = Counterexamples(training, alignment, masks, _made_like())
    pairs = drawn.draw(20, seed=0, epoch=1)[:, 6:].reshape(-1, 2).tolist()
    assert all(donor != filler and not (masks[donor] & masks[filler]).any() for donor, filler in pairs)
    assert drawn.donors_per_class() == {"swapped": {0: 8, 1: 8, 2: 8}, "erased": {0: 8, 1: 8, 2: 8}}


def test_pairs_change_by_the_squares_of_their_contrasts() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn((7, 4), generator=generator, dtype=torch.float64) for _ in range(2))
    expected = []
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        contrasts = [[z[k] - sum(z[:k] + z[k + 1 :]) / 3 for k in range(4)] for z in (a, b)]
        expected.append(sum((one - other) ** 2 for one, other in zip(*contrasts, strict=True)) / 4)
    torch.testing.assert_close(pair_change(first, second), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(pair_change(first, second + 5.0), pair_change(first, second))
    assert pair_change(first, first).sum() == 0


def test_feathered_edges_fall_with_the_distance_to_the_mask() -> None:
    masks = torch.rand((3, 9, 8), generator=torch.Generator().manual_seed(0)) < 0.05
    masks[2] = False
    assert masks[:2].any(dim=(1, 2)).all()
    found = opacity_of(masks, feather=2.5)
    for n in range(3):
        inside = torch.nonzero(masks[n]).tolist()
        for y in range(9):
            for x in range(8):
                away = min((math.hypot(y - v, x - u) for v, u in inside), default=math.inf)
                assert found[n, y, x].item() == pytest.approx(max(0.0, 1 - away / 2.5))
    assert torch.equal(opacity_of(masks), masks.double())


def test_classes_of_donors_and_donors_within_them_are_used_alike() -> None:
    training, alignment, masks = _data()
    drawn = Counterexamples(training, alignment, masks, _made_like(swapped=5))
    assert drawn.donors_per_class() == {"swapped": {0: 6, 1: 3}, "erased": {0: 6, 1: 3}}
    pairs = drawn.draw(48, seed=3, epoch=1)
    for slots, others in ((pairs[:, :5], training), (pairs[:, 5:], alignment)):
        for step in slots:
            counts = torch.bincount(alignment.labels[step[:, 0]], minlength=3)
            assert abs(counts[0] - counts[1]) <= 1  # in every step
            assert counts[2] == 0
        donors = slots[..., 0].flatten()
        per_class = torch.bincount(alignment.labels[donors])
        assert abs(per_class[0] - per_class[1]) <= 1
        for label in (0, 1):
            uses = torch.bincount(donors[alignment.labels[donors] == label], minlength=N_ALIGN)
            used = uses[(alignment.labels == label) & masks.any(dim=(1, 2))]
            assert used.max() - used.min() <= 1
        if others is training:  # receivers: the two other classes alike
            receivers = training.labels[slots[..., 1].flatten()]
            for label in (0, 1):
                of_label = torch.bincount(receivers[alignment.labels[donors] == label], minlength=3)
                assert of_label[label] == 0
                assert abs(int(of_label[2]) - int(of_label[1 - label])) <= 1


def test_draws_depend_on_seed_and_epoch_and_not_on_the_order_of_the_alignment_set() -> None:
    training, alignment, masks = _data()
    drawn = Counterexamples(training, alignment, masks, _made_like())
    order = torch.randperm(N_ALIGN, generator=torch.Generator().manual_seed(9))
    shuffled = Split(alignment.images[order], alignment.labels[order])
    other = Counterexamples(training, shuffled, masks[order], _made_like())
    pairs, again = drawn.draw(4, 5, 1), other.draw(4, 5, 1)
    assert not torch.equal(pairs, again)  # other places
    for step, same in zip(pairs, again, strict=True):
        for name in ("swapped", "twins", "erased", "swapped_labels", "erased_labels"):
            assert torch.equal(getattr(drawn.make(step), name), getattr(other.make(same), name))
    assert torch.equal(pairs, drawn.draw(4, 5, 1))
    assert not torch.equal(pairs, drawn.draw(4, 6, 1))
    assert not torch.equal(pairs, drawn.draw(4, 5, 2))


def test_of_weights_counts_what_most_votes_rejected() -> None:
    training, alignment, masks = _data()
    weights = torch.where(masks, 0.7, 0.3)
    drawn, weighed = (Counterexamples(training, alignment, each, _made_like()) for each in (masks, weights))
    step = drawn.draw(1, 0, 1)[0]
    assert torch.equal(step, weighed.draw(1, 0, 1)[0])
    assert torch.equal(drawn.make(step).swapped, weighed.make(step).swapped)


def test_nothing_to_make_counterexamples_of_is_said() -> None:
    training, alignment, masks = _data()
    with pytest.raises(InputError, match=r"counterexamples\.swapped: no rejected region has a training picture of an"):
        Counterexamples(training, alignment, torch.zeros_like(masks), _made_like())
    with pytest.raises(InputError, match=r"counterexamples\.erased: no rejected region can be filled"):
        Counterexamples(training, alignment, torch.ones_like(masks), _made_like())


def _mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE**2, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def _cnn() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * SIDE**2, 3)
        return nn.Sequential(*layers).double()


def _settings(correction: str, **options: Any) -> AlignSettings:
    settings = {"rrr_lambda": 0.4 if correction == "both" else 0.0, "learning_rate": 0.01, "epochs": 2, "seeds": [3]}
    batches = {"alignment_batch": 5, "training_batch": 20, "correction": correction}
    return AlignSettings.model_validate(
        {**settings, **batches, "counterexamples": _made_like().model_dump(), **options}
    )


def _align(model: nn.Module, settings: AlignSettings, resume: Resume | None = None) -> AlignedRun:
    training, alignment, masks = _data()
    (run,) = align_ensemble(model, training, alignment, masks, training, settings, resume=resume)
    return run


@pytest.mark.parametrize("correction", ["counterexamples", "both"])
@pytest.mark.parametrize("model", [_mlp, _cnn])
def test_the_steps_are_those_of_a_plain_loop(correction: str, model: Any) -> None:
    settings = _settings(correction)
    run = _align(model(), settings)
    training, alignment, masks = _data()
    plain = model()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    rows = endless_batches(N, 20, torch.Generator().manual_seed(6))
    chosen = endless_batches(N_ALIGN, 5, torch.Generator().manual_seed(7))
    maker = Counterexamples(training, alignment, masks, _made_like())
    changes = []
    for epoch in (1, 2):
        for pairs in maker.draw(3, 3, epoch):
            made, row, choice = maker.make(pairs), next(rows), next(chosen)
            pictures, labels = [training.images[row]], [training.labels[row]]
            if correction == "both":
                pictures.insert(0, alignment.images[choice])
                labels.insert(0, alignment.labels[choice])
            pictures += [made.swapped, made.erased]
            labels += [made.swapped_labels, made.erased_labels]
            size = sum(map(len, labels))
            assert size == settings.batch()[1]
            plain.train()
            loss = functional.cross_entropy(plain(torch.cat(pictures)), torch.cat(labels), reduction="sum") / size
            plain.eval()
            if correction == "both":
                penalty = rrr_penalty(plain, alignment.images[choice], masks[choice]).sum() / size
                loss = loss + 0.4 * penalty
            differences = plain(made.swapped) - plain(made.twins)
            change = torch.stack(
                [
                    sum((d[k] - (d.sum() - d[k]) / 2) ** 2 for k in range(3)) / 3  # type: ignore[misc]
                    for d in differences
                ]
            ).mean()
            changes.append(change.item())
            optimizer.zero_grad()
            (loss + 0.3 * change).backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(run.weights[name], value)
    assert run.curve["pair_change"].tolist() == pytest.approx([np.mean(changes[:3]), np.mean(changes[3:])])
    assert (run.curve["penalty"] > 0).all() == (correction == "both")


def test_an_mlp_takes_the_ordinary_loop_and_a_single_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_stack(*_: Any) -> None:
        raise AssertionError("the stacked path knows no counterexamples")

    monkeypatch.setattr(learners, "StackedMlp", no_stack)
    _align(_mlp(), _settings("counterexamples"))
    with pytest.raises(AssertionError, match="knows no counterexamples"):
        _align(_mlp(), _settings("rrr", counterexamples=None))


def test_the_paper_s_correction_makes_none_and_its_curve_has_no_pairs() -> None:
    run = _align(_cnn(), _settings("rrr", counterexamples=None, rrr_lambda=0.4))
    assert list(run.curve) == ["epoch", "cross_entropy", "penalty", "val_accuracy"]


@pytest.mark.parametrize("correction", ["counterexamples", "both"])
def test_stopped_and_started_again_it_ends_with_the_same_weights(
    correction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _align(_cnn(), _settings(correction))
    monkeypatch.setattr("lvlmva_core.resume.MIN_SECONDS", -1.0)
    monkeypatch.setattr("lvlmva_core.resume.COST_FACTOR", -1000)
    steps = 0
    take = learners.Single.step

    def killed(self: learners.Single, *batch: Tensor) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:  # in the second epoch
            raise KeyboardInterrupt
        take(self, *batch)

    monkeypatch.setattr(learners.Single, "step", killed)
    resume = Resume(Store(tmp_path), "work", [], torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        _align(_cnn(), _settings(correction), resume)
    steps = 100
    again = _align(_cnn(), _settings(correction), Resume(Store(tmp_path), "work", [], torch.device("cpu")))
    assert steps == 103  # the second epoch's alone
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value)
    assert again.curve.equals(whole.curve)


SPOT = (slice(0, 3), slice(0, 3))  # where the toy's shortcut lies


def _toy(seed: int, n: int, spot: Tensor) -> tuple[Tensor, Tensor]:
    """Grey pictures, 12 a side: the class shows weakly in the middle; a bright spot in a corner where `spot` says."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = 0.2 * torch.rand((n, 1, 12, 12), generator=generator)
    middle = torch.where(torch.rand(n, generator=generator) < 0.85, labels, 1 - labels)
    images[:, 0, 5:8, 5:8] += 0.2 * middle[:, None, None]
    images[:, 0, *SPOT] += 0.7 * spot[:, None, None].float()
    return images, labels


def _effect(model: nn.Module) -> float:
    """Change of z_1 - z_0 by the spot, over its standard deviation without."""
    with torch.no_grad():
        with_spot, without = (model(_toy(9, 400, torch.full((400,), has))[0]) for has in (True, False))
    change = (with_spot[:, 1] - with_spot[:, 0]) - (without[:, 1] - without[:, 0])
    return float(change.mean() / (without[:, 1] - without[:, 0]).std())


@pytest.mark.usefixtures("one_thread")  # the models are too small to gain from more
def test_a_known_shortcut_goes_by_the_verdicts_and_stays_with_random_places() -> None:
    has = (torch.arange(400) % 2 == 1) & (torch.arange(400) % 20 < 18)  # on 9 of 10 of the second class
    images, labels = _toy(0, 400, has)
    training = Split(images, labels)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(base.parameters(), lr=2e-3)
    for rows in torch.stack([torch.randperm(400) for _ in range(20)]).view(-1, 50):
        optimizer.zero_grad()
        functional.cross_entropy(base(images[rows]), labels[rows]).backward()
        optimizer.step()
    masks = torch.zeros((80, 12, 12), dtype=torch.bool)
    masks[:, *SPOT] = has[:80, None, None]
    settings = AlignSettings.model_validate(
        {"rrr_lambda": 0.0, "learning_rate": 2e-3, "epochs": 15, "seeds": [0], "correction": "counterexamples"}
    )
    alignment = Split(images[:80], labels[:80])
    effects: dict[str, list[float]] = {}
    for name, drawn in (
        ("verdicts", masks.numpy()),
        ("random places", random_masks_like(masks.numpy(), 0)),
        ("class-matched", masks_on_random_pictures(masks.numpy(), 0, labels[:80].numpy())),
    ):
        for run in align_ensemble(base, training, alignment, torch.from_numpy(drawn), training, settings):
            model = copy.deepcopy(base)
            model.load_state_dict(run.weights)
            effects.setdefault(name, []).append(_effect(model))
    before = _effect(base)
    assert before > 2
    assert max(map(abs, effects["verdicts"])) < 0.1 * before
    assert min(effects["random places"] + effects["class-matched"]) > 0.5 * before


def _level(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Pictures of one grey each, 12 a side, darker or brighter than the others; the class shows in the middle."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    level = 0.3 + 0.1 * torch.rand((n, 1, 1, 1), generator=generator)
    images = (level + 0.01 * torch.randn((n, 1, 12, 12), generator=generator)).clamp(0, 1)
    images[:, 0, 5:8, 5:8] += (0.04 + 0.04 * torch.rand((n, 1, 1), generator=generator)) * labels[:, None, None]
    return images, labels


def _effect_of_edges(model: nn.Module) -> float:
    """Change of z_1 - z_0 by an innocent patch with hard edges from another picture, over its standard deviation."""
    images, _ = _level(9, 400)
    patched = images.clone()
    patched[:, 0, 0:4, 7:11] = images.roll(7, 0)[:, 0, 0:4, 7:11]
    with torch.no_grad():
        before, after = (z[:, 1] - z[:, 0] for z in (model(images), model(patched)))
    return float((after - before).mean() / before.std())


def _small_cnn() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(32, 2))


def _learn(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for rows in torch.cat([torch.randperm(len(images)) for _ in range(30)]).view(-1, 50):
        optimizer.zero_grad()
        functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()


@pytest.mark.usefixtures("one_thread")
def test_a_hard_edge_is_not_learnt_as_a_shortcut() -> None:
    images, labels = _level(1, 300)
    _learn(base := _small_cnn(), images, labels)
    masks = torch.zeros((60, 12, 12), dtype=torch.bool)
    masks[:, 0:4, 7:11] = (torch.arange(60) % 4 == 0)[:, None, None]  # innocent regions, of one class alone
    settings = AlignSettings.model_validate(
        {"rrr_lambda": 0.0, "learning_rate": 1e-3, "epochs": 12, "seeds": [0], "correction": "counterexamples"}
    )
    training = Split(images, labels)
    (run,) = align_ensemble(base, training, Split(images[:60], labels[:60]), masks, training, settings)
    misled = copy.deepcopy(base)
    base.load_state_dict(run.weights)
    assert abs(_effect_of_edges(base)) < 0.15
    # edges that go with a class are learnt: pictures without a middle, edges in one class alone
    edged = images.clone()
    edged[:, 0, 5:8, 5:8] = images[:, 0, 5:8, 0:3]
    edged[labels == 0, 0, 0:4, 7:11] = images.roll(5, 0)[labels == 0, 0, 0:4, 7:11]
    _learn(misled, edged, labels)
    assert _effect_of_edges(misled) < -0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swapped": 0, "erased": 0}, "swapped and erased are both 0"),
        ({"swapped": 0}, "pair_weight compares swapped pictures with their twins"),
        ({"edges": "feathered"}, "feather says over how many pixels"),
        ({"feather": 2.0}, "feather says over how many pixels"),
        ({"fill": "blur", "erased": 0}, "fill is of erased pictures, and erased is 0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CounterexampleSettings.model_validate(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "rrr"}, "counterexamples are not made with correction: rrr"),
        ({"correction": "counterexamples", "rrr_lambda": 0.1}, "has no penalty; set rrr_lambda to 0"),
        ({"correction": "both", "selection": {"rule": "pseudo_group"}}, "would choose by what was trained"),
        ({"correction": "contrary"}, "Input should be 'rrr', 'counterexamples' or 'both'"),
    ],
)
def test_corrections_and_what_they_have_no_use_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _settings(**{"correction": "both", **options})


def _params(folder: Path, align: dict[str, Any], methods: dict[str, dict[str, Any]]) -> Path:
    yaml = YAML(pure=True)
    content = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["align"] |= align
    content["methods"] |= methods
    yaml.dump(content, folder / "params.yaml")
    return folder / "params.yaml"


def test_methods_take_over_what_their_correction_uses(tmp_path: Path) -> None:
    made_like = {"swapped": 3, "erased": 2, "pair_weight": 0.0}
    names = ["lvlm_va_counterexamples", "lvlm_va_both", "counterexamples_random_masks", "class_matched"]
    path = _params(tmp_path, {"counterexamples": made_like, "alignment_batch": 10}, {name: {} for name in names})
    chosen = load_params(path).chosen_methods()
    found = {name: chosen[name] for name in ("lvlm_va", *names)}
    assert all(isinstance(settings, AlignSettings) for settings in found.values())
    about = {name: (s.correction, s.rrr_lambda, s.batch(), s.made_like()) for name, s in found.items()}  # type: ignore[attr-defined]
    made = CounterexampleSettings.model_validate(made_like)
    assert about == {
        "lvlm_va": ("rrr", 0.1, (10, 74), None),
        "lvlm_va_counterexamples": ("counterexamples", 0.0, (0, 69), made),
        "lvlm_va_both": ("both", 0.1, (10, 79), made),
        "counterexamples_random_masks": ("counterexamples", 0.0, (0, 69), made),
        "class_matched": ("rrr", 0.1, (10, 74), None),
    }


@pytest.mark.parametrize(
    ("align", "methods", "message"),
    [
        ({"correction": "both"}, {}, r"'align'.*a method says its own correction.*lvlm_va_both"),
        ({"counterexamples": {"swapped": 3}}, {}, r"align\.counterexamples: no method makes them"),
        ({}, {"lvlm_va": {"correction": "both"}}, r"methods\.lvlm_va: correction must be rrr"),
        (
            {},
            {"lvlm_va": {"counterexamples": {}}},
            r"methods\.lvlm_va: counterexamples has no use with correction: rrr",
        ),
        ({}, {"lvlm_va_counterexamples": {"rrr_lambda": 0.0}}, r"rrr_lambda has no use with correction: counterexam"),
        ({"selection": {"rule": "pseudo_group"}}, {"lvlm_va_both": {}}, "set selection to null for this method"),
    ],
)
def test_params_refuse_what_would_be_passed_over(
    tmp_path: Path, align: dict[str, Any], methods: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_params(_params(tmp_path, align, methods))


def test_every_control_s_class_shares_are_counted() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    masks = np.zeros((60, 6, 6), dtype=bool)
    masks[np.flatnonzero(labels == 0)[:12], :2, :3] = True
    masks[np.flatnonzero(labels == 1)[:3], 4:, 4:] = True
    drawn = np.stack([masks_on_random_pictures(masks, seed, labels) for seed in range(4)])
    counted = shares_per_class(drawn, labels, ["a", "b"])
    assert counted == {
        "pictures": 15.0,
        "class_shares": pytest.approx({"a": 0.8, "b": 0.2}),
        "mean_area": pytest.approx((12 * 6 + 3 * 4) / (60 * 36)),
    }
    for one in drawn:  # by hand, draw by draw
        assert sum(bool(mask.any()) for mask, label in zip(one, labels, strict=True) if label == 0) == 12
        assert sum(bool(mask.any()) for mask, label in zip(one, labels, strict=True) if label == 1) == 3
    assert len({one.any(axis=(1, 2)).tobytes() for one in drawn}) == 4
    of_any = shares_per_class(np.stack([masks_on_random_pictures(masks, s) for s in range(200)]), labels, ["a", "b"])
    assert of_any["class_shares"]["a"] == pytest.approx((labels == 0).mean(), abs=0.03)  # the class shares are gone
    assert shares_per_class(np.zeros_like(masks), labels, ["a", "b"])["class_shares"] == {"a": 0.0, "b": 0.0}
