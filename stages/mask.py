"""Stage mask: verdicts, segments and overrides to correction masks."""

from pathlib import Path

import typer

from lvlmva.entry import run
from lvlmva.params import load_params
from lvlmva_core.arrays import read_array, read_attrs, write_arrays, write_json
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.records import VerdictRow, read_rows
from lvlmva_core.masks import assemble_masks, highest_attributions, notes_on
from lvlmva_core.overrides import read_reviews, resolve
from lvlmva_core.regions import segmentation_digest


def mask(
    params: Path,
    segments: Path,
    verdicts: Path,
    overrides: Path,
    masks: Path,
    mask_metrics: Path,
    attributions: Path,
) -> None:
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
    reviews = read_reviews(overrides)
    resolved, all_ties = resolve(reviews.events)
    ties = [tie for tie in all_ties if digests.get(tie.sample) == tie.segmentation]
    weighed, kept = (shares if config.weights == "votes" else None), None
    if config.attribution_kept is not None:
        kept = highest_attributions(attributions, ids, label_maps, config.attribution_kept)
    result = assemble_masks(ids, label_maps, given, {**no_region, **failures}, resolved, weighed, kept)
    for line in [*reviews.notes, *notes_on(overrides, ties, result.stale, digests)]:
        typer.echo(line, err=True)
    if len(result.left_out) > config.max_failed_share * len(ids):
        raise InputError(
            f"{len(result.left_out)} of {len(ids)} samples have no verdicts, more than mask.max_failed_share = "
            f"{config.max_failed_share}; first: {next(iter(sorted(result.left_out.items())))}"
        )
    arrays, attrs_of = {"masks": result.masks}, {"ids": result.ids, "left_out": result.left_out}
    if result.weights is not None:
        arrays, attrs_of = {**arrays, "weights": result.weights}, {**attrs_of, "weights": config.weights}
    write_arrays(masks, arrays, attrs_of)
    reviewers = sorted({event.reviewer for event in reviews.events})
    summary = {"critic": sorted(critics), "judge": sorted(judges), "reviewers": reviewers, "ties": len(ties)}
    summary |= result.summary()
    write_json(mask_metrics, {"mask": summary})


if __name__ == "__main__":
    run(mask)
