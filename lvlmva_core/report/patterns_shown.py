"""Patterns as cards: sentences, a heat map a class, examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lvlmva_core.patterns import Pattern
from lvlmva_core.render import enlarge, render_region
from lvlmva_core.report.gallery import Gallery
from lvlmva_core.report.thumbnails import LOSSLESS_UP_TO, data_url, heat_over

HEATS, EXAMPLES = 4, 6  # of a card
SIDE, QUALITY = 160, 65  # pixels, WebP
SAID_SHARE = 0.01  # of a class's samples; what is rarer is not said


def cards(gallery: Gallery, patterns: Sequence[Pattern], images: np.ndarray) -> list[dict[str, Any]]:
    """What the template shows of each pattern. images: uint8 (N, C, H, W), of the gallery; places are rows of it."""
    n_samples = len(gallery.ids)
    means = {k: images[gallery.labels == k].mean(0) for k in np.unique(gallery.labels).tolist()}
    shown = []
    for pattern in patterns:
        seen = sorted(
            ((share, k) for k, share in enumerate(pattern.shares) if np.isfinite(share) and share >= SAID_SHARE),
            key=lambda pair: (-pair[0], pair[1]),
        )
        brightest = max(float(pattern.heat.max()), 1e-12)
        heats = [
            {
                "url": data_url(_large(heat_over(pattern.heat[k], means[k], brightest)), SIDE, QUALITY),
                "caption": f"class {gallery.classes[k]}: {share:.0%}",
            }
            for share, k in seen[:HEATS]
        ]
        # spread over the members, so that no single kind of them is shown alone
        places = np.linspace(0, len(pattern.members) - 1, min(EXAMPLES, len(pattern.members))).round().astype(int)
        members = [pattern.members[place] for place in np.unique(places)]
        examples = [
            {
                "url": data_url(render_region(images[n], gallery.label_maps[n] == region), SIDE, QUALITY),
                "place": n,
                "region": region,
                "sample": gallery.ids[n],
                "class": gallery.class_names[n],
            }
            for n, region in members
        ]
        shown.append(
            {
                "name": pattern.name,
                "sentence": _sentence(gallery, pattern, seen),
                "details": _details(pattern, n_samples),
                "reliance": _reliance(pattern),
                "bar": 0.0 if pattern.reliance is None else round(min(max(pattern.reliance, 0.0), 1.0), 3),
                "samples": pattern.samples,
                "regions": len(pattern.members),
                "heats": heats,
                "examples": examples,
            }
        )
    return shown


def pattern_data(gallery: Gallery, patterns: Sequence[Pattern]) -> list[dict[str, Any]]:
    """What the scripts know of each pattern: its members, and the region that a name is tied to."""
    found = []
    for pattern in patterns:
        n, region = pattern.anchor
        anchor = {"sample": gallery.ids[n], "segmentation": gallery.digests[n], "region": region}
        found.append({"name": pattern.name, "members": [list(each) for each in pattern.members], "anchor": anchor})
    return found


def _sentence(gallery: Gallery, pattern: Pattern, seen: Sequence[tuple[float, int]]) -> str:
    named = seen if len(seen) <= 5 else seen[:4]
    said = [f"{share:.0%} of the samples of class {gallery.classes[k]}" for share, k in named]
    if len(named) < len(seen):
        said.append(f"some of {len(seen) - len(named)} other classes")
    where = pattern.name.partition(",")[0]
    place = "all over the picture" if where.startswith("spread") else f"at the {where}"
    return f"In {_listed(said)} the model looks {place}, at what was found irrelevant."


def _details(pattern: Pattern, n_samples: int) -> str:
    details = [
        f"{pattern.samples} of {n_samples} samples ({pattern.samples / n_samples:.0%})",
        f"it holds {pattern.attribution:.0%} of what speaks for the class in them",
    ]
    if pattern.words:
        details.append(f"said of it more than of others: {', '.join(pattern.words)}")
    return "; ".join(details) + "."


def _reliance(pattern: Pattern) -> str | None:
    if pattern.reliance is None or pattern.low is None or pattern.high is None:
        return None
    return f"{pattern.reliance:.2f} (95 % interval {pattern.low:.2f} to {pattern.high:.2f})"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "some samples"


def _large(picture: np.ndarray) -> np.ndarray:
    """Tiny pictures stay lossless as they are; a browser enlarges them pixel by pixel."""
    return picture if max(picture.shape[:2]) <= LOSSLESS_UP_TO else enlarge(picture, SIDE)
