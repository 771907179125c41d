"""The audit as a user would call it, on pictures and a model from elsewhere whose shortcut is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lvlmva.cli import app

CLASSES = ("<b>dark", "it's bright")
MODEL = """
import torch

def {name}():
    weight = torch.zeros(16, 16)
    weight[:5, :5], weight[6:11, 6:11] = {corner}, {middle}
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([-weight.flatten(), weight.flatten()]))
        net[1].bias.copy_(torch.tensor([0.5, -0.5]) * float(weight.sum()))
    return net
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders: a corner and the middle are bright in class 1, dark in class 0; the rest is noise."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for n in range(40):
            pixels = rng.integers(0, 60, (16, 16)).astype(np.uint8)
            for where in (np.s_[:5, :5], np.s_[6:11, 6:11]):
                pixels[where] += np.uint8(180 * label)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"patient-<i>-{n}.png")
    code = MODEL.format(name="relies", corner=1.0, middle=0.4) + MODEL.format(name="blind", corner=0.0, middle=1.0)
    (tmp_path / "toy.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    return tmp_path


def _run(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["audit", *words])
    return found.exit_code, (found.stdout if "--json" in words else found.output) + (
        str(found.exception) if found.exception else ""
    )


def _words(function: str) -> list[str]:
    named = ["--images", "pictures", "--model", f"toy:{function}", "--classes", ",".join(CLASSES), "--size", "16"]
    return [*named, "--normalisation", "none", "--samples", "40", "--regions", "2", "--threads", "1"]


def test_the_corner_comes_up_and_a_model_that_ignores_it_is_not_accused(folder: Path) -> None:
    code, out = _run(*_words("relies"), "--json")
    assert code == 0, out
    found = json.loads(out)
    first = found["groups"][0]
    assert (found["accuracy"], first["name"].split(",")[0], first["at_edge"]) == (1.0, "top left", True)
    # the logit is made of corner and middle, 1 to 0.4 on 25 pixels each; exchanged, the corner's part turns round
    assert first["reliance"] == pytest.approx(2 / 1.4, abs=0.15)
    brightness = next(cue for cue in found["cues"] if cue["cue"] == "brightness")
    assert (brightness["high"], brightness["auc"]) == (True, 1.0)

    code, out = _run(*_words("blind"), "--json")
    assert code == 0, out
    found = json.loads(out)
    # dark in one class and bright in the other: two groups, both in the middle
    assert {group["name"].split(",")[0] for group in found["groups"] if group["depended_on"]} == {"centre"}
    assert not [group for group in found["groups"] if group["at_edge"] and group["depended_on"]]


def test_a_table_with_ids_and_unusual_names_is_read_as_new_reads_it(folder: Path) -> None:
    """The columns are guessed by their content, or said; the same pictures give the same findings."""
    rows = [(path.stem, path.parent.name) for path in sorted((folder / "pictures").rglob("*.png"))]
    (folder / "pictures/all").mkdir()
    for place, (stem, name) in enumerate(rows):
        (folder / "pictures" / name / f"{stem}.png").rename(folder / "pictures/all" / f"{place:03d}.png")
    lines = [f"{place:03d},{name},{len(name)}" for place, (_, name) in enumerate(rows)]
    (folder / "pictures/list.csv").write_text("number,finding,site\n" + "\n".join(lines) + "\n", encoding="utf-8")
    said = ["--columns", "file=number,label=finding", "--file-pattern", "all/{}.png"]
    found = []
    for words in (said, said[:2]):
        code, out = _run(*_words("relies"), "--table", "list.csv", *words, "--json")
        assert code == 0, out
        found.append(json.loads(out))
    assert found[0] == found[1]
    assert found[0]["accuracy"] == 1.0
    code, out = _run(*_words("relies"), "--columns", "label=finding")
    assert "--columns and --file-pattern are of a table; name it with --table" in out
    code, out = _run(*_words("relies"), "--table", "lost.csv")
    assert "--table lost.csv: no such file, here or below pictures" in out


def test_the_page_names_no_file_and_escapes_classes(folder: Path) -> None:
    code, out = _run(*_words("relies"), "--out", "page.html", "--at-most-mb", "0.2")
    assert code == 0, out
    assert "Look closer" in out
    page = Path("page.html").read_text()
    assert len(page.encode()) <= 200_000
    assert "patient-" not in page
    assert "<b>dark" not in page
    assert "&lt;b&gt;dark" in page
    assert str(folder) not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "pictures"], "--model: is missing; give both, or neither"),
        (["--split", "half"], "--split half: expected one of all, train, val, test"),
        ([], "no dvc.yaml here; give --images and --model, or run it in the project's folder"),
        (["--images", "pictures", "--model", "torchvision:resnet18", "--size", "16"], "--classes: is missing; name"),
        (["--images", "nowhere", "--model", "toy:blind", "--size", "16", "--classes", "a,b"], "no such folder or file"),
        ([*_words("blind")[:-8], "--size", "16"], "normalisation is missing"),
        ([*_words("blind"), "--classes", "a,b"], "is none of --classes (a, b)"),
        ([*_words("absent")], "--model"),
        ([*_words("blind"), "--normalisation", "0.5/x"], "--normalisation 0.5/x: expected numbers"),
        ([*_words("blind"), "--out", "no/page.html"], "--out no/page.html: no folder no; create it"),
    ],
)
def test_mistakes_are_named_by_their_option(folder: Path, words: list[str], message: str) -> None:
    code, out = _run(*words)
    assert code == 1
    assert message in out, out
