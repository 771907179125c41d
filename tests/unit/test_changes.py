"""Changes given by -S, against what writing them into the file by hand gives."""

from typing import Any

import pytest
from ruamel.yaml import YAML

from lvlmva.changes import apply_changes, lay_over
from lvlmva_core.errors import InputError

PARAMS = """
align: {rrr_lambda: 0.1, seeds: [0, 1]}
critique: {critic: rules, endpoint: null}
methods: {lvlm_va: {}, rrr_gt: {rrr_lambda: 0.03}}
"""


def params() -> Any:
    return YAML(typ="safe", pure=True).load(PARAMS)


def after(*changes: str) -> Any:
    content = params()
    apply_changes(content, changes)
    return content


@pytest.mark.parametrize(
    ("change", "found", "by_hand"),
    [
        ("align.rrr_lambda=1e-4", "rrr_lambda: 0.1", "rrr_lambda: 0.0001"),
        ("align.seeds=[4, 5]", "[0, 1]", "[4, 5]"),
        ("critique.critic=no", "critic: rules", "critic: 'no'"),
        ("critique.endpoint.model=a=b", "endpoint: null", "endpoint: {model: a=b}"),
        ("methods.rrr_gt={learning_rate: 1}", "{rrr_lambda: 0.03}", "{rrr_lambda: 0.03, learning_rate: 1}"),
        ("methods={lvlm_va: {}}", "{lvlm_va: {}, rrr_gt: {rrr_lambda: 0.03}}", "{lvlm_va: {}}"),
        ("methods.random_masks={}", "{lvlm_va: {}", "{lvlm_va: {}, random_masks: {}"),
        ("critique.endpoint=", "endpoint: null", "endpoint: "),
    ],
)
def test_a_change_is_what_it_would_be_in_the_file(change: str, found: str, by_hand: str) -> None:
    assert found in PARAMS
    assert after(change) == YAML(typ="safe", pure=True).load(PARAMS.replace(found, by_hand))


def test_later_changes_lie_over_earlier_ones() -> None:
    assert after("align.rrr_lambda=1", "align.rrr_lambda=2")["align"] == {"rrr_lambda": 2, "seeds": [0, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("align", r"--set align: expected section\.key=value"),
        ("=3", r"expected section\.key=value"),
        ("align..x=3", r"expected section\.key=value"),
        ("align.seeds=[1", r"--set align\.seeds=\[1: '\[1' is not valid YAML"),
    ],
)
def test_what_is_no_change_is_refused(change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        after(change)


def test_only_sections_are_laid_over_sections() -> None:
    with pytest.raises(InputError, match="a preset: expected sections with keys"):
        lay_over({}, ["a"], "a preset")
    with pytest.raises(InputError, match="a preset: there are no sections to lay it over"):
        lay_over(None, {"a": 1}, "a preset")
