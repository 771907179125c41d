"""`lvlmva new`: a data set and a model of the user's become a preset and a folder of prompts (an extension)."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlmva.pipeline import paths
from lvlmva.preset import preset
from lvlmva.roots import local_copy
from lvlmva_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from lvlmva_core.datasets.guess import ColumnGuess

NAME = re.compile(r"[a-z0-9_]+")
ON_A_CPU = 64  # pixels a side that are suggested for a model that is trained here
PUBLISHED = 224  # and at most for one that is brought along


def new(
    name: Annotated[str, typer.Argument(help="of the experiment: small letters, digits, underscores")],
    images: Annotated[str | None, typer.Option(help="folder or tar of the pictures, here or s3://...")] = None,
    table: Annotated[str | None, typer.Option(help="CSV or parquet, a row a picture; 'none' = class folders")] = None,
    columns: Annotated[
        str | None, typer.Option(help="where the names are unusual: file=image_id,label=dx,patient=case,...")
    ] = None,
    size: Annotated[int | None, typer.Option(help="pixels a side that pictures are resized to once")] = None,
    model: Annotated[
        str | None, typer.Option(help="torchvision:NAME, timm:NAME, own.FILE:FUNCTION, or small_resnet")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="the model's trained weights; 'none' = it is trained here")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="a,b: their names in the order of the model's logits")] = None,
    normalisation: Annotated[
        str | None, typer.Option(help="what the checkpoint was trained on: imagenet, half, none or bytes")
    ] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="section.key=value, laid over it")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="take every guess, ask nothing")] = False,
    force: Annotated[bool, typer.Option("--force", help="write over a preset and prompts of that name")] = False,
    params: Annotated[Path, typer.Option(help="the file to change")] = Path("params.yaml"),
    presets: Annotated[Path, typer.Option(help="where presets lie")] = Path("presets"),
) -> None:
    """Set up an experiment on pictures of yours: asks what is not said, and suggests what it finds.

    Writes presets/NAME.yaml and prompts/NAME/specification.yaml (to be filled in), and lays the preset over params.yaml
    with the change shown. Go on with `lvlmva check`.

    Example: lvlmva new moles --images data/external/moles --table moles.csv --size 64 --model torchvision:resnet18
    --checkpoint own/moles.pth --classes benign,malignant --yes
    """
    if not NAME.fullmatch(name):
        raise InputError(f"'{name}': expected small letters, digits and underscores, e.g. my_moles")
    written = [presets / f"{name}.yaml", Path(paths().get("prompts", "prompts")) / name / "specification.yaml"]
    there = [file for file in written if file.exists()]
    if there and not force:
        raise InputError(f"{there[0]} exists; choose another name, or write over it with --force")
    said = {"images": images, "table": table, "size": size, "model": model, "checkpoint": checkpoint}
    answers = Answers({**said, "columns": columns, "classes": classes, "normalisation": normalisation}, yes)
    found = _found(answers)
    kept = {file: file.read_bytes() for file in there}
    try:
        for file, text in zip(written, (_preset_text(name, found), _specification_text(found.classes)), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        preset(name, changes=changes, params=params, presets=presets)
    except InputError:
        for file in written:
            file.unlink(missing_ok=True)
        if not any(written[1].parent.iterdir()):
            shutil.rmtree(written[1].parent)
        for file, content in kept.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        raise
    typer.echo(f"\nwritten: {written[0]} and {written[1]}")
    for line in found.notes:
        typer.echo(f"note: {line}")
    typer.echo(
        f"next: describe the pictures and each class in {written[1]}; choose a critic (`lvlmva preset critics/...`, "
        "docs/critics.md); then `lvlmva check`"
    )


@dataclass(frozen=True)
class Found:
    """All that a preset says of the pictures and the model.

    table, checkpoint: None where there is none. train: pictures of the split train by class, as far as it is known.
    """

    images: str
    table: str | None
    columns: dict[str, str]
    pattern: str | None
    size: int
    model: str
    checkpoint: str | None
    classes: list[str]
    normalisation: str | None
    train: dict[str, int]
    groups: bool
    masks: bool
    notes: list[str]


class Answers:
    """What was said as options, else asked on a terminal, else guessed with --yes."""

    def __init__(self, said: dict[str, Any], yes: bool) -> None:
        self.said = said
        self.yes = yes
        if not yes and not sys.stdin.isatty():
            needed = [name for name in ("images", "table", "size", "model", "checkpoint", "classes") if not said[name]]
            if needed:
                raise InputError(
                    f"there is no terminal to ask on: give --{', --'.join(needed)}, or --yes, which takes guesses for "
                    "all but --images"
                )

    def get(self, name: str, question: str, guess: Callable[[], Any]) -> Any:
        """The answer to a question. guess: a suggestion, None where there is none."""
        if self.said[name] is not None:
            return self.said[name]
        suggested = guess()
        if not self.yes and sys.stdin.isatty():
            return typer.prompt(question, default=suggested, type=type(suggested) if suggested is not None else str)
        if suggested is None:
            raise InputError(f"--{name} is missing, and nothing can be guessed for it; say it")
        return suggested


def _found(answers: Answers) -> Found:
    from lvlmva_core.datasets.guess import guess_size, guess_table
    from lvlmva_core.datasets.tables import classes_of, listed_tree, read_cells, read_listed, splits_of

    images = str(answers.get("images", "Folder (or tar) of the pictures", lambda: None))
    root = local_copy(images) if "://" in images else Path(images).expanduser()
    if not root.exists():
        raise InputError(f"--images {images}: nothing there; give the folder or tar archive of the pictures")
    table = _none(
        answers.get("table", "Table, a row a picture ('none': class folders)", lambda: guess_table(root) or "none")
    )
    chosen, pattern, notes = columns_said(answers.said["columns"]), None, []
    if table is not None:
        path = table_file(root, table)
        cells = read_cells(path)
        guessed = guess_with(cells, root, chosen)
        pattern = guessed.pattern
        for role, column in (("file", guessed.file), ("label", guessed.label)):
            if role not in chosen:
                chosen[role] = _asked_column(answers, role, column, list(cells.columns), path)
        chosen |= columns_said(answers.get("columns", OTHER_COLUMNS, lambda: ""))
        listed = read_listed(path, {role: chosen.get(role) for role in COLUMNS})
        notes += listed.notes
        if pattern:
            notes.append(f"files are {pattern} around the column '{chosen['file']}' (prepare.file_pattern)")
    elif root.is_dir():
        listed = listed_tree(root)
    else:
        raise InputError(f"--images {images}: without a table it must be a folder of class folders; give --table")
    found = classes_of(listed, None)[0]
    checkpoint = _none(answers.get("checkpoint", "File of the trained weights ('none': trained here)", lambda: "none"))
    if checkpoint is not None and not Path(checkpoint).expanduser().is_file():
        raise InputError(f"--checkpoint {checkpoint}: no such file; give the file of trained weights, or none")
    model = str(answers.get("model", "Model", lambda: "small_resnet" if checkpoint is None else None))
    size = answers.get("size", "Pixels a side", lambda: guess_size(root, ON_A_CPU if checkpoint is None else PUBLISHED))
    text = answers.get("classes", "Classes, in the order of the model's logits", lambda: ",".join(found))
    classes = [part.strip() for part in text.split(",")]
    if sorted(classes) != sorted(found):
        raise InputError(f"--classes {text}: the table has {', '.join(found)}; name each of these once")
    normalisation = None
    if checkpoint is not None and (answers.said["normalisation"] or not model.startswith("timm:")):
        usual = "imagenet" if model.startswith("torchvision:") else "none"
        normalisation = str(
            answers.get("normalisation", "Pixels were scaled by (imagenet, half, none, bytes)", lambda: usual)
        )
        if answers.said["normalisation"] is None:
            notes.append(f"normalisation {normalisation} is a guess; `lvlmva check` tries the others")
    rows, splits = [*listed.table["label"]], splits_of(listed)[0]
    train = Counter(
        rows if splits is None else [row for row, split in zip(rows, splits, strict=True) if split == "train"]
    )
    share = 0.7 if splits is None else 1.0
    return Found(
        images, table, chosen, pattern, size, model, checkpoint, classes, normalisation,
        {each: int(count * share) for each, count in train.items()}, listed.has("spurious"), listed.has("mask"), notes,
    )  # fmt: skip


COLUMNS = ("file", "label", "split", "spurious", "mask", "patient")
OTHER_COLUMNS = "Other columns with unusual names, e.g. split=fold,patient=case,spurious=tag,mask=tag_mask"


def _none(answer: Any) -> str | None:
    return None if str(answer).strip().casefold() in ("", "none") else str(answer)


def table_file(root: Path, table: str) -> Path:
    """The table's file: of this path, or below the pictures' folder. Raises InputError where there is none."""
    path = root / table if root.is_dir() and not Path(table).expanduser().is_file() else Path(table).expanduser()
    if not path.is_file():
        raise InputError(f"--table {table}: no such file, here or below {root}")
    return path


def guess_with(cells: "pd.DataFrame", root: Path, chosen: dict[str, str]) -> "ColumnGuess":
    """`guess_columns`, where the columns of some roles were said."""
    from lvlmva_core.datasets.guess import guess_columns

    guessed = guess_columns(cells.drop(columns=[c for c in chosen.values() if c in cells]), root)
    if "file" in chosen and chosen["file"] in cells:
        return replace(guess_columns(cells[[chosen["file"]]], root), label=guessed.label)
    return guessed


def columns_said(text: str | None) -> dict[str, str]:
    """role=column,... as a mapping. Raises InputError for another form or role."""
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    for role, separator, column in pairs:
        if not separator or not column or role.strip() not in COLUMNS:
            raise InputError(f"--columns: '{role}{separator}{column}': expected ROLE=COLUMN, of {', '.join(COLUMNS)}")
    return {role.strip(): column.strip() for role, _, column in pairs}


def _asked_column(answers: Answers, role: str, guess: str | None, there: list[str], path: Path) -> str:
    what = "picture's file" if role == "file" else "class"
    if not answers.yes and sys.stdin.isatty():
        return str(typer.prompt(f"Column of the {what} (there are {', '.join(there)})", default=guess))
    if guess is None:
        raise InputError(f"{path}: which column is the {what}? There are {', '.join(there)}; say --columns {role}=...")
    return guess


def _preset_text(name: str, found: Found) -> str:
    """The preset, with the defaults of a small data set: λ from a short grid by a rule that needs no group labels."""
    per_class = min(found.train.values(), default=1)
    n_samples = max(2, min(256, sum(found.train.values()) // 2, per_class * len(found.classes)))
    columns = {role: column for role, column in found.columns.items() if column}
    prepare = {
        "dataset": "folder",
        "name": name,
        "root": found.images,
        "table": found.table,
        **({"columns": columns} if columns else {}),
        **({"file_pattern": found.pattern} if found.pattern else {}),
        "classes": found.classes,
        "image_size": found.size,
        "seed": 0,
    }
    if found.checkpoint is None:
        train: dict[str, Any] = {"from": "scratch", "model": found.model, "hidden": 8, "learning_rate": 0.001}
        train |= {"weight_decay": 0.05, "batch_size": 64, "epochs": 30}
    else:
        train = {"from": "checkpoint", "model": found.model, "checkpoint": found.checkpoint, "classes": found.classes}
        train |= {"normalisation": found.normalisation} if found.normalisation else {}
    align = {
        "rrr_lambda": 0.01,
        "learning_rate": 0.0003 if found.checkpoint is None else 0.0001,
        "epochs": 4,
        "alignment_batch": min(24, n_samples),
        "training_batch": min(64, max(2, sum(found.train.values()) // 2)),  # a split that is still drawn may be smaller
        "batch_norm": "frozen",
        "max_gradient_norm": 1.0,
        "learning_rate_schedule": "linear",
        "selection": {"rule": "pseudo_group", "rrr_lambdas": [0.001, 0.01, 0.1], "seed": 0},
        "seeds": [0, 1, 2],
    }
    true_masks = ", rrr_gt: {}" if found.masks and found.groups else ""
    return f"""# Written by `lvlmva new {name}`. What each key means: docs/own.md. Next: `lvlmva check`.
prepare:
{_section(prepare)}
train:
{_section(train)}
rank: {{n_samples: {n_samples}, stratify: true}}
attribute: {{batch_size: 200}}
segment: {{n_regions: 7}}
# until a model is chosen (`lvlmva preset critics/...`) the stand-in `rules` answers, which knows digits alone
critique: {{prompts: {name}}}
judge: {{prompts: {name}}}
align:
{_section(align)}
# what needs group labels or true masks is not here (docs/own.md says what may be added)
methods: {{lvlm_va: {{}}, lambda_zero: {{rrr_lambda: 0.0}}, random_masks: {{}}, random_pictures: {{}}{true_masks}}}
retrained: {{}}
evaluate: {{attribution_samples: 48, robustness: false}}
"""


def _section(content: dict[str, Any]) -> str:
    """Keys as YAML, of which JSON is a part."""
    return "\n".join(f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items())


def _specification_text(classes: list[str]) -> str:
    described = "\n".join(f"  {json.dumps(each, ensure_ascii=False)}: null" for each in classes)
    return f"""# What an expert says of the pictures, in the place of each null; `lvlmva check` says what is left.
# The questions around it are prompts/generic/critic.j2 and judge.j2; a file of that name here replaces one.
picture: null   # what they are, e.g. close photographs of lesions of the skin
classes:        # of each, in a sentence or two, what shows it and where
{described}
# things that come with a class by accident; shown to the critic only with critique.name_spurious_feature: true
spurious_features: []
"""
