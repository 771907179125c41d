"""Tables of what came out, from the content of metrics/evaluate.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from lvlmva_core.lvlm.offline import is_stand_in
from lvlmva_core.lvlm.settings import is_detector
from lvlmva_core.methods import METHODS, in_order
from lvlmva_core.metrics import METRICS
from lvlmva_core.outputs import BASE, SUBJECT
from lvlmva_core.report.page import Table
from lvlmva_core.samples import TWINS

UNDECIDED = {
    "ties": "ties, where the critic's stands",
    "stale_overrides": "of earlier segmentations, which do not count",
}
SPLITS = {
    "test_agreeing": "accuracy, decoy as in training",
    "test_plain": "accuracy, no decoy",
}

# how a method's supervision says that it comes from verdicts, and what the verdicts of some critics come from
OF_VERDICTS = ("verdicts of the critic", "which pictures LVLM-VA masks", "area of LVLM-VA's masks")
KNOWN = {"oracle": "drawn from true masks", "rules": "by a rule that knows where digits lie"}
DESCRIBED = "a description per class"


def judged_by(content: Mapping[str, Any]) -> str:
    """Who criticised and judged, in words that no stand-in can be mistaken in."""
    critics = ", ".join(_named(name) for name in content["verdicts"]["critic"])
    judges = ", ".join(_named(name) for name in content["verdicts"]["judge"])
    named = content["verdicts"]["critic_settings"].get("name_spurious_feature")
    prompt = "" if named is None else f" ({'told' if named else 'not told'} the known spurious features)"
    rates = ", ".join(
        f"{name.replace('_', ' ')} {content['verdicts']['critic_settings'][name]}"
        for name in ("rejects", "overlap", "false_positive_rate", "false_negative_rate", "errors")
        if name in content["verdicts"]["critic_settings"]
    )
    return f"critic: {critics}{prompt}{f' ({rates})' if rates else ''}; judge: {judges}"


def before_and_after(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table of methods, from the content of metrics/evaluate.json."""
    extra = sorted(
        {split for measured in content["methods"].values() for split in measured if split.startswith("test_")} - {TWINS}
    )
    measured_at_all = {metric for measured in content["methods"].values() for metric in measured["test"]}
    headings = {
        name: metric.heading
        for name, metric in METRICS.items()
        if metric.heading is not None and name in measured_at_all  # what is not stands in content["left_out"]
    }
    columns = ["", *headings.values(), *(SPLITS.get(split, split) for split in extra)]
    rows = []
    for name in in_order(content["methods"]):
        measured = content["methods"][name]
        values = [measured["test"].get(metric) for metric in headings]
        values += [measured[split]["accuracy"] for split in extra]
        seeds = measured.get("seeds", 1)
        rows.append([METHODS[name].label, *(_number(value, seeds) for value in values)])
    return columns, rows


def significance(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of LVLM-VA's difference to every other method, with its p values."""
    tests = content["tests"].get(SUBJECT, {})
    metrics = [metric for metric in ("wga", "aga", "accuracy") if metric in tests]
    columns = [f"{METHODS[SUBJECT].label} minus"]
    for metric in metrics:
        columns += ["Δ accuracy" if metric == "accuracy" else f"Δ{METRICS[metric].heading}", "p two-sided"]
        columns += ["p one-sided"] if metric == "wga" else []
    rows = []
    for other in in_order(tests[metrics[0]]) if metrics else []:
        row = [METHODS[other].label]
        for metric in metrics:
            found = tests[metric][other]
            row += [
                f"{found['difference']['mean']:+.3f} ± {found['difference']['std']:.3f}",
                f"{found['p_two_sided']:.3f}",
            ]
            row += [f"{found['p_greater']:.3f}"] if metric == "wga" else []
        rows.append(row)
    return columns, rows


def supervision(content: Mapping[str, Any]) -> list[str]:
    """What each method of the table had beside class labels in this run, in the order of the rows."""
    critics = content["verdicts"]["critic"]
    known = [words for name, words in KNOWN.items() if name in critics]
    known += ["by a trained detector"] if any(is_detector(name) for name in critics) else []
    drawn = f" (here {', '.join(known)})" if known else ""
    to_choose = {name: f"; to choose: {of['supervision']}" for name, of in content.get("chosen", {}).items()}
    found = [METHODS[name].supervision + to_choose.get(name, "") for name in in_order(content["methods"])]
    if all(is_stand_in(name) or is_detector(name) for name in critics):  # none of them reads a description
        found = [words.replace(f"{DESCRIBED}; ", "") for words in found]
    return [
        words.replace(of_verdicts, f"{of_verdicts}{drawn}") if (of_verdicts := _of_verdicts(words)) else words
        for words in found
    ]


def choices(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of what was chosen for each method, by which rule, and where that ends the grid."""
    rows = []
    for name in in_order(content.get("chosen", {})):
        of = content["chosen"][name]
        ends = {key: f" ({end} that was tried)" for key, end in of["at_edge"].items()}
        values = [f"{key} = {value:g}{ends.get(key, '')}" for key, value in of["chosen"].items()]
        epoch = f"{of['epoch']['mean']:.1f}" if "epoch" in of else "none"
        tried = str(len(of["candidates"]))
        rows.append([METHODS[name].label, of["rule"], tried, "; ".join(values) or "as set", epoch])
    return ["method", "rule", "candidates", "chosen", "epoch, mean over seeds"], rows


def verdict_table(verdicts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the verdicts' quality under each overlap rule."""
    columns = ["overlap", "precision", "recall", "judged spurious", "overlapping", "regions"]
    rows = [
        [
            rule.removeprefix("overlap_").replace("_", " "),
            share(measured["precision"]),
            share(measured["recall"]),
            str(measured["regions_judged_spurious"]),
            str(measured["regions_overlapping"]),
            str(measured["regions"]),
        ]
        for rule, measured in verdicts.items()
        if rule.startswith("overlap_") and isinstance(measured, dict)
    ]
    return columns, rows


def share(value: float | None) -> str:
    """A share 0..1 as text."""
    return "no such region" if value is None else f"{value:.3f}"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _of_verdicts(supervision: str) -> str | None:
    return next((words for words in OF_VERDICTS if words in supervision), None)


def _named(name: str) -> str:
    what = "a detector" if is_detector(name) else "a stand-in" if is_stand_in(name) else None
    return f"{name} ({what}, not a vision-language model)" if what else name


def _number(value: float | dict[str, float] | None, seeds: int) -> str:
    """A mean with its spread, which one seed does not have."""
    if value is None:
        return "not known"
    if not isinstance(value, dict):
        return f"{value:.3f}"
    return f"{value['mean']:.3f} ± {value['std']:.3f}" if seeds > 1 else f"{value['mean']:.3f}"


Bars = dict[str, dict[str, tuple[float, float]]]


def bars(content: Mapping[str, Any]) -> Bars:
    """Metric's name in full -> method -> (mean, standard deviation over seeds), for metrics that are known."""
    names = {
        "accuracy": "test accuracy",
        "wga": "worst-group accuracy (WGA)",
        "mu_align": "alignment of attributions (μ_align)",
    }
    found = {name: _bars(content["methods"], metric) for metric, name in names.items()}
    return {name: of_methods for name, of_methods in found.items() if of_methods}


def _bars(methods: Mapping[str, Any], metric: str) -> dict[str, tuple[float, float]]:
    values = {name: measured["test"][metric] for name, measured in methods.items() if metric in measured["test"]}
    return {
        name: (value["mean"], value["std"]) if isinstance(value, dict) else (value, 0.0)
        for name, value in values.items()
    }


def differences(content: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Metric -> method -> (mean, standard deviation, two-sided p) of its difference to the base model."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for metric in ("accuracy", "wga", "mu_align"):
        for name, tested in content["tests"].items():
            if metric in tested:
                test = tested[metric][BASE]
                values = (test["difference"]["mean"], test["difference"]["std"], test["p_two_sided"])
                found.setdefault(METRICS[metric].heading or metric, {})[name] = values
    return found


def warning_of(verdicts: Mapping[str, Any]) -> str:
    """What must be said first where stand-ins or detectors judged; "" where none did."""
    names = sorted({*verdicts["critic"], *verdicts["judge"]})
    detectors, stand_ins = [n for n in names if is_detector(n)], [n for n in names if is_stand_in(n)]
    if not detectors and not stand_ins:
        return ""
    kinds = {"detector": detectors, "stand-in": stand_ins}
    who = " and ".join(f"the {kind} {', '.join(those)}" for kind, those in kinds.items() if those)
    return (
        f"No vision-language model was asked. The verdicts come from {who}: "
        "the figures show what the pipeline does with such verdicts, not how well a model judges."
    )


def corrected_by(masked: Mapping[str, Any]) -> str:
    """What experts changed of the critic's verdicts, from `mask` of metrics/mask.json; "" where nobody reviewed."""
    if not masked["reviewers"]:
        return ""
    said = (
        f"Reviewed by {', '.join(masked['reviewers'])}: {masked['verdicts_overridden']} verdicts are not the critic's"
    )
    more = [f"{words}: {masked[key]}" for key, words in UNDECIDED.items() if masked[key]]
    return "; ".join([said, *more]) + "."


def left_out(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of what was not measured, and why; no rows where all was."""
    return ["left out", "why"], [[what, why] for what, why in content.get("left_out", {}).items()]


def page_tables(content: Mapping[str, Any], class_names: Sequence[str]) -> list[Table]:
    """The tables of the page: methods, what is left out, verdicts, alignment set."""
    tables = [Table("Before and after", _note(content), *before_and_after(content))]
    columns, rows = left_out(content)
    if rows:
        tables.append(Table("Left out", "What this data set does not say cannot be measured.", columns, rows))
    columns, rows = verdict_table(content["verdicts"])
    if rows:
        tables.append(
            Table(
                "Verdicts against the true masks",
                "Precision: of the regions judged spurious, the share that overlaps the spurious feature. Recall: of "
                "the regions that overlap it, the share judged spurious. What counts as overlap is the first column.",
                columns,
                rows,
            )
        )
    columns, rows = choices(content)
    if rows:
        tables.append(
            Table(
                "Chosen settings",
                "By one rule and one set of donors for all methods, on the validation split. Where a value is the "
                "lowest or highest that was tried, what lies beyond was not looked at.",
                columns,
                rows,
            )
        )
    return [*tables, _alignment_set(content["alignment_set"], class_names)]


def _note(content: Mapping[str, Any]) -> str:
    """What the columns of the table of methods are, of those that are there."""
    measured = {metric for found in content["methods"].values() for metric in found["test"]}
    terms = []
    if "aga" in measured:
        terms += ["AGA is the plain mean over groups", "WGA the worst group"]
    if "mu_align" in measured:
        terms.append(
            f"μ_align {'' if terms else 'is '}one minus the share of attribution on the spurious feature, on "
            f"{content['pictures']['mu_align']} pictures that have it"
        )
    if "reliance_true" in measured:
        terms.append(
            "'reliance, true' how far the feature moves the contrast of the class that it speaks for, in standard "
            f"deviations of the contrast, on {content['pictures']['reliance_true']} pictures with and without it"
        )
    bound = (
        "RRR with true masks knows what LVLM-VA does not: it is the bound. " if "rrr_gt" in content["methods"] else ""
    )
    several = any(found.get("seeds", 1) > 1 for found in content["methods"].values())
    spread = "mean ± standard deviation over seeds" if several else "one seed, so that its spread is not known"
    return (
        f"Test split; {spread}. {', '.join(terms)}{'. ' if terms else ''}{bound}"
        "The controls know less (docs/alignment.md)."
    )


def _alignment_set(chosen: Mapping[str, Any], class_names: Sequence[str]) -> Table:
    note = f"The {chosen['samples']} training samples chosen by {chosen['strategy'].replace('_', ' ')}"
    if "samples_per_group" not in chosen:
        rows = [[class_names[int(label)], str(count)] for label, count in chosen["samples_per_class"].items()]
        return Table("Alignment set", f"{note}.", ["class", "samples"], rows)
    return Table(
        "Alignment set",
        f"{note}; {share(chosen['share_with_spurious_feature'])} of them carry the spurious feature, "
        f"{share(chosen['share_with_spurious_feature_in_training'])} of the training set do.",
        ["group", "samples"],
        [[group, str(count)] for group, count in chosen["samples_per_group"].items()],
    )
