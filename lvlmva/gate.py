"""`lvlmva gate`: whether a new checkpoint relies on what was rejected before, for scripts (an extension)."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlmva.params import load_params
from lvlmva.pipeline import paths
from lvlmva_core.errors import InputError


def gate(
    model: Annotated[Path, typer.Option(help="the checkpoint to test")],
    reliance_at_most: Annotated[float, typer.Option(min=0.0, help="the largest reliance that passes, e.g. 0.1")],
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
    params: Annotated[Path, typer.Option(help="the project's settings")] = Path("params.yaml"),
) -> None:
    """Fail (exit code 1) when a checkpoint relies on what was rejected before.

    Reliance: rejected regions of alignment samples are put into test pictures of other classes; how far the logit of
    the true class falls, less than when its own class fills the same place, as a share of that logit's typical size.
    The interval is a 95 % bootstrap over pictures; the value decides, not its interval. The base model and the aligned
    one are shown beside it. The checkpoint is one of ours, or, with `train.from: checkpoint`, read as that one is.
    """
    rows = measure_reliance(model, params)
    found = rows[-1]
    passed = found["reliance"] <= reliance_at_most
    if as_json:
        typer.echo(json.dumps({"passed": passed, "reliance_at_most": reliance_at_most, "models": rows}, indent=2))
    else:
        typer.echo(f"{'model':40}{'reliance':>10}  95 % interval      accuracy")
        for row in rows:
            interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
            typer.echo(f"{row['model'][-40:]:40}{row['reliance']:10.3f}  {interval:18} {row['accuracy']:.3f}")
        said = "at most" if passed else "more than"
        typer.echo(f"{'passed' if passed else 'FAILED'}: {said} {reliance_at_most:g} on {found['pictures']} pictures")
    if not passed:
        raise typer.Exit(1)


def measure_reliance(model: Path, params: Path) -> list[dict[str, Any]]:
    """Reliance on what was rejected and accuracy on the test split: of the base model, the aligned one, and `model`.

    Raises:
        InputError: the checkpoint does not fit, the pipeline's outputs are missing, or nothing was rejected.
    """
    import torch

    from lvlmva_core.arrays import read_array, read_attrs
    from lvlmva_core.evaluation import Rejected
    from lvlmva_core.exchange import run_trial
    from lvlmva_core.foreign import is_ours, load_foreign
    from lvlmva_core.metrics import reliance_on_rejected
    from lvlmva_core.models import load_checkpoint
    from lvlmva_core.progress import track
    from lvlmva_core.samples import read_class_names, read_samples
    from lvlmva_core.splits import read_sample_rows, read_split
    from lvlmva_core.statistics import bootstrap_interval
    from lvlmva_core.train_settings import Checkpoint
    from lvlmva_core.training import accuracy

    known = {key: Path(value) for key, value in paths().items()}
    loaded, device = load_params(params), torch.device("cpu")
    table = read_samples(known["samples"])
    test = read_split(known["images"], table, "test", device)
    judged = read_sample_rows(known["images"], table, list(read_attrs(known["masks"])["ids"]), device)
    masks = torch.from_numpy(read_array(known["masks"], "masks"))
    trial = Rejected(judged, masks, loaded.exchange).trial(test)
    if trial is None:
        raise InputError(
            f"{known['masks']}: nothing was rejected, so that there is nothing to rely on; run `dvc repro mask`"
        )
    base, spec = load_checkpoint(known["base"], device, loaded.train.model)
    candidates = {"base model": base}
    if aligned := sorted((known["models"] / "lvlm_va").glob("seed=*.safetensors")):
        candidates[f"aligned ({aligned[0].stem})"] = load_checkpoint(aligned[0], device, loaded.train.model)[0]
    if isinstance(loaded.train, Checkpoint) and not is_ours(model):
        settings = loaded.train.model_copy(update={"checkpoint": str(model)})
        tested = load_foreign(settings, test.images[:64], read_class_names(known["images"])).model
    else:
        tested, own = load_checkpoint(model, device, loaded.train.model)
        shapes = [(each.channels, each.height, each.width, each.n_classes) for each in (own, spec)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{model}: for pictures and classes {shapes[0]}, those here are {shapes[1]} (channels, height, width, "
                "classes); test it in its own project"
            )
    candidates[str(model)] = tested
    rows = []
    for name, candidate in track(candidates.items(), "gate", total=len(candidates)):
        found = run_trial(candidate, test, judged.images, masks, trial, loaded.exchange.batch_size)
        low, high = bootstrap_interval(found, reliance_on_rejected, seed=loaded.exchange.seed)
        rows.append(
            {
                "model": name,
                "reliance": reliance_on_rejected(found),
                "low": low,
                "high": high,
                "accuracy": accuracy(candidate, test.images, test.labels),
                "pictures": len(found),
            }
        )
    return rows
