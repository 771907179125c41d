"""Stage compare: every method's metrics, their spread and tests, and the verdicts against the true masks."""

from pathlib import Path
from typing import Any

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, read_json, read_table, write_json
from lvlmva_core.comparison import (
    entropy_summary,
    flat,
    left_out,
    measure,
    over_seeds,
    reliance_intervals,
    tests,
    verdict_summary,
)
from lvlmva_core.lvlm.records import VerdictRow, read_rows
from lvlmva_core.outputs import BASE, read_outputs
from lvlmva_core.samples import groups_known, read_object_masks, read_samples, read_spurious_masks, rows_of_ids


def compare(
    params: Path,
    samples: Path,
    spurious_masks: Path,
    entropies: Path,
    rank_metrics: Path,
    attributions: Path,
    segments: Path,
    verdicts: Path,
    evaluations: Path,
    evaluation: Path,
    groups: Path,
    runs: Path,
) -> None:
    """Compare the methods that params name; what others left in the folder is passed over."""
    loaded = load_params(params)
    table = read_samples(samples)
    methods = [BASE, *loaded.methods, *loaded.retrained]
    outputs = {method: read_outputs(evaluations / f"{method}.safetensors") for method in methods}
    explained = outputs[BASE].map_ids
    masks = read_spurious_masks(spurious_masks, rows_of_ids(table, explained))[0] if explained else None
    values, per_group = measure(outputs, table, masks)
    judged = list(read_attrs(segments)["ids"])
    rows = rows_of_ids(table, judged)
    content: dict[str, Any] = {
        "methods": over_seeds(values),
        "tests": tests(values),
        "reliance": reliance_intervals(outputs),
        "alignment_set": read_json(rank_metrics)["rank"],
        "verdicts": verdict_summary(
            read_rows(verdicts, VerdictRow),
            judged,
            read_array(segments, "segments"),
            read_array(attributions, "attributions"),
            *read_spurious_masks(spurious_masks, rows),
            read_object_masks(spurious_masks, rows),
            overlap=loaded.compare.overlap,
        ),
    }
    if groups_known(table):
        of_training = read_table(entropies, ["id", "entropy", "label"])
        spurious = table["spurious"].to_numpy()[rows_of_ids(table, of_training["id"].tolist())]
        entropy, label = of_training["entropy"].to_numpy(), of_training["label"].to_numpy()
        content["entropy"] = entropy_summary(entropy, spurious, label)
    with_masks = content["verdicts"]["samples_with_true_mask"] > 0
    if absent := left_out(groups=groups_known(table), test_masks=bool(explained), alignment_masks=with_masks):
        content["left_out"] = absent
    write_json(evaluation, content)
    groups.parent.mkdir(parents=True, exist_ok=True)
    per_group.to_csv(groups, index=False)
    flat(values).to_csv(runs, index=False)


if __name__ == "__main__":
    run(compare)
