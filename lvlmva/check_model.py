"""`lvlmva check-model`: whether the classifier that params name can be used, before anything is paid for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from lvlmva.params import load_params
from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it passed, and what was found, or what is wrong and the remedy."""

    name: str
    passed: bool
    message: str


def check_model(params: Path, images: Path, samples: Path) -> list[Finding]:
    """Try the model that `train` names on the prepared pictures; after a failure the later ones are not tried.

    Raises:
        InputError: params or the prepared pictures cannot be read.
    """
    import torch

    from lvlmva_core.classifier_check import check_classifier, check_differentiation
    from lvlmva_core.foreign import initial_spec, load_foreign
    from lvlmva_core.models import build_model
    from lvlmva_core.samples import read_class_names, read_samples
    from lvlmva_core.splits import read_split
    from lvlmva_core.train_settings import Checkpoint

    config = load_params(params).train
    table, classes, device = read_samples(samples), read_class_names(images), torch.device("cpu")
    splits = {split: read_split(images, table, split, device) for split in sorted(table["split"].unique())}
    probe = splits["train"].images[:64]
    findings = []
    try:
        if isinstance(config, Checkpoint):
            found = load_foreign(config, probe, classes)
            model = found.model
            findings.append(Finding("model", True, "; ".join(found.notes) or f"{config.model} fits its checkpoint"))
        else:
            spec = initial_spec(config.model, probe.shape[1:], len(classes), config.hidden)
            model = build_model(spec, config.seed, config.model).eval()
            findings.append(Finding("model", True, f"{config.model}, to be trained"))
    except InputError as error:
        return [Finding("model", False, str(error))]
    try:
        check_differentiation(model, probe)
        findings.append(Finding("layers", True, "each has an exact attribution rule, and a second derivative"))
    except InputError as error:
        findings.append(Finding("layers", False, str(error)))
    if isinstance(config, Checkpoint):
        result = check_classifier(model, splits, classes, config.expected_accuracy)
        reached = ", ".join(f"{split} {value:.3f}" for split, value in result.accuracy.items())
        wrong = "; ".join(result.implausible)
        findings.append(Finding("accuracy", not wrong, f"implausible: {wrong}" if wrong else reached))
        best = result.better[0] if result.better else None
        message = "no other normalisation or order of classes fits better"
        if best is not None:
            message = (
                f"{best.accuracy:.3f} instead of {result.as_set.accuracy:.3f} on the same pictures with "
                f"{_changes(best.normalisation, best.channel_order)}{_order(best.classes, classes, config.classes)}; "
                "correct params.yaml"
            )
        findings.append(Finding("reading", best is None, message))
    return findings


def check_model_command(
    params: Annotated[Path, typer.Option(help="the project's settings")] = Path("params.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Check the classifier that params name: its file, layers, accuracy, order of classes and scaling; 1 if it "
    "fails."""
    known = paths()
    findings = check_model(params, Path(known["images"]), Path(known["samples"]))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in findings], indent=2, ensure_ascii=False))
    else:
        for each in findings:
            typer.echo(f"{'ok  ' if each.passed else 'FAIL'}  {each.name:10}{each.message}")
    if not all(each.passed for each in findings):
        raise typer.Exit(1)


def _changes(normalisation: str, channel_order: str) -> str:
    if normalisation == "as set":
        return "the normalisation as set"
    if normalisation == "imagenet_bytes":
        return f"train.normalisation {{mean: ImageNet's, std: [1/255, 1/255, 1/255]}}, channel_order {channel_order}"
    return f"train.normalisation {normalisation}, channel_order {channel_order}"


def _order(logits: list[str], class_names: list[str], stated: list[str]) -> str:
    """The order of classes to state; `logits` is in the order of the model as it was set."""
    if logits == class_names:
        return ""
    # logit k of the model as set is that of class_names[k]; in the file it stands where `stated` has that name
    other = dict(zip(class_names, logits, strict=True))
    return f" and train.classes [{', '.join(other[name] for name in stated)}]"
