"""The outcome as a table on the terminal: `python -m stages.results`."""

import sys
from pathlib import Path
from typing import Any

from lvlmva_core.arrays import read_json
from stages.entry import run

STAND_INS = ("rules", "oracle", "replay")
NAMES = {
    "base": "base model",
    "lambda_zero": "control: λ = 0",
    "random_masks": "control: random masks",
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
        for name in ("overlap", "false_positive_rate", "false_negative_rate")
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


def results(evaluation: Path = Path("metrics/evaluate.json")) -> None:
    """Print the table of methods before and after alignment."""
    from rich.console import Console
    from rich.table import Table

    content = read_json(evaluation)
    columns, rows = before_and_after(content)
    table = Table(title="Before and after, test split", caption=judged_by(content))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    # a pipe has no width of its own: wide enough for the table
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _named(name: str) -> str:
    return f"{name} (a stand-in, not a vision-language model)" if name in STAND_INS else name


def _number(value: float | dict[str, float] | None) -> str:
    if value is None:
        return "not known"
    return f"{value['mean']:.3f} ± {value['std']:.3f}" if isinstance(value, dict) else f"{value:.3f}"


if __name__ == "__main__":
    run(results)
