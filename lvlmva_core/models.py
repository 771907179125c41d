"""Classifiers by name, and checkpoints that hold what is needed to build them again."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lvlmva_core.errors import InputError

FORMAT = 1


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint must know to build its model: name, input (channels, height, width), classes, hidden units."""

    name: str
    channels: int
    height: int
    width: int
    n_classes: int
    hidden: int


def build_model(spec: ModelSpec, seed: int) -> nn.Module:
    """Build a classifier that maps images (B, C, H, W) in [0, 1] to logits (B, K), in train mode on the CPU.

    Initial weights are drawn from `seed`; the global generator is left as it was.

    Raises:
        InputError: no model has that name.
    """
    if spec.name not in BUILDERS:
        raise InputError(f"train.model: no model '{spec.name}'; known: {', '.join(BUILDERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[spec.name](spec)


def save_checkpoint(path: Path, spec: ModelSpec, model: nn.Module) -> None:
    """Write weights and spec as safetensors, byte for byte the same for the same weights.

    The spec stands as sorted JSON under one metadata key: safetensors writes several keys in random order.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"lvlmva": json.dumps({"format": FORMAT, "spec": asdict(spec)}, sort_keys=True)}
    save_file(tensors, str(path), metadata=metadata)


def load_checkpoint(path: Path, device: torch.device) -> tuple[nn.Module, ModelSpec]:
    """Read a checkpoint that `save_checkpoint` wrote; the model comes in eval mode on `device`.

    Raises:
        InputError: the file is missing, damaged, or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "restore it with `dvc checkout`, or delete it and run `dvc repro`"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("lvlmva", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; {remedy}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); {remedy}") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of format {FORMAT} of this software; {remedy}")
    spec = ModelSpec(**metadata["spec"])
    model = build_model(spec, seed=0)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # names or shapes that do not fit
        raise InputError(f"{path}: the weights do not fit model '{spec.name}' ({error}); {remedy}") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values() if tensor.is_floating_point()):
        raise InputError(f"{path}: weights that are not finite; {remedy}, or lower the learning rate or λ")
    return model.to(device).eval(), spec


def weights_digest(model: nn.Module) -> str:
    """sha256 (hex) over the names, types, shapes and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def predict_logits(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (N, K) of images (N, C, H, W) in [0, 1], without gradients, on the model's device, in its present mode."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(batch.to(device)) for batch in images.split(batch_size)])


class Mlp(nn.Module):
    """One hidden ReLU layer over all pixels: the paper's DecoyMNIST model with 256 units (LVLM-VA §5.1)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(math.prod((spec.channels, spec.height, spec.width)), spec.hidden)
        self.relu = nn.ReLU()
        self.output = nn.Linear(spec.hidden, spec.n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, K)."""
        return self.output(self.relu(self.hidden(self.flatten(images))))  # type: ignore[no-any-return]


BUILDERS: Mapping[str, Callable[[ModelSpec], nn.Module]] = MappingProxyType({"mlp": Mlp})
