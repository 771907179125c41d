"""What reviewers changed, and which of their verdicts do not count, sample by sample."""

from collections.abc import Sequence

from lvlmva_core.masks import why_stale
from lvlmva_core.overrides import Override, Tie
from lvlmva_core.render import PALETTE
from lvlmva_core.report.gallery import Gallery
from lvlmva_core.report.page import Table


def change_tables(gallery: Gallery, resolved: Sequence[Override], ties: Sequence[Tie]) -> list[Table]:
    """Tables of verdicts that are not the critic's, of ties and of stale verdicts; those without rows are left out.

    Args:
        gallery: with its masks (`gallery.with_masks`). resolved, ties: what all reviewers said, by `overrides.resolve`.
    """
    place_of = {sample: n for n, sample in enumerate(gallery.ids)}
    digest_of = dict(zip(gallery.ids, gallery.digests, strict=True))

    def counts(each: Override | Tie) -> bool:
        n = place_of.get(each.sample)
        return n is not None and gallery.digests[n] == each.segmentation and each.region in gallery.shares[n]

    changed, stale = [], []
    for each in resolved:
        if not counts(each):
            why = why_stale(each, digest_of)
            stale.append([each.sample, _region(each.region), each.verdict, ", ".join(each.reviewers), why])
            continue
        n = place_of[each.sample]
        before = gallery.by_critic(n).get(each.region)
        if before != each.verdict:
            changed.append([each.sample, gallery.class_names[n], _region(each.region), before or "none", each.verdict])
            changed[-1] += [", ".join(each.reviewers), _masked(gallery, n)]
    tied = [
        [each.sample, _region(each.region), ", ".join(each.yes), ", ".join(each.no)] for each in ties if counts(each)
    ]
    tables = [
        Table(
            "What reviewers changed",
            "Verdicts that are not the critic's, and by them the share of the sample's positive attribution that is "
            "masked: with the critic's verdicts alone, and now.",
            ["sample", "class", "region", "critic", "now", "by", "masked"],
            changed,
        ),
        Table(
            "Ties",
            "As many reviewers said yes as no: the critic's verdict stands.",
            ["sample", "region", "yes by", "no by"],
            tied,
        ),
        Table(
            "Verdicts that do not count any more",
            "They are of regions that are not there now, as after a new training: review these samples again.",
            ["sample", "region", "verdict", "by", "why"],
            stale,
        ),
    ]
    return [table for table in tables if table.rows]


def _region(region: int) -> str:
    return f"{region + 1}, {PALETTE[region].name}" if region < len(PALETTE) else str(region + 1)


def _masked(gallery: Gallery, n: int) -> str:
    said = gallery.by_critic(n)
    before = gallery.share_of(n, {region: float(verdict == "no") for region, verdict in said.items()})
    masked = None if gallery.masked is None else gallery.masked[n]
    now = "left out" if masked is None else f"{gallery.share_of(n, masked):.0%}"
    return f"{f'{before:.0%}' if said else 'left out'} → {now}"
