"""A study of several base models: rows, intervals, tables (an extension; the paper has one base a data set).

A row is one model. Methods are compared by pairs of models of the same base and seed; intervals come from resampling
bases, seeds within them and test pictures (`lvlmva_core.statistics.hierarchical_bootstrap`).
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlmva_core.comparison import Runs, shortcut_pairs
from lvlmva_core.errors import InputError
from lvlmva_core.methods import METHODS, in_order
from lvlmva_core.outputs import BASE, SUBJECT, Outputs
from lvlmva_core.samples import groups_known
from lvlmva_core.statistics import hierarchical_bootstrap, holm, two_sided_p

if TYPE_CHECKING:
    import pandas as pd


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
# measure -> whether more is better; the first that the data allow is the primary one
MEASURES = {"reliance": False, "wga": True, "accuracy": True}
LEVEL = 0.05  # below it, after Holm, a difference is called one

COMPARED = ["method", "measure", "against", "value", "value_against", "difference", "low", "high", "p", "p_holm"]
RRR_LAMBDA = "rrr_lambda"  # a further column where methods ran with several λ; "" of a method without one

Models = Mapping[str, Mapping[str, Outputs]]  # base -> method -> outputs


def rows_of(values: Mapping[str, Runs]) -> "pd.DataFrame":
    """One row a model: method, base, seed ("" of a base itself), and COLUMNS that are known.

    Args:
        values: base -> what `lvlmva_core.comparison.measure` took of its methods.
    """
    import pandas as pd

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
    table = table.assign(order=table["method"].map(order)).sort_values(
        ["order", "base", "seed"], kind="stable", key=lambda column: column.map(_in_number_order)
    )
    return table.drop(columns="order").reset_index(drop=True)


def _in_number_order(value: Any) -> Any:
    return int(value or -1) if isinstance(value, str) else value


def compared(models: Models, samples: "pd.DataFrame", *, draws: int = 2000, seed: int = 0) -> "pd.DataFrame":
    """Each method of CONTROLS against base, λ = 0 and its best control, by each of MEASURES that the data allow.
    Families of their own: the paper's correction against the methods of the literature that are there, and each method
    against BOUND if it is.

    Only bases count that have every method which is compared, with the same seeds. The best control is the one of the
    best mean (reliance: the smallest absolute), chosen anew for each measure on these very models, which favours the
    control.

    Returns:
        Columns COMPARED: value, value_against: means over models; difference with low, high (95 %); p, two-sided;
        p_holm, within the comparisons of one family by one measure. Reliances are absolute values.
    """
    import pandas as pd

    measures = measures_of(samples)
    table = []
    for subject, controls in CONTROLS.items():
        literature = [name for name, method in METHODS.items() if method.kind == "retrained" and subject == SUBJECT]
        known = (BASE, LAMBDA_ZERO, *controls, *literature, BOUND)
        wanted = [name for name in known if any(name in of for of in models.values())]
        complete = complete_bases(models, [subject, *wanted])
        if not complete:
            continue
        for measure, (taken, statistic) in measures.items():
            stacked = {name: _stacked(complete, name, subject, taken) for name in (subject, *wanted)}
            means = {name: statistic(values) for name, values in stacked.items()}
            better = max if MEASURES[measure] else min
            there = [name for name in controls if name in wanted]
            best = [better(there, key=lambda name: means[name])] if there else []
            plain = [name for name in (BASE, LAMBDA_ZERO) if name in wanted]
            for others in (
                [*plain, *best],
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


def compared_over(by_lambda: Mapping[str, Models], samples: "pd.DataFrame", *, draws: int = 2000) -> "pd.DataFrame":
    """`compared` at each of several λ, a family being all of them: every further λ that is tried costs its share.

    Args:
        by_lambda: λ -> models, in which what has no λ is the same.

    Returns:
        Columns COMPARED with RRR_LAMBDA after "method". A method without λ is not compared with BOUND, which has one.
    """
    import pandas as pd

    found = []
    for place, (rrr_lambda, models) in enumerate(by_lambda.items()):
        table = compared(models, samples, draws=draws)
        without = table["method"].map(lambda name: METHODS[name].correction == "counterexamples").astype(bool)
        table.insert(1, RRR_LAMBDA, np.where(without, "", rrr_lambda))
        found.append(table[~without | ((table["against"] != BOUND) & (place == 0))])
    both = pd.concat(found, ignore_index=True)
    family = both["against"].map(lambda name: name if name == BOUND else METHODS[name].kind == "retrained").astype(str)
    for _, rows in both.groupby(["method", "measure", family], sort=False):
        adjusted = holm({str(place): p for place, p in rows["p"].items()})
        both.loc[rows.index, "p_holm"] = [adjusted[str(place)] for place in rows.index]
    return both


def complete_bases(models: Models, wanted: Sequence[str]) -> Models:
    """The bases that have all of these methods, each with the seeds of the first base's."""
    there = {base: of for base, of in models.items() if set(wanted) <= of.keys()}
    seeds = next(({*of[wanted[0]].seeds} for of in there.values()), set())
    return {
        base: of for base, of in there.items() if all({*of[name].seeds} == seeds for name in wanted if name != BASE)
    }


Taken = Callable[[Outputs, int], np.ndarray]  # outputs, place of the seed -> (pictures, columns)


def measures_of(samples: "pd.DataFrame") -> dict[str, tuple[Taken, Callable[[np.ndarray], float]]]:
    """Those of MEASURES that the data allow -> what it takes of a model, and how it comes from (bases, seeds, pictures,
    columns). Reliance needs test pictures with and without the spurious feature, WGA that it is known which have it.
    """
    rows = samples[samples["split"].str.startswith("test")].reset_index(drop=True)
    test = np.flatnonzero(rows["split"] == "test")
    pairs = shortcut_pairs(samples)
    known = groups_known(samples)
    labels = rows["label"].to_numpy()[test]
    group = labels * 2 + (rows["spurious"].to_numpy(dtype=bool)[test] if known else 0)

    def contrasts(of: Outputs, place: int) -> np.ndarray:
        assert pairs is not None
        return pairs.contrasts(of.logits[:, place])

    def right(of: Outputs, place: int) -> np.ndarray:
        return np.stack([of.predictions()[test, place] == labels, group], axis=1).astype(np.float64)

    every: dict[str, tuple[Taken, Callable[[np.ndarray], float]]] = {
        "reliance": (contrasts, _reliance),
        "wga": (right, _worst_group),
        "accuracy": (right, lambda drawn: float(drawn[..., 0].mean())),
    }
    allowed = {"reliance": pairs is not None, "wga": known}
    return {name: of for name, of in every.items() if allowed.get(name, True)}


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
    known = [name for name in COLUMNS if found[name].notna().any()]
    columns = ["method", "models", *(HEADINGS[name] for name in known)]
    rows = []
    for (method, rrr_lambda), own in _by_method(found):
        spread = [f"{own[name].mean():.3f} ± {own[name].std() if len(own) > 1 else 0:.3f}" for name in known]
        rows.append([label_of(method, rrr_lambda), str(len(own)), *spread])
    made = [(columns, rows)]
    beside = path.with_name(f"{path.stem}_compared.csv")
    if beside.exists():
        columns = ["method", "measure", "minus", "difference", "95 % interval", "p", "p, Holm"]
        made.append((columns, [_comparison(row) for row in read_compared(beside).to_dict("records")]))
    return made


def label_of(method: str, rrr_lambda: str = "") -> str:
    """A method as tables name it, with its λ where it ran with several."""
    label = METHODS[method].label
    return f"{label}, λ = {rrr_lambda}" if rrr_lambda else label


def read_compared(path: Path) -> "pd.DataFrame":
    """The comparisons of a study. Raises InputError where there is no such file, or a column is missing."""
    return _read(path, COMPARED)


def conclusions(comparisons: "pd.DataFrame", primary: str) -> list[str]:
    """What the comparisons by one measure say, a sentence each: better, worse, or not better (LEVEL, after Holm)."""
    return [_conclusion(row) for row in comparisons[comparisons["measure"] == primary].to_dict("records")]


def _conclusion(row: Mapping[Hashable, Any]) -> str:
    gain = row["difference"] if MEASURES[row["measure"]] else -row["difference"]
    said = "not better than" if row["p_holm"] >= LEVEL else "better than" if gain > 0 else "worse than"
    return (
        f"{label_of(row['method'], row.get(RRR_LAMBDA, ''))} is {said} '{METHODS[row['against']].label}' by "
        f"{HEADINGS[row['measure']]}: {row['value']:.3f} and {row['value_against']:.3f}, difference "
        f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), p {row['p_holm']:.4f} after Holm"
    )


def _by_method(found: "pd.DataFrame") -> "Iterator[tuple[tuple[str, str], pd.DataFrame]]":
    """The rows of each method and λ, in order."""
    for method in in_order(found["method"].unique()):
        own = found[found["method"] == method]
        values = list(own[RRR_LAMBDA].unique()) if RRR_LAMBDA in found else [""]
        for rrr_lambda in sorted(values, key=lambda value: float(value or -1)):
            yield (method, rrr_lambda), own[own[RRR_LAMBDA] == rrr_lambda] if RRR_LAMBDA in found else own


def _comparison(row: Mapping[Hashable, Any]) -> list[str]:
    return [
        label_of(row["method"], row.get(RRR_LAMBDA, "")),
        HEADINGS[row["measure"]],
        METHODS[row["against"]].label,
        f"{row['difference']:+.3f}",
        f"{row['low']:+.3f} to {row['high']:+.3f}",
        f"{row['p']:.4f}",
        f"{row['p_holm']:.4f}",
    ]


def _read(path: Path, columns: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    try:
        found = pd.read_csv(path, dtype={"base": str, "seed": str, RRR_LAMBDA: str}, keep_default_na=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable; write it with `lvlmva experiments`") from error
    if missing := [name for name in columns if name not in found]:
        raise InputError(f"{path}: no column '{missing[0]}'; write it anew with `lvlmva experiments`")
    return found.fillna({RRR_LAMBDA: ""}) if RRR_LAMBDA in found else found
