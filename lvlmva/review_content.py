"""What the review page shows: alignment samples with their regions, verdicts and pictures, from the stages' files."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lvlmva_core.arrays import read_array, read_attrs, read_json
from lvlmva_core.errors import InputError
from lvlmva_core.pattern_names import read_names, with_names
from lvlmva_core.patterns import Pattern
from lvlmva_core.render import attribution_limit, enlarge, render_image, to_png
from lvlmva_core.report import tables
from lvlmva_core.report.captions import CAPTIONS
from lvlmva_core.report.gallery import Gallery, read_gallery
from lvlmva_core.report.headline import headline_of
from lvlmva_core.report.page import Page, drawn_of
from lvlmva_core.report.patterns_shown import cards, pattern_data
from lvlmva_core.report.thumbnails import signed_picture
from lvlmva_core.samples import read_images

Kind = Literal["image", "before", "after"]
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
        if kind == "image":
            return to_png(render_image(read_images(self.known["images"], self.rows[[n]])[0]))
        shown = self.attributions[n]
        if kind == "after":
            if self.ids[n] not in self.explained:
                raise ValueError(f"'{self.ids[n]}' was not explained after alignment (explain.gallery_samples)")
            row = np.array([self.explained[self.ids[n]]])
            shown = read_array(self.known["explanations"], "attributions", row)[0]
        elif kind != "before":
            raise ValueError(f"picture '{kind}' is none of image, before, after")
        return to_png(enlarge(signed_picture(shown, attribution_limit(self.attributions[n]))))

    def check_unchanged(self) -> None:
        """Raises InputError where stages ran since the files were read."""
        if _state(self.known) != self.state:
            raise InputError("the pipeline's files have changed since this page was served; start `lvlmva review` anew")

    @cached_property
    def explained(self) -> dict[str, int]:
        """Sample -> row of what the aligned model looks at, for those that were explained."""
        path = self.known["explanations"]
        return {str(sample): row for row, sample in enumerate(read_attrs(path)["ids"])} if path.exists() else {}

    @cached_property
    def found(self) -> tuple[list[Pattern], int, list[dict[str, Any]]]:
        """Patterns of what the critic rejected, the number of regions in none of them, and the patterns' cards."""
        self.check_unchanged()
        images = read_images(self.known["images"], self.rows)
        patterns, rare = self.patterns(images)
        return patterns, rare, cards(self, patterns, images)

    def named_patterns(self) -> list[Pattern]:
        """The patterns by the names that experts gave them."""
        return with_names(self.found[0], self, read_names(self.known["overrides"]))

    def data(self) -> dict[str, Any]:
        """What the page's scripts know at once; JSON-able."""
        samples = [{**sample, "after": sample["id"] in self.explained} for sample in self.page["samples"]]
        return {**self.page, "samples": samples, "patterns": pattern_data(self, self.named_patterns())}

    def report(self) -> Page:
        """What stands on the page beside its samples: what was measured so far."""
        about = read_attrs(self.known["images"])
        _, rare, shown = self.found
        named = [{**card, "name": pattern.name} for card, pattern in zip(shown, self.named_patterns(), strict=True)]
        page = Page(f"LVLM-VA on {about.get('dataset', 'these pictures')}: review", patterns=named, rare=rare)
        if not self.known["evaluation"].exists():
            return page
        measured = read_json(self.known["evaluation"])
        who = tables.judged_by(measured)
        drawn = [(caption, self.known["reports"] / f"{name}.png") for name, caption in CAPTIONS.items()]
        return replace(
            page,
            warning=tables.warning_of(measured["verdicts"]),
            headline=headline_of(measured, about["spurious_feature"]),
            facts=[f"{who[0].upper()}{who[1:]}."],
            tables=tables.page_tables(measured, self.classes),
            figures=[drawn_of(caption, path) for caption, path in drawn if path.exists()],
        )

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


def _state(known: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in WATCHED:
        try:
            stat = (known[name] / "zarr.json").stat()
        except FileNotFoundError:
            continue  # a stage is at work: differs from when it was there
        found[name] = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
    return found
