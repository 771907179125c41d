"""The conformance suites of `lvlmva_core.testing`: all that exists passes, and what is broken on purpose is caught."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lvlmva_core.attribution_methods import ATTRIBUTION_METHODS, AttributionMethod
from lvlmva_core.attribution_methods.deep_lift_shap import DeepLiftShap
from lvlmva_core.corruptions import CORRUPTIONS, contrast
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.offline import CRITICS, criticise_by_rules, is_stand_in
from lvlmva_core.lvlm.settings import OracleCritic, StandInCritic
from lvlmva_core.metrics import METRICS, Measured, Metric
from lvlmva_core.penalties import PENALTIES, ClosedForm, Penalty, rrr_penalty, squared_gradient
from lvlmva_core.segmenters import Arrays, Segmenter
from lvlmva_core.segmenters.grid import Grid
from lvlmva_core.segmenters.ppeps_wgm import PpepsWgm
from lvlmva_core.segmenters.sam import Sam
from lvlmva_core.segmenters.slic import Slic
from lvlmva_core.store import Store
from lvlmva_core.testing.attribution import AttributionMethodTests
from lvlmva_core.testing.corruption import CorruptionTests
from lvlmva_core.testing.critic import CriticTests
from lvlmva_core.testing.metric import MetricTests
from lvlmva_core.testing.penalty import PenaltyTests
from lvlmva_core.testing.segmenter import SegmenterTests
from lvlmva_core.testing.store import StoreTests
from tests.unit.conformance import complaints
from tests.unit.test_segmentation_methods import tiny_sam

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------------- segmenters


class TestGrid(SegmenterTests):
    def segmenter(self) -> Segmenter:
        return Grid(n_regions=4)


class TestSlic(SegmenterTests):
    def segmenter(self) -> Segmenter:
        return Slic(n_regions=4, n_superpixels=30)


class TestSlicOfGreyPictures(TestSlic):
    channels = 1


class TestPpepsWgm(SegmenterTests):
    def segmenter(self) -> Segmenter:
        return PpepsWgm(n_regions=4, n_starts=4)


class TestPpepsWgmThatChooses(SegmenterTests):
    def segmenter(self) -> Segmenter:
        return PpepsWgm(n_regions=3, n_starts=2, choose="bic")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sam(tmp_path_factory.mktemp("sam"))


class TestSam(SegmenterTests):
    folder: Path

    @pytest.fixture(autouse=True)
    def given(self, checkpoint: Path) -> None:
        self.folder = checkpoint

    def segmenter(self) -> Segmenter:
        return Sam(n_regions=4, sam_checkpoint=str(self.folder))


def test_every_segmenter_goes_through_the_suite() -> None:
    suites = (TestGrid, TestSlic, TestPpepsWgm)
    assert {*(suite().segmenter().method for suite in suites), "sam"} == set(Segmenter.kinds)


def _segmenter_suite(**overrides: Any) -> type:
    """The suite on a `Grid` of which something is overridden; it is no kind of its own."""

    class Suite(SegmenterTests):
        def segmenter(self) -> Segmenter:
            broken = Grid(n_regions=4, seed=3)
            kind = type("Broken", (), {"__getattr__": lambda self, name: getattr(broken, name)})()
            for name, value in overrides.items():
                setattr(kind, name, functools.partial(value, broken) if callable(value) else value)
            return kind  # type: ignore[no-any-return]

    return Suite


def _unsorted(grid: Grid, maps: np.ndarray, *rest: Any) -> Arrays:
    found = grid.segment(maps, *rest)
    return {**found, "weights": found["weights"][:, ::-1].copy()}


def _of_the_batch(grid: Grid, maps: np.ndarray, *rest: Any) -> Arrays:
    found = grid.segment(maps, *rest)
    found["segments"][0, 0, 0] = len(maps)
    return found


def _drawing(grid: Grid, maps: np.ndarray, *rest: Any) -> Arrays:
    np.random.random()  # noqa: NPY002
    return grid.segment(maps, *rest)


def _writing(grid: Grid, maps: np.ndarray, *rest: Any) -> Arrays:
    found = grid.segment(maps, *rest)
    maps[0, 0, 0] += 1
    return found


def _as_integers(grid: Grid, maps: np.ndarray, *rest: Any) -> Arrays:
    found = grid.segment(maps, *rest)
    return {**found, "segments": found["segments"].astype(np.int64)}


def _never_empty(grid: Grid, maps: np.ndarray, *rest: Any) -> Arrays:
    return grid.segment(np.abs(maps), *rest)


def _deaf_to_nan(grid: Grid, maps: np.ndarray, *rest: Any) -> Arrays:
    return grid.segment(np.nan_to_num(maps, posinf=1.0), *rest)


def _scaled(grid: Grid, maps: np.ndarray, *rest: Any) -> Arrays:
    return grid.segment(np.where(np.abs(maps) > 3, 100 * maps, maps), *rest)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (_unsorted, "test_regions_are_numbered_by_falling_share"),
        (_of_the_batch, "test_samples_are_independent"),
        (_drawing, "test_the_same_again"),
        (_writing, "test_inputs_are_left_alone"),
        (_as_integers, "test_what_comes_out"),
        (_never_empty, "test_a_map_without_positive_attribution_has_no_region"),
        (_deaf_to_nan, "test_a_broken_map_is_refused_by_its_sample"),
        (_scaled, "test_the_scale_of_a_map_changes_nothing"),
    ],
)
def test_a_broken_segmenter_is_caught(broken: Callable[..., Arrays], complaint: str) -> None:
    assert complaint in complaints(_segmenter_suite(segment=broken))


def test_a_segmenter_that_lies_about_pictures_or_keys_is_caught() -> None:
    assert "test_pictures_count_where_it_says_so" in complaints(_segmenter_suite(reads_images=True))

    class Forgetful(SegmenterTests):
        def segmenter(self) -> Segmenter:
            class Quiet(Slic):
                method: Literal["quiet"] = "quiet"  # type: ignore[assignment]

                def kept_under(self) -> dict[str, object]:
                    return {}

            Segmenter.kinds.pop("quiet")
            return Quiet(n_regions=4, n_superpixels=30)

    found = complaints(Forgetful)
    assert "test_what_changes_the_result_changes_what_it_is_kept_under" in found
    assert "test_it_is_found_by_its_name" in found


# ------------------------------------------------------------------------------------------------- attribution methods


@pytest.mark.parametrize("name", ATTRIBUTION_METHODS)
def test_every_attribution_method_passes_its_suite(name: str) -> None:
    class Suite(AttributionMethodTests):
        n_classes = 3
        shape = (3, 8, 8)

        def method(self, batch_size: int) -> AttributionMethod:
            return AttributionMethod.model_validate({"method": name, "n_baselines": 4, "batch_size": batch_size})

    assert complaints(Suite) == set()


def _of_the_whole_batch(maps: Tensor) -> Tensor:
    return maps - maps.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_of_the_whole_batch, "test_samples_are_independent"),
        (lambda maps: 1.01 * maps, "test_attributions_add_up"),
        (lambda maps: maps.float(), "test_attributions_add_up"),
        (lambda maps: maps + torch.rand(()), "test_random_generators_are_left_alone"),
        (lambda maps: maps + 1e-3, "test_an_input_that_is_its_baseline_has_no_attribution"),
    ],
)
def test_a_broken_attribution_method_is_caught(change: Callable[[Tensor], Tensor], complaint: str) -> None:
    class Suite(AttributionMethodTests):
        shape = (3, 8, 8)
        dtypes = (torch.float64,)

        def method(self, batch_size: int) -> AttributionMethod:
            return DeepLiftShap(n_baselines=4, batch_size=batch_size)

        def explain(self, *given: Any) -> Tensor:
            return change(super().explain(*given))

    assert complaint in complaints(Suite)


# ----------------------------------------------------------------------------------------------------------- penalties


class TestLogProbabilities(PenaltyTests):
    name = "log_probabilities"


class TestContrast(PenaltyTests):
    name = "contrast"


def test_every_penalty_goes_through_the_suite() -> None:
    assert {suite.name for suite in (TestLogProbabilities, TestContrast)} == set(PENALTIES)


def _coupled(model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    model.train()
    pixels = images.detach().requires_grad_(True)
    score = model(pixels).log_softmax(1).sum()
    (slope,) = torch.autograd.grad(score, pixels, create_graph=True)
    return (slope * masks[:, None]).square().flatten(1).sum(1)


def _detached(model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    return rrr_penalty(model, images, masks).detach() + 0 * sum(p.sum() for p in model.parameters())


def _outside(model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    return rrr_penalty(model, images, torch.ones_like(masks) if masks.dtype == torch.bool else masks)


def _averaged(model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    return rrr_penalty(model, images, masks) / len(images)


def _lenient(model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    return rrr_penalty(model, images, (masks != 0).reshape(-1, *masks.shape[-2:]).expand(len(images), 4, 5))


def _in_train_mode(model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    found = rrr_penalty(model, images, masks)
    model.train()
    return found


@pytest.mark.parametrize(
    ("measure", "complaint"),
    [
        (_coupled, "test_samples_are_independent"),
        (_coupled, "test_the_model_and_the_inputs_come_back"),
        (_detached, "test_the_gradient_in_the_parameters_is_its_central_difference"),
        (_outside, "test_an_empty_mask_costs_nothing_and_a_larger_one_no_less"),
        (_averaged, "test_samples_are_independent"),
        (_lenient, "test_masks_of_another_shape_or_type_are_refused"),
        (_in_train_mode, "test_the_model_and_the_inputs_come_back"),
    ],
)
def test_a_broken_penalty_is_caught(monkeypatch: pytest.MonkeyPatch, measure: Any, complaint: str) -> None:
    monkeypatch.setitem(PENALTIES, "broken", Penalty(measure))
    suite = type("Suite", (PenaltyTests,), {"name": "broken"})
    assert complaint in complaints(suite)


def test_a_wrong_closed_form_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(model: nn.Module, images: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
        return squared_gradient(model, images, masks, lambda logits: logits.log_softmax(1).sum())

    right = PENALTIES["log_probabilities"].closed_form
    assert right is not None
    for wrong in (ClosedForm(right.slope), ClosedForm(lambda p, labels: 1 - p, right.curvature)):
        monkeypatch.setitem(PENALTIES, "broken", Penalty(measure, wrong))
        suite = type("Suite", (PenaltyTests,), {"name": "broken"})
        assert complaints(suite) == {"test_the_closed_form_is_what_double_backward_gives"}


# --------------------------------------------------------------------------------------------------------------- store


class TestStore(StoreTests):
    def store(self, root: Path) -> Store:
        return Store(root)


class _Overwriting(Store):
    def put_bytes(self, kind: str, key: str, suffix: str, content: bytes, *, replace: bool = False) -> bool:
        return super().put_bytes(kind, key, suffix, content, replace=True)


class _Trusting(Store):
    def get_arrays(self, kind: str, key: str) -> dict[str, np.ndarray] | None:
        found = super().get_arrays(kind, key)
        return {"x": np.zeros(1)} if found is None and self.path(kind, key, "arrays").parent.is_dir() else found


class _Littering(Store):
    def put_bytes(self, kind: str, key: str, suffix: str, content: bytes, *, replace: bool = False) -> bool:
        new = super().put_bytes(kind, key, suffix, content, replace=replace)
        self.path(kind, key, suffix).with_suffix(".left").touch()
        return new


class _Unlocked(Store):
    def lock(self, kind: str, key: str) -> Any:
        import contextlib

        return contextlib.nullcontext()


class _Anywhere(Store):
    def path(self, kind: str, key: str, suffix: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.{suffix}"


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (_Overwriting, "test_the_first_record_stands"),
        (_Trusting, "test_damage_is_never_served"),
        (_Trusting, "test_a_record_is_served_under_its_own_key_alone"),
        (_Littering, "test_same_arrays_same_bytes"),
        (_Unlocked, "test_one_at_a_time_holds_a_lock"),
        (_Anywhere, "test_names_that_could_leave_the_folder_are_refused"),
    ],
)
def test_a_broken_store_is_caught(broken: type[Store], complaint: str) -> None:
    suite = type("Suite", (StoreTests,), {"store": lambda self, root: broken(root)})
    assert complaint in complaints(suite)


# ------------------------------------------------------------------------------------------------------------- critics


class TestRules(CriticTests):
    name = "rules"


class TestOracle(CriticTests):
    name = "oracle"
    told: Mapping[str, Any] = MappingProxyType({})

    def settings(self) -> StandInCritic:
        return OracleCritic(critic="oracle", prompts="decoy_digits", **self.told)


class TestOracleThatErrs(TestOracle):
    told = MappingProxyType({"false_positive_rate": 0.3, "false_negative_rate": 0.4})
    numbering_matters = True


class TestOracleOfObjects(TestOracle):
    told = MappingProxyType({"oracle_rejects": "off_object"})


def test_every_stand_in_goes_through_the_suite() -> None:
    assert {suite.name for suite in (TestRules, TestOracle)} == {name for name in CRITICS if is_stand_in(name)}


def _rules(case: Case) -> str:
    return criticise_by_rules(case.picture, case.segments)


def _forgetful(case: Case) -> str:
    return _rules(case).rpartition("; ")[0] or "Verdicts: "


def _indiscreet(case: Case) -> str:
    return f"Of {case.sample}.\n{_rules(case)}"


def _scribbling(case: Case) -> str:
    found = _rules(case)
    case.picture[0, 0, 0] += 1
    return found


def _by_number(case: Case) -> str:
    return _rules(case).replace("red - yes", "red - no").replace("red - no", "red - no")


def _talkative(case: Case) -> str:
    return f"There is no pink, no lime and no white region.\n{_rules(case)}"


_ASKED: list[str] = []


def _tired(case: Case) -> str:
    _ASKED.append(case.sample)
    return f"Critique {len(_ASKED)}.\n{_rules(case)}"


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (_forgetful, "test_the_judge_reads_a_verdict_for_each_region"),
        (_indiscreet, "test_prose_holds_no_sample_id"),
        (_scribbling, "test_inputs_are_left_alone"),
        (_by_number, "test_the_number_of_a_region_decides_nothing"),
        (_tired, "test_the_same_again"),
        (_tired, "test_samples_are_independent"),
    ],
)
def test_a_broken_critic_is_caught(broken: Callable[[Case], str], complaint: str) -> None:
    suite = type("Suite", (CriticTests,), {"criticise": lambda self, case: broken(case)})
    assert complaint in complaints(suite)


# --------------------------------------------------------------------------------------------- corruptions and metrics


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_passes_its_suite(name: str) -> None:
    assert complaints(type("Suite", (CorruptionTests,), {"name": name})) == set()


def _noise(images: Tensor, amount: float) -> Tensor:
    return (images + amount * torch.rand_like(images)).clamp(0, 1)


def _in_place(images: Tensor, amount: float) -> Tensor:
    return images.mul_(1 - amount)


def _against_the_batch(images: Tensor, amount: float) -> Tensor:
    return images.lerp(images.mean(0, keepdim=True), amount)


def _beyond(images: Tensor, amount: float) -> Tensor:
    return images * (1 + 10 * amount)


@pytest.mark.parametrize(
    ("apply", "amounts", "complaint"),
    [
        (_noise, (0.1, 0.2, 0.3, 0.4, 0.5), "test_the_same_again"),
        (_in_place, (0.1, 0.2, 0.3, 0.4, 0.5), "test_the_same_again"),
        (_against_the_batch, (0.1, 0.2, 0.3, 0.4, 0.5), "test_pictures_are_independent"),
        (_beyond, (0.1, 0.2, 0.3, 0.4, 0.5), "test_pictures_stay_pictures"),
        (contrast, (1.1, 1.3, 1.2, 1.4, 1.6), "test_each_severity_departs_further"),
    ],
)
def test_a_broken_corruption_is_caught(
    monkeypatch: pytest.MonkeyPatch, apply: Any, amounts: tuple[float, ...], complaint: str
) -> None:
    monkeypatch.setitem(CORRUPTIONS, "broken", (apply, amounts))
    assert complaint in complaints(type("Suite", (CorruptionTests,), {"name": "broken"}))


def test_severities_that_are_not_checked_are_caught() -> None:
    class Suite(CorruptionTests):
        name = "gamma_up"

        def apply(self, images: Tensor, severity: int) -> Tensor:
            function, parameters = CORRUPTIONS[self.name]
            return function(images, parameters[severity - 1 if 0 < severity <= 5 else 0])

    assert complaints(Suite) == {"test_other_severities_are_refused"}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_passes_its_suite(name: str) -> None:
    classes = 2 if name in OF_TWO_CLASSES else 3
    assert complaints(type("Suite", (MetricTests,), {"name": name, "classes": classes})) == set()


OF_TWO_CLASSES = ("wga_best_threshold", "auc_plain", "auc_spurious")


def _first(of: Measured) -> float:
    return float(of.predictions[0] == of.labels[0])


def _count(of: Measured) -> float:
    return float((of.predictions == of.labels).sum())


def _numbers(of: Measured) -> float:
    return float(np.abs(of.predictions - of.labels).mean())


def _sorting(of: Measured) -> float:
    of.predictions.sort()
    return float((of.predictions == of.labels).mean())


def _of_numpy(of: Measured) -> Any:
    return (of.predictions == of.labels).mean()


@pytest.mark.parametrize(
    ("measure", "complaint"),
    [
        (_first, "test_the_order_of_samples_changes_nothing"),
        (_count, "test_every_sample_twice_changes_nothing"),
        (_numbers, "test_the_numbers_of_classes_change_nothing"),
        (_sorting, "test_inputs_are_left_alone"),
        (_of_numpy, "test_a_number_or_none"),
    ],
)
def test_a_broken_metric_is_caught(monkeypatch: pytest.MonkeyPatch, measure: Any, complaint: str) -> None:
    monkeypatch.setitem(METRICS, "broken", Metric(measure, "broken", False, False))
    assert complaint in complaints(type("Suite", (MetricTests,), {"name": "broken"}))
