"""Stage mask: verdicts, segments and overrides to correction masks."""

from pathlib import Path

import typer

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, write_arrays, write_json
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.records import VerdictRow, read_rows
from lvlmva_core.masks import assemble_masks, why_stale
from lvlmva_core.overrides import read_reviews, resolve
from lvlmva_core.regions import segmentation_digest

SAID = 20  # ties and stale overrides that are named; metrics count them all


def mask(params: Path, segments: Path, verdicts: Path, overrides: Path, masks: Path, mask_metrics: Path) -> None:
    """Mask the regions that were judged spurious or irrelevant."""
    config = load_params(params).mask
    label_maps, attrs = read_array(segments, "segments"), read_attrs(segments)
    ids = list(attrs["ids"])
    digests = {sample: segmentation_digest(label_map) for sample, label_map in zip(ids, label_maps, strict=True)}
    given, failures, critics, judges = {}, {}, set(), set()
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
    no_region = {s: status for s, status in zip(ids, attrs["status"], strict=True) if status != "ok" and s not in given}
    reviews = read_reviews(overrides)
    resolved, all_ties = resolve(reviews.events)
    ties = [tie for tie in all_ties if digests.get(tie.sample) == tie.segmentation]
    result = assemble_masks(ids, label_maps, given, {**no_region, **failures}, resolved)
    tied = [
        f"tie: {overrides}: region {tie.region} of '{tie.sample}': yes by {', '.join(tie.yes)}, no by "
        f"{', '.join(tie.no)}; the critic's verdict stands"
        for tie in ties
    ]
    stale = [
        f"stale override: {overrides}: region {each.region} of '{each.sample}' by {', '.join(each.reviewers)}: "
        f"{why_stale(each, digests)}; it is left out, review it again"
        for each in result.stale
    ]
    for line in [*reviews.notes, *tied[:SAID], *stale[:SAID]]:
        typer.echo(line, err=True)
    if len(result.left_out) > config.max_failed_share * len(ids):
        raise InputError(
            f"{len(result.left_out)} of {len(ids)} samples have no verdicts, more than mask.max_failed_share = "
            f"{config.max_failed_share}; first: {next(iter(sorted(result.left_out.items())))}"
        )
    write_arrays(masks, {"masks": result.masks}, {"ids": result.ids, "left_out": result.left_out})
    summary = {
        "critic": sorted(critics),
        "judge": sorted(judges),
        "samples": len(result.ids),
        "samples_left_out": len(result.left_out),
        "samples_masked": int(result.masks.any(axis=(1, 2)).sum()),
        "mean_masked_area": float(result.masks.mean()),
        "verdicts_overridden": result.overridden,
        "reviewers": sorted({event.reviewer for event in reviews.events}),
        "stale_overrides": len(result.stale),
        "ties": len(ties),
    }
    write_json(mask_metrics, {"mask": summary})


if __name__ == "__main__":
    run(mask)
