"""Stage mask: verdicts, segments and overrides to correction masks."""

from pathlib import Path

import typer

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, write_arrays, write_json
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.records import VerdictRow, read_rows
from lvlmva_core.masks import assemble_masks, read_overrides, why_stale
from lvlmva_core.regions import segmentation_digest


def mask(params: Path, segments: Path, verdicts: Path, overrides: Path, masks: Path, mask_metrics: Path) -> None:
    """Mask the regions that were judged spurious or irrelevant."""
    config = load_params(params).mask
    label_maps, attrs = read_array(segments, "segments"), read_attrs(segments)
    ids = list(attrs["ids"])
    digests = {sample: segmentation_digest(label_map) for sample, label_map in zip(ids, label_maps, strict=True)}
    given, shares, failures, critics, judges = {}, {}, {}, set(), set()
    for row in read_rows(verdicts, VerdictRow):
        critics |= row.critics()
        judges.add(row.judge)
        if row.failure is not None:
            failures[row.sample] = row.failure
            continue
        if row.segmentation != digests.get(row.sample):
            raise InputError(
                f"{verdicts}: the verdicts of '{row.sample}' are of another segmentation; run `dvc repro critique`"
            )
        given[row.sample] = row.by_region()
        if config.weights == "votes":
            shares[row.sample] = row.shares_rejecting()
    no_region = {s: status for s, status in zip(ids, attrs["status"], strict=True) if status != "ok" and s not in given}
    weighed = shares if config.weights == "votes" else None
    result = assemble_masks(ids, label_maps, given, {**no_region, **failures}, read_overrides(overrides), weighed)
    for override in result.stale:
        typer.echo(
            f"stale override: {overrides}: region {override.region} of '{override.sample}': "
            f"{why_stale(override, digests)}; review it again or delete the row",
            err=True,
        )
    if len(result.left_out) > config.max_failed_share * len(ids):
        raise InputError(
            f"{len(result.left_out)} of {len(ids)} samples have no verdicts, more than mask.max_failed_share = "
            f"{config.max_failed_share}; first: {next(iter(sorted(result.left_out.items())))}"
        )
    arrays, attrs_of = {"masks": result.masks}, {"ids": result.ids, "left_out": result.left_out}
    if result.weights is not None:
        arrays, attrs_of = {**arrays, "weights": result.weights}, {**attrs_of, "weights": config.weights}
    write_arrays(masks, arrays, attrs_of)
    summary = {"critic": sorted(critics), "judge": sorted(judges), **result.summary()}
    write_json(mask_metrics, {"mask": summary})


if __name__ == "__main__":
    run(mask)
