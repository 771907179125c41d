"""What the review page shows: alignment samples with their regions, verdicts and pictures, from the stages' files."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lvlmva_core.arrays import read_array, read_attrs, read_table
from lvlmva_core.errors import InputError
from lvlmva_core.independence import typical_size
from lvlmva_core.lvlm.offline import is_stand_in
from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow, read_rows
from lvlmva_core.regions import attribution_shares, segmentation_digest
from lvlmva_core.render import PALETTE, attribution_limit, enlarge, render_image, render_overlay, to_png
from lvlmva_core.samples import read_class_names, read_images, read_samples, rows_of_ids

Kind = Literal["image", "attribution", "overlay"]
WATCHED = ("images", "segments", "attributions")  # whose change makes the page show what is not there any more


@dataclass(frozen=True)
class Content:
    """The alignment set as the stages left it.

    ids: N samples. rows: int (N,), of images.zarr. class_names: of each sample. label_maps: uint8 (N, H, W).
    digests: of these. shares: of each sample, region -> share of the positive attribution. reliance: float (N, J), or
    None where the stage `exchange` did not run. state: of the files, when they were read.
    """

    known: dict[str, Path]
    ids: list[str]
    rows: np.ndarray
    class_names: list[str]
    entropies: list[float]
    label_maps: np.ndarray
    digests: list[str]
    shares: list[dict[int, float]]
    reliance: np.ndarray | None
    critiques: dict[str, CritiqueRow]
    verdicts: dict[str, VerdictRow]
    state: dict[str, tuple[int, ...]]

    @cached_property
    def page(self) -> dict[str, Any]:
        """All that the page knows at once; JSON-able."""
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

    def critique(self, n: int) -> str:
        """What the critic wrote of a sample, or why it wrote nothing."""
        row = self.critiques.get(self.ids[n])
        if row is None:
            return "No critic was asked about this sample."
        if row.critique is not None:
            return row.critique
        return row.failure or "No critic was asked: the prediction does not depend on any region."

    def with_words(self, words: str) -> list[int]:
        """Places of the samples whose critique, id or class holds all of the words, in any case."""
        wanted = words.casefold().split()
        texts = (
            f"{sample} {name} {self.critique(n)}".casefold()
            for n, (sample, name) in enumerate(zip(self.ids, self.class_names, strict=True))
        )
        return [n for n, text in enumerate(texts) if all(word in text for word in wanted)]

    def picture(self, n: int, kind: Kind) -> bytes:
        """A PNG of a sample. Raises InputError where the files have changed since, ValueError for another kind."""
        self.check_unchanged()
        if kind == "attribution":
            return to_png(enlarge(_signed(read_array(self.known["attributions"], "attributions", np.array([n]))[0])))
        pixels = read_images(self.known["images"], self.rows[[n]])[0]
        if kind == "image":
            return to_png(render_image(pixels))
        if kind == "overlay":
            return to_png(render_overlay(pixels, self.label_maps[n], style="grey" if len(pixels) == 1 else "colour"))
        raise ValueError(f"picture '{kind}' is none of image, attribution, overlay")

    def check_unchanged(self) -> None:
        """Raises InputError where stages ran since the files were read."""
        if _state(self.known) != self.state:
            raise InputError("the pipeline's files have changed since this page was served; start `lvlmva review` anew")

    @cached_property
    def places(self) -> dict[tuple[str, str], int]:
        """(Sample, digest of its segmentation) -> place."""
        return {pair: n for n, pair in enumerate(zip(self.ids, self.digests, strict=True))}

    def _sample(self, n: int) -> dict[str, Any]:
        row = self.verdicts.get(self.ids[n])
        said = {} if row is None else row.by_region()
        certainty = {} if row is None else {each.region: each.certainty for each in row.verdicts}
        areas = np.bincount(self.label_maps[n].ravel(), minlength=256) / self.label_maps[n].size
        return {
            "id": self.ids[n],
            "class": self.class_names[n],
            "entropy": self.entropies[n],
            "failure": None if row is None else row.failure,
            "regions": [
                {
                    "region": region,
                    "colour": PALETTE[region].name,
                    "rgb": PALETTE[region].rgb,
                    "share": self.shares[n].get(region, 0.0),
                    "area": float(areas[region]),
                    "reliance": None if self.reliance is None else _finite(self.reliance[n, region]),
                    "verdict": said.get(region),
                    "asked": region in certainty,
                    "certainty": certainty.get(region),
                }
                for region in self.shares[n]
            ],
        }


def read_content(known: dict[str, Path]) -> Content:
    """Read what there is. Verdicts, critiques and reliance may be lacking.

    Args:
        known: name -> path, of dvc.yaml.

    Raises:
        InputError: there is no segmentation, or files are of different ones.
    """
    for name, stage in (("segments", "segment"), ("attributions", "attribute"), ("images", "prepare")):
        if not known[name].exists():
            raise InputError(f"{known[name]}: not made yet; run `dvc repro {stage}`")
    state = _state(known)
    attrs = read_attrs(known["segments"])
    ids = [str(sample) for sample in attrs["ids"]]
    table = read_samples(known["samples"])
    rows = rows_of_ids(table, ids)
    names = read_class_names(known["images"])
    label_maps = read_array(known["segments"], "segments")
    digests = [segmentation_digest(label_map) for label_map in label_maps]
    if read_attrs(known["attributions"])["ids"] != ids:
        raise InputError(f"{known['attributions']}: other samples than the segmentations; run `dvc repro segment`")
    maps = read_array(known["attributions"], "attributions")
    entropies = read_table(known["alignment_set"], ["id", "entropy"]).set_index("id")["entropy"]
    reliance = None
    if known["reliance"].exists() and read_attrs(known["reliance"])["ids"] == ids:
        typical = typical_size(read_array(known["reliance"], "logit")) or 1.0
        reliance = read_array(known["reliance"], "other").astype(np.float64) / typical
    content = Content(
        known,
        ids,
        rows,
        [names[int(label)] for label in table["label"].to_numpy()[rows]],
        [float(entropies[sample]) for sample in ids],
        label_maps,
        digests,
        [attribution_shares(effect, label_map) for effect, label_map in zip(maps, label_maps, strict=True)],
        reliance,
        _rows(known["critiques"], CritiqueRow),
        _rows(known["verdicts"], VerdictRow),
        state,
    )
    for what, stage, found in (("critiques", "critique", content.critiques), ("verdicts", "judge", content.verdicts)):
        for sample, digest in zip(ids, digests, strict=True):
            row = found.get(sample)
            if row is not None and row.segmentation != digest:
                raise InputError(f"{known[what]}: '{sample}' is of another segmentation; run `dvc repro {stage}`")
    return content


def _rows(path: Path, kind: Any) -> dict[str, Any]:
    return {row.sample: row for row in read_rows(path, kind)} if path.exists() else {}


def _signed(attribution: np.ndarray) -> np.ndarray:
    """Blue below, white at, red above zero: uint8 (H, W, 3)."""
    from matplotlib import colormaps

    scale = attribution_limit(attribution)
    level = np.clip(attribution / (2 * scale) + 0.5, 0, 1)
    return np.asarray(np.rint(colormaps["RdBu_r"](level)[..., :3] * 255), dtype=np.uint8)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _state(known: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in WATCHED:
        try:
            stat = (known[name] / "zarr.json").stat()
        except FileNotFoundError:
            continue  # a stage is at work: differs from when it was there
        found[name] = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
    return found
