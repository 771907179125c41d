"""The outcome as a table on the terminal: `python -m stages.results`."""

import sys
from pathlib import Path
from typing import Any

import typer

from lvlmva.entry import run
from lvlmva_core.arrays import read_json

STAND_INS = ("rules", "oracle", "replay")
NAMES = {
    "base": "base model",
    "lambda_zero": "control: λ = 0",
    "random_masks": "control: random masks",
    "random_pictures": "control: random pictures",
    "jtt": "JTT",
    "subg": "SUBG (group labels)",
    "dfr": "DFR (group labels)",
    "lvlm_va": "LVLM-VA",
    "rrr_gt": "RRR with true masks (bound)",
}
HEADINGS = {
    "accuracy": "accuracy",
    "aga": "AGA",
    "wga": "WGA",
    "mu_align": "μ_align",
}
SPLITS = {
    "test_agreeing": "accuracy, decoy as in training",
    "test_plain": "accuracy, no decoy",
}


def judged_by(content: dict[str, Any]) -> str:
    """Who criticised and judged, in words that no stand-in can be mistaken in."""
    critics = ", ".join(_named(name) for name in content["verdicts"]["critic"])
    judges = ", ".join(_named(name) for name in content["verdicts"]["judge"])
    named = content["verdicts"]["critic_settings"].get("name_spurious_feature")
    prompt = "" if named is None else f" ({'told' if named else 'not told'} the known spurious features)"
    rates = ", ".join(
        f"{name.replace('_', ' ')} {content['verdicts']['critic_settings'][name]}"
        for name in ("rejects", "overlap", "false_positive_rate", "false_negative_rate")
        if name in content["verdicts"]["critic_settings"]
    )
    return f"critic: {critics}{prompt}{f' ({rates})' if rates else ''}; judge: {judges}"


def before_and_after(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the table of methods, from the content of metrics/evaluate.json."""
    extra = sorted(
        {split for measured in content["methods"].values() for split in measured if split.startswith("test_")}
    )
    columns = ["", *HEADINGS.values(), *(SPLITS.get(split, split) for split in extra)]
    rows = []
    for method, name in NAMES.items():
        if (measured := content["methods"].get(method)) is None:
            continue
        values = [measured["test"].get(metric) for metric in HEADINGS] + [
            measured[split]["accuracy"] for split in extra
        ]
        rows.append([name, *(_number(value) for value in values)])
    return columns, rows


def significance(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of LVLM-VA's difference to every other method, with its p values."""
    columns = [
        "LVLM-VA minus",
        "ΔWGA",
        "p two-sided",
        "p one-sided",
        "ΔAGA",
        "p two-sided",
        "Δ accuracy",
        "p two-sided",
    ]
    tests = content["tests"].get("lvlm_va", {})
    rows = []
    for other, name in NAMES.items():
        if other not in tests.get("wga", {}):
            continue
        row = [name]
        for metric in ("wga", "aga", "accuracy"):
            found = tests[metric][other]
            row += [
                f"{found['difference']['mean']:+.3f} ± {found['difference']['std']:.3f}",
                f"{found['p_two_sided']:.3f}",
            ]
            row += [f"{found['p_greater']:.3f}"] if metric == "wga" else []
        rows.append(row)
    return columns, rows


def results(
    evaluation: Path = Path("metrics/evaluate.json"),
    markdown: bool = False,
) -> None:
    """Print the table of methods before and after alignment; with --markdown also supervision and p values."""
    from rich.console import Console
    from rich.table import Table

    content = read_json(evaluation)
    columns, rows = before_and_after(content)
    if markdown:
        supervision = {NAMES[method]: need for method, need in content["supervision"].items() if method in NAMES}
        rows = [[row[0], supervision[row[0]], *row[1:]] for row in rows]
        typer.echo(f"{judged_by(content)}\n")
        typer.echo(markdown_table(["method", "supervision beside class labels", *columns[1:]], rows))
        typer.echo(markdown_table(*significance(content)))
        return
    table = Table(title="Before and after, test split", caption=judged_by(content))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    # a pipe has no width of its own: wide enough for the table
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _named(name: str) -> str:
    return f"{name} (a stand-in, not a vision-language model)" if name in STAND_INS else name


def _number(value: float | dict[str, float] | None) -> str:
    if value is None:
        return "not known"
    return f"{value['mean']:.3f} ± {value['std']:.3f}" if isinstance(value, dict) else f"{value:.3f}"


if __name__ == "__main__":
    run(results)
