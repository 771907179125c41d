"""What came out in a few sentences and numbers: what the model looked at before, and what it looks at now."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lvlmva_core.metrics import METRICS
from lvlmva_core.outputs import BASE, SUBJECT

UNTESTABLE_BELOW = 6  # seeds: the least two-sided p of Wilcoxon's test is 2 / 2^n
WORDS = {  # metric -> what it is, for somebody who meets it here
    "wga": "right in the worst group",
    "aga": "right, mean over groups",
    "accuracy": "right in all",
    "mu_align": "of the attribution off the spurious feature",
    "reliance_true": "moved by the spurious feature, in standard deviations",
    "reliance": "moved by what was rejected, as a share of the logit",
}
PAST, PRESENT = ("put", "gave way", "was"), ("puts", "gives way", "is")
LESS_IS_BETTER = ("reliance", "reliance_true")


@dataclass(frozen=True)
class Figure:
    """A metric before and after: texts. change: which way it went; "even" where by no more than twice its spread."""

    heading: str
    words: str
    before: str
    after: str
    spread: str
    control: str
    change: Literal["better", "worse", "even"]


@dataclass(frozen=True)
class Headline:
    """before, after: a sentence each. control: what fine-tuning does without masks, or "". tests: what they say.

    figures: the metrics that are known.
    """

    before: str
    after: str
    control: str
    tests: str
    figures: list[Figure]


def headline_of(content: Mapping[str, Any], feature: str) -> Headline:
    """The headline from the content of metrics/evaluate.json. feature: what the spurious feature is called."""
    methods, seeds = content["methods"], content["methods"][SUBJECT]["seeds"]
    base, subject = methods[BASE]["test"], methods[SUBJECT]["test"]
    control = methods.get("lambda_zero", {}).get("test", {})
    figures = []
    for name, words in WORDS.items():
        if name not in base or name not in subject:
            continue
        before, after = _mean(base[name]), _mean(subject[name])
        figures.append(
            Figure(
                METRICS[name].heading or name,
                words,
                f"{before:.3f}",
                f"{after:.3f}",
                f"± {subject[name]['std']:.3f} over {seeds} seeds" if seeds > 1 else "one seed",
                f"{_mean(control[name]):.3f}" if name in control else "",
                _change(after - before, subject[name], name in LESS_IS_BETTER),
            )
        )
    return Headline(
        f"Before, the model {_looks(base, f'the spurious feature ({feature})', PAST)}.",
        f"Now it {_looks(subject, 'it', PRESENT)}.",
        _control(content),
        _tests(content, seeds),
        figures,
    )


def _looks(of: Mapping[str, Any], feature: str, verbs: tuple[str, str, str]) -> str:
    """What a model looks at and how often it is right, in words."""
    parts = []
    if "mu_align" in of:
        parts.append(f"{verbs[0]} {1 - _mean(of['mu_align']):.0%} of its attribution on {feature}")
    if "reliance_true" in of:
        parts.append(f"{verbs[1]} to it by {_mean(of['reliance_true']):.2f} standard deviations of its output")
    elif "reliance" in of:
        parts.append(f"{verbs[1]} to what was rejected by {_mean(of['reliance']):.0%} of its logit")
    right = f"{verbs[2]} right on {_mean(of['accuracy']):.0%} of the test pictures"
    if "wga" in of:
        right += f" ({_mean(of['wga']):.0%} in its worst group)"
    return f"{', '.join(parts)} and {right}" if parts else right


def _change(moved: float, of: Any, less_is_better: bool) -> Literal["better", "worse", "even"]:
    spread = of["std"] if isinstance(of, dict) else 0.0
    if abs(moved) <= max(2 * spread, 5e-4):
        return "even"
    return "better" if (moved > 0) != less_is_better else "worse"


def _control(content: Mapping[str, Any]) -> str:
    """What of the difference the masks make: fine-tuning alone changes a model, too."""
    tests = content["tests"].get(SUBJECT, {})
    name = next((name for name in ("wga", "accuracy") if "lambda_zero" in tests.get(name, {})), None)
    if name is None:
        return ""
    found = tests[name]["lambda_zero"]["difference"]
    alone = _mean(content["methods"]["lambda_zero"]["test"][name])
    heading = METRICS[name].heading
    return (
        f"Fine-tuning without masks (λ = 0) reaches {heading} {alone:.3f}; with the masks it is {found['mean']:+.3f} "
        f"± {found['std']:.3f} from there."
    )


def _tests(content: Mapping[str, Any], seeds: int) -> str:
    tests = content["tests"].get(SUBJECT, {})
    said = []
    for name in ("wga", "accuracy"):
        if name in tests and BASE in tests[name]:
            found = tests[name][BASE]
            said.append(f"Δ{METRICS[name].heading} {found['difference']['mean']:+.3f} (p = {found['p_two_sided']:.3f})")
    few = (
        f" With {seeds} seed{'' if seeds == 1 else 's'} no difference can be significant."
        if seeds < UNTESTABLE_BELOW
        else ""
    )
    return f"Against the base model: {', '.join(said)}; Wilcoxon's test over seeds, two-sided.{few}" if said else few


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, dict) else value)
