"""What the review page shows: alignment samples with their regions, verdicts and pictures, from the stages' files."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from lvlmva_core.arrays import read_array
from lvlmva_core.errors import InputError
from lvlmva_core.render import attribution_limit, enlarge, render_image, render_overlay, to_png
from lvlmva_core.report.gallery import Gallery, read_gallery
from lvlmva_core.samples import read_images

Kind = Literal["image", "attribution", "overlay"]
WATCHED = ("images", "segments", "attributions")  # whose change makes the page show what is not there any more


@dataclass(frozen=True)
class Content(Gallery):
    """The alignment set, and the files that it was read from.

    known: name -> path, of dvc.yaml. state: of the files, when they were read.
    """

    known: dict[str, Path] = field(default_factory=dict)
    state: dict[str, tuple[int, ...]] = field(default_factory=dict)

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
    names = ("images", "samples", "segments", "attributions", "alignment_set", "reliance", "critiques", "verdicts")
    gallery = read_gallery(*(known[name] for name in names))
    return Content(**vars(gallery), known=known, state=state)


def _signed(attribution: np.ndarray) -> np.ndarray:
    """Blue below, white at, red above zero: uint8 (H, W, 3)."""
    from matplotlib import colormaps

    scale = attribution_limit(attribution)
    level = np.clip(attribution / (2 * scale) + 0.5, 0, 1)
    return np.asarray(np.rint(colormaps["RdBu_r"](level)[..., :3] * 255), dtype=np.uint8)


def _state(known: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in WATCHED:
        try:
            stat = (known[name] / "zarr.json").stat()
        except FileNotFoundError:
            continue  # a stage is at work: differs from when it was there
        found[name] = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
    return found
