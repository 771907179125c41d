"""What came out of many experiments: rows, comparisons, a table and a figure, from what is complete."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lvlmva.experiments_folder import Piece, base_of, has_lambda, is_done, paths_of
from lvlmva.pipeline import paths
from lvlmva_core.comparison import Runs, measure
from lvlmva_core.lvlm.records import VerdictRow, read_rows
from lvlmva_core.methods import METHODS
from lvlmva_core.outputs import BASE, Outputs, read_outputs
from lvlmva_core.report.tables import judged_by, markdown_table
from lvlmva_core.samples import read_samples, read_spurious_masks, rows_of_ids
from lvlmva_core.store import replace_file
from lvlmva_core.study import (
    HEADINGS,
    LEVEL,
    MEASURES,
    RRR_LAMBDA,
    compared,
    compared_over,
    conclusions,
    label_of,
    rows_of,
    tables,
)

if TYPE_CHECKING:
    import pandas as pd


Models = dict[str, dict[str, Outputs]]  # base -> method -> outputs


@dataclass(frozen=True)
class Found:
    """What is complete: λ ("" where only one is) -> base -> method -> outputs, and the metrics of the same.

    judged: who criticised and judged, of a stand-in what it is.
    """

    samples: "pd.DataFrame"
    models: Mapping[str, Models]
    values: Mapping[str, Mapping[str, Runs]]
    judged: str


def read_study(study: Path) -> Found:
    """Read what is complete of a study's folder."""
    samples = read_samples(study / Path(paths()["samples"]).name)
    models: dict[str, Models] = {}
    values: dict[str, dict[str, Runs]] = {}
    judged = ""
    for here in sorted(study.glob("base=*"), key=base_of):
        base = str(base_of(here))
        if not is_done(study, Piece("evaluate", int(base), method=BASE)):
            continue
        places = {"": here} | {each.name.partition("=")[2]: each for each in here.glob("lambda=*")}
        of_base = {
            rrr_lambda: {
                piece.method: read_outputs(paths_of(study, place)["evaluations"] / f"{piece.method}.safetensors")
                for piece in _evaluated(study, int(base), rrr_lambda)
            }
            for rrr_lambda, place in sorted(places.items(), key=lambda item: float(item[0] or -1))
        }
        explained = rows_of_ids(samples, of_base[""][BASE].map_ids)
        file = study / Path(paths()["spurious_masks"]).name
        masks = read_spurious_masks(file, explained)[0] if len(explained) else None
        for rrr_lambda, outputs in of_base.items():
            if outputs:
                models.setdefault(rrr_lambda, {})[base] = outputs
                values.setdefault(rrr_lambda, {})[base] = measure(outputs, samples, masks)[0]
        judged = judged or _judged(paths_of(study, here)["verdicts"])
    return Found(samples, models, values, judged)


def _evaluated(study: Path, base: int, rrr_lambda: str) -> list[Piece]:
    every = (Piece("evaluate", base, rrr_lambda, method) for method in METHODS)
    return [piece for piece in every if is_done(study, piece)]


def _judged(verdicts: Path) -> str:
    records = read_rows(verdicts, VerdictRow)
    about = {
        "critic": sorted({name for record in records for name in record.critics()}),
        "judge": sorted({record.judge for record in records}),
        "critic_settings": next((record.settings for record in records if record.settings), {}),
    }
    return judged_by({"verdicts": about})


def write_rows(found: Found, rows: Path) -> None:
    """Write the rows, and beside them the comparisons (`<name>_compared.csv`); nothing where nothing is complete."""
    import pandas as pd

    if not found.values:
        return
    rows.parent.mkdir(parents=True, exist_ok=True)
    several = [rrr_lambda for rrr_lambda in found.models if rrr_lambda]
    table = rows_of(found.values[""])
    comparisons = compared(found.models[""], found.samples) if not several else pd.DataFrame()
    if several:
        parts = [(rrr_lambda, rows_of(values)) for rrr_lambda, values in found.values.items()]
        table = pd.concat([part.assign(**{RRR_LAMBDA: rrr_lambda}) for rrr_lambda, part in parts], ignore_index=True)
        table = table[["method", RRR_LAMBDA, *(name for name in table if name not in ("method", RRR_LAMBDA))]]
        plain = {
            base: {name: each for name, each in of.items() if name == BASE or not has_lambda(name)}
            for base, of in found.models[""].items()
        }
        whole = {
            rrr_lambda: {base: {**plain[base], **found.models[rrr_lambda].get(base, {})} for base in plain}
            for rrr_lambda in several
        }
        comparisons = compared_over(whole, found.samples)
    table.to_csv(rows, index=False, float_format="%.6f")
    comparisons.to_csv(compared_file(rows), index=False, float_format="%.6f")


def compared_file(rows: Path) -> Path:
    """Where the comparisons lie."""
    return rows.with_name(f"{rows.stem}_compared.csv")


def write_page(found: Found, rows: Path, primary: str) -> list[str]:
    """Write `<name>.md`, the tables and what they say, and `<name>.png`, the differences; the sentences, in order.

    primary: the measure that was declared.
    """
    import pandas as pd

    comparisons = pd.read_csv(compared_file(rows), dtype={RRR_LAMBDA: str}, keep_default_na=False)
    models = sum(len(runs) for values in found.values.values() for of in values.values() for runs in of.values())
    said = conclusions(comparisons, primary) or ["no method could be compared with another: too little is complete"]
    head = [f"{models} models; {found.judged}.", f"Primary measure: {HEADINGS[primary]} ({_direction(primary)})."]
    text = [*head, "", *(f"- {line}" for line in said), "", "\n".join(markdown_table(*each) for each in tables(rows))]
    text += [
        "Means ± standard deviations over models. Intervals (95 %) and p: bootstrap over bases, seeds within them, and "
        "test pictures; Holm within the comparisons of a method by a measure. The control is the best of those that "
        "ran, chosen by each measure on the same models, which favours it."
    ]
    replace_file(rows.with_suffix(".md"), "\n".join([*text, ""]).encode())
    if not comparisons.empty:
        _draw(comparisons, primary, f"{found.judged}; {models} models", rows.with_suffix(".png"))
    return said


def _direction(measure: str) -> str:
    return "more is better" if MEASURES[measure] else "less is better"


def _draw(comparisons: "pd.DataFrame", primary: str, caption: str, file: Path) -> None:
    from lvlmva_core.report.figures import Compared, save_figure, study_figure  # matplotlib

    there = comparisons["measure"].unique()
    panels = {}
    for measure_ in [primary, *(name for name in MEASURES if name != primary)]:
        if measure_ not in there:
            continue
        first = "primary measure; " if measure_ == primary else ""
        panels[f"Δ {HEADINGS[measure_]} ({first}{_direction(measure_)})"] = [
            Compared(
                label_of(row["method"], row.get(RRR_LAMBDA, "")),
                METHODS[row["against"]].label,
                METHODS[row["method"]].color,
                row["difference"],
                row["low"],
                row["high"],
                row["p_holm"] < LEVEL,
            )
            for row in comparisons[comparisons["measure"] == measure_].to_dict("records")
        ]
    note = f"filled: p < {LEVEL} after Holm; whiskers: 95 %"
    save_figure(study_figure(panels, f"{caption}; {note}"), file)
