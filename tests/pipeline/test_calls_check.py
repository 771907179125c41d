"""`lvlmva check --ask`: one question to the real client's server, which is paid for once."""

from pathlib import Path

import pytest

from lvlmva.check import Checklist, _critic
from lvlmva.params import load_params
from lvlmva.probe import Probed
from lvlmva_core.scaling import money
from tests.pipeline.calls import Server, sample_arrays

CLASSES = [str(k) for k in range(10)]
KNOWN = {"prompts": Path("prompts"), "critiques": Path("data/critiques.jsonl")}


def _asked(*, ask: bool = True) -> Checklist:
    pictures, segments, _ = sample_arrays(1)
    done = Checklist()
    probed = Probed(0.0, 0.0, 0.0, 0.0, 0.0, None, pictures[0], segments[0], 3)
    _critic(done, load_params(Path("params.yaml")), KNOWN, CLASSES, probed, ask=ask)
    return done


def _said(done: Checklist, name: str) -> list[str]:
    return [f"{row.status}: {row.message}" for row in done.rows if row.name == name]


def test_one_question_is_sent_where_the_user_agrees_and_its_answer_is_kept(folder: Path, server: Server) -> None:
    quiet = _asked(ask=False)
    assert server.log() == []
    assert not _said(quiet, "asked")
    assert quiet.calls["critique"].seconds is None
    assert quiet.calls["critique"].input_tokens > 0

    first = _asked()
    assert server.paid() == 1
    (line,) = _said(first, "asked")
    assert line.startswith("ok: an answer of ")
    assert first.passed
    assert first.calls["critique"].seconds is not None
    assert money(first.calls["critique"]) is not None

    again = _asked()
    assert server.paid() == 1
    assert "the store holds an answer" in _said(again, "asked")[0]
    assert again.calls["critique"].seconds is None


@pytest.mark.parametrize("always", [{"message": {"content": "I see a picture."}}, {"message": {"content": ""}}])
def test_an_answer_that_is_of_no_use_fails_the_check(folder: Path, server: Server, always: object) -> None:
    server.set(always=always)
    done = _asked()
    assert _said(done, "asked")[0].startswith("fail: one question got no usable answer: ")
    assert not done.passed
