"""What a model looks at and should not, in a few cards: rejected regions grouped by place, likeness and words.

An extension of LVLM-VA: the model's behaviour told to an expert (the one way of the interface), where verdicts are the
other. Arrays and critiques in, plain records out; nothing here runs a model.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lvlmva_core.audit import (
    EXTENT_WEIGHT,
    JOINED_WITHIN,
    LIKENESS_WEIGHT,
    PLACE_WEIGHT,
    SPREAD_FROM,
    colour_name,
    describe_regions,
    place_name,
)
from lvlmva_core.regions import NO_REGION
from lvlmva_core.render import COLOUR_NAMES
from lvlmva_core.statistics import bootstrap_interval

WORDS_WEIGHT = 0.3  # distance of two regions that share no word, in sides of a picture
MOST_JOINED = 3000  # regions that are compared pair by pair; more join the nearest group
MOST_TERMS = 400
LEAST_SHARE, LEAST_REGIONS = 0.02, 3  # of the samples: what is rarer is counted only
MOST_PATTERNS = 12
CHARACTERISTIC_FROM = 0.15  # how much more often than elsewhere a word must be said of a pattern to stand in its name
DRAWS = 400  # of the bootstrap
TERM = re.compile(r"[^\W\d_]{3,}")
SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
# words of English, and of what every critique says of every region
COMMON = """
about above after all also and any apart are area areas because been being below between both but can class
contains could cover covers does each fill fills for from had has have her here him his holds how into its itself
just less lies like likely located made may mainly model more most mostly much near not only onto other our out
over part parts picture image pixel pixels rather region regions relevant irrelevant spurious said same see seems
shape should show shows since some such than that the their them then there therefore these they this those
through thus too touches misses under upon verdict very was were what when where whether which while who whole
will with within without would yes you your
"""
STOP_WORDS = frozenset(COMMON.split())


@dataclass(frozen=True)
class Pattern:
    """Rejected regions of several samples that lie alike, look alike and are told of alike.

    members: (sample's row, region), rising. anchor: the most central of them, which a name given to the pattern is
    tied to. words: said of it more often than of other rejected regions. samples: that hold one of them.
    shares: float (K,), of each class's samples, 0..1; NaN for a class without samples. attribution: mean over these
    samples of the share of the positive attribution that it holds, 0..1. reliance: mean over them of the fall of the
    true class's centred logit when the region is exchanged for other classes' content, as a share of that logit's
    typical size; low, high: 95 % bootstrap over samples; all three None where no exchange was made.
    heat: float32 (K, H, W): of each class, the mean over its samples of the positive attribution that lies in the
    pattern, as a share of each sample's.
    """

    name: str
    members: list[tuple[int, int]]
    anchor: tuple[int, int]
    words: list[str]
    samples: int
    shares: list[float]
    attribution: float
    reliance: float | None
    low: float | None
    high: float | None
    heat: np.ndarray


def words_of_regions(critique: str, colours: Mapping[int, str]) -> dict[int, str]:
    """What a critique says of each region: the sentences that name its colour, and no more than one other.

    Args:
        critique: free text. colours: region -> the name of its colour.

    Returns:
        region -> text, "" where nothing is said of it.
    """
    patterns = {region: re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for region, name in colours.items()}
    found: dict[int, list[str]] = {region: [] for region in colours}
    named: list[int] = []
    for sentence in SENTENCE.split(critique):
        here = [region for region, pattern in patterns.items() if pattern.search(sentence)]
        # "It lies on the bone." goes on about the region before
        named = here or named
        if 0 < len(named) <= 2:
            for region in named:
                found[region].append(sentence)
    return {region: " ".join(sentences) for region, sentences in found.items()}


def terms_of(text: str) -> list[str]:
    """The words that tell texts apart, each once, in the order of the alphabet: no stop words, no region's colour."""
    said = {word.casefold() for word in TERM.findall(text)}
    return sorted(said - STOP_WORDS - set(COLOUR_NAMES))


def tf_idf(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Weights of the words of each text (scikit-learn's TfidfVectorizer, each word counted once a text).

    Returns:
        float64 (n, V), rows of length 1 or 0, and the V words: those that at least two texts hold, the commonest 400.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    held: dict[str, int] = {}
    for text in texts:
        for term in terms_of(text):
            held[term] = held.get(term, 0) + 1
    common = [term for term, count in held.items() if count >= 2]
    chosen = sorted(sorted(common, key=lambda term: (-held[term], term))[:MOST_TERMS])
    if not chosen:
        return np.zeros((len(texts), 0)), []
    vectorizer = TfidfVectorizer(analyzer=terms_of, vocabulary=chosen)
    return np.asarray(vectorizer.fit_transform(texts).todense()), chosen


def group_patterns(described: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Group regions by place, likeness and words: int64 (n,), groups numbered by first appearance.

    Average linkage (scipy) with the weights of `lvlmva_core.audit.group_regions`, and words beside them: texts
    without a common word are WORDS_WEIGHT of a picture's side apart. Of more than MOST_JOINED regions, evenly spaced
    ones are joined and the others go to the group with the nearest mean.

    Args:
        described: (n, 3 + C), of `describe_regions`. weights: (n, V), of `tf_idf`.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    n = len(described)
    if n < 2:
        return np.zeros(n, dtype=np.int64)
    features = _features(described, weights)
    joined = np.arange(n) if n <= MOST_JOINED else np.unique(np.linspace(0, n - 1, MOST_JOINED).round().astype(int))
    labels = fcluster(linkage(features[joined], "average"), JOINED_WITHIN, "distance") - 1
    if len(joined) < n:
        means = np.stack([features[joined[labels == k]].mean(0) for k in range(labels.max() + 1)])
        distances = (features**2).sum(1)[:, None] - 2 * features @ means.T + (means**2).sum(1)
        nearest = distances.argmin(1)
        nearest[joined] = labels
        labels = nearest
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[numbers], dtype=np.int64)


def find_patterns(
    segments: np.ndarray,
    rejected: Sequence[Iterable[int]],
    attributions: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    texts: Sequence[Mapping[int, str]],
    reliance: np.ndarray | None,
    *,
    n_classes: int,
) -> tuple[list[Pattern], int]:
    """Rejected regions in groups; what holds most of what the model looks at comes first.

    Args:
        segments: uint8 (N, H, W), 255 = none. rejected: of each sample, the regions that are masked.
        attributions: float (N, H, W). images: uint8 (N, C, H, W). labels: int (N,).
        texts: of each sample, region -> what the critique says of it (`words_of_regions`).
        reliance: float (N, J), falls as shares of the typical logit, or None.

    Returns:
        At most MOST_PATTERNS patterns, and the number of regions in groups that are rarer or less than those.
    """
    kept = np.full_like(segments, NO_REGION)
    for n, regions in enumerate(rejected):
        kept[n] = np.where(np.isin(segments[n], list(regions)), segments[n], NO_REGION)
    holding = np.flatnonzero((kept != NO_REGION).any(axis=(1, 2)))
    local, described = describe_regions(kept[holding], attributions[holding], images[holding])
    members = [(int(holding[row]), region) for row, region in local]
    weights, terms = tf_idf([texts[n].get(region, "") for n, region in members])
    numbers, features = group_patterns(described, weights), _features(described, weights)
    positive = np.maximum(attributions[holding].astype(np.float64), 0)
    positive /= np.maximum(positive.sum(axis=(1, 2)), np.finfo(np.float64).tiny)[:, None, None]
    row_of = {int(n): row for row, n in enumerate(holding)}
    per_class = np.bincount(labels, minlength=n_classes)
    least = max(LEAST_REGIONS, LEAST_SHARE * len(labels))
    found: list[tuple[float, Pattern]] = []
    for number in range(int(numbers.max(initial=-1)) + 1):
        chosen = np.flatnonzero(numbers == number)
        if len(chosen) < least:
            continue
        rows = np.array([members[place][0] for place in chosen])
        regions = np.array([members[place][1] for place in chosen])
        heat = np.zeros((n_classes, *segments.shape[1:]))
        for n, region in zip(rows, regions, strict=True):
            heat[labels[n]] += positive[row_of[int(n)]] * (kept[n] == region)
        total = float(heat.sum())
        unique, place_of = np.unique(rows, return_inverse=True)
        fall = None if reliance is None else _per_sample(reliance[rows, regions].astype(np.float64), place_of)
        low, high = (None, None) if fall is None else bootstrap_interval(fall, _mean, draws=DRAWS)
        with np.errstate(invalid="ignore"):
            shares = np.bincount(labels[unique], minlength=n_classes) / per_class
            heat /= per_class[:, None, None]
        words = _characteristic(weights > 0, chosen, terms)
        distances = ((features[chosen] - features[chosen].mean(0)) ** 2).sum(1)
        pattern = Pattern(
            name=_name(described[chosen], words),
            members=[members[place] for place in chosen],
            anchor=members[chosen[int(distances.argmin())]],
            words=words,
            samples=len(unique),
            shares=shares.tolist(),
            attribution=total / len(unique),
            reliance=None if fall is None else float(fall.mean()),
            low=low,
            high=high,
            heat=np.nan_to_num(heat).astype(np.float32),
        )
        found.append((total, pattern))
    found.sort(key=lambda pair: (-pair[0], pair[1].members))
    shown = [pattern for _, pattern in found[:MOST_PATTERNS]]
    return _named_apart(shown), len(members) - sum(len(pattern.members) for pattern in shown)


def _features(described: np.ndarray, weights: np.ndarray) -> np.ndarray:
    channels = described.shape[1] - 3
    return np.concatenate(
        [
            described[:, :2] * PLACE_WEIGHT,
            described[:, 2:3] * EXTENT_WEIGHT,
            described[:, 3:] * (LIKENESS_WEIGHT / np.sqrt(channels)),
            weights * (WORDS_WEIGHT / np.sqrt(2)),  # rows of length 1 without a common word are sqrt(2) apart
        ],
        axis=1,
    )


def _per_sample(values: np.ndarray, place_of: np.ndarray) -> np.ndarray:
    """A sample with two regions in a pattern counts once, with their mean."""
    return np.asarray(np.bincount(place_of, values) / np.bincount(place_of))


def _characteristic(says: np.ndarray, chosen: np.ndarray, terms: Sequence[str]) -> list[str]:
    """Up to three words that are said of the chosen regions more often than of the others, most telling first."""
    if not terms:
        return []
    others = np.ones(len(says), dtype=bool)
    others[chosen] = False
    inside = says[chosen].mean(0)
    outside = says[others].mean(0) if others.any() else np.zeros(len(terms))
    lead = inside - outside
    order = sorted(
        np.flatnonzero((lead >= CHARACTERISTIC_FROM) & (inside >= 0.5)), key=lambda t: (-lead[t], terms[int(t)])
    )
    return [terms[int(term)] for term in order[:3]]


def _name(described: np.ndarray, words: Sequence[str]) -> str:
    row, column, extent = described[:, :3].mean(0)
    where = "spread over the picture" if extent >= SPREAD_FROM else place_name(row, column)
    name = f"{where}, {colour_name(described[:, 3:].mean(0))}"
    return f"{name}: {', '.join(words)}" if words else name


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _named_apart(patterns: Sequence[Pattern]) -> list[Pattern]:
    """Patterns of one name are numbered."""
    seen: dict[str, int] = {}
    named = []
    for pattern in patterns:
        seen[pattern.name] = number = seen.get(pattern.name, 0) + 1
        named.append(replace(pattern, name=f"{pattern.name} ({number})") if number > 1 else pattern)
    return named
