"""`lvlmva study` as a process and in a real Chromium: the draw, blinding, kills, two participants, the summary."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lvlmva.cli import app
from lvlmva.questionnaire import begin, explained, open_questionnaire
from lvlmva_core.arrays import read_array, read_json, write_arrays
from lvlmva_core.errors import InputError
from lvlmva_core.questionnaire import items_of, read_answers
from lvlmva_core.render import to_png
from tests.pipeline.browser import CHROMIUM, barriers, watched
from tests.pipeline.review import COUNT, LONG, SIDE, ReviewServer, write_project

OPTIONS = ("--samples", "4", "--seed", "3")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose base and aligned model are there; module-wide, since torch takes its time."""
    from lvlmva_core.models import ModelSpec, build_model, save_checkpoint

    folder = tmp_path_factory.mktemp("study") / "project"
    write_project(folder)
    attributions = read_array(folder / "data/attributions.zarr", "attributions")
    attrs = {"ids": [f"s{n}" for n in range(COUNT)], "method": "deep_lift_shap", "baseline_ids": ["s0", "s1"]}
    write_arrays(folder / "data/attributions.zarr", {"attributions": attributions}, attrs)
    spec = ModelSpec("mlp", 3, SIDE, SIDE, 2, 8)
    save_checkpoint(folder / "models/lvlm_va/seed=0.safetensors", spec, build_model(spec, 1))
    return folder


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[ReviewServer]:
    with ReviewServer(project, 0, "study", *OPTIONS) as running:
        running.log_in()
        yield running
        assert "Traceback" not in running.end(signal.SIGINT)


def known(folder: Path) -> dict[str, Path]:
    from lvlmva.pipeline import paths

    return {name: folder / path for name, path in paths(folder / "dvc.yaml").items()}


def test_the_study_shows_what_the_stages_made_and_keeps_it(server: ReviewServer) -> None:
    import torch

    from lvlmva_core.attribution import deep_lift_shap
    from lvlmva_core.models import load_checkpoint
    from lvlmva_core.samples import to_unit_range

    folder = server.folder
    shown = open_questionnaire(folder / "questionnaire")
    assert shown is not None
    places = [int(sample[1:]) for sample in shown.samples]
    assert len(set(places)) == 4
    for name, path in (("images", "images"), ("segments", "segments"), ("before", "attributions")):
        array = "attributions" if name == "before" else name
        expected = read_array(folder / f"data/{path}.zarr", array)[places]
        np.testing.assert_array_equal(read_array(folder / "questionnaire/shown.zarr", name), expected)
    model, _ = load_checkpoint(folder / "models/lvlm_va/seed=0.safetensors", torch.device("cpu"))
    images = torch.from_numpy(to_unit_range(read_array(folder / "data/images.zarr", "images")))
    for place, after in zip(places, read_array(folder / "questionnaire/shown.zarr", "after"), strict=True):
        found = deep_lift_shap(model, images[[place]], images[:2], place % 2)
        np.testing.assert_allclose(after, found.sum(1)[0].numpy(), rtol=1e-4, atol=1e-6)
    ignored = (folder / "questionnaire/.gitignore").read_text()
    assert "/shown.zarr" in ignored
    again = begin(folder / "other", known(folder), 4, 3, rejected_only=True)
    assert (folder / "other/study.json").read_bytes() == (folder / "questionnaire/study.json").read_bytes()
    assert again.study == shown.study
    with pytest.raises(InputError, match="--samples 7: expected 1 to 6"):
        begin(folder / "third", known(folder), 7, 3, rejected_only=True)


def test_nothing_that_is_sent_tells_the_sides(server: ReviewServer) -> None:
    shown = open_questionnaire(server.folder / "questionnaire")
    assert shown is not None
    answer = server.get("/api/items?participant=blind")
    page = answer.json()
    mine = items_of(shown.samples, "blind", 3)
    assert [each["question"] for each in page["items"]] == [each.question for each in mine]
    for item, sent in zip(mine, page["items"], strict=True):
        if item.question == "explanation":
            assert sent == {"question": "explanation", "class": shown.facts_of(item.sample)["class"], "answer": None}
    assert b"before" not in answer.body
    assert b"after" not in answer.body
    assert all(f'"{sample}"'.encode() not in answer.body for sample in shown.samples)
    segments, maps = (read_array(server.folder / "questionnaire/shown.zarr", name) for name in ("images", "after"))
    for n, item in enumerate(mine[:4]):
        place = shown.samples.index(item.sample)
        picture = {side: server.get(f"/api/items/{n}/{side}.png?participant=blind") for side in ("left", "right")}
        assert picture["left"].headers.keys() == picture["right"].headers.keys()
        expected = to_png(explained(segments[place], maps[place]))
        assert (picture["left"].body == expected, picture["right"].body == expected) == (
            item.left == "after",
            item.left == "before",
        )
        assert server.get(f"/api/items/{n}/rejected.png?participant=blind").status == 404
    assert not (server.folder / "questionnaire/blind.csv").exists()  # who only looks leaves nothing


def test_answers_reach_the_file_unblinded_and_what_cannot_be_meant_is_refused(server: ReviewServer) -> None:
    def say(item: int, answer: str, **more: Any) -> Any:
        return server.post("/api/answers", {"participant": "P1", "item": item, "answer": answer, **more})

    shown = open_questionnaire(server.folder / "questionnaire")
    assert shown is not None
    for n, status, words in ((0, 400, "before"), (0, 409, "yes"), (4, 409, "left"), (12, 404, "yes"), (-1, 400, "yes")):
        assert say(n, words).status == status, (n, words)
    assert say(4, "yes", more=1).status == 400
    for path in ("/api/items?participant=..%2fx", "/api/items?participant="):
        assert server.get(path).status == 409
    assert server.get("/api/items/99/image.png?participant=P1").status == 404
    assert server.ask("POST", "/api/answers", b"{}", {"Sec-Fetch-Site": "cross-site"}).status == 403
    assert server.ask("GET", "/api/study", hosts=("rebound.example",)).status == 421
    assert not (server.folder / "questionnaire/P1.csv").exists()
    mine = items_of(shown.samples, "P1", 3)
    for n, item in enumerate(mine):
        given = ["left", "right", "same"][n % 3] if item.question == "explanation" else ["yes", "no", "unsure"][n % 3]
        answer = say(n, given)
        assert (answer.status, answer.json()) == (201, {"item": n, "answer": given})
    kept = read_answers(server.folder / "questionnaire/P1.csv")
    assert [(each.sample, each.question, each.left) for each in kept] == [(i.sample, i.question, i.left) for i in mine]
    for n, each in enumerate(kept[:4]):
        other = "before" if each.left == "after" else "after"
        assert each.answer == [each.left, other, "same"][n % 3]
    found = server.get("/api/items?participant=p1").json()
    assert found["participant"] == "P1"
    assert [each["answer"] for each in found["items"]][:3] == ["left", "right", "same"]


def test_the_summary_names_the_stand_in_and_counts(
    server: ReviewServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(server.folder, folder)
    monkeypatch.chdir(folder)
    for file in (folder / "questionnaire").glob("*.csv"):
        file.unlink()
    shown = open_questionnaire(folder / "questionnaire")
    assert shown is not None
    from lvlmva_core.questionnaire import add_answer

    for name, choice in (("P1", "after"), ("P2", "same")):
        for item in items_of(shown.samples, name, 3):
            answer = choice if item.question == "explanation" else "yes"
            add_answer(shown.folder, shown.study, item, answer, name)
    done = CliRunner().invoke(app, ["study", "--summary"])
    assert done.exit_code == 0, done.output
    assert "2 participants, 4 samples, 12 questions each; all finished" in done.output
    assert "critic: rules; judge: rules; rules is a stand-in, no model" in done.output
    content = read_json(folder / "questionnaire/summary.json")
    explanation = content["questions"]["explanation"]
    assert (explanation["share"], explanation["share_decided"]) == (0.5, 1.0)
    assert explanation["counts"] == {"before": 0, "after": 4, "same": 4}
    assert content["stand_ins"] == ["rules"]
    first = (folder / "questionnaire/summary.json").read_bytes()
    CliRunner().invoke(app, ["study", "--summary"])
    assert (folder / "questionnaire/summary.json").read_bytes() == first
    for arguments, words in (
        (["study", "--samples", "5"], "was begun with 4"),
        (["study", "--seed", "1"], "was begun with 3"),
        (["study", "--all-judged"], "was begun with the other draw"),
        (["study", "--summary", "--folder", "nowhere"], "nowhere: no study there"),
    ):
        refused = CliRunner().invoke(app, [*arguments])
        assert refused.exit_code == 1
        assert words in str(refused.output) + str(refused.exception)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_participant_by_mouse_key_and_phone_through_a_kill(project: Path, browser: Any, server: ReviewServer) -> None:
    with ReviewServer(project, 0, "study") as mine:
        page, complaints = watched(browser, mine, viewport={"width": 1200, "height": 900})
        page.goto(mine.address)
        page.locator("#start").wait_for()
        assert "the stand-in “rules”" in page.locator("#judged .stand-in").first.inner_text()
        assert barriers(page) == []
        page.locator("#participant").fill("P9")
        page.locator("#go").click()
        page.locator("#begin-error", has_text="Please agree first").wait_for()
        page.locator("#consent").check()
        page.locator("#go").click()
        page.locator("#part", has_text="Question 1 of 12").wait_for()
        page.locator("#pictures img").last.wait_for()
        assert barriers(page) == []
        assert page.locator("body").inner_text().find("stand-in") < 0  # said before and after, not while asked
        page.keyboard.press("1")
        page.locator("#part", has_text="Question 2 of 12").wait_for()
        page.locator("#answers").get_by_role("button", name="No difference").click()
        page.locator("#part", has_text="Question 3 of 12").wait_for()
        page.keyboard.press("2")
        page.locator("#part", has_text="Question 4 of 12").wait_for()
        page.keyboard.press("k")
        page.locator("#part", has_text="Question 3 of 12").wait_for()
        assert page.locator('#answers [aria-pressed="true"]').inner_text().startswith("Right")
        file = project / "questionnaire/P9.csv"
        assert len(read_answers(file)) == 3
        assert complaints == []
        mine.end(signal.SIGKILL)
        page.keyboard.press("1")
        page.locator("#error", has_text="not saved, question 3: the server does not answer").wait_for()
        assert page.locator('#answers [aria-pressed="true"]').inner_text().startswith("Right")
        port = mine.port
    with ReviewServer(project, port, "study") as again:
        page, complaints = watched(browser, again, viewport={"width": 360, "height": 740}, color_scheme="dark")
        page.goto(again.address)
        page.locator("#participant").fill("p9")
        page.locator("#consent").check()
        page.locator("#go").click()
        page.locator("#part", has_text="Question 4 of 12").wait_for()  # where the killed one was left
        assert page.locator("#counter").inner_text() == "3 of 12 answered"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("0")
        for n in range(5, 13):
            page.locator("#part", has_text=f"Question {n} of 12").wait_for()
            if page.locator("#critique-box").is_visible():
                said = page.evaluate("document.getElementById('critique').textContent")
                assert said == LONG or said.startswith("sample ")
                assert page.locator("#critique").locator("*").count() == 0
                if n == 12:
                    assert barriers(page) == []
            page.keyboard.press("y")
        page.locator("#end-title").wait_for()
        assert "the stand-in “rules”" in page.locator("#judged-again").inner_text()
        assert barriers(page) == []
        assert page.title() == "LVLM-VA: study"
        assert complaints == []
        assert again.end(signal.SIGINT) == ""
    kept = read_answers(project / "questionnaire/P9.csv")
    assert len(kept) == 12
    assert [each.order for each in kept] == list(range(1, 13))
    assert json.loads((project / "questionnaire/study.json").read_text())["seed"] == 3
