"""Every method that can stand in a table or figure: the only list. Their order is that of tables and figures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lvlmva_core.align_settings import Correction
from lvlmva_core.outputs import BASE, SUBJECT


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    kind: "base"; "penalty": fine-tunes the base model on masks, which `lvlmva_core.controls.MASK_SOURCES` makes for it;
        "retrained": trains anew or refits, by `lvlmva_core/baselines/<name>.py`.
    supervision: what it needs beside class labels. needs: what of it a data set may not have.
    fixed: settings that make it what it is. correction: of a penalty, how it corrects (`AlignSettings`).
    """

    label: str
    color: str
    kind: Literal["base", "penalty", "retrained"]
    supervision: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    needs: Literal["groups", "true_masks"] | None = None
    correction: Correction = "rrr"


METHODS: dict[str, Method] = {
    BASE: Method("base model", "#7f7f7f", "base", "none"),
    "lambda_zero": Method("control: λ = 0", "#bdbdbd", "penalty", "none", {"rrr_lambda": 0.0}),
    "random_masks": Method(
        "control: random masks", "#d9b38c", "penalty", "which pictures LVLM-VA masks, and how much of each"
    ),
    "random_pictures": Method("control: random pictures", "#ead7c0", "penalty", "area of LVLM-VA's masks"),
    "class_matched": Method(
        "control: random pictures, same classes",
        "#e6c9a8",
        "penalty",
        "area of LVLM-VA's masks, and how many lie on each class",
    ),
    "flagged_pictures": Method("control: whole flagged pictures", "#c49c6b", "penalty", "which pictures LVLM-VA masks"),
    "counterexamples_random_masks": Method(
        "control: counterexamples (extension), random masks",
        "#f4b6b6",
        "penalty",
        "which pictures LVLM-VA masks, and how much of each",
        correction="counterexamples",
    ),
    "counterexamples_class_matched": Method(
        "control: counterexamples (extension), same classes",
        "#f9d5d5",
        "penalty",
        "area of LVLM-VA's masks, and how many lie on each class",
        correction="counterexamples",
    ),
    "both_random_masks": Method(
        "control: both (extension), random masks",
        "#e3b5d9",
        "penalty",
        "which pictures LVLM-VA masks, and how much of each",
        correction="both",
    ),
    "both_class_matched": Method(
        "control: both (extension), same classes",
        "#f0d4ea",
        "penalty",
        "area of LVLM-VA's masks, and how many lie on each class",
        correction="both",
    ),
    "jtt": Method("JTT", "#9edae5", "retrained", "none in training"),
    "subg": Method("SUBG (group labels)", "#c5b0d5", "retrained", "group labels in training", needs="groups"),
    "dfr": Method(
        "DFR (group labels)",
        "#9467bd",
        "retrained",
        "group labels of the split that it is refitted on",
        needs="groups",
    ),
    "group_dro": Method("GroupDRO (group labels)", "#8c6bb1", "retrained", "group labels in training", needs="groups"),
    "dfr_verdicts": Method(
        "DFR on groups of verdicts (extension)", "#17becf", "retrained", "verdicts of the critic, as groups"
    ),
    "group_dro_verdicts": Method(
        "GroupDRO on groups of verdicts (extension)", "#2c7fb8", "retrained", "verdicts of the critic, as groups"
    ),
    SUBJECT: Method("LVLM-VA", "#1f77b4", "penalty", "a description per class; verdicts of the critic"),
    "lvlm_va_counterexamples": Method(
        "LVLM-VA, counterexamples (extension)",
        "#d62728",
        "penalty",
        "a description per class; verdicts of the critic",
        correction="counterexamples",
    ),
    "lvlm_va_both": Method(
        "LVLM-VA, both (extension)",
        "#b5489b",
        "penalty",
        "a description per class; verdicts of the critic",
        correction="both",
    ),
    "rrr_gt": Method(
        "RRR with true masks (bound)",
        "#2ca02c",
        "penalty",
        "true spurious masks of the alignment set",
        needs="true_masks",
    ),
}


def method(name: str) -> Method:
    """The method of that name. Raises ValueError where there is none: a table drops nothing."""
    if name not in METHODS:
        raise ValueError(f"no method '{name}'; known: {', '.join(METHODS)}")
    return METHODS[name]


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of METHODS. Raises ValueError where one is not listed."""
    wanted = list(names)
    for name in wanted:
        method(name)
    return [name for name in METHODS if name in wanted]
