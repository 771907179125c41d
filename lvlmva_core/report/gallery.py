"""The alignment set as a page shows it: each sample's regions, verdicts, masks and what the critic wrote of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lvlmva_core.arrays import read_array, read_attrs, read_table
from lvlmva_core.errors import InputError
from lvlmva_core.independence import typical_size
from lvlmva_core.lvlm.offline import is_stand_in
from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow, read_rows
from lvlmva_core.overrides import Override
from lvlmva_core.patterns import Pattern, find_patterns, words_of_regions
from lvlmva_core.regions import Overlap, attribution_shares, overlaps, segmentation_digest
from lvlmva_core.render import PALETTE
from lvlmva_core.samples import (
    groups_known,
    read_class_names,
    read_penalised,
    read_samples,
    read_spurious_masks,
    rows_of_ids,
)


@dataclass(frozen=True)
class Gallery:
    """N alignment samples as the stages left them.

    ids: of the samples. rows: int (N,), of images.zarr. labels: int (N,). classes: their K names. class_names: of each
    sample. groups: of each sample, or None where nobody knows. entropies: nats. attributions: float32 (N, H, W).
    label_maps: uint8 (N, H, W). digests: of these. shares: of each sample, region -> share of the positive attribution.
    reliance: float (N, J), as shares of the typical logit, or None where the stage `exchange` did not run.
    critiques, verdicts: sample -> row; some may be lacking.
    masked: of each sample, region -> how much of it is masked, 0..1; None for a sample that is left out, or for all
    where no masks are there. left_out: sample -> why. given: (sample, region) -> what reviewers decided.
    truth: of each sample, region -> whether it overlaps the true spurious feature; None where that is not known.
    """

    ids: list[str]
    rows: np.ndarray
    labels: np.ndarray
    classes: list[str]
    class_names: list[str]
    groups: list[str] | None
    entropies: list[float]
    attributions: np.ndarray
    label_maps: np.ndarray
    digests: list[str]
    shares: list[dict[int, float]]
    reliance: np.ndarray | None
    critiques: Mapping[str, CritiqueRow]
    verdicts: Mapping[str, VerdictRow]
    masked: list[dict[int, float] | None] | None = None
    left_out: Mapping[str, str] | None = None
    given: Mapping[tuple[str, int], Override] | None = None
    truth: list[dict[int, bool] | None] | None = None

    @cached_property
    def page(self) -> dict[str, Any]:
        """All that the page knows at once, without pictures and critiques; JSON-able."""
        judged = [self.verdicts[sample] for sample in self.ids if sample in self.verdicts]
        critics = sorted({name for row in judged for name in row.critics()})
        judges = sorted({row.judge for row in judged})
        return {
            "critics": [{"name": name, "stand_in": is_stand_in(name)} for name in critics],
            "judges": [{"name": name, "stand_in": is_stand_in(name)} for name in judges],
            "height": self.label_maps.shape[1],
            "width": self.label_maps.shape[2],
            "samples": [self._sample(n) for n in range(len(self.ids))],
        }

    def named(self) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
        """Attributions and label maps with the samples that their rows are, as a panel takes them."""
        of_all = {"ids": self.ids}
        return {"before": (of_all, self.attributions), "segments": (of_all, self.label_maps)}

    def critique(self, n: int) -> str:
        """What the critic wrote of a sample, or why it wrote nothing."""
        row = self.critiques.get(self.ids[n])
        if row is None:
            return "No critic was asked about this sample."
        if row.critique is not None:
            return row.critique
        return row.failure or "No critic was asked: the prediction does not depend on any region."

    def by_critic(self, n: int) -> dict[int, str]:
        """Region -> the critic's "yes" | "no"; none where that failed."""
        row = self.verdicts.get(self.ids[n])
        return {} if row is None else row.by_region()

    def rejected(self, n: int) -> list[int]:
        """Regions that are masked, wholly or by some votes; those that the critic rejected where no masks are there."""
        if self.masked is None:
            return [region for region, verdict in self.by_critic(n).items() if verdict == "no"]
        return [region for region, weight in (self.masked[n] or {}).items() if weight > 0]

    def share_of(self, n: int, weights: Mapping[int, float]) -> float:
        """Share of the positive attribution in regions, each by its weight 0..1."""
        return sum(self.shares[n].get(region, 0.0) * weight for region, weight in weights.items())

    def patterns(self, images: np.ndarray) -> tuple[list[Pattern], int]:
        """Rejected regions in groups (`lvlmva_core.patterns.find_patterns`). images: uint8 (N, C, H, W)."""
        texts = [
            words_of_regions(self.critique(n), {region: PALETTE[region].name for region in self.shares[n]})
            if self.rejected(n)
            else {}
            for n in range(len(self.ids))
        ]
        return find_patterns(
            self.label_maps,
            [self.rejected(n) for n in range(len(self.ids))],
            self.attributions,
            images,
            self.labels,
            texts,
            self.reliance,
            n_classes=len(self.classes),
        )

    def _sample(self, n: int) -> dict[str, Any]:
        sample = self.ids[n]
        row = self.verdicts.get(sample)
        said = self.by_critic(n)
        certainty = {} if row is None else {each.region: each.certainty for each in row.verdicts}
        areas = np.bincount(self.label_maps[n].ravel(), minlength=256) / self.label_maps[n].size
        masked = None if self.masked is None else self.masked[n]
        regions = []
        for region, share in self.shares[n].items():
            given = None if self.given is None else self.given.get((sample, region))
            regions.append(
                {
                    "region": region,
                    "colour": PALETTE[region].name,
                    "rgb": PALETTE[region].rgb,
                    "share": share,
                    "area": float(areas[region]),
                    "reliance": None if self.reliance is None else _finite(self.reliance[n, region]),
                    "verdict": said.get(region),
                    "asked": region in certainty,
                    "certainty": certainty.get(region),
                    "masked": None if masked is None else masked[region],
                    "given": None if given is None else {"verdict": given.verdict, "by": list(given.reviewers)},
                }
            )
        by_critic = {region: float(verdict == "no") for region, verdict in said.items()}
        return {
            "id": sample,
            "class": self.class_names[n],
            "group": None if self.groups is None else self.groups[n],
            "entropy": self.entropies[n],
            "failure": None if row is None else row.failure,
            "left_out": (self.left_out or {}).get(sample),
            "masked_by_critic": self.share_of(n, by_critic) if said else None,
            "masked_share": None if masked is None else self.share_of(n, masked),
            "differs": self._differs(n),
            "regions": regions,
        }

    def _differs(self, n: int) -> bool | None:
        """Whether what is masked is not what overlaps the true feature; None where that is not known."""
        truth = None if self.truth is None else self.truth[n]
        if truth is None or (self.masked is not None and self.masked[n] is None):
            return None
        rejected = set(self.rejected(n))
        return any((region in rejected) != overlapping for region, overlapping in truth.items())


def read_gallery(
    images: Path,
    samples: Path,
    segments: Path,
    attributions: Path,
    entropies: Path,
    reliance: Path,
    critiques: Path,
    verdicts: Path,
) -> Gallery:
    """Read what the stages up to `judge` left. Verdicts, critiques and reliance may be lacking.

    Raises:
        InputError: files are of different segmentations, or cannot be read.
    """
    attrs = read_attrs(segments)
    ids = [str(sample) for sample in attrs["ids"]]
    table = read_samples(samples)
    rows = rows_of_ids(table, ids)
    names = read_class_names(images)
    labels = table["label"].to_numpy()[rows]
    label_maps = read_array(segments, "segments")
    digests = [segmentation_digest(label_map) for label_map in label_maps]
    if read_attrs(attributions)["ids"] != ids:
        raise InputError(f"{attributions}: other samples than the segmentations; run `dvc repro segment`")
    maps = read_array(attributions, "attributions")
    known = read_table(entropies, ["id", "entropy"]).set_index("id")["entropy"]
    falls = None
    if reliance.exists() and read_attrs(reliance)["ids"] == ids:
        typical = typical_size(read_array(reliance, "logit")) or 1.0
        falls = read_array(reliance, "other").astype(np.float64) / typical
    gallery = Gallery(
        ids=ids,
        rows=rows,
        labels=labels,
        classes=names,
        class_names=[names[int(label)] for label in labels],
        groups=table["group"].to_numpy()[rows].tolist() if groups_known(table) else None,
        entropies=[float(known[sample]) for sample in ids],
        attributions=maps,
        label_maps=label_maps,
        digests=digests,
        shares=[attribution_shares(effect, label_map) for effect, label_map in zip(maps, label_maps, strict=True)],
        reliance=falls,
        critiques=_rows(critiques, CritiqueRow),
        verdicts=_rows(verdicts, VerdictRow),
    )
    for path, stage, found in ((critiques, "critique", gallery.critiques), (verdicts, "judge", gallery.verdicts)):
        for sample, digest in zip(ids, digests, strict=True):
            row = found.get(sample)
            if row is not None and row.segmentation != digest:
                raise InputError(f"{path}: '{sample}' is of another segmentation; run `dvc repro {stage}`")
    return gallery


def with_masks(gallery: Gallery, masks: Path, resolved: Sequence[Override]) -> Gallery:
    """The gallery with what is masked, and what reviewers decided.

    Args:
        masks: as the stage `mask` wrote them.
        resolved: at most one a region; those of other segmentations do not count.

    Raises:
        InputError: the masks are of other regions.
    """
    masked = read_penalised(masks)
    row_of = {sample: row for row, sample in enumerate(masked[0])}
    found: list[dict[int, float] | None] = []
    for n, sample in enumerate(gallery.ids):
        if sample not in row_of:
            found.append(None)
            continue
        mask, label_map = masked[1][row_of[sample]], gallery.label_maps[n]
        present, first = np.unique(label_map, return_index=True)
        of_label = np.zeros(256, dtype=masked[1].dtype)
        of_label[present] = mask.ravel()[first]
        if not np.array_equal(of_label[label_map], mask):
            raise InputError(f"{masks}: the mask of '{sample}' is of another segmentation; run `dvc repro mask`")
        found.append({region: float(of_label[region]) for region in gallery.shares[n]})
    digest_of = dict(zip(gallery.ids, gallery.digests, strict=True))
    given = {(each.sample, each.region): each for each in resolved if digest_of.get(each.sample) == each.segmentation}
    return replace(gallery, masked=found, left_out=read_attrs(masks)["left_out"], given=given)


def with_truth(gallery: Gallery, spurious_masks: Path, rule: Overlap) -> Gallery:
    """The gallery with which regions overlap the true spurious feature, where its place is known."""
    truth, known = read_spurious_masks(spurious_masks, gallery.rows)
    if not known.any():
        return gallery
    found = [
        overlaps(gallery.label_maps[n], truth[n], gallery.attributions[n], rule) if known[n] else None
        for n in range(len(gallery.ids))
    ]
    return replace(gallery, truth=found)


def _rows(path: Path, kind: Any) -> dict[str, Any]:
    return {row.sample: row for row in read_rows(path, kind)} if path.exists() else {}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
