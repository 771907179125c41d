import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlmva_core.errors import InputError
from lvlmva_core.overrides import (
    Event,
    Override,
    Tie,
    add_verdict,
    read_events,
    read_reviews,
    resolve,
    reviewer_file,
    standing,
    take_back,
)

HEADER = "sample,segmentation,region,verdict,note,reviewer,order\n"


def said(reviewer: str, order: int, verdict: str, region: int = 0, sample: str = "a") -> Event:
    return Event(sample, "d", region, verdict, "", reviewer, order)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("voices", "outcome"),
    [
        (["yes"], "yes"),
        (["no"], "no"),
        (["unsure"], "unsure"),
        (["unsure", "unsure", "no"], "no"),  # who is unsure has no part in it
        (["no", "no", "yes"], "no"),
        (["yes", "yes", "no"], "yes"),
        (["yes", "no"], None),
        (["yes", "no", "unsure"], None),
        (["yes", "yes", "no", "no"], None),
    ],
)
def test_the_majority_of_those_who_said_yes_or_no_decides(voices: list[str], outcome: str | None) -> None:
    overrides, ties = resolve([said(f"r{n}", 1, verdict) for n, verdict in enumerate(voices)])
    if outcome is None:
        names = {word: tuple(f"r{n}" for n, v in enumerate(voices) if v == word) for word in ("yes", "no")}
        assert (overrides, ties) == ([], [Tie("a", "d", 0, names["yes"], names["no"])])
    else:
        behind = tuple(f"r{n}" for n, verdict in enumerate(voices) if verdict == outcome)
        assert (overrides, ties) == ([Override("a", "d", 0, outcome, behind)], [])


def test_histories_are_resolved_as_a_reading_from_the_end_says() -> None:
    """Oracle: of each reviewer and region, backwards, an undo swallows the verdict before it."""
    rng = random.Random(0)
    seen = Counter[str]()
    for _ in range(300):
        events: list[Event] = []
        for reviewer in ("anna", "bert", "carl", "dora")[: rng.randint(1, 4)]:
            left: Counter[int] = Counter()
            for order in range(1, rng.randint(1, 14)):
                region = rng.randrange(2)
                verdict = rng.choice(["yes", "no", "unsure", "undo", "undo"])
                if verdict == "undo" and not left[region]:
                    continue
                left[region] += -1 if verdict == "undo" else 1
                events.append(said(reviewer, order, verdict, region))
        expected: dict[int, str] = {}
        for region in range(2):
            votes: Counter[str] = Counter()
            for reviewer in {event.reviewer for event in events}:
                swallowed = 0
                for event in reversed([e for e in events if (e.reviewer, e.region) == (reviewer, region)]):
                    if event.verdict == "undo":
                        swallowed += 1
                    elif swallowed:
                        swallowed -= 1
                    else:
                        votes[event.verdict] += 1
                        break
            if votes["yes"] != votes["no"]:
                expected[region] = "yes" if votes["yes"] > votes["no"] else "no"
            elif votes["yes"]:
                expected[region] = "tie"
            elif votes["unsure"]:
                expected[region] = "unsure"
        rng.shuffle(events)  # files are read in any order; the numbers tell
        overrides, ties = resolve(events)
        found = {each.region: each.verdict for each in overrides} | {tie.region: "tie" for tie in ties}
        assert found == expected
        seen.update(expected.values())
    assert min(seen[outcome] for outcome in ("yes", "no", "unsure", "tie")) > 20


def test_an_undo_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="order 3 takes back a verdict on region 1 of 'a' that was never given"):
        standing([said("anna", 1, "yes"), said("anna", 3, "undo", region=1)])


@pytest.mark.parametrize(
    "content",
    [
        b"sample,segmentation,region,verdict\na,d,2,no\nm\xc3\xbcller,d,0,yes\n",
        "\ufeffsample;segmentation;region;verdict\r\na;d;2;No\r\nmüller;d;0; YES\r\n;;;\r\n".encode(),
        "sample,segmentation,region,verdict,note\na,d,2,no,seen by me; twice\nmüller,d,0,yes,\n".encode(),
        "sample;segmentation;region;verdict\r\na;d;2;NO\r\nmüller;d;0;yes\r\n".encode("cp1252"),
        "sample;segmentation;region;verdict;note;reviewer;order\r\na;d;2;no;;verdicts;1\r\nmüller;d;0;Yes;;Verdicts;2".encode(
            "cp1252"
        ),
    ],
)
def test_a_file_by_hand_is_read_as_spreadsheets_save_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "verdicts.csv").write_bytes(content)
    found = read_reviews(tmp_path)
    overrides, _ = resolve(found.events)
    assert overrides == [
        Override("a", "d", 2, "no", ("verdicts",)),
        Override("müller", "d", 0, "yes", ("verdicts",)),
    ]
    latin = b"\xfcller" in content
    assert [note.split(": ")[1].split(";")[0] for note in found.notes] == ["not UTF-8, read as Windows-1252"] * latin


BY_HAND = "sample,segmentation,region,verdict\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"anna\.csv: the first line must be"),
        ("sample,region\n", "first line must be .*, not 'sample,region'"),
        (f"{BY_HAND}a,b,0,perhaps\n", "line 2: verdict 'perhaps' is none of yes, no, unsure$"),
        (f"{BY_HAND}a,b,0,undo\n", "line 2: verdict 'undo'"),
        (f"{BY_HAND}a,b,one,no\n", "line 2: region 'one'"),
        (f"{BY_HAND}a,b,²,no\n", "line 2: region '²'"),
        (f"{BY_HAND}a,b,1\n", "line 2: expected 4 values, not 3"),
        (f"{BY_HAND}a,b,1,no\n\na,b,1,yes\n", "line 4: second verdict for region 1 of 'a'"),
        (f"{HEADER}a,b,1,no,,anna,x\n", "line 2: order 'x' is not a number"),
        (f"{HEADER},b,1,no,,anna,1\n", "line 2: no sample"),
        (f"{HEADER}a, ,1,no,,anna,1\n", "line 2: no segmentation"),
        (f"{HEADER}a,b,1,no,,bert,1\n", "line 2: the reviewer is 'bert', but the file is named after 'anna'"),
        (f'{HEADER}a,b,1,no,"x\ny",anna,1\na,b,1,maybe,,anna,2\n', "line 4: verdict 'maybe' is none of .*undo"),
        (f'{HEADER}a,b,1,no,,anna,1\na,b,2,no,"open,anna,2\na,b,3,no,,anna,3\n', "line 3: not CSV"),
        (f"{HEADER}a,b,1,no,,anna,1\na,b,0,undo,,anna,2\n", "order 2 takes back .* never given; remove that row"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "anna.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_reviews(tmp_path)


def test_a_header_alone_an_empty_folder_and_none_at_all(tmp_path: Path) -> None:
    assert read_reviews(tmp_path).events == []
    (tmp_path / "verdicts.csv").write_text(BY_HAND)
    (tmp_path / ".~lock.verdicts.csv#").write_text("an editor's")
    assert read_reviews(tmp_path).events == []
    with pytest.raises(InputError, match="nowhere: no such folder; restore it"):
        read_reviews(tmp_path / "nowhere")


def test_what_is_no_csv_is_said_and_two_files_of_one_person_are_refused(tmp_path: Path) -> None:
    (tmp_path / "anna.xlsx").write_bytes(b"PK")
    (tmp_path / "README.md").write_text("ours")
    assert read_reviews(tmp_path).notes == [f"{tmp_path}/anna.xlsx: not read; save it as CSV"]
    (tmp_path / "bert.csv").write_text(BY_HAND)
    (tmp_path / "Bert.csv").write_text(BY_HAND)
    with pytest.raises(InputError, match=r"bert\.csv: .*Bert\.csv is of the same reviewer"):
        read_reviews(tmp_path)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(texts.filter(str.strip), st.integers(0, 11), texts), min_size=1, max_size=3))
def test_what_is_written_is_read_again_whatever_it_is_called(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("overrides")
    written = [add_verdict(folder, (sample, "d", region), "no", note, "anna") for sample, region, note in rows]
    assert read_events(folder / "anna.csv").events == written
    assert [event.order for event in written] == list(range(1, len(rows) + 1))
    assert [event.note for event in written] == [" ".join(note.split()) for *_, note in rows]


def test_files_only_grow_and_an_undo_brings_back_what_was_said_before(tmp_path: Path) -> None:
    key = ("a", "d", 0)
    versions = []
    for verdict in ("yes", "no"):
        add_verdict(tmp_path, key, verdict, "", "Anna B.-C")  # type: ignore[arg-type]
        versions.append((tmp_path / "Anna B.-C.csv").read_bytes())
    take_back(tmp_path, 2, "anna b.-c")  # one person, however the name is written
    versions.append((tmp_path / "Anna B.-C.csv").read_bytes())
    for before, after in itertools.pairwise(versions):
        assert after.startswith(before)
        assert after.count(b"\n") == before.count(b"\n") + 1
    (left,) = standing(read_events(tmp_path / "Anna B.-C.csv").events).values()
    assert (left.verdict, left.order) == ("yes", 1)
    with pytest.raises(InputError, match="the verdict of order 2 does not stand any more"):
        take_back(tmp_path, 2, "Anna B.-C")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["Anna B.-C.csv"]


def test_a_file_by_hand_is_gone_on_with_and_a_broken_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "anna.csv").write_bytes(b"\xef\xbb\xbfsample;segmentation;region;verdict\r\na;d;2;No")
    add_verdict(tmp_path, ("a", "d", 1), "yes", "", "anna")
    assert (tmp_path / "anna.csv").read_text() == f"{HEADER}a,d,2,no,,anna,1\na,d,1,yes,,anna,2\n"
    (tmp_path / "bert.csv").write_text("broken")
    with pytest.raises(InputError, match=r"bert\.csv: the first line must be"):
        add_verdict(tmp_path, ("a", "d", 1), "yes", "", "bert")
    assert (tmp_path / "bert.csv").read_text() == "broken"
    with pytest.raises(InputError, match="the note has 2001 characters"):
        add_verdict(tmp_path, ("a", "d", 1), "yes", "x" * 2001, "carl")
    with pytest.raises(InputError, match="verdict 'undo' is none of"):
        add_verdict(tmp_path, ("a", "d", 1), "undo", "", "carl")  # type: ignore[arg-type]
    assert not (tmp_path / "carl.csv").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../anna", "a/b", "a\\b", "/etc/x", ".anna", "anna.", "a\0b", "a\nb", "x" * 61, "Verdicts"]
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="expected a name of 1 to 60 letters"):
        reviewer_file(tmp_path, name)


def test_usual_names_are_files(tmp_path: Path) -> None:
    for name in ("anna", "Dr. Müller", "李雷", "r2", "x" * 60, "a.b-c_d"):
        assert reviewer_file(tmp_path, name) == tmp_path / f"{name}.csv"
    assert reviewer_file(tmp_path, "Mu\u0308ller") == tmp_path / "Müller.csv"
