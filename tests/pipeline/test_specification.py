"""The specification in the served review page: the price is what the stage then pays, and no tab undoes another's."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lvlmva.pipeline import paths
from lvlmva.specification import Editor
from lvlmva_core.arrays import read_array
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.prompts import Specification
from lvlmva_core.overrides import add_verdict
from lvlmva_core.regions import regions_present, segmentation_digest
from tests.pipeline.calls import KEY, Server, critique_here, judge_here, write_data
from tests.pipeline.review import ROOT, ReviewServer, write_project

TEXT = """# from the clinic
picture: close photographs
classes:
  benign: even and sharp # so they say
  <b>malignant</b>: ragged
spurious_features: [] # none yet
"""


def write_specified(folder: Path) -> None:
    """A project judged by a stand-in, with a specification that fits its classes."""
    write_project(folder)
    shutil.copytree(ROOT / "prompts", folder / "prompts")
    (folder / "prompts/decoy_digits/specification.yaml").write_text(TEXT)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewServer]:
    """Its review page."""
    folder = tmp_path_factory.mktemp("specification") / "project"
    write_specified(folder)
    with ReviewServer(folder) as running:
        running.log_in()
        yield running


def edit(found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: found[name] for name in ("picture", "classes", "spurious_features", "digest")} | changes


def described(found: dict[str, Any], name: str, words: str) -> list[dict[str, str]]:
    return [{**each, "description": words} if each["name"] == name else each for each in found["classes"]]


def test_a_change_is_shown_saved_and_no_tab_undoes_another(served: ReviewServer) -> None:
    at = "/specification/api"
    file = served.folder / "prompts/decoy_digits/specification.yaml"
    first = served.get(f"{at}/specification").json()
    assert first["critics"] == [{"name": "rules", "stand_in": True}]
    second = served.get(f"{at}/specification").json()
    wanted = edit(first, classes=described(first, "benign", "  Even,\n sharp 🩻 # and small  "))
    plan = served.post(f"{at}/plan", wanted).json()
    assert file.read_text() == TEXT  # nothing is written by looking
    assert plan["lines"] == [
        "The stand-in 'rules' does not read the specification: its verdicts stay, nothing is asked."
    ]
    lines = plan["diff"].split("\n")
    assert "-  benign: even and sharp # so they say" in lines
    assert '+  benign: "Even, sharp 🩻 # and small" # so they say' in lines
    for sent, words in (
        (wanted, "nothing was shown yet"),
        ({**wanted, "shown": "0" * 64}, "this is not the change that was shown"),
        ({**wanted, "picture": "other", "shown": plan["shown"]}, "this is not the change that was shown"),
    ):
        refused = served.post(f"{at}/save", sent)
        assert (refused.status, words in refused.json()["error"]) == (409, True)
    assert file.read_text() == TEXT
    saved = served.post(f"{at}/save", {**wanted, "shown": plan["shown"]})
    assert (saved.status, saved.json()) == (201, {"digest": plan["shown"]})
    after = TEXT.replace("even and sharp #", '"Even, sharp 🩻 # and small" #')
    assert file.read_text() == after
    # the other tab began before that
    other = edit(second, spurious_features=["a ruler"])
    for path in ("plan", "save"):
        refused = served.post(f"{at}/{path}", {**other, "shown": plan["shown"]})
        assert refused.status == 409
        assert "has changed since you began, in another tab or an editor" in refused.json()["error"]
    assert file.read_text() == after
    assert [each.name for each in file.parent.iterdir() if each.name.startswith(".")] == []  # DVC follows the folder
    third = served.get(f"{at}/specification").json()
    for changes, words in (
        ({"picture": " ~ "}, "nothing is said here"),
        ({"classes": third["classes"][:1]}, "the classes are others by now"),
        ({"classes": [*third["classes"], third["classes"][0]]}, "a class comes twice"),
        ({"spurious_features": [""]}, "nothing is said here"),
        ({"spurious_features": ["x" * 10_001]}, "expected 1 to 10000 characters"),
    ):
        refused = served.post(f"{at}/plan", edit(third, **changes))
        assert refused.status == 409
        assert words in refused.json()["error"]
    assert served.post(f"{at}/plan", edit(third, more=1)).status == 400
    assert served.post(f"{at}/save", wanted, {"Sec-Fetch-Site": "cross-site"}).status == 403
    assert served.get("/specification/api/question").status == 409  # no model is configured, nobody is asked


@pytest.fixture
def mine(folder: Path) -> Path:
    """A project that asks the model server, with prompts of its own."""
    (folder / "prompts").unlink()
    shutil.copytree(ROOT / "prompts", folder / "prompts")
    shutil.copy(ROOT / "dvc.yaml", folder / "dvc.yaml")
    (folder / "overrides").mkdir()
    write_data(folder, 12)
    return folder


def editor() -> Editor:
    return Editor({name: Path(path) for name, path in paths().items()})


def test_the_price_that_is_shown_is_what_the_stage_then_pays(mine: Path, server: Server) -> None:
    critique_here()
    judge_here()
    ids = [json.loads(line) for line in (mine / "data/critiques.jsonl").read_text().splitlines()]
    about = sum(row["class_name"] == "3" and bool(row["regions"]) for row in ids)
    now, digest = editor().read()
    assert about > 0
    wanted = Specification.model_validate({**now.model_dump(), "classes": {**now.classes, "3": "Two arcs."}})
    plan = editor().plan(wanted, digest)
    assert plan.samples == about
    assert f"critique.endpoint: 0 answers in the store, {about} calls to buy from tester" in plan.lines[0]
    assert any(f"new verdicts: {about} calls or more" in line for line in plan.lines)
    features = Specification.model_validate({**now.model_dump(), "spurious_features": ["a tag"]})
    assert editor().plan(features, digest).lines == [
        "No prompt about the alignment set changes: nothing is asked anew (critique.name_spurious_feature is false: "
        "spurious features stand in no prompt)."
    ]
    server.set()
    after = editor().save(wanted, digest, plan.shown)
    assert server.log() == []  # looking and saving ask nothing
    critique_here()
    assert len(server.log()) == about
    back = editor().plan(now, after)
    assert f"critique.endpoint: {about} answers in the store, 0 calls to buy" in back.lines[0]


def test_a_proposal_is_asked_for_once_at_the_price_shown(
    mine: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    critique_here()
    judge_here()
    segments = read_array(mine / "data/segments.zarr", "segments")
    rows = [json.loads(line) for line in (mine / "data/verdicts.jsonl").read_text().splitlines()]
    said = {(row["sample"], each["region"]): each["verdict"] for row in rows for each in row["verdicts"]}
    flipped = 0
    for n, label_map in enumerate(segments):
        for region in regions_present(label_map):
            if flipped == 19:
                with pytest.raises(InputError, match="19 corrections; a proposal is made from 20 on"):
                    editor().question()
            key = (f"patient-{n:04d}", segmentation_digest(label_map), region)
            verdict = said.get((key[0], region))
            if verdict is not None and flipped < 24:
                note = "a tag" if flipped % 2 else ""
                add_verdict(mine / "overrides", key, "no" if verdict == "yes" else "yes", note, "anna")
                flipped += 1
    server.set(say='{"classes": {"1": "A stroke."}, "spurious_features": ["a tag"], "why": "tags"}')
    question = editor().question()
    assert server.log() == []
    assert "1 calls to buy from tester" in question["price"]
    assert "24 of 24" in question["text"]
    assert "patient-" not in question["text"]
    with pytest.raises(InputError, match="have changed since the price was shown"):
        editor().propose("0" * 64)
    assert server.log() == []
    found = editor().propose(question["shown"])
    assert (found["model"], found["why"], found["spent"][:7]) == ("tester (1)", "tags", "1 calls")
    assert {each["name"]: each["description"] for each in found["specification"]["classes"]}["1"] == "A stroke."
    (sent,) = server.log()
    assert sent["body"]["messages"][0]["content"] == question["text"]
    assert KEY not in json.dumps(found)
    assert editor().question()["free"]
    again = editor().propose(question["shown"])
    assert (again["specification"], again["spent"]) == (found["specification"], "from the store, 0 calls")
    assert server.paid() == 1
    # an answer that proposes nothing is paid, kept and said; the next click asks beyond it
    add_verdict(mine / "overrides", (key[0], key[1], 0), "unsure", "", "bert")
    (mine / "params.yaml").write_text((mine / "params.yaml").read_text().replace("tester", "other"))
    server.set(say="I would not change it.")
    question = editor().question()
    for asked in (1, 2):
        with pytest.raises(InputError, match="is no proposal: it holds no JSON object; what was paid is kept"):
            editor().propose(question["shown"])
        assert server.paid() == asked
    monkeypatch.setenv("LVLMVA_OFFLINE", "1")
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((mine / "params.yaml").read_text())
    content["critique"]["endpoint"]["model"] = "never"
    with (mine / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    question = editor().question()
    assert (question["free"], question["replay"]) == (False, True)
    with pytest.raises(InputError, match="only the store may answer"):
        editor().propose(question["shown"])
    assert server.paid() == 2
