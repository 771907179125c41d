"""`lvlmva export`: the aligned model as files for others, each loaded again and compared, with its card."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlmva.params import Params, load_params
from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError

FORMATS = ("safetensors", "program", "onnx")
PICTURES = 64  # on which each file is compared


def export(
    out: Annotated[Path, typer.Option(help="the folder to write")] = Path("export"),
    method: Annotated[str, typer.Option(help="whose model: lvlm_va, another of `methods`, or base")] = "lvlm_va",
    seed: Annotated[str | None, typer.Option(help="which of its models; by default the first")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="safetensors, program (torch.export), onnx; may be repeated")
    ] = None,
    name: Annotated[str | None, typer.Option(help="on the card; by default the data set's and the method's")] = None,
    params: Annotated[Path, typer.Option(help="the project's settings")] = Path("params.yaml"),
) -> None:
    """Write the aligned model with its card, and say how far each file is from the model.

    Every format holds the normalisation: pictures in [0, 1] go in, logits come out. `dvc repro` must have run.
    """
    import torch

    from lvlmva_core.arrays import read_attrs
    from lvlmva_core.export import card, compare_models, export_onnx, export_program
    from lvlmva_core.models import load_checkpoint
    from lvlmva_core.samples import read_samples, rows_of_split
    from lvlmva_core.splits import read_sample_rows

    chosen = formats or list(FORMATS)
    if unknown := [each for each in chosen if each not in FORMATS]:
        raise InputError(f"--format {unknown[0]}: expected one of {', '.join(FORMATS)}")
    known = {key: Path(value) for key, value in paths().items()}
    loaded, device = load_params(params), torch.device("cpu")
    checkpoint, seed = _checkpoint(known, method, seed)
    model, spec = load_checkpoint(checkpoint, device, loaded.train.model)
    table, about = read_samples(known["samples"]), read_attrs(known["images"])
    ids = table["id"].iloc[rows_of_split(table, "test")[:PICTURES]].tolist()
    pictures = read_sample_rows(known["images"], table, ids, device).images
    out.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[], Any]] = {
        "safetensors": lambda: compare_models(
            Path(shutil.copyfile(checkpoint, out / "model.safetensors")),
            model,
            load_checkpoint(out / "model.safetensors", device, loaded.train.model)[0],
            pictures,
        ),
        "program": lambda: export_program(model, pictures, out / "model.pt2"),
        "onnx": lambda: export_onnx(model, pictures, out / "model.onnx"),
    }
    files = []
    for each in chosen:
        files.append(writers[each]())
        typer.echo(f"{files[-1].path}: at most {files[-1].difference:.1e} of the largest logit from the model")
    facts = _facts(known, table, about, loaded, method, seed)
    text = card(
        name=name or f"{about['dataset']}-{method}",
        classes=about["class_names"],
        shape=(spec.channels, spec.height, spec.width),
        files=files,
        **facts,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    typer.echo(f"{out / 'README.md'}: the card")


def _checkpoint(known: dict[str, Path], method: str, seed: str | None) -> tuple[Path, str]:
    if method == "base":
        return known["base"], ""
    folder = known["models"] / method
    there = {path.stem.removeprefix("seed="): path for path in sorted(folder.glob("seed=*.safetensors"))}
    if not there:
        raise InputError(f"{folder}: no model of '{method}' there; run `dvc repro`, or name another with --method")
    seed = seed if seed is not None else next(iter(there))
    if seed not in there:
        raise InputError(f"{folder}: no seed {seed}; there are {', '.join(there)}")
    return there[seed], seed


def _facts(known: dict[str, Path], table: Any, about: dict[str, Any], loaded: Params, method: str, seed: str) -> Any:
    """What the card says beside the files, from the pipeline's outputs."""
    import numpy as np

    from lvlmva_core.arrays import read_array, read_attrs, read_json
    from lvlmva_core.comparison import intervals_of
    from lvlmva_core.outputs import BASE, read_outputs
    from lvlmva_core.report.tables import judged_by, warning_of
    from lvlmva_core.samples import rows_of_ids

    content, masks = read_json(known["evaluation"]), read_array(known["masks"], "masks")
    ids = list(read_attrs(known["masks"])["ids"])
    masked = np.asarray(masks.any(axis=(1, 2)))
    labels = table["label"].to_numpy()[rows_of_ids(table, ids)]
    measured = []
    for each, which in ((BASE, ""), (method, seed)):
        outputs = read_outputs(known["evaluations"] / f"{each}.safetensors")
        measured.append(intervals_of(outputs, outputs.seeds.index(which), table))
    train = loaded.train
    origin = f"{train.model}, from {train.start}"
    return {
        "dataset": about["dataset"],
        "spurious_feature": about["spurious_feature"],
        "base": origin,
        "critic": judged_by(content),
        "warning": warning_of(content["verdicts"]),
        "rejected": {
            "samples": len(ids),
            "masked": int(masked.sum()),
            "area": float(masks.mean()),
            "per_class": {name: int(masked[labels == k].sum()) for k, name in enumerate(about["class_names"])},
        },
        "table": [
            {"metric": metric, "before": measured[0][metric], "after": measured[1][metric]}
            for metric in measured[1]
            if metric in measured[0]
        ],
    }
