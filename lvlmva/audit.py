"""`lvlmva audit`: what a classifier looks at and depends on, as one page to send by mail (an extension)."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from lvlmva.params import load_params
from lvlmva.pipeline import paths
from lvlmva.roots import with_local_root
from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from lvlmva_core.report.audit_page import AuditContent

Fit = Literal["crop", "pad", "stretch"]
Channels = Literal["auto", "grey", "colour"]
SPLITS = ("all", "train", "val", "test")
BLOCK = 256  # pictures that are read and run at once, so that memory does not grow with their number
CHUNK = 8  # samples that are explained or segmented between two looks at the clock
DONORS = 512  # pictures that regions are filled from, at most
PROBE = 64  # pictures that a model from elsewhere is tried on
EXAMPLES = 12  # samples of a group that --json names
# what the library calls a setting, and the option that it is here
OPTIONS = {
    "prepare.root": "--images",
    "prepare.table": "--table",
    "prepare.columns": "--columns",
    "prepare.file_pattern": "--file-pattern",
    "prepare.classes": "--classes",
    "prepare.channels": "--channels",
    "prepare.image_size": "--size",
    "train.checkpoint_key": "--checkpoint-key",
    "train.checkpoint": "--checkpoint",
    "train.classes": "--classes",
    "train.model": "--model",
    "train.normalisation": "--normalisation",
    "train.channels": "--channels",
    "attribute.n_baselines": "--baselines",
}


@dataclass(frozen=True)
class How:
    """How much is looked at; what stands in params.yaml for the project's own model."""

    samples: int
    regions: int
    donors: int
    baselines: int
    seed: int
    pairs: int = 64  # (sample, baseline) pairs that are explained at once
    batch_size: int = 64


@dataclass(frozen=True)
class Subject:
    """The model and the prepared pictures.

    source: the folder that the samples' files lie in, None where it is not known. rows: of the pictures, rising.
    """

    model: Any
    images: Path
    table: "pd.DataFrame"
    rows: np.ndarray
    class_names: list[str]
    source: Path | None
    facts: dict[str, str]
    notes: list[str] = field(default_factory=list)


def audit(
    images: Annotated[Path | None, typer.Option(help="your pictures: a folder, a tar, or MedMNIST's npz")] = None,
    table: Annotated[Path | None, typer.Option(help="CSV or parquet with files and labels; else class folders")] = None,
    columns: Annotated[
        str | None, typer.Option(help="of the table, where names are unusual: file=image_id,label=dx,patient=case")
    ] = None,
    file_pattern: Annotated[
        str | None, typer.Option(help="where the table holds an id in the place of a path: 'images/{}.jpg'")
    ] = None,
    model: Annotated[str | None, typer.Option(help="torchvision:NAME, timm:NAME, or package.module:function")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="its weights: safetensors, or a state dict")] = None,
    checkpoint_key: Annotated[str | None, typer.Option(help="the entry of the file that holds them")] = None,
    classes: Annotated[str | None, typer.Option(help="names in the order of the logits: a,b,c")] = None,
    size: Annotated[int | None, typer.Option(min=16, max=1024, help="pixels a side that the model takes")] = None,
    fit: Annotated[Fit, typer.Option(help="how a picture becomes square")] = "crop",
    channels: Annotated[Channels, typer.Option(help="auto is grey where every picture is")] = "auto",
    normalisation: Annotated[
        str | None, typer.Option(help="none, imagenet, half, bytes; or mean/std: 0.5,0.5,0.5/0.2,0.2,0.2")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="all, train, val or test; by default all of yours, the project's train")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="pictures that are explained, the surest of each class")] = 64,
    regions: Annotated[int, typer.Option(min=1, max=12, help="of each of them, at most")] = 5,
    donors: Annotated[int, typer.Option(min=1, help="pictures that each region is exchanged with")] = 4,
    baselines: Annotated[int, typer.Option(min=1, help="of the attribution")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="of every draw")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<n>")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default one a CPU")] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("audit.html"),
    at_most_mb: Annotated[float, typer.Option(min=0.05, help="largest page, in megabytes")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings, for scripts")] = False,
    params: Annotated[Path, typer.Option(help="the project's settings")] = Path("params.yaml"),
) -> None:
    """See in a minute whether there is anything to align: no training, no critic.

    Writes one page: for each class where the model looks, the regions that its predictions depend on most, and what
    of a whole picture (brightness, blur, size, colour cast) goes with the labels. Nothing is changed, nothing leaves
    the machine.

    Your own: lvlmva audit --images DIR --table FILE --model torchvision:resnet18 --checkpoint FILE --classes a,b
    --size 224 --normalisation imagenet

    Without --images and --model: the project's base model, after `dvc repro`. The more --samples and --donors, the
    surer the numbers and the longer it takes.
    """
    from lvlmva_core.compute import set_up_compute
    from lvlmva_core.report.audit_page import render_audit

    if (images is None) != (model is None):
        raise InputError(f"--{'images' if images is None else 'model'}: is missing; give both, or neither")
    if split is not None and split not in SPLITS:
        raise InputError(f"--split {split}: expected one of {', '.join(SPLITS)}")
    if not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: no folder {out.parent}; create it")
    where = set_up_compute(device, threads or os.cpu_count() or 1)
    how = How(samples, regions, donors, baselines, seed)
    if images is None or model is None:
        content, findings = look(_projects(params, split or "train", where), how, where)
    else:
        wanted = _wanted(images, _layout(images, table, columns, file_pattern), classes, size, fit, channels, seed)
        stated = _stated(model, checkpoint, checkpoint_key, classes, normalisation)
        with tempfile.TemporaryDirectory(prefix="lvlmva-audit-") as folder:
            try:
                subject = _own(wanted, stated, Path(folder), images, split or "all", where)
                content, findings = look(subject, how, where)
            except InputError as error:
                raise InputError(_as_options(str(error))) from None
    page = render_audit(content, int(at_most_mb * 1e6))
    out.write_text(page, encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"page": str(out), **findings}, indent=2, ensure_ascii=False))
    else:
        typer.echo(content.verdict.headline)
        for point in content.verdict.points:
            typer.echo(f"- {point}")
        typer.echo(f"{out}: {len(page.encode()) / 1e6:.1f} MB")


def look(subject: Subject, how: How, device: "torch.device") -> tuple["AuditContent", dict[str, Any]]:
    """Rank, attribute, segment, exchange, measure the cues: what the page shows, and the same for scripts.

    Raises:
        InputError: a class has no picture to exchange with, or nothing could be explained.
    """
    import torch

    from lvlmva_core import audit as found_by
    from lvlmva_core.attribution.deep_lift import explain
    from lvlmva_core.diffuse import diffuse_share, diffuse_warning
    from lvlmva_core.exchange import exchange_regions
    from lvlmva_core.independence import typical_size
    from lvlmva_core.progress import track
    from lvlmva_core.report.audit_page import AuditContent
    from lvlmva_core.samples import read_images
    from lvlmva_core.segmenters.ppeps_wgm import PpepsWgm
    from lvlmva_core.splits import read_sample_rows

    model, table, names = subject.model, subject.table, subject.class_names
    pictured = table.iloc[subject.rows]
    labels_of_all = pictured["label"].to_numpy(copy=True)
    logits, cues = _run_all(subject, device)
    chosen = _chosen(pictured, logits, how.samples)
    shown = read_sample_rows(subject.images, table, chosen, device)
    rng = np.random.default_rng([how.seed, 3])
    drawn = np.sort(rng.permutation(subject.rows)[: how.baselines])
    baselines = read_sample_rows(subject.images, table, table["id"].iloc[drawn].tolist(), device).images
    parts = [slice(first, first + CHUNK) for first in range(0, len(chosen), CHUNK)]
    maps = np.concatenate(
        [
            explain(model, shown.images[part], baselines, shown.labels[part], batch_size=how.pairs)
            .attributions.sum(1)
            .cpu()
            .numpy()
            for part in track(parts, "explain")
        ]
    )
    segmenter = PpepsWgm(n_regions=how.regions, choose="fixed", seed=how.seed)
    label_maps = np.concatenate(
        [segmenter.segment(maps[part], None, chosen[part], device)["segments"] for part in track(parts, "segment")]
    )
    donors = read_sample_rows(subject.images, table, _donors(pictured, rng), device)
    reliance = exchange_regions(
        model,
        shown,
        chosen,
        label_maps,
        donors,
        donors.table["id"].tolist(),
        n_regions=how.regions,
        n_donors=how.donors,
        batch_size=how.batch_size,
        seed=how.seed,
    )
    pixels = read_images(subject.images, shown.table.index.to_numpy())
    labels = shown.labels.cpu().numpy()
    scale = typical_size(reliance.logit) or 1.0
    falls = {name: getattr(reliance, name) for name in ("other", "own", "other_spread", "flipped")}
    groups, rare = found_by.region_groups(
        label_maps, maps, pixels, labels, falls, scale, n_classes=len(names), seed=how.seed
    )
    measured, left_out = found_by.measure_cues(
        {**cues, **_file_cues(pictured, subject.source)}, labels_of_all, len(names)
    )
    right = (logits.argmax(1) == torch.from_numpy(labels_of_all)).numpy()
    accuracy, counts = float(right.mean()), np.bincount(labels_of_all, minlength=len(names))
    spread = diffuse_share(maps)
    commonest = float(counts.max() / counts.sum())
    verdict = found_by.verdict_of(groups, measured, names, accuracy, commonest, diffuse_warning(spread))
    without = int((label_maps == 255).all(axis=(1, 2)).sum())
    notes = [
        *subject.notes,
        *[f"{without} samples without positive attribution are left out."] * bool(without),
        *[f"Cues that are the same for all pictures, or not known: {', '.join(left_out)}."] * bool(left_out),
        f"Explained are the {len(chosen)} samples that the model is surest of, as many of each class; {how.baselines} "
        f"baselines, up to {how.regions} regions, {how.donors} donors of other classes and of the own; seed "
        f"{how.seed}.",
    ]
    content = AuditContent(
        title="What the model looks at",
        verdict=verdict,
        facts={
            **subject.facts,
            "pictures": f"{len(pictured)} ({pixels.shape[2]} x {pixels.shape[3]} pixels)",
            "accuracy on them": f"{accuracy:.1%}",
            "pixels that hold 90 % of the attribution": "no attribution"
            if spread is None
            else f"{spread:.0%} (median)",
        },
        class_names=names,
        accuracies=[float(right[labels_of_all == k].mean()) if counts[k] else float("nan") for k in range(len(names))],
        counts=counts.tolist(),
        attention=found_by.mean_attribution(maps, labels, len(names)),
        means=_means(pixels, labels, len(names)),
        images=pixels,
        segments=label_maps,
        groups=groups,
        rare=rare,
        cues=measured,
        notes=notes,
    )
    return content, {**_findings(content, chosen, accuracy), "diffuse_share": spread}


def _findings(content: "AuditContent", ids: Sequence[str], accuracy: float) -> dict[str, Any]:
    """What --json prints."""
    names = content.class_names
    groups = []
    for group in content.groups:
        facts = asdict(group)
        members = facts.pop("members")
        shares = {name: share for name, share in zip(names, facts.pop("shares"), strict=True) if np.isfinite(share)}
        examples = [ids[n] for n in dict.fromkeys(n for n, _ in members)][:EXAMPLES]
        groups.append({**facts, "depended_on": group.depended_on, "shares": shares, "examples": examples})
    return {
        **asdict(content.verdict),
        "accuracy": accuracy,
        "groups": groups,
        "cues": [
            {"cue": cue.cue, "class": names[cue.label], "auc": cue.auc, "p_holm": cue.p, "high": cue.high}
            for cue in content.cues
        ],
        "notes": list(content.notes),
    }


def _run_all(subject: Subject, device: "torch.device") -> tuple["torch.Tensor", dict[str, np.ndarray]]:
    """Logits (N, K) of all pictures and cues (N,) of their pixels, read in blocks."""
    import torch

    from lvlmva_core.audit import pixel_cues
    from lvlmva_core.models import predict_logits
    from lvlmva_core.progress import track
    from lvlmva_core.samples import read_images, to_unit_range

    logits, cues = [], []
    blocks = np.array_split(subject.rows, -(-len(subject.rows) // BLOCK))
    for rows in track(blocks, "run the model"):
        pixels = read_images(subject.images, rows)
        cues.append(pixel_cues(pixels))
        logits.append(predict_logits(subject.model, torch.from_numpy(to_unit_range(pixels)).to(device)).cpu())
    return torch.cat(logits), {name: np.concatenate([part[name] for part in cues]) for name in cues[0]}


def _chosen(pictured: "pd.DataFrame", logits: "torch.Tensor", n_samples: int) -> list[str]:
    """Ids of the samples that the model is surest of, by rising id: as many of each class, all of a rarer one."""
    import pandas as pd

    from lvlmva_core.ranking import output_entropy, select_alignment_set

    candidates = pd.DataFrame(
        {
            "id": pictured["id"].to_numpy(),
            "entropy": output_entropy(logits).numpy(),
            "label": pictured["label"].to_numpy(),
            "prediction": logits.argmax(1).numpy(),
        }
    )
    labels = sorted(candidates["label"].unique())
    each = max(1, n_samples // len(labels))
    parts = [candidates[candidates["label"] == k] for k in labels]
    chosen = [
        select_alignment_set(part, min(each, len(part)), "low_entropy", stratify=False, seed=0)["id"] for part in parts
    ]
    return sorted(pd.concat(chosen))


def _donors(pictured: "pd.DataFrame", rng: np.random.Generator) -> list[str]:
    """Ids of the pictures that regions are filled from, as many of each class."""
    drawn = pictured.iloc[rng.permutation(len(pictured))]
    place = drawn.groupby("label").cumcount().to_numpy()
    return sorted(drawn["id"].iloc[np.argsort(place, kind="stable")[:DONORS]])


def _file_cues(pictured: "pd.DataFrame", source: Path | None) -> dict[str, np.ndarray]:
    """File and original sizes, float64 (N,); NaN throughout where one of them is not known."""
    from PIL import Image

    found = np.full((len(pictured), 3), np.nan)
    for n, name in enumerate(pictured["source"] if source is not None and source.is_dir() else []):
        assert source is not None
        path = source / name
        try:
            with Image.open(path) as image:
                found[n] = path.stat().st_size, *image.size
        except OSError:
            break  # not a plain picture (DICOM): sizes are said to be unknown
    size, width, height = found.T
    return {"file size": size, "width": width, "height": height, "aspect": width / height}


def _means(pixels: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Mean picture of each class, uint8 (K, C, H, W)."""
    means = np.zeros((n_classes, *pixels.shape[1:]), dtype=np.uint8)
    for k in np.unique(labels):
        means[k] = np.rint(pixels[labels == k].mean(0))
    return means


def _projects(params: Path, split: str, device: "torch.device") -> Subject:
    """The project's own base model and prepared pictures."""
    from lvlmva_core.models import load_checkpoint
    from lvlmva_core.samples import read_class_names, read_samples

    known = {name: Path(path) for name, path in paths().items()}
    if not known:
        raise InputError("no dvc.yaml here; give --images and --model, or run it in the project's folder")
    loaded = load_params(params)
    table = read_samples(known["samples"])
    model, _ = load_checkpoint(known["base"], device, loaded.train.model)
    root = with_local_root(loaded.prepare).root
    return Subject(
        model,
        known["images"],
        table,
        _rows(table, split),
        read_class_names(known["images"]),
        None if root is None else Path(root).expanduser(),
        {"model": f"{loaded.train.model}, the project's base model", "data": f"{loaded.prepare.dataset}, {split}"},
    )


def _own(wanted: Any, stated: Any, folder: Path, root: Path, split: str, device: "torch.device") -> Subject:
    """The user's pictures, prepared in a folder that is removed after, and the user's model."""
    import torch

    from lvlmva_core.foreign import load_foreign
    from lvlmva_core.samples import read_class_names, read_samples
    from lvlmva_core.splits import read_sample_rows

    images, samples = folder / "images.zarr", folder / "samples.parquet"
    wanted.write(images, samples, folder / "spurious_masks.zarr")
    table, names = read_samples(samples), read_class_names(images)
    rows = _rows(table, split)
    probe = read_sample_rows(images, table, table["id"].iloc[rows[:PROBE]].tolist(), torch.device("cpu"))
    found = load_foreign(stated, probe.images, names)
    file = "" if stated.checkpoint is None else f" ({Path(stated.checkpoint).name})"
    return Subject(
        found.model.to(device),
        images,
        table,
        rows,
        names,
        root.expanduser(),
        {"model": f"{stated.model}{file}", "data": f"{root.name}, {split}"},
        [f"The model: {note}." for note in found.notes],
    )


def _rows(table: "pd.DataFrame", split: str) -> np.ndarray:
    from lvlmva_core.samples import rows_of_split

    return np.arange(len(table)) if split == "all" else rows_of_split(table, split)


def _layout(images: Path, table: Path | None, columns: str | None, file_pattern: str | None) -> dict[str, Any]:
    """What `lvlmva new` would write of the table: what was said, and guesses by names and content for the rest."""
    from lvlmva.new import columns_said, guess_with, table_file
    from lvlmva_core.datasets.tables import read_cells

    if not images.expanduser().exists():
        raise InputError(f"--images {images}: no such folder or file")
    if table is None:
        if columns or file_pattern:
            raise InputError("--columns and --file-pattern are of a table; name it with --table")
        return {"table": None}
    root, said = images.expanduser(), columns_said(columns)
    guessed = guess_with(read_cells(table_file(root, str(table))), root, said)
    found = {"file": guessed.file, "label": guessed.label, **said}
    pattern = file_pattern or guessed.pattern
    return {
        "table": str(table),
        "columns": {role: column for role, column in found.items() if column},
        **({"file_pattern": pattern} if pattern else {}),
    }


def _wanted(
    images: Path,
    layout: dict[str, Any],
    classes: str | None,
    size: int | None,
    fit: Fit,
    channels: Channels,
    seed: int,
) -> Any:
    """Settings of the data set `folder`. layout: of `_layout`."""
    from lvlmva_core.datasets.folder import Folder

    if size is None:
        raise InputError("--size: is missing; give the pixels a side that the model was trained on, e.g. 224")
    return Folder(
        root=str(images),
        **layout,
        classes=_names(classes),
        image_size=size,
        fit=fit,
        channels=channels,
        seed=seed,
        on_bad_file="leave_out",
    )


def _stated(
    model: str, checkpoint: Path | None, checkpoint_key: str | None, classes: str | None, normalisation: str | None
) -> Any:
    """Settings of a model that was trained elsewhere."""
    from pydantic import ValidationError

    from lvlmva_core.train_settings import Checkpoint

    if checkpoint is None and (":" not in model or model.startswith(("torchvision:", "timm:"))):
        raise InputError("--checkpoint: is missing; name the file of the trained weights")
    try:
        return Checkpoint.model_validate(
            {
                "from": "checkpoint",
                "model": model,
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "checkpoint_key": checkpoint_key,
                "classes": _names(classes),
                "normalisation": _scaling(normalisation),
            }
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = str(first["loc"][0]) if first["loc"] else "model"
        raise InputError(f"--{place.replace('_', '-')}: {first['msg'].removeprefix('Value error, ')}") from None


def _names(classes: str | None) -> list[str]:
    if classes is None:
        raise InputError(
            "--classes: is missing; name the classes in the order of the model's logits, e.g. benign,malignant "
            "(another order makes every finding wrong without an error)"
        )
    return [name.strip() for name in classes.split(",")]


def _scaling(text: str | None) -> Any:
    """A name of a normalisation, or numbers for mean and std."""
    if text is None or "/" not in text:
        return text
    mean, _, std = text.partition("/")
    try:
        return {"mean": [float(each) for each in mean.split(",")], "std": [float(each) for each in std.split(",")]}
    except ValueError:
        raise InputError(
            f"--normalisation {text}: expected numbers, e.g. 0.5,0.5,0.5/0.2,0.2,0.2, or one of none, imagenet, half, "
            "bytes"
        ) from None


def _as_options(message: str) -> str:
    """An error of the library in the words of this command."""
    for setting, option in OPTIONS.items():
        message = message.replace(setting, option)
    return message
