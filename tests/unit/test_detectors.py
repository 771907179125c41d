"""Critics that are trained detectors: letters that were really drawn, a classifier, and what they are called."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter, ValidationError

from lvlmva_core import concepts, found_text
from lvlmva_core.concepts import Look, class_numbers, concept_evidence, square_around
from lvlmva_core.efficientnet_lite import EfficientNetLite0
from lvlmva_core.errors import InputError
from lvlmva_core.fills import fill_by_blur
from lvlmva_core.found_text import find_text
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.critic import criticise
from lvlmva_core.lvlm.detectors import ready
from lvlmva_core.lvlm.judge import judge_by_stand_in
from lvlmva_core.lvlm.offline import CRITICS, is_stand_in
from lvlmva_core.lvlm.settings import ConceptCritic, Critique, StandInJudge, TextCritic, is_detector
from lvlmva_core.report.tables import judged_by, warning_of
from lvlmva_core.testing.critic import CriticTests

ocr = pytest.mark.skipif(
    importlib.util.find_spec(found_text.PACKAGE.replace("-", "_")) is None, reason="the extra `ocr` is not installed"
)
SIDE = 64


pytestmark = pytest.mark.usefixtures("one_thread")


TEXT = TextCritic(critic="text", prompts="knee")


def _radiograph(seed: int, letter: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Smooth grey bones with noise, uint8 (1, 64, 64), and where a letter was drawn in a corner, bool (64, 64)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((SIDE, SIDE)) / SIDE
    bone = 90 * np.exp(-(((columns - 0.5) / 0.25) ** 2)) * (1 - 0.7 * np.exp(-(((rows - 0.5) / 0.05) ** 2)))
    plain = np.clip(40 + bone + rng.normal(0, 4, (SIDE, SIDE)), 0, 255).astype(np.uint8)
    if letter is None:
        return plain[None], np.zeros((SIDE, SIDE), dtype=bool)
    image = Image.fromarray(plain)
    ImageDraw.Draw(image).text((4, 3), letter, fill=235, font=ImageFont.load_default(14))
    drawn = np.asarray(image)
    return drawn[None], drawn != plain


@ocr
@pytest.mark.parametrize("letter", ["R", "L"])
def test_a_letter_that_was_drawn_is_found_where_it_is(letter: str) -> None:
    picture, mask = _radiograph(0, letter)
    (found,) = find_text(picture, 640, 0.4)
    assert (found.mask & mask).sum() >= 0.9 * mask.sum()
    assert found.mask.sum() <= 4 * mask.sum()
    assert 0.4 <= found.probability <= 1
    in_colour = find_text(np.repeat(picture, 3, axis=0), 640, 0.4)
    assert np.array_equal(in_colour[0].mask, found.mask)
    assert find_text(picture, 640, 0.99999) == []


@ocr
def test_a_picture_without_letters_has_none() -> None:
    for seed in range(3):
        assert find_text(_radiograph(seed)[0], 640, 0.4) == []


def _quarters() -> np.ndarray:
    rows, columns = np.indices((SIDE, SIDE)) >= SIDE // 2
    return (rows * 2 + columns).astype(np.uint8)


@ocr
def test_the_region_that_holds_the_letter_is_rejected_and_its_row_says_by_what() -> None:
    picture, mask = _radiograph(1, "R")
    segments = _quarters()
    cases = [Case("a", "arthritic", picture, segments), Case("b", "healthy", _radiograph(1)[0], segments)]
    shared = segments.copy()
    shared[mask & (np.indices((SIDE, SIDE))[1] < np.flatnonzero(mask.any(0))[0] + 3)] = 3  # a strip of the letter
    rows = criticise(TEXT, [*cases, Case("c", "healthy", picture, shared)])
    found = [row.by_region() for row in judge_by_stand_in(StandInJudge(judge="rules", prompts="knee"), rows)]
    yes = dict.fromkeys(range(4), "yes")
    assert found == [{**yes, 0: "no"}, yes, {**yes, 0: "no"}]
    assert rows[0].critic == "text"
    assert rows[0].settings["is"] == "a detector, not a vision-language model"
    assert rows[0].settings["network"].startswith("PP-OCRv4 detection of rapidocr-onnxruntime 1.")
    of_any = TEXT.model_copy(update={"overlap": "any"})
    assert "red - no; blue - yes; yellow - yes; green - no" in str(criticise(of_any, [Case("c", "", picture, shared)]))


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found_text._network.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'text' needs rapidocr-onnxruntime: pip install 'lvlmva\[ocr\]'"):
        ready(TEXT)
    found_text._network.cache_clear()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of ImageNet's shape; drawn weights, since the trained ones are not shipped."""
    torch.manual_seed(0)
    net = EfficientNetLite0(1000)
    with torch.no_grad():
        net.fc.weight *= 200  # so that regions matter
    path = tmp_path_factory.mktemp("weights") / "drawn.pth"
    torch.save(net.state_dict(), path)
    return path


def _concept(weights: Path, **options: object) -> ConceptCritic:
    told = {"critic": "concept", "prompts": "skin", "concepts": ["Band Aid", "diaper"], "at_least": 0.5}
    return ConceptCritic.model_validate({**told, "weights": str(weights), **options})


@pytest.mark.parametrize("look", ["alone", "without"])
def test_evidence_is_that_of_pictures_cut_and_filled_by_hand(weights: Path, look: Look) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (3, 40, 40)).astype(np.uint8)
    segments = np.full((40, 40), 255, dtype=np.uint8)
    segments[:12, :15], segments[20:, 22:] = 0, 2
    found = concept_evidence(picture, segments, ("Band Aid", "diaper"), str(weights), look)
    net = EfficientNetLite0(1000).eval()
    net.load_state_dict(torch.load(weights, weights_only=True))

    def log_odds(shown: np.ndarray) -> float:
        image = torch.tensor(shown / 255)[None]
        image = torch.nn.functional.interpolate(image, (concepts.SIDE,) * 2, mode="bicubic").clamp(0, 1)
        with torch.no_grad():
            p = net(((image - 0.498) / 0.502).float()).double().softmax(1)[0]
        named = p[419] + p[529]  # ImageNet's numbers of the two
        return float(torch.log(named / (1 - named)))

    if look == "alone":
        expected = {0: log_odds(picture[:, :15, :15]), 2: log_odds(picture[:, 20:, 20:])}
    else:
        whole = log_odds(picture.astype(float))
        expected = {r: whole - log_odds(fill_by_blur(picture, segments == r)) for r in (0, 2)}
    assert found == pytest.approx(expected, abs=2e-3)


def test_squares_lie_in_the_picture_around_their_region() -> None:
    picture = np.arange(8 * 20).reshape(1, 8, 20)
    spot = np.zeros((8, 20), dtype=bool)
    spot[0, 19] = True
    assert square_around(picture, spot).tolist() == picture[:, :5, 15:].tolist()  # a quarter of the larger side
    spot[6, 15] = True
    assert square_around(picture, spot).tolist() == picture[:, :7, 13:].tolist()
    assert square_around(picture, np.ones_like(spot)).shape == (1, 8, 20)


@pytest.mark.parametrize("look", ["alone", "without"])
def test_a_region_is_rejected_from_the_evidence_that_is_set(weights: Path, look: Look) -> None:
    segments = np.kron(np.array([[0, 1], [2, 3]], dtype=np.uint8), np.ones((20, 20), dtype=np.uint8))
    noise = np.random.default_rng(0).integers(0, 60, (3, 40, 40))
    picture = (noise + np.array([0, 60, 120, 180])[segments]).astype(np.uint8)
    found = concept_evidence(picture, segments, ("Band Aid", "diaper"), str(weights), look)
    most, second, third = sorted(found.values())[:-4:-1]
    case = Case("a", "benign", picture, segments)
    for bound, count in ((most + 1e-3, 0), ((most + second) / 2, 1), ((second + third) / 2, 2)):
        (row,) = criticise(_concept(weights, at_least=bound, look=look), [case])
        assert str(row.critique).rpartition("\n")[2].count("- no") == count
    assert (row.settings["concepts"], row.settings["look"]) == (["Band Aid", "diaper"], look)
    assert row.settings["is"] == "a detector, not a vision-language model"
    with pytest.raises(ValueError, match="look 'within': expected one of alone, without"):
        concept_evidence(picture, segments, ("Band Aid",), str(weights), "within")  # type: ignore[arg-type]


def test_classes_and_weights_that_are_not_there(weights: Path, tmp_path: Path) -> None:
    assert class_numbers(("band aid", "Diaper")) == [419, 529]
    with pytest.raises(InputError, match="ImageNet has no class 'band-aid'; did you mean Band Aid"):
        class_numbers(("band-aid",))
    concepts.classifier.cache_clear()
    with pytest.raises(InputError, match=r"critique\.weights: .*gone\.pth: no such file; docs/data\.md says"):
        ready(_concept(tmp_path / "gone.pth"))
    shutil.copy(weights, tmp_path / "there.pth")
    assert ready(_concept(tmp_path / "there.pth")) == (
        "'concept' is a detector, not a vision-language model: it looks for Band Aid, diaper"
    )


@ocr
class TestText(CriticTests):
    name = "text"

    def settings(self) -> TextCritic:
        return TEXT.model_copy(update={"side": 96})  # fast; what is found does not matter here


class TestConcept(CriticTests):
    name = "concept"
    channels = 3

    @pytest.fixture(autouse=True)
    def _small(self, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights = weights
        monkeypatch.setattr(concepts, "SIDE", 32)  # fast; what it sees does not matter here

    def settings(self) -> ConceptCritic:
        return _concept(self.weights, at_least=-6.5)


def test_every_detector_goes_through_the_suite() -> None:
    assert {suite.name for suite in (TestText, TestConcept)} == {name for name in CRITICS if is_detector(name)}


def test_a_detector_is_called_one_everywhere() -> None:
    assert [name for name in ("rules", "oracle", "replay", "text", "concept") if is_stand_in(name)] == [
        *("rules", "oracle", "replay")
    ]
    assert is_detector("text")
    assert not is_detector("gpt@1")
    verdicts = {"critic": {"text": 5}, "judge": {"rules": 5}, "critic_settings": {"overlap": "half_of_feature"}}
    assert judged_by({"verdicts": verdicts}) == (
        "critic: text (a detector, not a vision-language model) (overlap half_of_feature); "
        "judge: rules (a stand-in, not a vision-language model)"
    )
    assert warning_of(verdicts).startswith(
        "No vision-language model was asked. The verdicts come from the detector text and the stand-in rules: "
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"critic": "text", "overlap": "majority_of_attribution"}, "'any' or 'half_of_feature'"),
        ({"critic": "concept", "concepts": ["Band Aid"], "at_least": 1.0}, "weights"),
        ({"critic": "concept", "concepts": [], "weights": "w.pth", "at_least": 1.0}, "at least 1 item"),
    ],
)
def test_settings_that_cannot_be_meant(told: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Critique).validate_python({"prompts": "knee", **told})


def test_keys_of_other_critics_are_passed_over() -> None:
    found = TypeAdapter(Critique).validate_python(
        {"critic": "text", "prompts": "knee", "false_positive_rate": 0.1, "endpoint": None, "seed": 0}
    )
    assert found == TEXT
