"""How good a critic is, measured on pictures with shortcuts that were planted: what is asked, and how it counts.

An extension. A region of a planted picture counts as spurious by an overlap rule, as everywhere. Blur and colour casts
have no place, so that no region is the right one to reject: there it is counted whether they change verdicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lvlmva_core.agreement import wilson_interval
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.budget import cost_usd, price_is_known
from lvlmva_core.lvlm.calls import Record
from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.planting import GlobalKind, LocalKind, Place, Size, centre_of, distort, kinds_for, plant
from lvlmva_core.regions import MAX_REGIONS, NO_REGION, ON_OBJECT, Overlap, overlaps, regions_present

if TYPE_CHECKING:
    import pandas as pd


UNTOUCHED = "untouched"
CONFIDENCE = 0.95
# of the picture, that a region fills
AREAS = {"below 5 %": (0.0, 0.05), "5 to 20 %": (0.05, 0.20), "above 20 %": (0.20, 1.01)}
_EFFECT = 1e-12  # attribution of a region that was made from the planted mask, where the model has none

Truth = Literal["planted", "known_shortcut", "object", "elsewhere"]


@dataclass(frozen=True)
class Item:
    """A picture that is asked about.

    base: id of the picture that it was made from. kind: a local or global kind, or "untouched". size, place: as drawn;
    None where there is none. mask: bool (H, W), the planted shortcut; empty for the others. native: bool (H, W), the
    picture's own shortcut, or None where nobody knows it. object_mask: bool (H, W), the object or the centre.
    made: whether the planted shortcut's region was made from its mask. case: what the critic gets.
    """

    base: str
    kind: str
    size: Size | None
    place: Place | None
    mask: np.ndarray
    native: np.ndarray | None
    object_mask: np.ndarray
    case: Case
    made: bool = False

    @property
    def local(self) -> bool:
        """Whether a shortcut with a place was planted."""
        return self.kind in get_args(LocalKind)

    def truth(self, rule: Overlap) -> dict[int, Truth]:
        """Region -> what it is: the planted shortcut, one that the picture had, on the object, or elsewhere."""
        segments, effect = self.case.segments, self.case.attribution
        assert effect is not None
        found: dict[int, Truth] = {
            region: "object" if on_object else "elsewhere"
            for region, on_object in overlaps(segments, self.object_mask, effect, ON_OBJECT).items()
        }
        for mask, name in ((self.native, "known_shortcut"), (self.mask, "planted")):
            if mask is not None and mask.any():
                held = overlaps(segments, mask, effect, rule)
                found |= {region: name for region, holds in held.items() if holds}  # type: ignore[misc]
        return found


def make_items(
    ids: Sequence[str],
    class_names: Sequence[str],
    pictures: np.ndarray,
    native: Sequence[np.ndarray | None],
    objects: np.ndarray | None,
    kinds: Sequence[str],
    seed: int,
) -> list[Item]:
    """Each picture untouched, and once with each kind of shortcut; sizes and places take turns in a drawn order.

    Args:
        class_names: of each picture. pictures: uint8 (n, C, H, W). native: bool (H, W) of each, None where unknown.
        objects: bool (n, H, W), or None; where there is no object, the centre stands for it.
        kinds: local and global ones.

    Returns:
        Items without regions: segments are 255.

    Raises:
        InputError: a kind that does not exist, or one that these pictures cannot show.
    """
    known = kinds_for(pictures.shape[1])
    for kind in kinds:
        if kind not in known:
            raise InputError(f"--kinds: '{kind}': these pictures can show {', '.join(known)}")
    height, width = pictures.shape[2:]
    empty, nothing = np.zeros((height, width), dtype=bool), np.full((height, width), NO_REGION, dtype=np.uint8)
    turns = [(size, place) for size in get_args(Size) for place in get_args(Place)]
    items = []
    for kind in (UNTOUCHED, *kinds):
        number = 0 if kind == UNTOUCHED else 1 + (*get_args(LocalKind), *get_args(GlobalKind)).index(kind)
        order = np.random.default_rng([seed, number]).permutation(len(ids))
        for n, sample in enumerate(ids):
            rng = np.random.default_rng([seed, number, n])
            own = objects is not None and objects[n].any()
            target = objects[n] if objects is not None and own else centre_of(height, width)
            picture, mask = pictures[n], empty
            size, place = turns[order[n] % len(turns)]
            item_size: Size | None = size
            item_place: Place | None = None
            if kind in get_args(LocalKind):
                planted = plant(picture, kind, size, place, target, rng, native[n])  # type: ignore[arg-type]
                picture, mask, item_place = planted.picture, planted.mask, planted.place
            elif kind == UNTOUCHED:
                item_size = None
            else:
                picture = distort(picture, kind, size, rng)  # type: ignore[arg-type]
            # what a critic that knows the truth is told: the planted shortcut, else the picture's own
            truth = mask if mask.any() else native[n] if native[n] is not None else empty
            case = Case(
                f"{sample} ({kind})",
                class_names[n],
                picture,
                nothing,
                spurious_mask=truth,
                object_mask=target & ~mask if own else None,
            )
            items.append(Item(sample, kind, item_size, item_place, mask, native[n], target & ~mask, case))
    return items


def with_regions(
    items: Sequence[Item], segments: np.ndarray, attributions: np.ndarray, rule: Overlap, *, keep: bool
) -> list[Item]:
    """Items with regions, as the pipeline makes them; where a planted shortcut has none, one is made from its mask.

    It has one where more than half of a region's positive attribution lies on it, and the region counts by `rule`. The
    made region takes the next colour, or that of the last region where all are taken. Items of global kinds get the
    regions of the untouched picture, so that a verdict that differs is due to the picture.

    Args:
        segments: uint8 (n, H, W), attributions: float32 (n, H, W), of the items that are untouched or local, in order.
        keep: whether regions that hold a planted shortcut are kept; False where they do not come from a model.
    """
    found = []
    of_base: dict[str, Item] = {}
    rows = iter(zip(segments, attributions, strict=True))
    for item in items:
        if item.local or item.kind == UNTOUCHED:
            regions, effect = next(rows)
            case = replace(item.case, segments=regions, attribution=effect)
            item = replace(item, case=case)
            if item.local and not (keep and _has_region(item, rule)):
                item = _with_own_region(item)
            elif item.kind == UNTOUCHED:
                of_base[item.base] = item
        else:
            same = of_base[item.base].case
            item = replace(item, case=replace(item.case, segments=same.segments, attribution=same.attribution))
        found.append(item)
    return found


def _has_region(item: Item, rule: Overlap) -> bool:
    segments, effect = item.case.segments, item.case.attribution
    assert effect is not None
    reacted = overlaps(segments, item.mask, effect, "majority_of_attribution")
    counts = overlaps(segments, item.mask, effect, rule)
    return any(reacted[region] and counts[region] for region in reacted)


def _with_own_region(item: Item) -> Item:
    segments, effect = item.case.segments.copy(), item.case.attribution
    assert effect is not None
    present = regions_present(segments)
    label = present[-1] + 1 if present else 0
    if label >= MAX_REGIONS:
        label = present[-1]
        segments[segments == label] = NO_REGION
    segments[item.mask] = label
    effect = np.where(item.mask & (effect <= 0), np.float32(_EFFECT), effect)
    return replace(item, made=True, case=replace(item.case, segments=segments, attribution=effect))


def regions_table(items: Sequence[Item], verdicts: Sequence[VerdictRow], rule: Overlap) -> "pd.DataFrame":
    """A row for each region that got a verdict.

    Columns: sample (of the picture it was made from), kind, size, place, made, region, area (share of the picture),
    truth, verdict, and `before`: the verdict on the same region of the untouched picture, for global kinds.
    """
    import pandas as pd

    rows = []
    given = {row.sample: row.by_region() for row in verdicts}
    for item in items:
        untouched = given.get(f"{item.base} ({UNTOUCHED})", {})
        truth = item.truth(rule)
        for region, verdict in given.get(item.case.sample, {}).items():
            rows.append(
                {
                    "sample": item.base,
                    "kind": item.kind,
                    "size": item.size,
                    "place": item.place,
                    "made": item.made,
                    "region": region,
                    "area": float((item.case.segments == region).mean()),
                    "truth": truth[region],
                    "verdict": verdict,
                    "before": None if item.local or item.kind == UNTOUCHED else untouched.get(region),
                }
            )
    names = ["sample", "kind", "size", "place", "made", "region", "area", "truth", "verdict", "before"]
    return pd.DataFrame(rows, columns=names)


def proportion(hits: int, total: int) -> dict[str, float | int | None]:
    """hits, total, share and its 95 % interval by Wilson's score (scipy): low, high. None without any."""
    interval = wilson_interval(hits, total, level=CONFIDENCE)
    low, high = interval or (None, None)
    return {"hits": hits, "total": total, "share": hits / total if total else None, "low": low, "high": high}


def quality(table: "pd.DataFrame") -> dict[str, Any]:
    """What rows of `regions_table` say of a critic.

    Of regions with a planted shortcut, recall (the share that was rejected), in all and by kind, region size, kind and
    region size, place, and where the region came from. Of rejected regions of planted pictures, precision (the share
    that holds the shortcut; regions with a known shortcut of the picture's own are left out), and precision_on_object,
    the same without regions beside the object, where a rejection may be right. false_alarms: of regions on the object
    in untouched pictures, the share that was rejected; rejected_elsewhere: the same of regions beside it. For each
    global kind `changed`, the share of regions whose verdict is another one than on the untouched picture, and false
    alarms.
    """
    import pandas as pd

    local = table[table["kind"].isin(get_args(LocalKind)) & (table["truth"] != "known_shortcut")]
    untouched = table[table["kind"] == UNTOUCHED]
    kinds = [kind for kind in get_args(LocalKind) if (local["kind"] == kind).any()]
    area = pd.Series("", index=local.index)
    for name, (low, high) in AREAS.items():
        area[(local["area"] >= low) & (local["area"] < high)] = name
    of_kind = {kind: local["kind"] == kind for kind in kinds}
    of_area = {name: area == name for name in AREAS}
    both = {f"{kind}, {name}": of_kind[kind] & of_area[name] for kind in kinds for name in AREAS}
    places = {f"{place} the object": local["place"] == place for place in get_args(Place)}
    sources = {"from attributions": ~local["made"].astype(bool), "from the planted mask": local["made"].astype(bool)}
    return {
        **_found(local),
        "by": {
            name: {label: _found(local[chosen]) for label, chosen in groups.items()}
            for name, groups in (
                ("kind", of_kind),
                ("region size", of_area),
                ("kind and region size", both),
                ("place", places),
                ("region", sources),
            )
        },
        "false_alarms": _rejected(untouched[untouched["truth"] == "object"]),
        "rejected_elsewhere": _rejected(untouched[untouched["truth"] == "elsewhere"]),
        "global": {
            kind: {
                "changed": _changed(table[table["kind"] == kind]),
                "false_alarms": _rejected(table[(table["kind"] == kind) & (table["truth"] == "object")]),
            }
            for kind in get_args(GlobalKind)
            if (table["kind"] == kind).any()
        },
    }


def _found(rows: "pd.DataFrame") -> dict[str, Any]:
    planted, rejected = rows["truth"] == "planted", rows["verdict"] == "no"
    hits = int((planted & rejected).sum())
    return {
        "recall": proportion(hits, int(planted.sum())),
        "precision": proportion(hits, int(rejected.sum())),
        "precision_on_object": proportion(hits, int((rejected & (rows["truth"] != "elsewhere")).sum())),
    }


def _rejected(rows: "pd.DataFrame") -> dict[str, Any]:
    return proportion(int((rows["verdict"] == "no").sum()), len(rows))


def _changed(rows: "pd.DataFrame") -> dict[str, Any]:
    paired = rows[rows["before"].notna()]
    return proportion(int((paired["before"] != paired["verdict"]).sum()), len(paired))


def unusable(items: Sequence[Item], critiques: Sequence[CritiqueRow], verdicts: Sequence[VerdictRow]) -> dict[str, int]:
    """Of how many pictures the critic's answer is unusable, of how many the judge's, and how many had no region."""
    empty = {item.case.sample for item in items if not regions_present(item.case.segments)}
    no_critique = {row.sample for row in critiques if row.failure is not None} - empty
    no_verdict = {row.sample for row in verdicts if row.failure is not None} - empty - no_critique
    return {
        "critic": len(no_critique),
        "judge": len(no_verdict),
        "without_regions": len(empty),
        "pictures": len(items),
    }


def cost(records: Sequence[tuple[Endpoint, Record]], pictures: int) -> dict[str, float | int | None]:
    """What answers cost at the prices in params, whenever they were bought; and for 1,000 pictures like these.

    Args:
        records: answers with the endpoint that they came from; one that several samples share counts once.
        pictures: those that have verdicts.

    Returns:
        answers, input_tokens, output_tokens, usd, usd_per_1000_pictures; USD is None where a price is unknown.
    """
    once = {record["key"]: (endpoint, record) for endpoint, record in records}
    tokens_in = tokens_out = 0
    usd: float | None = 0.0
    for endpoint, record in once.values():
        usage = record["response"].get("usage")
        counts = usage if isinstance(usage, Mapping) else {}
        came, went = (_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        tokens_in, tokens_out = tokens_in + came, tokens_out + went
        known = usd is not None and price_is_known(endpoint)
        tier = record["response"].get("service_tier")
        usd = (usd or 0.0) + cost_usd(endpoint, came, went, tier=str(tier)) if known else None
    return {
        "answers": len(once),
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "usd": usd,
        "usd_per_1000_pictures": None if usd is None or not pictures else 1000 * usd / pictures,
    }


def _count(number: Any) -> int:
    return number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else 0


def cheapest(critics: Sequence[Mapping[str, Any]], recall_at_least: float) -> tuple[str | None, dict[str, str]]:
    """The critic of least cost whose recall is enough: the lower end of its interval reaches the bound.

    Args:
        critics: name, stand_in, quality, cost of each. recall_at_least: 0..1.

    Returns:
        (its name, or None; for each critic why it is or is not enough).
    """
    reasons, enough = {}, []
    for critic in critics:
        recall, price = critic["quality"]["recall"], critic["cost"]["usd_per_1000_pictures"]
        if critic["stand_in"]:
            reasons[critic["name"]] = "a stand-in, not a vision-language model: not chosen"
        elif recall["low"] is None:
            reasons[critic["name"]] = "no region with a planted shortcut got a verdict"
        elif recall["low"] < recall_at_least:
            more = "; more pictures may show that it is" if recall["share"] >= recall_at_least else ""
            reasons[critic["name"]] = (
                f"recall {recall['share']:.2f}, at least {recall['low']:.2f}: not shown to be enough{more}"
            )
        elif price is None:
            reasons[critic["name"]] = f"recall at least {recall['low']:.2f}: enough, but its price is unknown"
        else:
            reasons[critic["name"]] = f"recall at least {recall['low']:.2f}: enough"
            enough.append((price, critic["name"]))
    return (min(enough)[1] if enough else None), reasons
