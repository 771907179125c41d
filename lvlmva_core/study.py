"""A study of several base models: rows, intervals, tables (an extension; the paper has one base a data set).

A row is one model. Methods are compared by pairs of models of the same base and seed; intervals come from resampling
bases, seeds within them and test pictures (`lvlmva_core.statistics.hierarchical_bootstrap`).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lvlmva_core.comparison import Runs, shortcut_pairs
from lvlmva_core.errors import InputError
from lvlmva_core.methods import METHODS, in_order
from lvlmva_core.outputs import BASE, SUBJECT, Outputs
from lvlmva_core.statistics import hierarchical_bootstrap, holm, two_sided_p

# column of the rows -> metric; `reliance` is the reliance on the feature itself, the primary measure
COLUMNS = {
    "accuracy": "accuracy",
    "aga": "aga",
    "wga": "wga",
    "wga_best_threshold": "wga_best_threshold",
    "reliance": "reliance_true",
    "auc_plain": "auc_plain",
    "auc_spurious": "auc_spurious",
    "mu_align": "mu_align",
}
HEADINGS = {
    "accuracy": "accuracy",
    "aga": "AGA",
    "wga": "WGA",
    "wga_best_threshold": "WGA, best threshold",
    "reliance": "reliance",
    "auc_plain": "AUC, plain",
    "auc_spurious": "AUC, with the feature",
    "mu_align": "μ_align",
}
# corrected by verdicts -> its controls, of which the best is the third of the family; base and λ = 0 are the others
CONTROLS = {
    "lvlm_va": ("random_masks", "class_matched", "flagged_pictures"),
    "lvlm_va_counterexamples": ("counterexamples_random_masks", "counterexamples_class_matched"),
    "lvlm_va_both": ("both_random_masks", "both_class_matched"),
}
LAMBDA_ZERO = "lambda_zero"
BOUND = "rrr_gt"  # true masks: what a correction by verdicts can be held against
# measure -> whether more is better
MEASURES = {"reliance": False, "wga": True, "accuracy": True}

COMPARED = ["method", "measure", "against", "value", "value_against", "difference", "low", "high", "p", "p_holm"]

Models = Mapping[str, Mapping[str, Outputs]]  # base -> method -> outputs


def rows_of(values: Mapping[str, Runs]) -> pd.DataFrame:
    """One row a model: method, base, seed ("" of a base itself), and COLUMNS that are known.

    Args:
        values: base -> what `lvlmva_core.comparison.measure` took of its methods.
    """
    rows = [
        {
            "method": method,
            "base": base,
            "seed": seed,
            **{name: of_model.get(f"test.{metric}", np.nan) for name, metric in COLUMNS.items()},
        }
        for base, of_methods in values.items()
        for method, by_seed in of_methods.items()
        for seed, of_model in by_seed.items()
    ]
    table = pd.DataFrame(rows)
    order = {name: place for place, name in enumerate(in_order(table["method"].unique()))}
    table = table.assign(order=table["method"].map(order)).sort_values(["order", "base", "seed"], kind="stable")
    return table.drop(columns="order").reset_index(drop=True)


def compared(models: Models, samples: pd.DataFrame, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Each method of CONTROLS against base, λ = 0 and its best control, by each of MEASURES. Families of their own: the
    paper's correction against the methods of the literature that are there, and each method against BOUND if it is.

    Only bases count that have every method which is compared. The best control is the one of the best mean (reliance:
    the smallest absolute), chosen anew for each measure on these very models, which favours the control.

    Returns:
        Columns COMPARED: value, value_against: means over models; difference with low, high (95 %); p, two-sided;
        p_holm, within the comparisons of one family by one measure. Reliances are absolute values.

    Raises:
        InputError: a measure needs what the data set does not say.
    """
    measures = measures_of(samples)
    table = []
    for subject, controls in CONTROLS.items():
        literature = [name for name, method in METHODS.items() if method.kind == "retrained" and subject == SUBJECT]
        known = (BASE, LAMBDA_ZERO, *controls, *literature, BOUND)
        wanted = [name for name in known if any(name in of for of in models.values())]
        complete = {base: of for base, of in models.items() if {subject, *wanted} <= of.keys()}
        if not complete or BASE not in wanted or LAMBDA_ZERO not in wanted:
            continue
        for measure, (taken, statistic) in measures.items():
            stacked = {name: _stacked(complete, name, subject, taken) for name in (subject, *wanted)}
            means = {name: statistic(values) for name, values in stacked.items()}
            better = max if MEASURES[measure] else min
            there = [name for name in controls if name in wanted]
            best = [better(there, key=lambda name: means[name])] if there else []
            for others in (
                [BASE, LAMBDA_ZERO, *best],
                [name for name in literature if name in wanted],
                [BOUND] if BOUND in wanted else [],
            ):
                family = {}
                for other in others:
                    found = drawn_differences(stacked[subject], stacked[other], statistic, draws, seed)
                    low, high = (float(end) for end in np.quantile(found, [0.025, 0.975]))
                    values = means[subject], means[other], means[subject] - means[other]
                    family[other] = (*values, low, high, two_sided_p(found))
                adjusted = holm({other: values[-1] for other, values in family.items()})
                table += [(subject, measure, other, *values, adjusted[other]) for other, values in family.items()]
    return pd.DataFrame(table, columns=COMPARED)


Taken = Callable[[Outputs, int], np.ndarray]  # outputs, place of the seed -> (pictures, columns)


def measures_of(samples: pd.DataFrame) -> dict[str, tuple[Taken, Callable[[np.ndarray], float]]]:
    """MEASURES -> what it takes of a model, and how it comes from (bases, seeds, pictures, columns).

    Raises:
        InputError: no test picture is there with and without the spurious feature.
    """
    rows = samples[samples["split"].str.startswith("test")].reset_index(drop=True)
    test = np.flatnonzero(rows["split"] == "test")
    pairs = shortcut_pairs(samples)
    if pairs is None:
        raise InputError("no test picture is there with and without the spurious feature: reliance has no meaning")
    labels, spurious = rows["label"].to_numpy()[test], rows["spurious"].to_numpy(dtype=bool)[test]
    group = labels * 2 + spurious

    def contrasts(of: Outputs, place: int) -> np.ndarray:
        return pairs.contrasts(of.logits[:, place])

    def right(of: Outputs, place: int) -> np.ndarray:
        return np.stack([of.predictions()[test, place] == labels, group], axis=1).astype(np.float64)

    return {
        "reliance": (contrasts, _reliance),
        "wga": (right, _worst_group),
        "accuracy": (right, lambda drawn: float(drawn[..., 0].mean())),
    }


def drawn_differences(
    values: np.ndarray, others: np.ndarray, statistic: Callable[[np.ndarray], float], draws: int, seed: int
) -> np.ndarray:
    """Bootstrap draws of the statistic's difference, (draws,); values, others: (bases, seeds, pictures, columns)."""
    both = np.stack([values, others], axis=3)
    return hierarchical_bootstrap(
        both, lambda drawn: statistic(drawn[..., 0, :]) - statistic(drawn[..., 1, :]), seed=seed, draws=draws
    )


def _reliance(drawn: np.ndarray) -> float:
    """Mean over models of the absolute `shortcut_effect`, from (..., pictures, 2); of all models at once, for speed."""
    shown, without = drawn[..., 0], drawn[..., 1]
    effects = (shown - without).mean(axis=-1) / np.maximum(without.std(axis=-1), np.finfo(np.float64).tiny)
    return float(np.abs(effects).mean())


def _worst_group(drawn: np.ndarray) -> float:
    """Mean over models of the worst group's accuracy, from (..., pictures, 2): right, and the group, alike for all."""
    group = drawn.reshape(-1, *drawn.shape[-2:])[0, :, 1].astype(int)
    counts = np.bincount(group)
    there = counts > 0
    right = drawn[..., 0] @ np.eye(len(counts))[group]
    return float((right[..., there] / counts[there]).min(axis=-1).mean())


def _stacked(models: Models, method: str, subject: str, taken: Taken) -> np.ndarray:
    """(bases, seeds, pictures, columns), by the subject's seeds; a base model stands for every seed."""
    return np.stack(
        [
            np.stack(
                [
                    taken(of[method], 0 if method == BASE else of[method].seeds.index(seed))
                    for seed in sorted(of[subject].seeds)
                ]
            )
            for of in models.values()
        ]
    )


def tables(path: Path) -> list[tuple[list[str], list[list[str]]]]:
    """Columns and rows of a page's tables, from the rows of a study (`<name>.csv`) and, where it lies beside, the
    comparisons (`<name>_compared.csv`).

    Raises:
        InputError: no such file, or a column is missing.
    """
    found = _read(path, ["method", "base", "seed", *COLUMNS])
    methods: Sequence[str] = in_order(found["method"].unique())
    known = [name for name in COLUMNS if found[name].notna().any()]
    columns = ["method", "models", *(HEADINGS[name] for name in known)]
    rows = []
    for method in methods:
        own = found[found["method"] == method]
        spread = [f"{own[name].mean():.3f} ± {own[name].std() if len(own) > 1 else 0:.3f}" for name in known]
        rows.append([METHODS[method].label, str(len(own)), *spread])
    made = [(columns, rows)]
    beside = path.with_name(f"{path.stem}_compared.csv")
    if beside.exists():
        columns = ["method", "measure", "minus", "difference", "95 % interval", "p", "p, Holm"]
        made.append((columns, [_comparison(row) for row in _read(beside, COMPARED).to_dict("records")]))
    return made


def _comparison(row: Mapping[Hashable, Any]) -> list[str]:
    return [
        METHODS[row["method"]].label,
        HEADINGS[row["measure"]],
        METHODS[row["against"]].label,
        f"{row['difference']:+.3f}",
        f"{row['low']:+.3f} to {row['high']:+.3f}",
        f"{row['p']:.4f}",
        f"{row['p_holm']:.4f}",
    ]


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        found = pd.read_csv(path, dtype={"base": str, "seed": str})
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable; write it with `python -m benchmarks.study`") from error
    if missing := [name for name in columns if name not in found]:
        raise InputError(f"{path}: no column '{missing[0]}'; write it anew with `python -m benchmarks.study`")
    return found
