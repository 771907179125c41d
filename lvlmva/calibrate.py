"""How good a critic is on the user's pictures: `lvlmva calibrate` plants shortcuts and asks about them."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import numpy as np
import typer

from lvlmva.ask import criticise_by_model, judge_by_model
from lvlmva.changes import apply_changes
from lvlmva.kept import kept_or_computed
from lvlmva.params import Params, load_params
from lvlmva.pipeline import paths
from lvlmva.preset import lay_preset_over, read_preset
from lvlmva_core import calibration
from lvlmva_core.calibration import UNTOUCHED, Item
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.critic import criticise
from lvlmva_core.lvlm.judge import judge_by_stand_in
from lvlmva_core.lvlm.offline import is_stand_in
from lvlmva_core.lvlm.settings import ModelCritic, ModelJudge, is_detector
from lvlmva_core.planting import kinds_for
from lvlmva_core.regions import Overlap
from lvlmva_core.report.tables import markdown_table
from lvlmva_core.samples import (
    read_class_names,
    read_images,
    read_object_masks,
    read_samples,
    read_spurious_masks,
    rows_of_split,
)

if TYPE_CHECKING:
    import pandas as pd


OUT = Path("calibration")  # no output of a stage: nothing of it is committed
OWN = "params"
PRECISIONS = ("precision", "precision_on_object")
ROWS_SHOWN = 8  # of the contact sheet


def calibrate(
    critic: Annotated[
        list[str] | None,
        typer.Option(help="a preset such as critics/gpt-4o, or params: as params.yaml says; repeat it"),
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", "-n", min=1, help="of each kind")] = 30,
    split: Annotated[str, typer.Option(help="of the prepared data: pictures that nothing was trained on")] = "val",
    kinds: Annotated[str, typer.Option(help="separated by commas; by default all that the pictures can show")] = "",
    seed: Annotated[int, typer.Option(min=0, help="of the pictures, sizes, looks and places")] = 0,
    overlap: Annotated[str | None, typer.Option(help="when a region counts; by default compare.overlap")] = None,
    recall_at_least: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="name the cheapest critic whose recall is surely this high")
    ] = 0.85,
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="section.key=value, of all critics")] = None,
    show: Annotated[Path | None, typer.Option(help="a PNG of the first planted pictures and their regions")] = None,
    out: Annotated[Path | None, typer.Option(help="every region as .csv, or the tables as .md")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON in the place of tables")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would take; nothing is sent")] = False,
    params: Annotated[Path, typer.Option(help="the params")] = Path("params.yaml"),
    presets: Annotated[Path, typer.Option(help="where presets lie")] = Path("presets"),
) -> None:
    """Measure critics on pictures of your own with planted shortcuts.

    Held-out pictures get known shortcuts, on the object and off it: a patch, a letter, a strip like a bandage; blur and
    colour casts of the whole. Critic and Judge are asked as in the stages, through the store and within the budget.
    """
    import pandas as pd

    if out is not None and out.suffix not in (".csv", ".md"):
        raise InputError(f"--out {out}: expected a file that ends in .csv or .md")
    names = critic or [OWN]
    if len(set(names)) < len(names):
        raise InputError("--critic: the same critic stands there twice")
    chosen = {name: _params_of(name, params, presets, changes or []) for name in names}
    loaded = chosen[names[0]]
    rule = _rule(overlap) if overlap else loaded.compare.overlap
    known = {name: Path(path) for name, path in paths().items()}
    if not known:
        raise InputError("there is no dvc.yaml here, which says where the prepared data lies; run it in the project")
    items, facts = _items(loaded, known, split, pictures, kinds, seed, rule)
    if show is not None:
        _show(items, show)
    class_names = read_class_names(known["images"])
    found: list[dict[str, Any]] = []
    tables: list[pd.DataFrame] = []
    for name, own in chosen.items():
        result = _ask(name, own, items, class_names, known["prompts"], rule, dry_run=dry_run)
        if result is not None:
            found.append(result[0])
            tables.append(result[1])
    if dry_run:
        typer.echo("the judge's plan depends on the critiques: one call each or more", err=True)
        return
    best, reasons = calibration.cheapest(found, recall_at_least)
    content = {
        **facts,
        "critics": found,
        "recall_at_least": recall_at_least,
        "cheapest_that_is_enough": best,
        "reasons": reasons,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".csv":
            pd.concat(tables).to_csv(out, index=False)
        else:
            out.write_text(_markdown(content), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False))
    else:
        _print(content)


def _params_of(name: str, params: Path, presets: Path, changes: Sequence[str]) -> Params:
    """Params with a preset laid over them, as `lvlmva preset` would write them."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    content = json.loads(json.dumps(yaml.load(params.read_text(encoding="utf-8")))) if params.is_file() else {}
    if name != OWN:
        layer = json.loads(json.dumps(read_preset(presets, name)))
        if not set(layer) <= {"critique", "judge"}:
            raise InputError(f"--critic {name}: a critic's preset has the sections critique and judge alone")
        lay_preset_over(content, layer, name)
    apply_changes(content, changes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / params.name
        with file.open("w", encoding="utf-8") as stream:
            yaml.dump(content, stream)
        return load_params(file)


def _rule(overlap: str) -> Overlap:
    if overlap not in get_args(Overlap):
        raise InputError(f"--overlap '{overlap}': expected one of {', '.join(get_args(Overlap))}")
    return overlap  # type: ignore[return-value]


def _items(
    loaded: Params, known: dict[str, Path], split: str, pictures: int, kinds: str, seed: int, rule: Overlap
) -> tuple[list[Item], dict[str, Any]]:
    """What is asked about, with regions, and what is to be said of how it was made."""
    if split == "train":
        raise InputError("--split train: the model has seen these; take val or test")
    table = read_samples(known["samples"])
    held_out = rows_of_split(table, split)
    drawn = np.sort(np.random.default_rng([seed, 99]).choice(held_out, min(pictures, len(held_out)), replace=False))
    shown = read_images(known["images"], drawn)
    masks, is_known = read_spurious_masks(known["spurious_masks"], drawn)
    native = [mask if known_one else None for mask, known_one in zip(masks, is_known, strict=True)]
    objects = read_object_masks(known["spurious_masks"], drawn)
    class_names = read_class_names(known["images"])
    labels = table["label"].to_numpy()[drawn]
    wanted = [kind.strip() for kind in kinds.split(",") if kind.strip()] or list(kinds_for(shown.shape[1]))
    ids = table["id"].iloc[drawn].tolist()
    items = calibration.make_items(
        ids, [class_names[int(label)] for label in labels], shown, native, objects, wanted, seed
    )
    own = [item for item in items if item.local or item.kind == UNTOUCHED]
    place_of = {sample: int(label) for sample, label in zip(ids, labels, strict=True)}
    segments, attributions, from_model = _regions(loaded, known, own, [place_of[item.base] for item in own])
    items = calibration.with_regions(items, segments, attributions, rule, keep=from_model)
    local = [item for item in items if item.local]
    facts = {
        "pictures": len(drawn),
        "split": split,
        "seed": seed,
        "kinds": wanted,
        "overlap": rule,
        "object": "its mask" if objects is not None else "the centre of the picture, since no masks are known",
        "regions": f"{loaded.segment.method} on attributions of the base model"
        if from_model
        else "a grid of tiles, since there is no base model",
        "regions_made_from_the_planted_mask": sum(item.made for item in local),
        "planted": len(local),
    }
    return items, facts


def _regions(
    loaded: Params, known: dict[str, Path], items: Sequence[Item], labels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Segments uint8 (n, H, W) and attributions float32 (n, H, W) as the stages make them, and whether a model did."""
    from lvlmva_core import attribution_maps as maps
    from lvlmva_core import segmentations
    from lvlmva_core.compute import set_up_compute
    from lvlmva_core.models import load_checkpoint, weights_digest
    from lvlmva_core.samples import to_unit_range
    from lvlmva_core.segmenters.grid import Grid

    pictures, ids = np.stack([item.case.picture for item in items]), [item.case.sample for item in items]
    from_model = known["base"].is_file()
    device = set_up_compute(loaded.compute.device, loaded.compute.threads)
    segmenter: Any = loaded.segment
    if from_model:
        method = loaded.attribute
        classifier, spec = load_checkpoint(known["base"], device)
        table = read_samples(known["samples"])
        drawn = maps.draw_baselines(rows_of_split(table, "train"), method.n_baselines, method.seed)
        baselines = to_unit_range(read_images(known["images"], drawn))
        shown, targets = to_unit_range(pictures), np.asarray(labels, dtype=np.int64)

        def read(places: Sequence[int]) -> maps.Shown:
            return shown[list(places)], targets[list(places)]

        weights = weights_digest(classifier)
        explained = maps.rows_to_explain(method, lambda: classifier, spec, weights, baselines, ids, read)
        _, records = kept_or_computed(explained, OUT, records_in=maps.records_in, stage="calibrate")
        found = list(records)
        maps.check_completeness(method, ids, np.concatenate([record["completeness_error"] for record in found]))
        attributions = np.stack([record["attribution"] for record in found])
    else:
        segmenter = Grid(n_regions=loaded.segment.n_regions)
        attributions = np.ones((len(items), *pictures.shape[2:]), dtype=np.float32)
    rows = segmentations.rows_to_segment(
        segmenter, ids, lambda places: attributions[list(places)], lambda places: pictures[list(places)], lambda: device
    )
    _, records = kept_or_computed(rows, OUT, records_in=segmentations.records_in, stage="calibrate")
    cut = list(records)
    segmentations.check_some([str(record["status"]) for record in cut])
    return np.stack([record["segments"] for record in cut]), attributions, from_model


def _ask(
    name: str,
    own: Params,
    items: Sequence[Item],
    class_names: list[str],
    prompts: Path,
    rule: Overlap,
    *,
    dry_run: bool,
) -> "tuple[dict[str, Any], pd.DataFrame] | None":
    """One critic's answers, counted; None after a dry run."""
    typer.echo(f"{name}:", err=True)
    cases = [item.case for item in items]
    # what is unusable is counted, not an error
    asked: Any = own.critique
    if isinstance(asked, ModelCritic):
        asked = asked.model_copy(update={"max_failed_share": 1.0})
        critiques = criticise_by_model(asked, cases, class_names, prompts / asked.prompts, OUT, dry_run=dry_run)
    else:
        critiques = criticise(asked, cases)
    if dry_run:
        return None
    judging: Any = own.judge
    if isinstance(judging, ModelJudge):
        judging = judging.model_copy(update={"max_failed_share": 1.0})
        verdicts = judge_by_model(judging, critiques, prompts / judging.prompts, OUT, dry_run=False)
    else:
        verdicts = judge_by_stand_in(judging, critiques)
    table = calibration.regions_table(items, verdicts, rule)
    records = [(asked.endpoint, row.record) for row in critiques if row.record is not None]
    records += [(judging.endpoint, record) for row in verdicts for record in row.records]
    stand_in = is_stand_in(asked.critic)
    content = {
        "name": name,
        "critic": critiques[0].critic,
        "judge": verdicts[0].judge,
        "stand_in": stand_in,
        "stand_ins": [each for each in (critiques[0].critic, verdicts[0].judge) if is_stand_in(each)],
        "settings": next((row.settings for row in critiques if row.settings), {}),
        "quality": calibration.quality(table),
        "unusable": calibration.unusable(items, critiques, verdicts),
        "cost": calibration.cost(records, sum(row.failure is None for row in verdicts)),
    }
    table.insert(0, "critic", name)
    return content, table


def _interval(found: dict[str, Any]) -> str:
    if found["share"] is None:
        return "none"
    return f"{found['share']:.2f} ({found['low']:.2f} to {found['high']:.2f}; {found['hits']}/{found['total']})"


def _usd(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _summary(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["critic", "recall", "precision", "on object", "false alarms", "unusable", "USD", "USD / 1,000"]
    rows = []
    for each in content["critics"]:
        bad, total = each["unusable"]["critic"] + each["unusable"]["judge"], each["unusable"]["pictures"]
        what = " (a stand-in)" if each["stand_in"] else " (a detector)" if is_detector(each["critic"]) else ""
        label = f"{each['name']}: {each['critic']}{what}"
        found, price = each["quality"], each["cost"]
        shares = [_interval(found[key]) for key in ("recall", *PRECISIONS, "false_alarms")]
        rows.append([label, *shares, f"{bad}/{total}", _usd(price["usd"]), _usd(price["usd_per_1000_pictures"])])
    return columns, rows


def _details(each: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for groups in each["quality"]["by"].values():
        for label, found in groups.items():
            if found["recall"]["total"] or found["precision"]["total"]:
                rows.append([label, *(_interval(found[key]) for key in ("recall", *PRECISIONS))])
    return ["regions", "recall", "precision", "on object"], rows


def _whole(each: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    found = each["quality"]
    rows = [[UNTOUCHED, "", _interval(found["false_alarms"])]]
    rows += [
        [kind, _interval(of_kind["changed"]), _interval(of_kind["false_alarms"])]
        for kind, of_kind in found["global"].items()
    ]
    return ["pictures", "verdicts that differ from the untouched picture's", "false alarms"], rows


def _notes(content: dict[str, Any]) -> list[str]:
    best = content["cheapest_that_is_enough"]
    lines = [
        f"{content['pictures']} pictures of the split {content['split']}, each untouched and once with each of "
        f"{', '.join(content['kinds'])}; seed {content['seed']}.",
        f"Regions: {content['regions']}; for {content['regions_made_from_the_planted_mask']} of {content['planted']} "
        "planted shortcuts the region was made from the planted mask, since it had none of its own.",
        f"A region counts as spurious by the rule {content['overlap']}; the object is {content['object']}. On object: "
        "precision without rejected regions beside the object, where it may be right. False alarms: of regions on the "
        "object in untouched pictures, the share that was rejected. In brackets: Wilson's 95 % interval, and counts. "
        "USD / 1,000: of as many pictures like these, at the prices in params.",
    ]
    lines += [f"{name}: {reason}." for name, reason in content["reasons"].items()]
    bound = f"a recall of at least {content['recall_at_least']:g} (lower end of the interval)"
    lines.append(f"The cheapest with {bound}: {best}." if best else f"No critic has been shown to have {bound}.")
    return lines


def _markdown(content: dict[str, Any]) -> str:
    parts = ["# Critics on planted shortcuts\n", *(f"{line}\n" for line in _notes(content))]
    parts.append(markdown_table(*_summary(content)))
    for each in content["critics"]:
        parts += [f"## {each['name']}\n", markdown_table(*_details(each)), markdown_table(*_whole(each))]
    return "\n".join(parts)


def _print(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    shown = [("Critics on planted shortcuts", _summary(content))]
    for each in content["critics"]:
        shown += [(each["name"], _details(each)), (f"{each['name']}: the whole picture changed", _whole(each))]
    for title, (columns, rows) in shown:
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, no_wrap=column == columns[0])
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in _notes(content):
        typer.echo(line)


def _show(items: Sequence[Item], path: Path) -> None:
    """Write the first pictures with each kind of shortcut, and the regions of the local ones."""
    from PIL import Image

    from lvlmva_core.render import contact_sheet, render_image, render_overlay

    kinds = list(dict.fromkeys(item.kind for item in items))
    columns = {kind: [item for item in items if item.kind == kind][:ROWS_SHOWN] for kind in kinds}
    titles: list[str] = []
    rows: list[list[np.ndarray]] = [[] for _ in columns[UNTOUCHED]]
    for kind, shown in columns.items():
        with_overlay = shown[0].local
        titles += [kind, "its regions"] if with_overlay else [kind]
        for row, item in zip(rows, shown, strict=True):
            row.append(render_image(item.case.picture))
            if with_overlay:
                row.append(render_overlay(item.case.picture, item.case.segments))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(rows, titles)).save(path)
