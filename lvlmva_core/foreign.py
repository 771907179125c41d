"""Classifiers that were trained elsewhere: their files, what can be wrong with them, and how they become ours.

A file is read as tensors only; what it says is never run. Everything that is changed on the way is said in a note.
"""

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lvlmva_core.checkpoints import is_users
from lvlmva_core.errors import InputError
from lvlmva_core.models import (
    ModelSpec,
    build_network,
    last_linear_place,
    load_checkpoint,
    normalised,
    predict_logits,
    timm_defaults,
    users_function,
    with_head,
)
from lvlmva_core.train_settings import NORMALISATIONS

if TYPE_CHECKING:
    from lvlmva_core.train_settings import Checkpoint

# entries that hold a model's tensors, by the layouts of timm, Lightning and common training scripts; averaged first
LAYOUTS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model_state", "model", "net")
PREFIXES = ("module.", "model.", "net.", "network.", "backbone.", "_orig_mod.")  # of wrappers: DDP, Lightning, compile
NAMED = 3  # tensors that an error names
TOLERANCE = 1e-3  # of the largest logit: two runs, or a sample alone and among others, differ by less
LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Foreign:
    """A classifier in eval mode on the CPU, float32, its logits in the data's order of classes; what was changed."""

    model: nn.Module
    spec: ModelSpec
    notes: list[str]


def load_foreign(
    settings: "Checkpoint", images: Tensor, class_names: Sequence[str], root: Path | None = None
) -> Foreign:
    """Build the classifier that `settings` describe and make it one of ours.

    Args:
        images: float32 (n, C, H, W) in [0, 1], n > 2: real pictures that it is tried on, at the prepared size.
        class_names: of the data, in the order of its labels.
        root: folder under which the files of "package.module:function" lie; None = the current folder.

    Raises:
        InputError: the file, the network or what it returns cannot be used; the message names it and the remedy.
    """
    order = class_order(settings.classes, class_names)
    channels, height, width = images.shape[1:]
    _check_size(settings, height, width)
    notes: list[str] = []
    if settings.checkpoint is not None and (own := _own_spec(Path(settings.checkpoint).expanduser())) is not None:
        return _one_of_ours(settings, own, images, order)
    spec = _spec(settings, channels, height, width, len(class_names), root)
    tensors = None
    if settings.checkpoint is not None:
        tensors, said = read_tensors(Path(settings.checkpoint).expanduser(), settings.checkpoint_key)
        notes += said
        spec = _fitted(spec, settings, tensors)
    net, default = build_network(spec, settings.model)
    net, said = _float32_on_cpu(net, settings.model)
    notes += said
    if tensors is not None:
        notes += _load(net, tensors, f"train.checkpoint: {settings.checkpoint}", settings.model)
    model = normalised(net.eval(), spec, default)
    check_outputs(model, images, len(class_names), settings.model)
    model, spec, said = _finished(model, spec, images, order, settings.classes)
    return Foreign(model.eval(), spec, notes + said)


def initial_spec(name: str, shape: Sequence[int], n_classes: int, hidden: int) -> ModelSpec:
    """The spec of a model that is to be trained here on pictures of shape (C, H, W)."""
    channels, height, width = shape
    code = users_function(name, Path.cwd())[1] if is_users(name) else None
    return ModelSpec(name, channels, height, width, n_classes, hidden, code=code)


def read_tensors(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Name -> tensor of a checkpoint file, and notes on which part of it was taken. No code in the file is run.

    Args:
        path: .safetensors, or what torch.save wrote: a state dict, or a dict that holds one (Lightning, timm, ...).
        key: the entry that holds it; None = the first of LAYOUTS that is there.

    Raises:
        InputError: no such file, not readable as tensors only, or it holds no state dict.
    """
    where = f"train.checkpoint: {path}"
    content = _content(path, where)
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: holds {type(content).__name__}, expected names to tensors; save model.state_dict()")
    notes = []
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            raise InputError(
                f"{where}: has no entry '{key}' with tensors; it has {_some(map(str, content))}: set "
                "train.checkpoint_key"
            )
        content = content[key]
        notes.append(f"took the entry '{key}'")
    elif not _is_state(content):
        there = [name for name in LAYOUTS if isinstance(content.get(name), Mapping) and _is_state(content[name])]
        if not there:
            raise InputError(
                f"{where}: no state dict in it (its entries: {_some(map(str, content))}); save model.state_dict(), or "
                "name the entry in train.checkpoint_key"
            )
        content = content[there[0]]
        beside = f", beside {', '.join(there[1:])} (train.checkpoint_key chooses)" if there[1:] else ""
        notes.append(f"took the entry '{there[0]}'{beside}")
    if not _is_state(content):
        raise InputError(f"{where}: the entry '{key}' holds other things than tensors; name another")
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    bad = [name for name, each in tensors.items() if each.is_floating_point() and not bool(torch.isfinite(each).all())]
    if bad:
        raise InputError(
            f"{where}: tensors that are not finite: {_some(bad)}; the training broke down, take an earlier one"
        )
    low = sorted({str(each.dtype).removeprefix("torch.") for each in tensors.values() if each.dtype in LOW_PRECISION})
    if low:
        notes.append(f"turned {', '.join(low)} into float32")
    return {n: each.float() if each.is_floating_point() else each for n, each in tensors.items()}, notes


def fit_names(tensors: Mapping[str, Tensor], expected: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names that a network expects, and notes on prefixes taken off and tensors left out.

    Of all chains of PREFIXES that a name begins with, that is taken off which makes most names fit, of equal ones the
    shortest; tensors that stand outside it (a loss's weights, a second network) are left out then.
    """
    wanted, chains = set(expected), {""}
    for name in tensors:
        taken = ""
        while prefix := next((each for each in PREFIXES if name[len(taken) :].startswith(each)), None):
            taken += prefix
            chains.add(taken)
    fits = {chain: sum(n.startswith(chain) and n[len(chain) :] in wanted for n in tensors) for chain in chains}
    chain = max(sorted(chains, key=len), key=lambda each: fits[each])
    if not chain:
        return dict(tensors), []
    notes = [f"took the prefix '{chain}' off the tensors' names"]
    if outside := sorted(name for name in tensors if not name.startswith(chain)):
        notes.append(f"left out what stands outside '{chain}': {_some(outside)}")
    return {name[len(chain) :]: tensor for name, tensor in tensors.items() if name.startswith(chain)}, notes


def check_outputs(model: nn.Module, images: Tensor, n_classes: int, name: str) -> Tensor:
    """Run a model in eval mode on pictures and refuse what is no logits; returns them as it gave them.

    Args:
        images: float32 (n, C, H, W), n > 2. n_classes: that the data has. name: of the model, for messages.

    Raises:
        InputError: it fails, returns no tensor, not one row a sample, another number of classes, probabilities, what is
            not finite, or what differs between two runs (dropout left on) or depends on the other samples of a batch.
    """
    place = f"train.model: '{name}'"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            logits = model(images)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise InputError(
                f"{place} cannot take pictures of shape {tuple(images.shape[1:])} ({_one_line(error)}); set "
                "train.channels "
                "and prepare.image_size to what it was trained on"
            ) from error
        logits = _tensor(logits, place, len(images), n_classes)
        again = model(images).reshape(logits.shape)
        apart = model(images[:2]).reshape(2, -1)
    scale = float(logits.abs().max()) + 1e-12
    if not bool(torch.isfinite(logits).all()):
        raise InputError(f"{place} returns values that are not finite; check its weights and train.normalisation")
    if float((again - logits).abs().max()) > TOLERANCE * scale:
        raise InputError(
            f"{place} gives other values each time it is run in eval mode, as with dropout left on; use nn.Dropout, or "
            "functional.dropout(..., training=self.training)"
        )
    if float((apart - logits[:2]).abs().max()) > TOLERANCE * scale:
        raise InputError(
            f"{place} gives a picture other values among other pictures, as with BatchNorm without running "
            "statistics; set track_running_stats and train it so"
        )
    _refuse_probabilities(logits, place, len(images))
    return logits


def class_order(classes: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """For each class of the data, which logit is its own.

    Args:
        classes: names in the order of the logits. class_names: names in the order of the labels.

    Raises:
        InputError: the names are not the same.
    """
    absent = [name for name in class_names if name not in classes]
    spare = [name for name in classes if name not in class_names]
    if absent or spare:
        what = [f"lacks {', '.join(absent)}"] * bool(absent) + [f"has {', '.join(spare)} besides"] * bool(spare)
        raise InputError(
            f"train.classes {' and '.join(what)}; the data's classes are {', '.join(class_names)}: name the same "
            "ones in "
            "the order of the model's logits"
        )
    return [list(classes).index(name) for name in class_names]


def _content(path: Path, where: str) -> Any:
    if not path.is_file():
        raise InputError(f"{where}: no such file; put it there, or change the setting")
    if path.stat().st_size == 0:
        raise InputError(f"{where}: the file is empty; copy it again")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        if zipfile.is_zipfile(path) and any("constants.pkl" in name for name in zipfile.ZipFile(path).namelist()):
            raise InputError(
                f"{where}: a TorchScript program, not weights; save model.state_dict() from the Python model"
            )
        # timm writes the training's arguments beside the tensors; a Namespace holds names and values and runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{where}: holds Python objects beside tensors ({_object_in(error)}), which could run code and are not "
            "read; "
            "where you trust it, save torch.save(model.state_dict(), FILE) and name that file"
        ) from error
    except Exception as error:  # what the readers raise on damaged files is not bounded
        raise InputError(f"{where}: not a readable checkpoint ({_one_line(error)}); copy it again") from error


def _object_in(error: BaseException) -> str:
    """The name of the object that the reader stopped at."""
    words = [word.strip("`'.,") for word in str(error).split()]
    return next((words[n + 1] for n, word in enumerate(words[:-1]) if word == "GLOBAL"), "see torch.load, weights_only")


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(each, Tensor) for each in content.values())


def is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint that this software wrote."""
    return _own_spec(path) is not None


def _own_spec(path: Path) -> ModelSpec | None:
    """The spec of a checkpoint that this software wrote; None for any other file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            stated = json.loads((file.metadata() or {}).get("lvlmva", "{}"))
    except (SafetensorError, OSError, ValueError):
        return None  # `read_tensors` says what is wrong with it
    return ModelSpec.from_facts(stated["spec"]) if "spec" in stated else None


def _one_of_ours(settings: "Checkpoint", own: ModelSpec, images: Tensor, order: list[int]) -> Foreign:
    assert settings.checkpoint is not None
    shape = (own.channels, own.height, own.width)
    if own.name != settings.model or own.n_classes != len(order) or shape != tuple(images.shape[1:]):
        raise InputError(
            f"train.checkpoint: {settings.checkpoint}: of model '{own.name}' for {own.n_classes} classes and "
            "pictures of "
            f"shape {shape}; train.model is '{settings.model}', the data has {len(order)} classes and "
            f"{tuple(images.shape[1:])}"
        )
    model, _ = load_checkpoint(Path(settings.checkpoint).expanduser(), torch.device("cpu"), settings.model)
    notes = ["a checkpoint of this software: its normalisation is taken from the file"]
    check_outputs(model, images, len(order), settings.model)
    model, spec, said = _finished(model, own, images, order, settings.classes)
    return Foreign(model.eval(), spec, notes + said)


def _spec(
    settings: "Checkpoint", channels: int, height: int, width: int, n_classes: int, root: Path | None
) -> ModelSpec:
    """What is known before the file is read: input and normalisation."""
    name = settings.model
    inside = settings.channels or (channels if is_users(name) or name in ("mlp", "small_resnet") else 3)
    if channels not in (1, inside):
        raise InputError(
            f"train.channels: the network takes {inside}, the pictures have {channels}; prepare them so, or correct it"
        )
    given = settings.normalisation
    if given is None:
        known = timm_defaults(name.removeprefix("timm:"))
        mean, std = tuple(known["mean"]), tuple(known["std"])
    elif isinstance(given, str):
        mean, std = NORMALISATIONS[given]
    else:
        mean, std = tuple(given.mean), tuple(given.std)
    if len(mean) != inside and inside == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)  # as timm does for grey pictures
    if len(mean) == 1:
        mean, std = mean * inside, std * inside
    if len(mean) != inside:
        raise InputError(f"train.normalisation: {len(mean)} numbers for a network of {inside} channels; give {inside}")
    plain = is_users(name) or name in ("mlp", "small_resnet")
    wrapped = not (plain and given == "none" and channels == inside and settings.channel_order == "rgb")
    if settings.channel_order == "bgr" and inside != 3:
        raise InputError(f"train.channel_order: bgr needs three channels, the network has {inside}; set it to rgb")
    return ModelSpec(
        name=name,
        channels=channels,
        height=height,
        width=width,
        n_classes=n_classes,
        hidden=settings.hidden,
        mean=mean if wrapped else None,
        std=std if wrapped else None,
        bgr=settings.channel_order == "bgr",
        net_channels=None if plain or inside == 3 else inside,
        code=users_function(name, root or Path.cwd())[1] if is_users(name) else None,
    )


def _check_size(settings: "Checkpoint", height: int, width: int) -> None:
    size = settings.input_size
    if size is None and settings.model.startswith("timm:"):
        known = timm_defaults(settings.model.removeprefix("timm:"))
        size = list(known["input_size"][1:]) if known.get("fixed_input_size") else None
    if size is not None and tuple(size) != (height, width):
        raise InputError(
            f"train.input_size: the model was made for {size[0]}x{size[1]}, the pictures are prepared at "
            f"{height}x{width}; set prepare.image_size to {size[0]}, or train.input_size to null if any size will do"
        )


def _fitted(spec: ModelSpec, settings: "Checkpoint", tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The spec with the number of logits that the file's last layer has, where the architecture has one."""
    if is_users(spec.name):
        return spec
    net, _ = build_network(spec)
    if not any(isinstance(module, nn.Linear) for module in net.modules()):
        return spec
    found, _ = fit_names(tensors, list(net.state_dict()))
    head = found.get(f"{last_linear_place(net)[0]}.weight")
    if head is None or head.ndim != 2 or head.shape[0] == spec.n_classes:
        return spec
    if head.shape[0] == 1 and spec.n_classes == 2:
        return replace(spec, logits=1)
    raise InputError(
        f"train.checkpoint: {settings.checkpoint}: its last layer has {head.shape[0]} logits, the data has "
        f"{spec.n_classes} classes; take a checkpoint that was trained on them, or train from these with `from: "
        "weights`"
    )


def _float32_on_cpu(net: nn.Module, name: str) -> tuple[nn.Module, list[str]]:
    parts = [*net.parameters(), *net.buffers()]
    if any(each.is_meta for each in parts):
        raise InputError(
            f"train.model: '{name}' has weights on the meta device, which hold no values; build it on the CPU"
        )
    devices = sorted({each.device.type for each in parts} - {"cpu"})
    kinds = sorted({str(each.dtype).removeprefix("torch.") for each in parts if each.dtype in LOW_PRECISION})
    notes = [f"moved from {', '.join(devices)} to the CPU"] * bool(devices)
    notes += [f"the network turned from {', '.join(kinds)} into float32"] * bool(kinds)
    return net.to(device="cpu", dtype=torch.float32), notes


def _load(net: nn.Module, tensors: Mapping[str, Tensor], where: str, name: str) -> list[str]:
    expected = net.state_dict()
    found, notes = fit_names(tensors, list(expected))
    counters = [each for each in expected if each.endswith("num_batches_tracked") and each not in found]
    missing = sorted(set(expected) - set(found) - set(counters))
    spare = sorted(set(found) - set(expected))
    shapes = [
        f"{each} {tuple(found[each].shape)} for {tuple(expected[each].shape)}"
        for each in sorted(set(expected) & set(found))
        if found[each].shape != expected[each].shape
    ]
    kinds = [
        each
        for each in sorted(set(expected) & set(found))
        if expected[each].is_floating_point() and not found[each].is_floating_point()
    ]
    parts = [
        f"{len(each)} {what}: {_some(each)}"
        for what, each in (("missing", missing), ("spare", spare), ("misshapen", shapes), ("not floating", kinds))
        if each
    ]
    if parts:
        raise InputError(
            f"{where}: does not fit model '{name}' ({'; '.join(parts)}); name the architecture that it was trained "
            "as, or a "
            "function of a file of yours that builds it"
        )
    net.load_state_dict({**{each: expected[each] for each in counters}, **found})
    return notes


def _tensor(output: Any, place: str, rows: int, n_classes: int) -> Tensor:
    if isinstance(output, Mapping):
        raise InputError(
            f"{place} returns a dict with {_some(map(str, output))}; return its logits alone, from a function of "
            "your own"
        )
    if not isinstance(output, Tensor):
        inside = f" of {len(output)}" if isinstance(output, (tuple, list)) else ""
        raise InputError(
            f"{place} returns a {type(output).__name__}{inside}; return its logits alone, from a function of your own"
        )
    if output.shape == (rows,) and n_classes == 2:
        return output[:, None]
    if output.ndim != 2 or len(output) != rows:
        raise InputError(
            f"{place} returns {tuple(output.shape)} for {rows} pictures, expected logits ({rows}, {n_classes})"
        )
    if output.shape[1] != n_classes and (output.shape[1], n_classes) != (1, 2):
        raise InputError(
            f"{place} returns {output.shape[1]} logits, the data has {n_classes} classes; take a model that was "
            "trained on "
            "them"
        )
    return output


def _refuse_probabilities(logits: Tensor, place: str, rows: int) -> None:
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    if inside and (logits.shape[1] == 1 or bool((logits.sum(1) - 1).abs().max() < 1e-3)):
        what = "lie in [0, 1]" if logits.shape[1] == 1 else "lie in [0, 1] and add up to 1"
        raise InputError(
            f"{place} returns probabilities (its values on {rows} pictures {what}); return what stands before "
            "softmax or "
            "sigmoid"
        )


def _finished(
    model: nn.Module, spec: ModelSpec, images: Tensor, order: list[int], classes: Sequence[str]
) -> tuple[nn.Module, ModelSpec, list[str]]:
    """The model with K logits in the data's order that come out of a linear layer; what that took."""
    before = predict_logits(model, images)
    before = before[:, None] if before.ndim == 1 else before
    notes = []
    one = before.shape[1] == 1
    wanted = torch.cat([-before / 2, before / 2], 1) if one else before
    if one:
        notes.append(f"one logit z turned into two, -z/2 for '{classes[0]}' and z/2 for '{classes[1]}'")
    wanted = wanted[:, order]
    if order != sorted(order):
        notes.append(f"logits put from {', '.join(classes)} into the data's order of classes")
    place = _linear_end(model, images)
    if place is not None:
        layer = model.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        bias = torch.zeros(len(weight)) if bias is None else bias
        spec = replace(spec, head="split", logits=1) if one else spec
        model = with_head(model, spec) if one else model
        layer = model.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        if one:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        with torch.no_grad():
            layer.weight.copy_(weight[order])
            if layer.bias is not None:
                layer.bias.copy_(bias[order])
    else:
        spec = replace(spec, head="appended", logits=1 if one else None)
        model = with_head(model, spec)
        matrix = torch.tensor([[-0.5], [0.5]]) if one else torch.eye(len(order))
        with torch.no_grad():
            model.head.weight.copy_(matrix[order])  # type: ignore[union-attr, operator]
            model.head.bias.zero_()  # type: ignore[union-attr, operator]
        notes.append("a linear layer put behind the network, which does not end in one")
    found = predict_logits(model.eval(), images)
    if float((found - wanted).abs().max()) > TOLERANCE * (float(wanted.abs().max()) + 1e-12):
        raise InputError(
            f"train.model: '{spec.name}' does not compute the same after its last layer was changed; return its "
            "logits from "
            "an nn.Linear that is used once"
        )
    return model, spec, notes


def _linear_end(model: nn.Module, images: Tensor) -> str | None:
    """Name of the linear layer whose output is the model's, or None."""
    places = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not places:
        return None
    seen: list[Tensor] = []
    handle = model.get_submodule(places[-1]).register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        with torch.no_grad():
            logits = model(images[:2])
    finally:
        handle.remove()
    whole = len(seen) == 1 and seen[0].shape == logits.shape and torch.equal(seen[0], logits)
    return places[-1] if whole else None


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:NAMED]) + (f" and {len(listed) - NAMED} more" if len(listed) > NAMED else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
