"""A classifier as files that others can load: a torch.export program, ONNX, and the card that says what it is.

Each is loaded again and compared with the model on real pictures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lvlmva_core.errors import InputError
from lvlmva_core.models import predict_logits

TOLERANCE = 1e-4  # largest difference of a logit, as a share of the largest logit on the same pictures
INPUT, OUTPUT = "images", "logits"  # names in the ONNX file


@dataclass(frozen=True)
class Compared:
    """A written file, and the largest difference of a logit to the model's, as a share of the largest logit."""

    path: Path
    difference: float


def export_program(model: nn.Module, images: Tensor, path: Path) -> Compared:
    """Write a torch.export program for batches of any size, read it again and compare.

    Args:
        model: in eval mode, on the CPU. images: float32 (n, C, H, W) in [0, 1], n > 2, real pictures.

    Raises:
        InputError: the model cannot be exported, or the program computes something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # two pictures: a batch of one would be taken for a constant
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # what the tracer raises on a model is not bounded
        raise InputError(
            f"{path}: the model cannot be exported by torch.export ({_one_line(error)}); leave this format out with "
            "--format"
        ) from error
    torch.export.save(program, str(path))
    loaded = torch.export.load(str(path)).module()
    return Compared(path, _compare(path, model, images, lambda batch: loaded(batch).detach().numpy()))


def export_onnx(model: nn.Module, images: Tensor, path: Path) -> Compared:
    """Write ONNX for batches of any size, run it by onnxruntime and compare. Arguments and errors as `export_program`.

    Raises:
        InputError: also where the extra `onnx` is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError as error:
        raise InputError(
            f"{path}: ONNX needs {error.name}; install it with `pip install onnx onnxruntime onnxscript` (extra "
            "`onnx`), or "
            "leave this format out with --format"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.onnx.export(
            model,
            (images[:2],),
            str(path),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # what the tracer raises on a model is not bounded
        raise InputError(
            f"{path}: the model cannot be exported to ONNX ({_one_line(error)}); leave this format out with --format"
        ) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return Compared(path, _compare(path, model, images, lambda batch: session.run([OUTPUT], {INPUT: batch.numpy()})[0]))


def compare_models(path: Path, model: nn.Module, again: nn.Module, images: Tensor) -> Compared:
    """Compare a model with what was read from `path` again. Raises InputError where they differ."""
    return Compared(path, _compare(path, model, images, lambda batch: predict_logits(again, batch).numpy()))


def card(
    *,
    name: str,
    dataset: str,
    classes: Sequence[str],
    shape: Sequence[int],
    spurious_feature: str,
    base: str,
    critic: str,
    warning: str,
    rejected: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
    files: Sequence[Compared],
) -> str:
    """The model's card as Hugging Face has it: YAML for machines, then what was done, before and after, and the limits.

    Args:
        name: of the model. shape: (C, H, W) of its pictures. base: how the base model came about.
        critic: who judged. warning: what must be said first where stand-ins judged, or "".
        rejected: samples, masked, area (share of a picture), per_class (class -> samples with a rejected region).
        table: rows with metric, before, after; both (value, low, high).
        files: what was written, each compared with the model.
    """
    results = [
        {"type": row["metric"], "name": f"{row['metric']} (test)", "value": round(float(row["after"][0]), 4)}
        for row in table
    ]
    head = {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "lvlm-va", "right-for-the-right-reasons"],
        "model-index": [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": dataset, "type": dataset},
                        "metrics": results,
                    }
                ],
            }
        ],
    }
    channels, height, width = shape
    lines = ["---", json.dumps(head, indent=1, ensure_ascii=False), "---", f"# {_escaped(name)}", ""]
    lines += [f"**{warning}**", ""] if warning else []
    lines += [
        f"A classifier of {_escaped(', '.join(classes))}, aligned by LVLM-VA (arXiv 2512.21985): regions that a critic "
        "rejected lost their influence on its predictions.",
        "",
        "## Use",
        f"Pictures of {channels} x {height} x {width} (channels, height, width), float32 in [0, 1]; normalisation is a "
        "layer of the model. It returns logits in the order of the classes above.",
        "",
        "| file | largest difference to the model, as a share of the largest logit |",
        "| --- | --- |",
        *(f"| {each.path.name} | {each.difference:.1e} |" for each in files),
        "",
        f"Each file was loaded again and compared on real pictures; at most {TOLERANCE:g} was allowed.",
        "",
        "## Data and training",
        f"- Data set: {_escaped(dataset)}. Spurious feature, as far as it is known: {_escaped(spurious_feature)}.",
        f"- Base model: {_escaped(base)}.",
        f"- Verdicts: {_escaped(critic)}.",
        f"- Rejected: a region in {rejected['masked']} of {rejected['samples']} alignment samples "
        f"({_escaped(', '.join(f'{k}: {n}' for k, n in rejected['per_class'].items()))}); on average "
        f"{100 * rejected['area']:.1f} % of a picture.",
        "",
        "## Before and after",
        "Test split, with 95 % bootstrap intervals over pictures; they say nothing of other seeds or other data.",
        "",
        "| | base model | this model |",
        "| --- | --- | --- |",
        *(f"| {row['metric']} | {_interval(row['before'])} | {_interval(row['after'])} |" for row in table),
        "",
        "Reliance: the fall of the true class's logit when rejected content of other classes is put into a picture, "
        "less "
        "the fall when its own class fills the same place, as a share of the logit's typical size (an extension; 0 = "
        "none).",
        "",
        "## Limits",
        "- What the critic did not see, or accepted, was not removed; a shortcut that is no region (colour, blur) is "
        "not "
        "touched.",
        "- The figures hold for pictures like those of the test split. Measure on your own before you rely on them.",
        "- It was not examined for use on patients.",
        "",
    ]
    return "\n".join(lines)


def _compare(path: Path, model: nn.Module, images: Tensor, again: Callable[[Tensor], np.ndarray]) -> float:
    """In one batch and one by one, so that a fixed batch size is noticed."""
    expected = predict_logits(model, images).numpy()
    found = again(images)
    single = np.concatenate([again(images[n : n + 1]) for n in range(min(3, len(images)))])
    scale = float(np.abs(expected).max()) + 1e-12
    difference = (
        max(float(np.abs(found - expected).max()), float(np.abs(single - expected[: len(single)]).max())) / scale
    )
    if not difference <= TOLERANCE:
        raise InputError(
            f"{path}: loaded again it differs from the model by {difference:.1e} of the largest logit, more than "
            f"{TOLERANCE:g}; leave this format out with --format"
        )
    return difference


def _interval(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _escaped(text: str) -> str:
    """Text that others wrote, so that it is neither markup nor a second line."""
    flat = " ".join(text.split())
    for sign in "\\`*_<>|[]":
        flat = flat.replace(sign, f"&#{ord(sign)};")
    return flat


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
