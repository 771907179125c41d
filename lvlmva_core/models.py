"""Classifiers by name, and checkpoints that hold what is needed to build them again."""

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lvlmva_core import efficientnet_lite
from lvlmva_core.checkpoints import FORMAT, REMEDY, digest_of_weights, is_users, open_checkpoint
from lvlmva_core.checkpoints import ModelSpec as ModelSpec  # others import it from here
from lvlmva_core.errors import InputError
from lvlmva_core.train_settings import NORMALISATIONS


def build_model(spec: ModelSpec, seed: int, own_model: str | None = None) -> nn.Module:
    """Build a classifier that maps images (B, C, H, W) in [0, 1] to logits (B, K), in train mode on the CPU.

    "mlp", "small_resnet", "efficientnet_lite0", the name of one of torchvision's classifiers (with or without
    "torchvision:" before it), "timm:NAME" (extra `timm`), or "package.module:function" of a file under the current
    folder. Initial weights are drawn from `seed`; the global generator is left as it was.

    Args:
        own_model: the "package.module:function" that the user has named; no other file is run.

    Raises:
        InputError: no model has that name, or it cannot be used here.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, normalisation = build_network(spec, own_model)
        net = net.to(device="cpu", dtype=torch.float32)  # a user's function may build another
        return with_head(normalised(net, spec, normalisation), spec)


def build_network(spec: ModelSpec, own_model: str | None = None) -> "tuple[nn.Module, MeanStd | None]":
    """The network as its author builds it, and the mean and std that its architecture is used with, if any."""
    if is_users(spec.name):
        return _users_network(spec, own_model), None
    library, _, name = spec.name.rpartition(":")
    if library == "timm":
        return _timm_network(spec, name)
    build = _torchvision_network if library else BUILDERS.get(name, _torchvision_network)
    return build(spec)


def normalised(net: nn.Module, spec: ModelSpec, normalisation: "MeanStd | None" = None) -> nn.Module:
    """The network behind its normalisation: `spec`'s, else the given one, else none."""
    mean, std = (spec.mean, spec.std) if spec.mean is not None and spec.std is not None else normalisation or ((), ())
    return Normalised(net, tuple(mean), tuple(std), spec.bgr) if mean else net


def with_head(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The model with the layer that `spec.head` asks for, its weights as good as drawn."""
    if spec.head == "split":
        place, layer = last_linear_place(model)
        head = nn.Linear(layer.in_features, 2)
        parent = model.get_submodule(place.rpartition(".")[0])
        setattr(parent, place.rpartition(".")[2], head)
    elif spec.head == "appended":
        return Headed(model, nn.Linear(spec.logits or spec.n_classes, spec.n_classes))
    return model


def users_file(name: str, root: Path) -> Path | None:
    """The file under `root` that a model's name means; None for a name of ours or of a library.

    Raises:
        InputError: there is no such file.
    """
    if not is_users(name):
        return None
    path = root.joinpath(*name.partition(":")[0].split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    raise InputError(
        f"train.model: '{name}' means the file {path.relative_to(root).with_suffix('.py')}, which is not there; "
        "create it"
    )


def users_function(name: str, root: Path) -> tuple[Callable[[], Any], str]:
    """The function that builds the user's network, and the sha256 (hex) of all code in its file's folder.

    Args:
        name: "package.module:function", a file under `root`; never a module that is installed.

    Raises:
        InputError: no such file or function, the file cannot be run, or another module has its name.
    """
    module, _, function = name.partition(":")
    file = users_file(name, root)
    assert file is not None
    sys.path.insert(0, str(root))
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"train.model: {file} cannot be run ({type(error).__name__}: {_one_line(error)})") from error
    finally:
        sys.path.remove(str(root))
    if Path(loaded.__file__ or "").resolve() != file.resolve():
        raise InputError(f"train.model: another module is called '{module}'; rename {file}")
    if not callable(getattr(loaded, function, None)):
        raise InputError(f"train.model: {file} has no function '{function}'; define it, or change the setting")
    digest = hashlib.sha256()
    for each in sorted(file.parent.rglob("*.py")):
        digest.update(f"{each.relative_to(file.parent).as_posix()}\n".encode() + each.read_bytes())
    return getattr(loaded, function), digest.hexdigest()


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
    return last_linear_place(model)[1]


def last_linear_place(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and layer of `last_linear`."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
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
    tensors = {  # copies, since safetensors refuses tensors that share memory, as tied weights do
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    metadata = {"lvlmva": json.dumps({"format": FORMAT, "spec": spec.facts()}, sort_keys=True)}
    save_file(tensors, str(path), metadata=metadata)


def load_checkpoint(path: Path, device: torch.device, own_model: str | None = None) -> tuple[nn.Module, ModelSpec]:
    """Read a checkpoint that `save_checkpoint` wrote; the model comes in eval mode on `device`.

    Args:
        own_model: the "package.module:function" of a file of the user's that may be run (`train.model` of params.yaml).

    Raises:
        InputError: the file is missing, damaged, or not one of ours, or names code that the user has not named.
    """
    with open_checkpoint(path, "pt") as (spec, file):
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    model = build_model(spec, 0, own_model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # names or shapes that do not fit
        raise InputError(f"{path}: the weights do not fit model '{spec.name}' ({error}); {REMEDY}") from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values() if tensor.is_floating_point()):
        raise InputError(f"{path}: weights that are not finite; {REMEDY}, or lower the learning rate or λ")
    return model.to(device).eval(), spec


def weights_digest(model: nn.Module) -> str:
    """sha256 (hex) over the names, types, shapes and bytes of a model's parameters and buffers."""
    arrays = ((name, tensor.detach().cpu().contiguous()) for name, tensor in sorted(model.state_dict().items()))
    return digest_of_weights(
        (name, str(array.dtype), array.shape, array.flatten().view(torch.uint8).numpy().tobytes())
        for name, array in arrays
    )


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

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], bgr: bool = False) -> None:
        super().__init__()
        self.bgr = bgr  # the network was trained on blue, green, red
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to logits (B, K)."""
        images = images.flip(1) if self.bgr else images
        return self.net((images - self.mean) / self.std)  # type: ignore[no-any-return]


class Headed(nn.Module):
    """A network with one more linear layer, which turns one logit into two, or puts the classes in another order."""

    def __init__(self, net: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.net = net
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to logits (B, K)."""
        logits = self.net(images)
        return self.head(logits if logits.ndim == 2 else logits.reshape(-1, 1))  # type: ignore[no-any-return]


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


def _mlp(spec: ModelSpec) -> "tuple[nn.Module, None]":
    return Mlp(spec), None


def _small_resnet(spec: ModelSpec) -> "tuple[nn.Module, MeanStd]":
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
        nn.Linear(4 * width, spec.logits or spec.n_classes),
    )
    return net, ((0.5,) * spec.channels, (0.25,) * spec.channels)


def _efficientnet_lite0(spec: ModelSpec) -> "tuple[nn.Module, MeanStd]":
    """EfficientNet-Lite0, for one or three channels, on the normalisation of its published weights."""
    _check_channels(spec)
    net = efficientnet_lite.EfficientNetLite0(spec.logits or spec.n_classes)
    return net, (efficientnet_lite.MEAN, efficientnet_lite.STD)


def _torchvision_network(spec: ModelSpec) -> "tuple[nn.Module, MeanStd]":
    """One of torchvision's classifiers, for one or three channels, on ImageNet's normalisation."""
    from torchvision import models

    name = spec.name.removeprefix("torchvision:")
    if name not in models.list_models(module=models):
        raise InputError(
            f"train.model: no model '{name}'; known: {', '.join(BUILDERS)}, and torchvision's classifiers "
            "(resnet50, ...), timm:NAME, and package.module:function of a file of yours"
        )
    if name in ("googlenet", "inception_v3"):
        raise InputError(f"train.model: '{name}' has outputs beside its logits; use another, such as resnet50")
    _check_channels(spec)
    net = models.get_model(name, weights=None, num_classes=spec.logits or spec.n_classes)
    if spec.net_channels not in (None, 3):
        _take_channels(net, spec)
    return net, (IMAGENET_MEAN, IMAGENET_STD)


def _take_channels(net: nn.Module, spec: ModelSpec) -> None:
    """Replace the first convolution by one for `spec.net_channels`, as those do who train on grey pictures."""
    place, first = next((name, each) for name, each in net.named_modules() if isinstance(each, nn.Conv2d))
    assert spec.net_channels is not None
    same: Any = {name: getattr(first, name) for name in ("kernel_size", "stride", "padding")}
    other = nn.Conv2d(spec.net_channels, first.out_channels, bias=first.bias is not None, **same)
    setattr(net.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2], other)


def timm_defaults(name: str) -> dict[str, Any]:
    """What timm knows of a model's input: mean, std, input_size (C, H, W), fixed_input_size.

    Raises:
        InputError: timm is not installed, or has no such model.
    """
    _, config = _timm(name)
    return {key: config[key] for key in ("mean", "std", "input_size", "fixed_input_size") if key in config}


def _timm(name: str) -> tuple[Any, dict[str, Any]]:
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"train.model: 'timm:{name}' needs timm; install it with `pip install timm` (extra `timm`)"
        ) from error
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5])
        raise InputError(
            f"train.model: timm has no model '{name}'; {f'near: {near}' if near else 'see timm.list_models()'}"
        )
    config: Any = timm.get_pretrained_cfg(name)
    return timm, {} if config is None else config.to_dict()


def _timm_network(spec: ModelSpec, name: str) -> "tuple[nn.Module, MeanStd | None]":
    """One of timm's classifiers, on the normalisation of its `pretrained_cfg`."""
    timm, config = _timm(name)
    channels = spec.net_channels or 3
    if spec.channels not in (1, channels):
        _check_channels(spec)
    given = {"img_size": (spec.height, spec.width)} if config.get("fixed_input_size") else {}
    try:
        net = timm.create_model(
            name, pretrained=False, num_classes=spec.logits or spec.n_classes, in_chans=channels, **given
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"train.model: timm cannot build '{name}' for {spec.height}x{spec.width} pictures ({_one_line(error)}); "
            f"it was made for {config.get('input_size')}: set prepare.image_size"
        ) from error
    mean, std = (tuple(config.get(key, default)) for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels  # as timm does for grey
    return net, (mean, std)


def _users_network(spec: ModelSpec, own_model: str | None) -> nn.Module:
    if spec.name != own_model:
        raise InputError(
            f"the checkpoint is of a model that the file of '{spec.name}' builds, and code is run only where params "
            f"name it (train.model is '{own_model}'); look at that file, then set train.model to it"
        )
    function, digest = users_function(spec.name, Path.cwd())
    if spec.code not in (None, digest):
        raise InputError(
            f"train.model: the code of '{spec.name}' has changed since the base model was written; run `dvc repro "
            "train`"
        )
    try:
        net = function()
    except Exception as error:  # whatever the user's code raises
        raise InputError(
            f"train.model: '{spec.name}' failed ({type(error).__name__}: {_one_line(error)}); it is called without "
            "arguments and returns the network"
        ) from error
    if not isinstance(net, nn.Module):
        raise InputError(f"train.model: '{spec.name}' returned {type(net).__name__}, expected a torch.nn.Module")
    return net


def _check_channels(spec: ModelSpec) -> None:
    if spec.net_channels is not None and spec.channels not in (1, spec.net_channels):
        raise InputError(
            f"train.channels: the network takes {spec.net_channels}, the pictures have {spec.channels}; prepare them so"
        )
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
    if spec.name in BUILDERS or spec.name.startswith("timm:") or is_users(spec.name):
        raise InputError(
            f"train.weights: '{weights}' is no .safetensors, .pt or .pth file, and torchvision has no weights for "
            f"'{spec.name}'; set it to null to train from scratch"
        )
    from torchvision import models

    try:
        chosen = models.get_model_weights(spec.name.removeprefix("torchvision:"))[weights]
    except KeyError as error:
        known = ", ".join(entry.name for entry in models.get_model_weights(spec.name.removeprefix("torchvision:")))
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


MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET_MEAN, IMAGENET_STD = NORMALISATIONS["imagenet"]  # what torchvision's weights expect
BUILDERS: Mapping[str, Callable[[ModelSpec], tuple[nn.Module, MeanStd | None]]] = MappingProxyType(
    {"mlp": _mlp, "small_resnet": _small_resnet, "efficientnet_lite0": _efficientnet_lite0}
)
