"""The audit as one self-contained HTML page of bounded size; everything that goes in is escaped."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from lvlmva_core.audit import COLUMNS, CUES, ROWS, Cue, RegionGroup, Verdict, shares_by_place
from lvlmva_core.errors import InputError
from lvlmva_core.render import enlarge, render_region

MOST_GROUPS = 8  # that are shown, those that predictions depend on most
MOST_CLASSES = 24
MOST_CUES = 12  # rows of the table
SAID_SHARE = 0.01  # of a class's samples; what is rarer in a group is not said
STEPS = ((4, 224, 85), (4, 160, 75), (3, 128, 65), (2, 96, 55), (1, 64, 45))  # examples, pixels a side, JPEG quality


@dataclass(frozen=True)
class AuditContent:
    """What the page shows of N samples.

    facts: name -> value, of the model and the pictures. accuracies: float (K,), NaN for a class without pictures.
    attention: float (K, H, W), of `mean_attribution`. means: uint8 (K, C, H, W), mean picture of each class's samples.
    images: uint8 (N, C, H, W). segments: uint8 (N, H, W). rare: regions in groups that are not shown.
    notes: what was left out or guessed.
    """

    title: str
    verdict: Verdict
    facts: Mapping[str, str]
    class_names: Sequence[str]
    accuracies: Sequence[float]
    counts: Sequence[int]
    attention: np.ndarray
    means: np.ndarray
    images: np.ndarray
    segments: np.ndarray
    groups: Sequence[RegionGroup]
    rare: int
    cues: Sequence[Cue]
    notes: Sequence[str]


def render_audit(content: AuditContent, at_most_bytes: int) -> str:
    """Render the page with as many, as large and as good pictures as fit; the page needs no network and no script.

    Raises:
        InputError: even the smallest pictures do not fit.
    """
    size = 0
    for examples, side, quality in STEPS:
        page = _render(content, examples, side, quality)
        size = len(page.encode())
        if size <= at_most_bytes:
            return page
    raise InputError(
        f"the page has {size / 1e6:.2f} MB with the smallest pictures, more than {at_most_bytes / 1e6:g} MB; raise "
        "--at-most-mb"
    )


def picture_url(picture: np.ndarray, side: int, quality: int) -> str:
    """A data URL of uint8 (H, W, 3) with at most `side` pixels a side: PNG or JPEG, whichever is smaller."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.BOX)
    found = {}
    for kind, options in (("png", {"compress_level": 6}), ("jpeg", {"quality": quality})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        found[kind] = buffer.getvalue()
    kind = min(found, key=lambda each: len(found[each]))
    return f"data:image/{kind};base64,{base64.b64encode(found[kind]).decode()}"


def heat_picture(attention: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """A map over the grey mean picture, uint8 (H, W, 3): white to dark, so that it reads without colour vision.

    Args:
        attention: float (H, W) >= 0. mean: uint8 (C, H, W).
    """
    from matplotlib import colormaps

    level = attention / max(float(np.quantile(attention, 0.995)), 1e-12)
    colours = colormaps["inferno"](np.clip(level, 0, 1))[..., :3] * 255
    grey = mean.astype(np.float64).mean(0)[..., None]
    opacity = 0.25 + 0.75 * np.sqrt(np.clip(level, 0, 1))[..., None]
    return np.asarray(np.rint((1 - opacity) * grey + opacity * colours), dtype=np.uint8)


def _render(content: AuditContent, examples: int, side: int, quality: int) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    environment.filters["two_places"] = lambda value: f"{value:z.2f}"  # without -0.00

    def url(picture: np.ndarray) -> str:
        return picture_url(picture, side, quality)

    with_samples = [k for k in range(len(content.class_names)) if np.isfinite(content.attention[k]).all()]
    return environment.get_template("audit.html").render(
        title=content.title,
        verdict=content.verdict,
        facts=content.facts,
        groups=[_group(content, group, examples, url) for group in content.groups[:MOST_GROUPS]],
        n_groups=len(content.groups),
        rare=content.rare,
        classes=[_class(content, k, url) for k in with_samples[:MOST_CLASSES]],
        more_classes=max(0, len(with_samples) - MOST_CLASSES),
        cues=[_cue(content, cue) for cue in content.cues[:MOST_CUES]],
        n_cues=len(content.cues),
        notes=content.notes,
    )


def _group(
    content: AuditContent, group: RegionGroup, examples: int, url: Callable[[np.ndarray], str]
) -> dict[str, Any]:
    order = sorted(
        ((share, k) for k, share in enumerate(group.shares) if share >= SAID_SHARE),
        key=lambda pair: (-pair[0], pair[1]),
    )
    said = [f"{share:.0%} of the samples of class {content.class_names[k]}" for share, k in order[:4]]
    if len(order) > 4:
        said.append(f"and some of {len(order) - 4} more")
    # spread over the members, so that no single kind of them is shown alone
    places = np.unique(np.linspace(0, len(group.members) - 1, min(examples, len(group.members))).round().astype(int))
    return {
        "of": group,
        "seen_in": ", ".join(said),
        "bar": round(100 * float(np.clip(group.reliance, 0, 1))),
        "pictures": [
            url(render_region(content.images[n], content.segments[n] == region))
            for n, region in (group.members[place] for place in places)
        ],
    }


def _class(content: AuditContent, k: int, url: Callable[[np.ndarray], str]) -> dict[str, Any]:
    shares = shares_by_place(content.attention[k])
    row, column = divmod(int(shares.argmax()), 3)
    place = "centre" if (row, column) == (1, 1) else f"{ROWS[row]} {COLUMNS[column]}"
    accuracy = content.accuracies[k]
    return {
        "name": content.class_names[k],
        "picture": url(enlarge(heat_picture(content.attention[k], content.means[k]))),
        "most": f"most at the {place}: {shares.max():.0%} of it in that ninth",
        "right": f"{accuracy:.0%} of {content.counts[k]} right",
    }


def _cue(content: AuditContent, cue: Cue) -> dict[str, Any]:
    more = cue.auc >= 0.5
    return {
        "name": cue.cue,
        "label": content.class_names[cue.label],
        "auc": f"{cue.auc:.2f}",
        "p": "< 0.001" if cue.p < 0.001 else f"{cue.p:.3f}",
        "high": cue.high,
        "way": CUES[cue.cue] if more else f"the other way from: {CUES[cue.cue]}",
    }
