"""Stage compare: every method's metrics, their spread and tests, and the verdicts against the true masks."""

import sys
from pathlib import Path
from typing import Any

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core import comparison
from lvlmva_core.arrays import read_array, read_attrs, read_json, read_table, write_json
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
    method_metrics: Path,
    evaluations: Path,
    evaluation: Path,
    groups: Path,
    runs: Path,
) -> None:
    """Compare the methods that params name; what others left in the folder is passed over."""
    loaded, table = load_params(params), read_samples(samples)
    names = (BASE, *loaded.methods, *loaded.retrained)
    outputs = {method: read_outputs(evaluations / f"{method}.safetensors") for method in names}
    explained = rows_of_ids(table, outputs[BASE].map_ids)
    masks = read_spurious_masks(spurious_masks, explained)[0] if len(explained) else None
    values, per_group = comparison.measure(outputs, table, masks)
    rows = rows_of_ids(table, judged := list(read_attrs(segments)["ids"]))
    written = {name: read_json(method_metrics / f"{name}.json")[name] for name in names if name != BASE}
    content: dict[str, Any] = {
        "methods": comparison.over_seeds(values),
        "tests": comparison.tests(values),
        "reliance": comparison.reliance_intervals(outputs),
        "chosen": {name: of["selection"] for name, of in written.items() if "selection" in of},
        "alignment_set": read_json(rank_metrics)["rank"],
        "verdicts": comparison.verdict_summary(
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
        content["entropy"] = comparison.entropy_summary(
            of_training["entropy"].to_numpy(), spurious, of_training["label"].to_numpy()
        )
    with_masks = content["verdicts"]["samples_with_true_mask"] > 0
    content["pictures"] = comparison.pictures_counted(outputs, table)
    if absent := comparison.left_out(
        groups=groups_known(table), alignment_masks=with_masks, pictures=content["pictures"]
    ):
        content["left_out"] = absent
    write_json(evaluation, content)
    sys.stderr.write("".join(f"{note}\n" for note in comparison.edge_notes(content)))
    groups.parent.mkdir(parents=True, exist_ok=True)
    per_group.to_csv(groups, index=False)
    comparison.flat(values).to_csv(runs, index=False)


if __name__ == "__main__":
    run(compare)
