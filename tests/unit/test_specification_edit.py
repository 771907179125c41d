"""A specification is edited in place: what is wanted comes out, and everything else stays as it was."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.prompts import Specification, parse_specification
from lvlmva_core.lvlm.specification_edit import edited

ROOT = Path(__file__).parents[2]
FILE = Path("specification.yaml")
TEXT = """# head
picture: grey scans   # of hands
classes: # two of them
  # the first
  no: >-
    A short text
    in two lines.

  # the second
  "1.0": 'it''s quoted' # why
# shown only when named
spurious_features:
  # seen in 2020
  - a grey square
  # seen later
  - "a ruler: black"
  - >-
    a long
    one
# end
"""
TEXTS = st.text(min_size=1, max_size=200).filter(
    lambda text: text.strip() not in ("", "~", "null") and "\x00" not in text
    and not any(0xD800 <= ord(each) < 0xE000 for each in text)
)  # fmt: skip


def wanted(now: Specification, **changes: object) -> Specification:
    return Specification.model_validate({**now.model_dump(), **changes})


@pytest.mark.parametrize("file", sorted((ROOT / "prompts").glob("*/specification.yaml")), ids=lambda f: f.parent.name)
def test_each_of_ours_keeps_all_lines_that_do_not_change(file: Path) -> None:
    text = file.read_text()
    now = parse_specification(text, file)
    assert edited(text, now, file) == text
    for name in now.classes:
        new = edited(text, wanted(now, classes={**now.classes, name: "Quite another description. " * 12}), file)
        start = text.index(f'"{name}"')
        assert new.startswith(text[:start])
        assert [line for line in new.split("\n") if "#" in line] == [line for line in text.split("\n") if "#" in line]
        others = [line for line in text.split("\n") if line.strip().startswith('"') and f'"{name}"' not in line]
        assert all(line in new.split("\n") for line in others)
    new = edited(text, wanted(now, spurious_features=[*now.spurious_features, "a ruler"]), file)
    assert set(new.split("\n")) - set(text.split("\n")) <= {"  - a ruler", "spurious_features:"}


def test_one_value_changes_in_its_place() -> None:
    now = parse_specification(TEXT, FILE)
    assert now.classes == {"no": "A short text in two lines.", "1.0": "it's quoted"}
    new = edited(TEXT, wanted(now, picture="colour pictures"), FILE)
    assert new == TEXT.replace("grey scans ", '"colour pictures" ')
    new = edited(TEXT, wanted(now, classes={**now.classes, "no": "Other words."}), FILE)
    assert new == TEXT.replace(">-\n    A short text\n    in two lines.\n", "Other words.\n")
    new = edited(TEXT, wanted(now, spurious_features=["a ruler: black", "a long one", "a tag"]), FILE)
    assert new == TEXT.replace("  - a grey square\n", "").replace("    one\n", "    one\n  - a tag\n")
    for listed in ("[]", "[a, b]"):
        flow = f"picture: p\nclasses: {{a: x}}\nspurious_features: {listed} # why\n"
        new = edited(flow, wanted(parse_specification(flow, FILE), spurious_features=['a "b"', "c"]), FILE)
        assert new == 'picture: p\nclasses: {a: x}\nspurious_features: # why\n  - >-\n    a "b"\n  - c\n'
    new = edited(TEXT, wanted(now, spurious_features=[]), FILE)
    assert "spurious_features: []\n  # seen in 2020\n  # seen later\n# end\n" in new


@settings(max_examples=80, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.lists(TEXTS, max_size=4), st.booleans())
def test_any_words_come_back_as_they_were_given(
    picture: str, first: str, second: str, features: list[str], newline: bool
) -> None:
    """Oracle: the YAML library reads what was written."""
    text = TEXT if newline else TEXT.rstrip("\n").removesuffix("\n# end")
    now = parse_specification(text, FILE)
    then = Specification(picture=picture, classes={"no": first, "1.0": second}, spurious_features=features)
    new = edited(text, then, FILE)
    assert parse_specification(new, FILE) == then
    for comment in (
        "# head",
        "# of hands",
        "# two of them",
        "  # the first",
        "  # the second",
        "# why",
        "# seen later",
    ):
        assert comment in new
    back = edited(new, now, FILE)
    assert parse_specification(back, FILE) == now


def test_what_cannot_be_edited_is_refused_and_named() -> None:
    now = parse_specification(TEXT, FILE)
    for changes, words in (
        ({"classes": {"no": "x"}}, "the classes are others by now"),
        ({"classes": {"no": "x" * 10_001, "1.0": "y"}}, "'no': expected 1 to 10000 characters, not 10001"),
        ({"spurious_features": ["a", "  "]}, "'2': expected 1 to 10000 characters, not 0"),
    ):
        with pytest.raises(InputError, match=words):
            edited(TEXT, wanted(now, **changes), FILE)
    anchored = "picture: p\nclasses:\n  a: &same text\n  b: *same\nspurious_features: []\n"
    with pytest.raises(InputError, match="cannot be edited here"):
        edited(anchored, wanted(parse_specification(anchored, FILE), classes={"a": "new", "b": "text"}), FILE)
