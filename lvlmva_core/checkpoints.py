"""Checkpoint files as they stand: the model that each is of and the digest of its weights, read without PyTorch.

To import PyTorch takes longer than all that a stage does whose records are there already.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lvlmva_core.errors import InputError

FORMAT = 1
REMEDY = "restore it with `dvc checkout`, or delete it and run `dvc repro`"
# Types that a model of ours holds, as safetensors and torch call them: floating ones are float32 in all of them, so
# that a tensor of another type would be turned into it when it is loaded.
HELD = {
    "F32": "torch.float32",
    "I64": "torch.int64",
    "I32": "torch.int32",
    "I16": "torch.int16",
    "I8": "torch.int8",
    "U8": "torch.uint8",
    "BOOL": "torch.bool",
}


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint must know to build its model: name, input (channels, height, width), classes, hidden units.

    `hidden` is the width of the MLP's hidden layer and of small_resnet's first stage; torchvision's models have theirs.

    Of models that were brought along (`lvlmva_core.foreign`): mean and std of pixels in [0, 1] for each channel of the
    network, None = the architecture's own; bgr: whether the channels are turned round before; net_channels: of the
    network's input, None = the architecture's own; logits: that the network itself has, None = n_classes; head:
    "own", "split": one logit z became (-z/2, z/2) in the last layer, "appended": a linear layer behind the network does
    so, or reorders the classes; code: sha256 of the user's files that build the network.
    """

    name: str
    channels: int
    height: int
    width: int
    n_classes: int
    hidden: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bgr: bool = False
    net_channels: int | None = None
    logits: int | None = None
    head: Literal["own", "split", "appended"] = "own"
    code: str | None = None

    def facts(self) -> dict[str, Any]:
        """The fields as JSON has them, without those that are as for every model of ours."""
        return {each.name: value for each in fields(self) if (value := asdict(self)[each.name]) != each.default}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "ModelSpec":
        """Inverse of `facts`. Raises TypeError where a field is unknown or missing."""
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in facts.items()}
        return cls(**given)


def is_users(name: str) -> bool:
    """Whether a model's name is "package.module:function" of a file of the user's."""
    return ":" in name and not name.startswith(("torchvision:", "timm:"))


@contextmanager
def open_checkpoint(path: Path, framework: Literal["pt", "numpy"]) -> Iterator[tuple[ModelSpec, Any]]:
    """What a checkpoint says of its model, and safetensors' open file, which gives tensors of `framework`.

    Raises:
        InputError: the file is missing, damaged (this too while it is read), or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework=framework) as file:
            metadata = json.loads((file.metadata() or {}).get("lvlmva", "{}"))
            yield _spec_in(metadata, path), file
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; {REMEDY}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); {REMEDY}") from error


def digest_of_weights(weights: Iterable[tuple[str, str, Sequence[int], bytes]]) -> str:
    """sha256 (hex) over tensors in rising order of their names: name, type as torch writes it, shape, bytes."""
    digest = hashlib.sha256()
    for name, kind, shape, content in weights:
        digest.update(f"{name} {kind} {tuple(shape)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read_weights_digest(path: Path) -> tuple[ModelSpec, str | None]:
    """The spec of a checkpoint, and `lvlmva_core.models.weights_digest` of the model that is built from it.

    None for that digest where only the model tells: where the user's own code builds it, which may change what is
    loaded, or where the file holds a type that none of ours has.

    Raises:
        InputError: the file is missing, damaged, or not one of ours.
    """
    with open_checkpoint(path, "numpy") as (spec, file):
        names = sorted(file.keys())
        kinds = [file.get_slice(name).get_dtype() for name in names]
        if is_users(spec.name) or not HELD.keys() >= set(kinds):
            return spec, None
        tensors = (file.get_tensor(name) for name in names)
        return spec, digest_of_weights(
            (name, HELD[kind], tensor.shape, tensor.tobytes())
            for name, kind, tensor in zip(names, kinds, tensors, strict=True)
        )


def _spec_in(metadata: Mapping[str, Any], path: Path) -> ModelSpec:
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of format {FORMAT} of this software; {REMEDY}")
    try:
        return ModelSpec.from_facts(metadata["spec"])
    except (TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: written by another version of this software ({reason}); {REMEDY}") from error
