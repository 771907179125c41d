"""Answers that came by mail: each row checked, nothing lost, importing twice is importing once."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lvlmva.cli import app
from lvlmva_core.arrays import write_arrays
from lvlmva_core.mailed_reviews import Prefer, Regions, merge, read_mailed
from lvlmva_core.overrides import COLUMNS, Event, add_verdict, read_events, standing, take_back
from lvlmva_core.regions import segmentation_digest
from tests.pipeline.review import ROOT

SEGMENTS = np.zeros((2, 4, 4), dtype=np.uint8)
SEGMENTS[:, 2:] = 1
SEGMENTS[1, 0, 0] = 2
DIGESTS = [segmentation_digest(each) for each in SEGMENTS]
NAMES = ["knee-01", "knie ü, 2"]
SHOWN = {name: Regions(DIGESTS[n], range(2 + n)) for n, name in enumerate(NAMES)}


def row(order: int, region: int = 0, verdict: str = "no", **more: Any) -> list[str]:
    fields = {"sample": NAMES[0], "segmentation": DIGESTS[0], "note": "", "reviewer": "anna", **more}
    return [str({**fields, "order": order, "region": region, "verdict": verdict}[name]) for name in COLUMNS]


def write(path: Path, rows: list[list[str]], *, excel: bool = False, encoding: str = "utf-8") -> Path:
    """A file as the page downloads it, or as Excel saves that."""

    def cell(text: str) -> str:
        return f'"{text}"' if any(each in text for each in ',;"') else text

    lines = [(";" if excel else ",").join(cell(text) for text in each) for each in [COLUMNS, *rows]]
    text = ("\ufeff" if excel and encoding == "utf-8" else "") + ("\r\n" if excel else "\n").join([*lines, ""])
    path.write_bytes(text.encode(encoding))
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    write_arrays(tmp_path / "data/segments.zarr", {"segments": SEGMENTS}, {"ids": NAMES})
    (tmp_path / "overrides").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    """Exit code, and all that was said, the error too."""
    done = CliRunner().invoke(app, ["review", "--import", *arguments])
    return done.exit_code, done.output + str(done.exception or "")


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
@pytest.mark.parametrize("excel", [False, True])
def test_a_download_is_taken_in_as_it_came_or_as_excel_saved_it(project: Path, excel: bool, encoding: str) -> None:
    rows = [
        row(1, 0, "no", note="Lineal, außen; links"),
        row(2, 2, "yes", sample=NAMES[1], segmentation=DIGESTS[1]),
        row(3, 0, "undo"),
        row(4, 0, "unsure"),
    ]
    file = write(project / "anna (1).csv", rows, excel=excel, encoding=encoding)
    code, said = run(str(file))
    assert code == 0, said
    assert f"{file}: 4 new rows into overrides/anna.csv" in said
    kept = read_events(project / "overrides/anna.csv").events
    assert [(e.sample, e.region, e.verdict, e.note, e.order) for e in kept] == [
        (NAMES[0], 0, "no", "Lineal, außen; links", 1),
        (NAMES[1], 2, "yes", "", 2),
        (NAMES[0], 0, "undo", "", 3),
        (NAMES[0], 0, "unsure", "", 4),
    ]
    before = os.stat(project / "overrides/anna.csv")
    assert run(str(file), str(file))[0] == 0
    after = os.stat(project / "overrides/anna.csv")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)  # not even written anew


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(2, sample="knee-1"), "line 3: no sample 'knee-1' in the alignment set; alike: 'knee-01'"),
        (row(2, 2), "line 3: 'knee-01' has no region 2, but 0, 1"),
        (row(2, 0, "maybe"), "line 3: verdict 'maybe' is none of yes, no, unsure, undo"),
        (row(2, segmentation=""), "line 3: no segmentation"),
        (row(2, reviewer="bert"), "line 3: is of 'bert', the rows before of 'anna'"),
        (row(1, 1), "line 3: order 1 stands in line 2 already"),
        (row(2, 1, "undo"), "order 2 takes back a verdict on region 1 of 'knee-01' that was never given"),
        (row(2, note="x" * 2001), "line 3: the note has 2001 characters"),
        (row(2)[:-1], "line 3: expected 7 values, not 6"),
        (row(2, segmentation="0" * 64), "line 3: 'knee-01' has other regions by now"),
    ],
)
def test_one_bad_row_is_named_and_nothing_is_taken_in(project: Path, bad: list[str], words: str) -> None:
    good = write(project / "bert.csv", [row(1, reviewer="bert")])
    file = write(project / "mail.csv", [row(1), bad])
    code, said = run(str(good), str(file))
    assert code == 1
    assert words in said
    assert "nothing was taken in" in said
    assert list((project / "overrides").glob("*.csv")) == []


def test_whose_answers_they_are_and_what_is_no_download(project: Path) -> None:
    file = write(project / "mail.csv", [row(1)])
    assert "mail.csv: is of 'anna', not of --reviewer 'bert'" in run(str(file), "--reviewer", "bert")[1]
    nameless = write(project / "nameless.csv", [row(1, reviewer="")])
    assert "reviewer '': expected a name" in run(str(nameless))[1]
    (project / "other.csv").write_text("a,b\n1,2\n")
    assert "other.csv: the first line must be 'sample,segmentation" in run("other.csv")[1]
    assert "holds no verdict" in run(str(write(project / "empty.csv", [])))[1]
    for arguments in (["review", "--import"], ["review", str(file)]):
        assert "--import and files belong together" in str(CliRunner().invoke(app, arguments).exception)
    assert run(str(file), "--reviewer", "Anna")[0] == 0
    # two downloads of one person, whose name was typed in two ways
    first, second = (write(project / f"{n}.csv", [row(1, n, reviewer=name)]) for n, name in ((0, "Carl"), (1, "carl")))
    assert run(str(first), str(second))[0] == 0
    assert [each.region for each in read_events(project / "overrides/Carl.csv").events] == [0, 1]


def test_what_contradicts_is_shown_with_the_remedy_and_nothing_is_lost(project: Path) -> None:
    key = (NAMES[0], DIGESTS[0], 0)
    add_verdict(project / "overrides", key, "yes", "the bone", "anna")
    before = (project / "overrides/anna.csv").read_text()
    file = write(project / "mail.csv", [row(1), row(2, 1)])
    code, said = run(str(file))
    assert code == 1
    assert "region 0 of 'knee-01': 'no', but 'yes' stands" in said
    assert "--prefer mailed lets the mailed ones count" in said
    assert (project / "overrides/anna.csv").read_text() == before
    assert run(str(file), "--prefer", "present")[0] == 0
    kept = standing(read_events(project / "overrides/anna.csv").events)
    assert {k[2]: e.verdict for k, e in kept.items()} == {0: "yes", 1: "no"}
    assert run(str(file), "--prefer", "mailed")[0] == 0
    kept = standing(read_events(project / "overrides/anna.csv").events)
    assert {k[2]: e.verdict for k, e in kept.items()} == {0: "no", 1: "no"}
    assert (project / "overrides/anna.csv").read_text().startswith(before)  # what was there is all there
    again = (project / "overrides/anna.csv").read_text()
    assert run(str(file))[0] == 0
    assert (project / "overrides/anna.csv").read_text() == again


def test_an_older_download_undoes_nothing_and_a_newer_one_goes_on(project: Path) -> None:
    old = write(project / "old.csv", [row(1)])
    new = write(project / "new.csv", [row(1), row(2, 0, "undo"), row(3, 0, "yes"), row(4, 1)])
    for file, expected in ((old, {0: "no"}), (new, {0: "yes", 1: "no"}), (old, {0: "yes", 1: "no"})):
        assert run(str(file))[0] == 0
        kept = standing(read_events(project / "overrides/anna.csv").events)
        assert {key[2]: event.verdict for key, event in kept.items()} == expected
    take_back(project / "overrides", 4, "anna")  # in the served page, later
    assert run(str(new))[0] == 0
    assert {key[2] for key in standing(read_events(project / "overrides/anna.csv").events)} == {0}


def test_stale_rows_are_kept_when_asked_for(project: Path) -> None:
    file = write(project / "mail.csv", [row(1), row(2, segmentation="0" * 64)])
    code, said = run(str(file), "--keep-stale")
    assert code == 0
    assert "1 rows are about earlier segmentations and do not count now" in said
    assert len(read_events(project / "overrides/anna.csv").events) == 2
    assert read_mailed(file, SHOWN).problems == []


HISTORY = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["yes", "no", "unsure", "undo"]), st.sampled_from("ab "))
)


def history(said: list[tuple[int, str, str]]) -> list[Event]:
    """Events with those undos left out that have nothing to take back."""
    events: list[Event] = []
    for region, verdict, note in said:
        event = Event("s", "d", region, verdict, note.strip(), "anna", len(events) + 1)  # type: ignore[arg-type]
        try:
            standing([*events, event])
        except ValueError:
            continue
        events.append(event)
    return events


@settings(max_examples=300, deadline=None)
@given(HISTORY, HISTORY, st.sampled_from(["mailed", "present", None]))
def test_merging_twice_is_merging_once_and_takes_nothing_away(
    one: list[tuple[int, str, str]], other: list[tuple[int, str, str]], prefer: Prefer | None
) -> None:
    present, mailed = history(one), history(other)
    new, conflicts = merge(present, mailed, prefer)

    def together(events: list[Event]) -> list[Event]:
        added = [Event(*e.key, e.verdict, e.note, e.reviewer, len(present) + n + 1) for n, e in enumerate(events)]
        return present + added

    after = together(new)
    counts, before, arrived = standing(after), standing(present), standing(mailed)  # still a history that can be meant
    again, still = merge(after, mailed, prefer)
    assert again == []
    assert [(a.key, b.key) for a, b in still] == [(a.key, b.key) for a, b in conflicts]
    for key in {event.key for event in present + mailed}:
        if key not in arrived and key in before and all(e.key != key for e in mailed):
            assert counts[key] == before[key]
        if prefer == "mailed" and key in arrived and key not in before and not any(e.key == key for e in present):
            assert counts[key].verdict == arrived[key].verdict
    if prefer is not None:
        assert conflicts == []
    merged_from_nothing, none = merge([], mailed, None)
    assert (merged_from_nothing, none) == (mailed, [])
