"""A first look at a classifier without training and without a critic (an extension of LVLM-VA).

Where it looks, class by class; what its predictions depend on, in regions grouped by place and likeness; and what of a
whole picture goes with its label. Arrays in, plain records out: nothing here runs a model.
"""

import colorsys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from lvlmva_core.regions import regions_present
from lvlmva_core.statistics import bootstrap_interval

PLACE_WEIGHT, LIKENESS_WEIGHT, EXTENT_WEIGHT = 1.0, 0.5, 0.5  # of a picture's side, of black to white, of a side
JOINED_WITHIN = 0.35  # mean distance up to which groups are joined: a third of a picture's side
SPREAD_FROM = 0.3  # root mean square distance from the centre, in sides; a map that is even everywhere has 0.41
EDGE = 0.25  # sides: a centre that is nearer to the border lies at the edge
DEPENDS_FROM = 0.1  # reliance below which a prediction does not depend on a region, as in `independent_regions`
CUE_FROM = 0.7  # AUC, or 1 - AUC below 0.5, from which a cue is warned of
LEVEL = 0.05  # of Holm's test
LEAST_SHARE, LEAST_REGIONS = 0.02, 3  # of the samples: rarer groups are counted only
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
COLOURED_FROM = 0.3  # saturation times brightness from which a colour has a name
CUES: Mapping[str, str] = MappingProxyType(  # name -> what a high value is
    {
        "brightness": "brighter",
        "contrast": "more contrast",
        "sharpness": "sharper, less blur",
        "red against green": "redder, less green",
        "yellow against blue": "yellower, less blue",
        "file size": "a larger file",
        "width": "wider original",
        "height": "higher original",
        "aspect": "wider for its height",
    }
)


@dataclass(frozen=True)
class RegionGroup:
    """Regions of several samples that lie alike and look alike.

    members: (sample's row, region), rising. shares: float (K,), of each class's samples that hold one of them, 0..1;
    NaN for a class without samples.
    reliance: mean over samples of the fall of the true class's centred logit when the region is exchanged for other
    classes' content, as a share of that logit's typical size; low, high: 95 % bootstrap over samples; spread: standard
    deviation over samples; donor_spread: mean standard deviation over donors. own: the fall with the own class's
    content. flipped: share of donors of other classes with which another class is predicted.
    """

    name: str
    at_edge: bool
    members: list[tuple[int, int]]
    samples: int
    shares: list[float]
    reliance: float
    low: float
    high: float
    spread: float
    donor_spread: float
    own: float
    flipped: float

    @property
    def depended_on(self) -> bool:
        """Whether predictions certainly depend on it."""
        return self.low > DEPENDS_FROM

    @property
    def stands_out(self) -> bool:
        """Whether it is to be looked at first: depended on, at the edge, where an object seldom lies."""
        return self.depended_on and self.at_edge


@dataclass(frozen=True)
class Cue:
    """How well one number of the whole picture tells one class from the others.

    auc: 0..1, 0.5 = not at all, below it = low values go with the class. p: two-sided Mann-Whitney, after Holm over all
    cues and classes of an audit.
    """

    cue: str
    label: int
    auc: float
    p: float

    @property
    def high(self) -> bool:
        """Whether it is warned of."""
        return max(self.auc, 1 - self.auc) >= CUE_FROM and self.p < LEVEL


@dataclass(frozen=True)
class Verdict:
    """stands_out: whether there is anything to look at first. headline, and points under it, in words."""

    stands_out: bool
    headline: str
    points: list[str]


def mean_attribution(attributions: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Where the model looks: mean over a class's samples of each map's positive part, which adds up to 1.

    Args:
        attributions: float (N, H, W); maps without a positive value are left out. labels: int (N,).

    Returns:
        float64 (K, H, W); NaN for a class without such a map.
    """
    positive = np.maximum(attributions.astype(np.float64), 0)
    total = positive.sum(axis=(1, 2))
    means = np.full((n_classes, *attributions.shape[1:]), np.nan)
    for k in range(n_classes):
        chosen = (labels == k) & (total > 0)
        if chosen.any():
            means[k] = (positive[chosen] / total[chosen, None, None]).mean(0)
    return means


def shares_by_place(attention: np.ndarray) -> np.ndarray:
    """Share of a map (H, W) in each ninth of the picture, float64 (3, 3) that add up to 1; rows, then columns."""
    height, width = attention.shape
    thirds = [np.minimum(np.arange(side) * 3 // side, 2) for side in (height, width)]
    shares = np.zeros((3, 3))
    np.add.at(shares, (thirds[0][:, None], thirds[1][None, :]), attention)
    return np.asarray(shares / attention.sum())


def place_name(row: float, column: float) -> str:
    """The ninth of the picture that a point lies in, in words; row and column 0..1 from the top left."""
    names = ROWS[min(int(row * 3), 2)], COLUMNS[min(int(column * 3), 2)]
    return "centre" if names == ("middle", "centre") else " ".join(names)


def colour_name(colour: np.ndarray) -> str:
    """A mean colour in words: (1,) grey or (3,) RGB in 0..1."""
    rgb = np.broadcast_to(colour, 3)
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(each) for each in rgb))
    if saturation * value >= COLOURED_FROM:
        return HUES[round(hue * 6) % 6]
    return ("dark", "medium grey" if len(colour) == 1 else "medium bright", "bright")[min(int(rgb.mean() * 3), 2)]


def describe_regions(
    segments: np.ndarray, attributions: np.ndarray, images: np.ndarray
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Where each region lies and what it looks like, each pixel weighted by its positive attribution.

    Args:
        segments: uint8 (N, H, W), 255 = none. attributions: float (N, H, W). images: uint8 (N, C, H, W).

    Returns:
        (sample's row, region) of each region that is there; float64 (n, 3 + C): row and column of the centre in 0..1,
        extent (root mean square distance from the centre, in sides), mean colour in 0..1.
    """
    height, width = segments.shape[1:]
    rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    members, found = [], []
    for n, label_map in enumerate(segments):
        for region in regions_present(label_map):
            inside = label_map == region
            weight = np.where(inside, np.maximum(attributions[n].astype(np.float64), 0), 0)
            weight = weight / weight.sum() if weight.sum() > 0 else inside / inside.sum()
            down, across = weight.sum(1), weight.sum(0)
            row, column = float(down @ rows), float(across @ columns)
            extent = float(np.sqrt(down @ (rows - row) ** 2 + across @ (columns - column) ** 2))
            colour = (images[n] * weight).sum(axis=(1, 2)) / 255
            members.append((n, region))
            found.append([row, column, extent, *colour])
    return members, np.array(found).reshape(len(members), 3 + images.shape[1])


def group_regions(described: np.ndarray) -> np.ndarray:
    """Group regions of one audit by place and likeness: int64 (n,), groups numbered by first appearance.

    Average linkage (scikit-learn): a distance of 1 is a picture's side, or twice the way from black to white.

    Args:
        described: (n, 3 + C), of `describe_regions`.
    """
    from sklearn.cluster import AgglomerativeClustering

    if len(described) < 2:
        return np.zeros(len(described), dtype=np.int64)
    channels = described.shape[1] - 3
    features = np.concatenate(
        [
            described[:, :2] * PLACE_WEIGHT,
            described[:, 2:3] * EXTENT_WEIGHT,
            described[:, 3:] * (LIKENESS_WEIGHT / np.sqrt(channels)),
        ],
        axis=1,
    )
    found = AgglomerativeClustering(n_clusters=None, distance_threshold=JOINED_WITHIN, linkage="average").fit(features)
    _, first, numbers = np.unique(found.labels_, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[numbers], dtype=np.int64)


def region_groups(
    segments: np.ndarray,
    attributions: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    reliance: Mapping[str, np.ndarray],
    scale: float,
    *,
    n_classes: int,
    seed: int,
) -> tuple[list[RegionGroup], int]:
    """Regions pooled over samples and grouped; what stands out comes first, then by reliance.

    Args:
        segments, attributions, images: of `describe_regions`. labels: int (N,).
        reliance: "other", "own", "other_spread", "flipped", each (N, J), as in `lvlmva_core.exchange.Reliance`.
        scale: typical size of the true class's logit (`lvlmva_core.independence.typical_size`): falls are shares of it.

    Returns:
        The groups, and the number of regions in groups that are too rare to be shown.
    """
    members, described = describe_regions(segments, attributions, images)
    numbers = group_regions(described)
    per_class = np.bincount(labels, minlength=n_classes)
    least = max(LEAST_REGIONS, LEAST_SHARE * len(labels))
    groups, rare = [], 0
    for number in range(int(numbers.max(initial=-1)) + 1):
        chosen = np.flatnonzero(numbers == number)
        rows = np.array([members[place][0] for place in chosen])
        if len(chosen) < least:
            rare += len(chosen)
            continue
        regions = np.array([members[place][1] for place in chosen])
        holding, place_of = np.unique(rows, return_inverse=True)
        of = {name: array[rows, regions].astype(np.float64) for name, array in reliance.items()}
        # a sample with two regions in a group counts once, with their mean
        falls = np.bincount(place_of, of["other"] / scale) / np.bincount(place_of)
        low, high = bootstrap_interval(falls, _mean, seed=seed)
        row, column, extent = described[chosen, :3].mean(0)
        spread_out = extent >= SPREAD_FROM
        where = "spread over the picture" if spread_out else place_name(row, column)
        with np.errstate(invalid="ignore"):
            shares = np.bincount(labels[holding], minlength=n_classes) / per_class
        groups.append(
            RegionGroup(
                name=f"{where}, {colour_name(described[chosen, 3:].mean(0))}",
                at_edge=bool(not spread_out and min(row, column, 1 - row, 1 - column) < EDGE),
                members=[members[place] for place in chosen],
                samples=len(holding),
                shares=shares.tolist(),
                reliance=float(falls.mean()),
                low=low,
                high=high,
                spread=float(falls.std(ddof=1)) if len(falls) > 1 else 0.0,
                donor_spread=float(of["other_spread"].mean() / scale),
                own=float(of["own"].mean() / scale),
                flipped=float(of["flipped"].mean()),
            )
        )
    groups.sort(key=lambda group: (not group.stands_out, -group.reliance, group.members))
    return _named_apart(groups), rare


def pixel_cues(images: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of whole pictures, each float64 (N,), by their names in CUES; colour casts for pictures in colour only.

    brightness and contrast are mean and standard deviation of the grey value 0..255 (ITU-R BT.601), sharpness the
    variance of its Laplacian, on the prepared pixels; casts are differences of channels' means.

    Args:
        images: uint8 (N, C, H, W), C 1 or 3.
    """
    from scipy.ndimage import laplace

    pixels = images.astype(np.float64)
    weights = (1.0,) if images.shape[1] == 1 else (0.299, 0.587, 0.114)
    grey = np.einsum("nchw,c->nhw", pixels, np.array(weights))
    cues = {
        "brightness": grey.mean(axis=(1, 2)),
        "contrast": grey.std(axis=(1, 2)),
        "sharpness": np.array([laplace(picture, mode="nearest").var() for picture in grey]),
    }
    if images.shape[1] == 3:
        red, green, blue = pixels.mean(axis=(2, 3)).T
        cues |= {"red against green": red - green, "yellow against blue": (red + green) / 2 - blue}
    return cues


def measure_cues(cues: Mapping[str, np.ndarray], labels: np.ndarray, n_classes: int) -> tuple[list[Cue], list[str]]:
    """Hold each cue against each class; of two classes the second alone, since the first is its mirror.

    Args:
        cues: name -> float (N,); one with a value that is not finite, or with one value only, is left out.
        labels: int (N,).

    Returns:
        The cues, strongest first, and the names of those that were left out.
    """
    from scipy import stats

    found, left_out = [], []
    for name, values in cues.items():
        if not np.isfinite(values).all() or np.ptp(values) == 0:
            left_out.append(name)
            continue
        for k in range(n_classes) if n_classes > 2 else [1]:
            inside, outside = values[labels == k], values[labels != k]
            if len(inside) and len(outside):
                test = stats.mannwhitneyu(inside, outside, method="asymptotic")
                found.append((name, k, float(test.statistic) / (len(inside) * len(outside)), float(test.pvalue)))
    adjusted = holm([p for *_, p in found])
    tested = [Cue(name, k, auc, p) for (name, k, auc, _), p in zip(found, adjusted, strict=True)]
    return sorted(tested, key=lambda cue: (-abs(cue.auc - 0.5), cue.cue, cue.label)), left_out


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): each p times the number of those that are not smaller, never falling."""
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0) if len(p_values) else raised
    return [float(p) for p in adjusted]


def verdict_of(
    groups: Sequence[RegionGroup],
    cues: Sequence[Cue],
    class_names: Sequence[str],
    accuracy: float,
    commonest: float,
    diffuse: str = "",
) -> Verdict:
    """What stands out and what does not.

    A group stands out where predictions depend on it and it lies at the edge, where the thing that a class is about
    seldom does; in the middle the numbers cannot tell right from wrong. A cue stands out by its AUC and p.

    Args:
        accuracy: of the model on the pictures, 0..1. commonest: share of the commonest class, 0..1. diffuse: what
            `lvlmva_core.diffuse.diffuse_warning` says of the maps.
    """
    points = [diffuse] if diffuse else []
    edge = [group for group in groups if group.stands_out]
    inner = [group for group in groups if group.depended_on and not group.at_edge]
    high = [cue for cue in cues if cue.high]
    if accuracy <= commonest:
        points.append(
            f"The model is right on {accuracy:.0%} of the pictures, no more than always naming the commonest class "
            f"({commonest:.0%}): check the order of the classes and the normalisation before anything else here."
        )
    if edge:
        points.append(
            f"Predictions depend on {_counted(len(edge), 'group')} of regions at the edge of the pictures, where the "
            f"object seldom lies: {_listed([f'{g.name} (reliance {g.reliance:.2f})' for g in edge])}."
        )
    else:
        points.append("No group of regions at the edge of the pictures was found that predictions depend on.")
    if inner:
        names = _listed([f"{group.name} (reliance {group.reliance:.2f})" for group in inner])
        points.append(f"Away from the edge they depend on {names}: look below whether that is the object itself.")
    elif not edge:
        points.append("No single region decides either: none changes the logit by a tenth of its typical size.")
    if high:
        told = [f"{cue.cue} (class {class_names[cue.label]}: AUC {cue.auc:.2f})" for cue in high]
        points.append(
            f"Global cues go with the labels: {_listed(told)}. A model can use them wherever it looks; this does not "
            "say that it does."
        )
    elif cues:
        points.append(f"No global cue goes with the labels (strongest: {cues[0].cue}, AUC {cues[0].auc:.2f}).")
    else:
        points.append("No global cue could be measured.")
    stands_out = bool(edge or high or diffuse or accuracy <= commonest)
    said = [
        *["the model hardly fits these pictures"] * (accuracy <= commonest),
        *["predictions depend on the edge of the pictures"] * bool(edge),
        *["global cues go with the labels"] * bool(high),
        *["attribution is diffuse"] * bool(diffuse),
    ]
    headline = f"Look closer: {' and '.join(said)}." if stands_out else "Nothing stands out."
    return Verdict(stands_out, headline, points)


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _counted(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def _listed(words: Sequence[str], at_most: int = 4) -> str:
    more = f", and {len(words) - at_most} more" if len(words) > at_most else ""
    return ", ".join(words[:at_most]) + more


def _named_apart(groups: Sequence[RegionGroup]) -> list[RegionGroup]:
    """Groups of one name are numbered."""
    seen: Counter[str] = Counter()
    named = []
    for group in groups:
        seen[group.name] += 1
        number = seen[group.name]
        named.append(replace(group, name=f"{group.name} ({number})") if number > 1 else group)
    return named
