"""Every method against the others: metrics of each model, spread over seeds, tests, and the verdicts' quality.

Pandas, scipy and files alone: no model is run, torch is not imported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from lvlmva_core.errors import InputError
from lvlmva_core.metrics import (
    METRICS,
    Measured,
    contrast,
    entropy_auroc,
    group_accuracies,
    reliance_on_rejected,
    verdict_quality,
)
from lvlmva_core.outputs import BASE, SUBJECT, Outputs
from lvlmva_core.regions import ON_OBJECT, Overlap, overlaps
from lvlmva_core.samples import TWINS, groups_known
from lvlmva_core.statistics import bootstrap_interval, mean_and_std, wilcoxon_test

if TYPE_CHECKING:
    import pandas as pd

    from lvlmva_core.lvlm.records import VerdictRow


GROUP_COLUMNS = ["label", "spurious", "count", "accuracy", "method", "seed"]

Runs = dict[str, dict[str, dict[str, float]]]  # method -> seed -> "split.metric" -> value


def measure(
    outputs: Mapping[str, Outputs], samples: "pd.DataFrame", masks: np.ndarray | None
) -> "tuple[Runs, pd.DataFrame]":
    """Take every metric of every model.

    Args:
        outputs: method -> outputs on all test splits. samples: the sample table.
        masks: bool (n, H, W), true spurious masks of the explained samples (`Outputs.map_ids`), or None.

    Returns:
        Values of each method, seed and "split.metric"; and the accuracy of each group of the split `test`: columns
        label, spurious, count, accuracy, method, seed; without a row where groups are not known.

    Raises:
        InputError: a method was measured on other samples than the table has.
    """
    import pandas as pd

    rows = samples[samples["split"].str.startswith("test")]
    shares = samples.loc[samples["split"] == "train", "group"].value_counts(normalize=True)
    known = groups_known(samples)
    pairs = shortcut_pairs(samples)
    values: Runs = {}
    groups = []
    for method, found in outputs.items():
        if found.ids != rows["id"].tolist():
            raise InputError(f"method '{method}' was evaluated on other samples; run `dvc repro`")
        predictions = found.predictions()
        values[method] = {}
        for place, seed in enumerate(found.seeds):
            maps = found.maps[:, place] if len(found.map_ids) else None
            of_model: dict[str, float] = {}
            for split, chosen in _places(rows).items():
                table = rows.iloc[chosen]
                measured = Measured(
                    predictions[chosen, place],
                    table["label"].to_numpy(),
                    table["spurious"].to_numpy(dtype=bool) if known else None,
                    table["group"].to_numpy(),
                    shares,
                    maps,
                    masks,
                    found.exchanged[:, place] if found.exchange_ids else None,
                    found.logits[chosen, place],
                    None if pairs is None else pairs.contrasts(found.logits[:, place]),
                )
                of_model |= _values(measured, split)
                if measured.spurious is not None and split == "test":
                    per_group = group_accuracies(measured.predictions, measured.labels, measured.spurious)
                    groups.append(per_group.assign(method=method, seed=seed))
                if split == "test":
                    corrupted = {name: predicted[:, place] for name, predicted in found.corrupted.items()}
                    of_model |= _robustness(corrupted, measured.labels, of_model["test.accuracy"])
            values[method][seed] = of_model
    return values, pd.concat(groups, ignore_index=True) if groups else pd.DataFrame(columns=GROUP_COLUMNS)


@dataclass(frozen=True)
class Pairs:
    """Test pictures that are there with and without the spurious feature, by their places among all test samples.

    shown, without: int64 (n,). classes: (n,), the class that the feature in the picture speaks for.
    """

    shown: np.ndarray
    without: np.ndarray
    classes: np.ndarray

    def contrasts(self, logits: np.ndarray) -> np.ndarray:
        """Of one model, from its logits (N, K): float64 (n, 2) as `lvlmva_core.metrics.shortcut_effect` takes them."""
        return np.stack([contrast(logits[places], self.classes) for places in (self.shown, self.without)], axis=1)


def shortcut_pairs(samples: "pd.DataFrame") -> Pairs | None:
    """Which test pictures are there with and without the spurious feature; None where none are.

    Either `test` has its `test_twins`, and the feature speaks for the class that has the largest share of it in
    training; or pictures are there with their own class's feature (`test_agreeing`) and without any (`test_plain`).
    Pictures belong together by their source.
    """
    rows = samples[samples["split"].str.startswith("test")].reset_index(drop=True)
    splits = set(rows["split"]) if groups_known(samples) else set()
    if TWINS in splits:
        table = rows[rows["split"].isin(["test", TWINS])]
        training = samples[samples["split"] == "train"]
        label, with_feature = training["label"].to_numpy(), training["spurious"].to_numpy(dtype=bool)
        shares = np.bincount(label, weights=with_feature) / np.maximum(np.bincount(label), 1)
        speaks_for = np.full(len(rows), int(shares.argmax()))
    elif {"test_agreeing", "test_plain"} <= splits:
        table = rows[rows["split"].isin(["test_agreeing", "test_plain"])]
        speaks_for = rows["label"].to_numpy()
    else:
        return None
    has = table["spurious"].to_numpy(dtype=bool)
    shown, without = (table[chosen].reset_index().set_index("source")["index"] for chosen in (has, ~has))
    both = shown.index.intersection(without.index)
    at = shown[both].to_numpy()
    return Pairs(at, without[both].to_numpy(), speaks_for[at])


def reliance_intervals(outputs: Mapping[str, Outputs], seed: int = 0) -> dict[str, Any]:
    """Each method's reliance on what was rejected (an extension): the mean of its seeds' models, and the 95 % bootstrap
    interval over pictures, which says nothing of the spread over seeds; {} where nothing was rejected."""

    def mean_of_models(rows: np.ndarray) -> float:
        return float(np.mean([reliance_on_rejected(rows[:, place]) for place in range(rows.shape[1])]))

    intervals = {}
    for method, found in outputs.items():
        if found.exchange_ids:
            low, high = bootstrap_interval(found.exchanged, mean_of_models, seed=seed)
            value = mean_of_models(found.exchanged)
            intervals[method] = {"value": value, "low": low, "high": high, "pictures": len(found.exchange_ids)}
    return intervals


def intervals_of(found: Outputs, place: int, samples: "pd.DataFrame", seed: int = 0) -> dict[str, tuple[float, ...]]:
    """One model's accuracy, AGA, WGA and reliance on the split `test`: metric -> (value, low, high), the 95 % bootstrap
    interval over pictures. AGA and WGA only where some pictures have the spurious feature and some do not.

    Args:
        place: of the model among `found.seeds`. samples: the sample table.
    """
    rows = samples[samples["split"].str.startswith("test")]
    test = (rows["split"] == "test").to_numpy()
    labels = rows["label"].to_numpy()[test]
    right = found.predictions()[test, place] == labels
    measures: dict[str, tuple[np.ndarray, Any]] = {"accuracy": (right, lambda drawn: float(drawn.mean()))}
    if groups_known(samples) and rows["spurious"][test].nunique() == 2:
        spurious = rows["spurious"].to_numpy()[test].astype(bool)
        columns = np.stack([right, labels, spurious], axis=1)
        for name, of_groups in (("AGA", np.mean), ("WGA", np.min)):
            measures[name] = (columns, lambda drawn, of_groups=of_groups: float(of_groups(_group_means(drawn))))
    if found.exchange_ids:
        measures["reliance"] = (found.exchanged[:, place], reliance_on_rejected)
    return {n: (of(taken), *bootstrap_interval(taken, of, seed=seed)) for n, (taken, of) in measures.items()}


def _group_means(rows: np.ndarray) -> np.ndarray:
    """Accuracy of each group that occurs; rows (n, 3) of right, label, spurious."""
    group = rows[:, 1].astype(int) * 2 + rows[:, 2].astype(int)
    counts = np.bincount(group)
    sums: np.ndarray = np.bincount(group, weights=rows[:, 0])
    return sums[counts > 0] / counts[counts > 0]


def _places(rows: "pd.DataFrame") -> dict[str, np.ndarray]:
    split = rows["split"].to_numpy()
    return {name: np.flatnonzero(split == name) for name in sorted(set(split))}


def _values(measured: Measured, split: str) -> dict[str, float]:
    taken = {
        f"{split}.{name}": metric.measure(measured)
        for name, metric in METRICS.items()
        if split == "test" or metric.every_split
    }
    return {name: value for name, value in taken.items() if value is not None}


def _robustness(corrupted: Mapping[str, np.ndarray], labels: np.ndarray, accuracy: float) -> dict[str, float]:
    """Accuracy under each corruption, the mean over severities, and how much that is below `accuracy`."""
    values: dict[str, float] = {}
    for name, predicted in corrupted.items():
        under = float(np.mean([(predicted[:, severity] == labels).mean() for severity in range(predicted.shape[1])]))
        values |= {f"robustness.{name}": under, f"robustness.{name}_drop": accuracy - under}
    return values


def over_seeds(values: Runs) -> dict[str, Any]:
    """One number a metric for the one base model; mean and std over seeds for the others."""
    summary: dict[str, Any] = {}
    for method, by_seed in values.items():
        runs = list(by_seed.values())
        nested: dict[str, Any] = {}
        for name in runs[0]:
            split, metric = name.split(".")
            taken = [run[name] for run in runs]
            nested.setdefault(split, {})[metric] = taken[0] if method == BASE else mean_and_std(taken)
        if method != BASE:
            nested["seeds"] = len(runs)
        summary[method] = nested
    return summary


def tests(values: Runs) -> dict[str, Any]:
    """Wilcoxon tests over seeds: every method against the base model, SUBJECT against every other, by paired seeds."""
    found: dict[str, Any] = {}
    for method, by_seed in values.items():
        others = [BASE] if method != SUBJECT else [other for other in values if other != method]
        for other in others if method != BASE else []:
            paired = sorted(seed for seed in by_seed if other == BASE or seed in values[other])
            for name in (name for name, metric in METRICS.items() if metric.tested):
                key = f"test.{name}"
                if key not in values[BASE][""] or not paired:
                    continue
                against = [values[other]["" if other == BASE else seed][key] for seed in paired]
                differences = [by_seed[seed][key] - value for seed, value in zip(paired, against, strict=True)]
                tested = {**wilcoxon_test(differences), "difference": mean_and_std(differences)}
                found.setdefault(method, {}).setdefault(name, {})[other] = tested
    return found


def pictures_counted(outputs: Mapping[str, Outputs], samples: "pd.DataFrame") -> dict[str, int]:
    """Metric -> on how many test pictures it is taken, where these are not all of the split `test`."""
    pairs = shortcut_pairs(samples)
    return {"mu_align": len(outputs[BASE].map_ids), "reliance_true": 0 if pairs is None else len(pairs.classes)}


def edge_notes(content: Mapping[str, Any]) -> list[str]:
    """A line for each choice that lies at the end of what was tried, from the content of metrics/evaluate.json."""
    return [
        f"{method}: {key} = {of['chosen'][key]} is the {end} that was tried; a wider grid may choose another"
        for method, of in content.get("chosen", {}).items()
        for key, end in of["at_edge"].items()
    ]


def left_out(*, groups: bool, alignment_masks: bool, pictures: Mapping[str, int]) -> dict[str, str]:
    """What is not measured -> why: nothing is left out without a word.

    Args:
        groups: whether every sample's spurious feature is known. alignment_masks: whether the true mask is known in the
            alignment set. pictures: of `pictures_counted`.
    """
    found = {}
    if not groups:
        why = "the table of samples does not say which pictures hold the spurious feature"
        found = dict.fromkeys(["AGA, WGA and the accuracy of each group", "AUROC of the entropy"], why)
    if not pictures["mu_align"]:
        found["μ_align"] = "no true mask of a test picture is known"
    if not pictures["reliance_true"]:
        found["reliance, true"] = "no test picture is there with and without the spurious feature"
    if not alignment_masks:
        found["precision and recall of the verdicts"] = "no true mask of the alignment set is known"
    return found


def entropy_summary(entropies: np.ndarray, spurious: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """How well the base model's entropy on the training split marks the spurious feature, overall and per class."""
    per_class = {str(k): entropy_auroc(entropies[label == k], spurious[label == k]) for k in np.unique(label)}
    return {"auroc": entropy_auroc(entropies, spurious), "auroc_per_class": per_class}


def flat(values: Runs) -> "pd.DataFrame":
    """One row a model: method, seed, and a column for each "split.metric"."""
    import pandas as pd

    return pd.DataFrame(
        [{"method": m, "seed": s, **of_model} for m, by_seed in values.items() for s, of_model in by_seed.items()]
    )


def verdict_summary(
    records: "Sequence[VerdictRow]",
    ids: Sequence[str],
    segments: np.ndarray,
    attributions: np.ndarray,
    spurious_masks: np.ndarray,
    known: np.ndarray,
    object_masks: np.ndarray | None,
    *,
    overlap: Overlap,
) -> dict[str, Any]:
    """Who judged, how many samples failed, and `verdicts_against_truth`.

    Args:
        records: rows of verdicts.jsonl. ids: the N samples of the arrays. overlap: the rule of record.
    """
    of_sample = {record.sample: record for record in records}
    given = [None if of_sample[sample].failure is not None else of_sample[sample].by_region() for sample in ids]
    return {
        "critic": sorted({name for record in records for name in record.critics()}),
        "judge": sorted({record.judge for record in records}),
        "critic_settings": next((record.settings for record in records if record.settings), {}),
        "samples": len(records),
        "samples_failed": sum(verdict is None for verdict in given),
        "samples_with_true_mask": int(np.sum(known)),
        **({"overlap_of_record": overlap} if known.any() else {}),
        **answers_against_truth(records, ids, segments, attributions, spurious_masks, known, overlap=overlap),
        **verdicts_against_truth(given, segments, attributions, spurious_masks, known, object_masks),
    }


def answers_against_truth(
    records: "Sequence[VerdictRow]",
    ids: Sequence[str],
    segments: np.ndarray,
    attributions: np.ndarray,
    spurious_masks: np.ndarray,
    known: np.ndarray,
    *,
    overlap: Overlap,
) -> dict[str, Any]:
    """How several answers err, whether they err together (`votes.error_summary`), and how what came of them errs.

    Args: as for `verdict_summary`.

    Returns:
        {"answers": ...}; {} where there are none.
    """
    from lvlmva_core.lvlm.answers import columns_of, rejections
    from lvlmva_core.lvlm.votes import error_summary

    places = {sample: place for place, sample in enumerate(ids) if known[place]}
    several = [record for record in records if record.all_answers() and record.sample in places]
    if not several:
        return {}
    rejected, regions = rejections(several)
    truths = {
        sample: overlaps(segments[at], spurious_masks[at], attributions[at], overlap) for sample, at in places.items()
    }
    truth = np.array([truths[sample][region] for sample, region in regions], dtype=bool)
    cascade = any(record.further for record in several)
    rule = several[0].votes
    summary = error_summary(rejected, truth, list(columns_of(several)), None if cascade else rule)
    right = [
        (verdict == "no") == truths[record.sample][region]
        for record in several
        for region, verdict in record.by_region().items()
    ]
    voted = {
        "votes": rule,
        "regions_voted": len(right),
        "accuracy_of_verdicts": float(np.mean(right)) if right else None,
    }
    return {"answers": {"overlap": overlap, **voted, **summary}}


def verdicts_against_truth(
    verdicts: Sequence[Mapping[int, str] | None],
    segments: np.ndarray,
    attributions: np.ndarray,
    spurious_masks: np.ndarray,
    known: np.ndarray,
    object_masks: np.ndarray | None,
) -> dict[str, Any]:
    """Precision and recall of verdicts under each overlap rule, over samples whose true mask is known (if any is).

    Args:
        verdicts: of each sample, region -> "yes" | "no"; None where they failed.
        segments: uint8 (N, H, W). attributions: float (N, H, W). spurious_masks: bool (N, H, W). known: bool (N,).
        object_masks: bool (N, H, W), then it is also counted which regions off the object were rejected; or None.
    """
    summary: dict[str, Any] = {}
    for rule in get_args(Overlap) if known.any() else ():
        judged, truth = [], []
        for row, given in enumerate(verdicts):
            if given is not None and known[row]:
                overlapping = overlaps(segments[row], spurious_masks[row], attributions[row], rule)
                judged += [verdict == "no" for verdict in given.values()]
                truth += [overlapping[region] for region in given]
        summary[f"overlap_{rule}"] = verdict_quality(judged, truth)
    if object_masks is not None:  # the other question that a critic may have been asked: what lies on the object?
        judged, truth = [], []
        for row, given in enumerate(verdicts):
            if given is not None:
                on_object = overlaps(segments[row], object_masks[row], attributions[row], ON_OBJECT)
                judged += [verdict == "no" for verdict in given.values()]
                truth += [not on_object[region] for region in given]
        summary["off_object"] = verdict_quality(judged, truth)
    return summary
