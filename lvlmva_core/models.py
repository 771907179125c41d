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

from lvlmva_core import efficientnet_lite
from lvlmva_core.errors import InputError

FORMAT = 1


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint must know to build its model: name, input (channels, height, width), classes, hidden units.

    `hidden` is the width of the MLP's hidden layer and of small_resnet's first stage; torchvision's models have theirs.
    """

    name: str
    channels: int
    height: int
    width: int
    n_classes: int
    hidden: int


def build_model(spec: ModelSpec, seed: int) -> nn.Module:
    """Build a classifier that maps images (B, C, H, W) in [0, 1] to logits (B, K), in train mode on the CPU.

    "mlp", "small_resnet", or the name of one of torchvision's classifiers. Initial weights are drawn from `seed`; the
    global generator is left as it was.

    Raises:
        InputError: no model has that name, or it cannot be used here.
    """
    build = BUILDERS.get(spec.name, _torchvision_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(spec)


def load_weights(model: nn.Module, spec: ModelSpec, weights: str) -> None:
    """Replace the initial weights by trained ones, all but those of a last layer for another number of classes.

    Args:
        model: as `build_model(spec, ...)` returned it.
        weights: a file (.safetensors; or .pt, .pth, read with weights_only), or the name of weights in torchvision's
            API ("IMAGENET1K_V2", "DEFAULT"), which are downloaded once.

    Raises:
        InputError: no such file or weights, or names and shapes that do not fit.
    """
    trained = _read_weights(spec, weights)
    target = model.net if isinstance(model, Normalised) else model
    if isinstance(target, efficientnet_lite.EfficientNetLite0):
        trained = efficientnet_lite.from_published(trained)
    expected = target.state_dict()
    prefix = "net."  # of checkpoints that were written here
    if trained and all(name.startswith(prefix) or name in ("mean", "std") for name in trained):
        trained = {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}
    head = next(name for name, module in reversed(list(target.named_modules())) if isinstance(module, nn.Linear))
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in trained and trained[name].shape != expected[name].shape:
            trained[name] = expected[name]
    try:
        target.load_state_dict(trained)
    except RuntimeError as error:
        raise InputError(f"train.weights: '{weights}' does not fit model '{spec.name}' ({_one_line(error)})") from error


def last_linear(model: nn.Module) -> nn.Linear:
    """The layer that turns features into logits. Raises InputError where the model does not end in a linear layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError("the model has no linear layer, so that its last layer cannot be refitted; use another")
    return layers[-1]


def penultimate_features(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """What the last linear layer sees: (N, D) of images (N, C, H, W), without gradients, on the model's device."""
    seen: list[Tensor] = []
    handle = last_linear(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        predict_logits(model, images, batch_size)
    finally:
        handle.remove()
    return torch.cat(seen)


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
        return torch.cat([model(batch.to(device)) for batch in torch.split(images, batch_size)])


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


class Normalised(nn.Module):
    """A network on normalised channels: gradients and attributions stay those of pixels in [0, 1] (LVLM-VA §3).

    One channel is repeated to the three that the network has, by broadcasting.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to logits (B, K)."""
        return self.net((images - self.mean) / self.std)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (He et al. 2016), every ReLU a module of its own."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(features)))))
        return self.relu2(inner + self.shortcut(features))  # type: ignore[no-any-return]


def _small_resnet(spec: ModelSpec) -> nn.Module:
    """A ResNet of 8 layers for pictures of about 64 pixels a side, which trains in minutes on a CPU.

    A strided stem, three residual blocks of `hidden`, 2 and 4 times `hidden` channels, the mean over places.
    """
    width = spec.hidden
    net = nn.Sequential(
        nn.Conv2d(spec.channels, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, spec.n_classes),
    )
    return Normalised(net, (0.5,) * spec.channels, (0.25,) * spec.channels)


def _efficientnet_lite0(spec: ModelSpec) -> nn.Module:
    """EfficientNet-Lite0, for one or three channels, on the normalisation of its published weights."""
    _check_channels(spec)
    return Normalised(
        efficientnet_lite.EfficientNetLite0(spec.n_classes), efficientnet_lite.MEAN, efficientnet_lite.STD
    )


def _torchvision_model(spec: ModelSpec) -> nn.Module:
    """One of torchvision's classifiers, for one or three channels, on ImageNet's normalisation."""
    from torchvision import models

    if spec.name not in models.list_models(module=models):
        raise InputError(
            f"train.model: no model '{spec.name}'; known: {', '.join(BUILDERS)}, and torchvision's classifiers "
            "(resnet50, ...)"
        )
    if spec.name in ("googlenet", "inception_v3"):
        raise InputError(f"train.model: '{spec.name}' has outputs beside its logits; use another, such as resnet50")
    _check_channels(spec)
    net = models.get_model(spec.name, weights=None, num_classes=spec.n_classes)
    return Normalised(net, IMAGENET_MEAN, IMAGENET_STD)


def _check_channels(spec: ModelSpec) -> None:
    if spec.channels not in (1, 3):
        raise InputError(
            f"train.model: '{spec.name}' takes 1 or 3 channels, the data has {spec.channels}; use small_resnet"
        )


def _read_weights(spec: ModelSpec, weights: str) -> dict[str, Tensor]:
    path = Path(weights).expanduser()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        if path.suffix in (".pt", ".pth"):
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
                raise InputError(
                    f"train.weights: {path} holds no state dict (names to tensors); save model.state_dict()"
                )
            return dict(content)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"train.weights: {path}: no such file; put it there, or set train.weights to null") from error
    except Exception as error:  # what the readers raise on damaged files is not bounded
        raise InputError(f"train.weights: {path}: not a readable checkpoint ({_one_line(error)})") from error
    if spec.name in BUILDERS:
        raise InputError(
            f"train.weights: '{weights}' is no .safetensors, .pt or .pth file, and torchvision has no weights for "
            f"'{spec.name}'; set it to null to train from scratch"
        )
    from torchvision import models

    try:
        chosen = models.get_model_weights(spec.name)[weights]
    except KeyError as error:
        known = ", ".join(entry.name for entry in models.get_model_weights(spec.name))
        raise InputError(
            f"train.weights: '{spec.name}' has no weights '{weights}'; known: {known}, or a file"
        ) from error
    try:
        return dict(chosen.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"train.weights: '{weights}' cannot be downloaded ({_one_line(error)}); give a local file, or null"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what torchvision's weights expect
BUILDERS: Mapping[str, Callable[[ModelSpec], nn.Module]] = MappingProxyType(
    {"mlp": Mlp, "small_resnet": _small_resnet, "efficientnet_lite0": _efficientnet_lite0}
)
