"""Classifiers from elsewhere: what is read, what is refused, and that they compute what they computed before."""

import argparse
import os
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms.functional import normalize

from lvlmva_core.attribution import deep_lift_shap
from lvlmva_core.errors import InputError
from lvlmva_core.foreign import Foreign, fit_names, load_foreign, read_tensors
from lvlmva_core.models import ModelSpec, build_model, load_checkpoint, penultimate_features, save_checkpoint
from lvlmva_core.train_settings import Checkpoint

CPU = torch.device("cpu")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
NAMES = ["benign", "malignant"]


def _images(channels: int = 3, side: int = 32, n: int = 6) -> Tensor:
    return torch.rand((n, channels, side, side), generator=torch.Generator().manual_seed(0))


def _resnet(seed: int = 0, n_classes: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return models.resnet18(weights=None, num_classes=n_classes).eval()


def _settings(**changes: Any) -> Checkpoint:
    usual = {"from": "checkpoint", "model": "resnet18", "classes": NAMES, "normalisation": "imagenet"}
    return Checkpoint.model_validate({**usual, "checkpoint": None, **changes})


def _load(tmp_path: Path, content: Any, images: Tensor | None = None, **changes: Any) -> Foreign:
    torch.save(content, tmp_path / "w.pth")
    settings = _settings(checkpoint=str(tmp_path / "w.pth"), **changes)
    return load_foreign(settings, _images() if images is None else images, NAMES)


def _expected(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(normalize(images.expand(-1, 3, -1, -1), *IMAGENET))  # type: ignore[no-any-return]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "lightning": lambda state: {
        "epoch": 3,
        "state_dict": {**{f"model.{k}": v for k, v in state.items()}, "criterion.weight": torch.ones(2)},
        "optimizer_states": [],
    },
    "timm": lambda state: {
        "arch": "resnet18",
        "args": argparse.Namespace(lr=0.1),
        "state_dict": {k: torch.zeros_like(v) for k, v in state.items()},
        "state_dict_ema": {f"module.{k}": v for k, v in state.items()},
    },
    "data parallel, compiled": lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_network_that_was_saved(layout: str, tmp_path: Path) -> None:
    net, images = _resnet(), _images()
    found = _load(tmp_path, LAYOUTS[layout](net.state_dict()))
    tolerance = 2e-2 if layout == "half" else 1e-5
    torch.testing.assert_close(_logits(found.model, images), _expected(net, images), atol=tolerance, rtol=tolerance)
    said = " ".join(found.notes)
    words = {"plain": "", "lightning": "prefix 'model.'", "timm": "'state_dict_ema', beside state_dict"}
    words |= {"data parallel, compiled": "'module._orig_mod.'", "half": "turned float16 into float32"}
    assert words[layout] in said
    assert ("criterion.weight" in said) == (layout == "lightning")
    assert next(found.model.parameters()).dtype == torch.float32


def test_a_key_chooses_among_entries_and_safetensors_are_read(tmp_path: Path) -> None:
    net, images = _resnet(), _images()
    other = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    found = _load(tmp_path, {"state_dict_ema": other, "state_dict": net.state_dict()}, checkpoint_key="state_dict")
    torch.testing.assert_close(_logits(found.model, images), _expected(net, images))
    save_file(net.state_dict(), str(tmp_path / "w.safetensors"))
    found = load_foreign(_settings(checkpoint=str(tmp_path / "w.safetensors")), images, NAMES)
    torch.testing.assert_close(_logits(found.model, images), _expected(net, images))


def test_names_fit_by_the_longest_chain_of_prefixes_that_helps() -> None:
    one = torch.zeros(1)
    found, notes = fit_names({"module.model.a": one, "module.loss.w": one}, ["a"])
    assert (list(found), len(notes)) == (["a"], 2)
    found, notes = fit_names({"model.a": one}, ["model.a"])  # the network's own name
    assert (list(found), notes) == (["model.a"], [])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize("channels", [1, 3])
def test_classes_are_put_into_the_datas_order_and_the_checkpoint_comes_back(
    order: list[int], channels: int, tmp_path: Path
) -> None:
    net, images = _resnet(n_classes=3), _images(channels)
    names = ["a", "b", "c"]
    torch.save(net.state_dict(), tmp_path / "w.pth")
    settings = _settings(checkpoint=str(tmp_path / "w.pth"), classes=[names[k] for k in order])
    found = load_foreign(settings, images, names)
    expected = _expected(net, images)
    for logit, k in enumerate(order):  # the logit at place n is the class that is named at place n
        torch.testing.assert_close(_logits(found.model, images)[:, k], expected[:, logit])
    assert any("order" in note for note in found.notes) == (order != [0, 1, 2])
    save_checkpoint(tmp_path / "base.safetensors", found.spec, found.model)
    again, spec = load_checkpoint(tmp_path / "base.safetensors", CPU)
    assert spec == found.spec
    assert torch.equal(_logits(again, images), _logits(found.model, images))


@pytest.mark.parametrize(
    ("normalisation", "channel_order", "by_hand"),
    [
        ("none", "rgb", lambda x: x),
        ("half", "rgb", lambda x: (x - 0.5) / 0.5),
        ("bytes", "rgb", lambda x: x * 255),
        ("none", "bgr", lambda x: x[:, [2, 1, 0]]),
        ({"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}, "bgr", None),
    ],
)
def test_normalisation_is_a_layer_of_the_model(
    normalisation: Any, channel_order: str, by_hand: Callable[[Tensor], Tensor] | None, tmp_path: Path
) -> None:
    net, images = _resnet(), _images()
    if by_hand is None:
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]))
        by_hand = lambda x: (x[:, [2, 1, 0]] - mean) / std  # noqa: E731
    found = _load(tmp_path, net.state_dict(), normalisation=normalisation, channel_order=channel_order)
    torch.testing.assert_close(_logits(found.model, images), _logits(net, by_hand(images)), atol=1e-4, rtol=1e-4)
    deep_lift_shap(found.model, images[:1], images[1:3], 0)  # every layer of it has an exact rule


def test_a_network_for_grey_pictures_has_one_channel(tmp_path: Path) -> None:
    net, images = _resnet(), _images(1)
    net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    found = _load(tmp_path, net.state_dict(), images, channels=1, normalisation="half")
    torch.testing.assert_close(_logits(found.model, images), _logits(net, (images - 0.5) / 0.5))
    with pytest.raises(InputError, match=r"train\.channels: the network takes 1, the pictures have 3"):
        _load(tmp_path, net.state_dict(), _images(3), channels=1, normalisation="half")


def test_one_logit_becomes_two_with_the_same_probability(tmp_path: Path) -> None:
    net, images = _resnet(n_classes=1), _images()
    found = _load(tmp_path, net.state_dict())
    logits = _logits(found.model, images)
    torch.testing.assert_close(logits.softmax(1)[:, 1], torch.sigmoid(_expected(net, images)[:, 0]))
    assert any("one logit z turned into two" in note for note in found.notes)
    torch.testing.assert_close(logits[:, 0], -logits[:, 1])  # each class's logit depends on the picture
    save_checkpoint(tmp_path / "b.safetensors", found.spec, found.model)
    assert torch.equal(_logits(load_checkpoint(tmp_path / "b.safetensors", CPU)[0], images), logits)
    swapped = _load(tmp_path, net.state_dict(), classes=["malignant", "benign"])
    torch.testing.assert_close(_logits(swapped.model, images), logits[:, [1, 0]])


def test_our_own_checkpoint_keeps_its_normalisation(tmp_path: Path) -> None:
    spec = ModelSpec("small_resnet", 3, 32, 32, 2, 4)
    model, images = build_model(spec, 0).eval(), _images()
    save_checkpoint(tmp_path / "o.safetensors", spec, model)
    settings = _settings(model="small_resnet", checkpoint=str(tmp_path / "o.safetensors"), normalisation="none")
    found = load_foreign(settings, images, NAMES)
    assert torch.equal(_logits(found.model, images), _logits(model, images))
    with pytest.raises(InputError, match=r"of model 'small_resnet' .* train\.model is 'resnet18'"):
        load_foreign(_settings(checkpoint=str(tmp_path / "o.safetensors")), images, NAMES)


def test_timms_model_is_timms_on_its_own_normalisation(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("mobilenetv3_small_050.lamb_in1k", pretrained=False, num_classes=2).eval()
    images = _images()
    found = _load(tmp_path, net.state_dict(), model="timm:mobilenetv3_small_050.lamb_in1k", normalisation=None)
    config = timm.data.resolve_data_config({}, model=net)
    expected = _logits(net, normalize(images, list(config["mean"]), list(config["std"])))
    torch.testing.assert_close(_logits(found.model, images), expected, atol=1e-5, rtol=1e-4)
    assert found.spec.mean == tuple(config["mean"])
    with pytest.raises(InputError, match="timm has no model 'resnet_nine'"):
        _load(tmp_path, {}, model="timm:resnet_nine", normalisation=None)
    with pytest.raises(
        InputError, match=r"made for 224x224, the pictures are prepared at 32x32; set prepare\.image_size"
    ):
        _load(tmp_path, {}, model="timm:vit_tiny_patch16_224", normalisation=None)


class _RunsCode:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    for content in (_RunsCode(tmp_path / "ran"), {"state_dict": {}, "hook": _RunsCode(tmp_path / "ran")}):
        torch.save(content, tmp_path / "evil.pth")
        with pytest.raises(InputError, match=r"evil\.pth: holds Python objects beside tensors.*torch\.save\(model"):
            read_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def _state(**changes: Tensor) -> dict[str, Tensor]:
    return {**_resnet().state_dict(), **changes}


BAD_FILES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "whole model": (_resnet(), {}, "holds Python objects beside tensors"),
    "missing": ({k: v for k, v in _state().items() if k != "fc.bias"}, {}, r"1 missing: fc\.bias"),
    "spare": (_state(extra=torch.zeros(1)), {}, "1 spare: extra"),
    "misshapen": (
        _state(**{"conv1.weight": torch.zeros(8, 3, 7, 7)}),
        {},
        r"1 misshapen: conv1\.weight \(8, 3, 7, 7\) for \(64, 3, 7, 7\)",
    ),
    "another number of classes": (_resnet(n_classes=5).state_dict(), {}, "its last layer has 5 logits, the data has 2"),
    "not finite": (_state(**{"fc.bias": torch.tensor([0.0, float("nan")])}), {}, r"not finite: fc\.bias"),
    "whole numbers": (_state(**{"fc.bias": torch.tensor([0, 1])}), {}, r"1 not floating: fc\.bias"),
    "list": ([1, 2], {}, "holds list, expected names to tensors"),
    "no state dict": ({"epoch": 3, "loss": 0.1}, {}, r"no state dict in it \(its entries: epoch, loss\)"),
    "unknown key": (_state(), {"checkpoint_key": "ema"}, "has no entry 'ema'"),
    "another architecture": (_state(), {"model": "resnet50"}, "does not fit model 'resnet50'"),
    "classes": (_state(), {"classes": ["benign", "bad"]}, r"train\.classes lacks malignant and has bad besides"),
    "too many channels": (
        _state(),
        {"normalisation": {"mean": [0.5, 0.5], "std": [1.0, 1.0]}},
        "2 numbers for a network of 3 channels",
    ),
    "input size": (_state(), {"input_size": [224, 224]}, "made for 224x224, the pictures are prepared at 32x32"),
    "no torchvision model": (_state(), {"model": "torchvision:resnet19"}, "no model 'resnet19'"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_in_one_line(kind: str, tmp_path: Path) -> None:
    content, changes, message = BAD_FILES[kind]
    with pytest.raises(InputError, match=message) as caught:
        _load(tmp_path, content, **changes)
    assert "\n" not in str(caught.value)
    assert "train." in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "the file is empty"), (b"\x80\x02nothing", "Python objects|not a readable")],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_damaged_file_is_named(content: bytes | None, message: str, name: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"train\.checkpoint: .*{name}: .*({message})"):
        load_foreign(_settings(checkpoint=str(tmp_path / name)), _images(), NAMES)


def test_torchscript_is_told_apart(tmp_path: Path) -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.save(torch.jit.trace(Small(), torch.zeros(1)), str(tmp_path / "s.pt"))
    with pytest.raises(InputError, match=r"s\.pt: a TorchScript program, not weights"):
        read_tensors(tmp_path / "s.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalisation": None}, "normalisation is missing"),
        ({"classes": ["a", "a"]}, "a name stands there twice"),
        ({"checkpoint": None}, "checkpoint is null"),
        ({"normalisation": {"mean": [0.5], "std": [1.0, 1.0]}}, "mean has 1 numbers, std 2"),
        ({"model": "../evil:run"}, "pattern"),
    ],
)
def test_settings_that_would_fail_silently_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _settings(**{"checkpoint": "w.pth", **changes})


USERS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, outputs=2):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU())
        self.last = nn.Linear(8, outputs)
    def forward(self, x):
        return self.last(self.body(x))

class ConvEnd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
    def forward(self, x):
        return self.conv(x).mean((2, 3))

def wrapped(change, outputs=2):
    class Wrapped(Net):
        def forward(self, x):
            return change(super().forward(x))
    return Wrapped(outputs)

def plain(): return Net()
def conv_end(): return ConvEnd()
def one(): return wrapped(lambda z: z[:, 0], 1)
def half(): return Net().half()
def double(): return Net().double()
def dropout_on(): return wrapped(lambda z: nn.functional.dropout(z, 0.5))
def batch_norm(): return wrapped(nn.BatchNorm1d(2, track_running_stats=False).train())
def pair(): return wrapped(lambda z: (z, z))
def dictionary(): return wrapped(lambda z: {"logits": z, "features": z})
def probabilities(): return wrapped(lambda z: z.softmax(1))
def one_probability(): return wrapped(torch.sigmoid, 1)
def five(): return Net(5)
def picture(): return wrapped(lambda z: z[:, :, None])
def nothing(): return wrapped(lambda z: z / 0)
def meta():
    with torch.device("meta"):
        return Net()
def string(): return "a model"
def fails(): raise RuntimeError("no weights here")
def numpy_inside(): return wrapped(lambda z: torch.from_numpy(z.detach().numpy()))
value = 3
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A file of the user's under the current folder; its module's name differs from test to test."""
    module = f"net_{abs(hash(request.node.name))}"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / f"{module}.py").write_text(textwrap.dedent(USERS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own", raising=False)
    return f"own.{module}"


def _of_user(users: str, function: str, **changes: Any) -> Foreign:
    torch.manual_seed(0)
    settings = _settings(model=f"{users}:{function}", **{"normalisation": "none", **changes})
    return load_foreign(settings, _images(), NAMES)


@pytest.mark.parametrize("function", ["plain", "conv_end", "one", "half", "double"])
@pytest.mark.parametrize("normalisation", ["none", "half"])
def test_a_users_network_comes_back_from_our_checkpoint_by_its_name(
    users: str, function: str, normalisation: str, tmp_path: Path
) -> None:
    found, images = _of_user(users, function, normalisation=normalisation), _images()
    logits = _logits(found.model, images)
    assert logits.shape == (6, 2)
    save_checkpoint(tmp_path / "b.safetensors", found.spec, found.model)
    name = f"{users}:{function}"
    again, _ = load_checkpoint(tmp_path / "b.safetensors", CPU, name)
    assert torch.equal(_logits(again, images), logits)
    assert torch.equal(_logits(again, images[:1]), _logits(found.model, images[:1]))
    layer, features = again.get_submodule(""), penultimate_features(again, images)
    assert len(features) == len(images)
    assert layer is again
    with pytest.raises(InputError, match=r"code is run only where params name it \(train\.model is 'None'\)"):
        load_checkpoint(tmp_path / "b.safetensors", CPU)
    file = tmp_path / "own" / f"{users.removeprefix('own.')}.py"
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(InputError, match=r"has changed since the base model was written; run `dvc repro train`"):
        load_checkpoint(tmp_path / "b.safetensors", CPU, name)


@pytest.mark.parametrize(
    ("function", "note"),
    [
        ("one", "one logit z turned into two"),
        ("conv_end", "a linear layer put behind the network"),
        ("half", "turned from float16 into float32"),
        ("double", "turned from float64 into float32"),
    ],
)
def test_what_is_changed_is_said(users: str, function: str, note: str) -> None:
    assert any(note in said for said in _of_user(users, function).notes)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("dropout_on", "gives other values each time .* dropout left on"),
        ("batch_norm", "gives a picture other values among other pictures"),
        ("pair", "returns a tuple of 2; return its logits alone"),
        ("dictionary", "returns a dict with logits, features"),
        ("probabilities", "returns probabilities .* add up to 1"),
        ("one_probability", r"returns probabilities .* lie in \[0, 1\]\)"),
        ("five", "returns 5 logits, the data has 2 classes"),
        ("picture", r"returns \(6, 2, 1\) for 6 pictures"),
        ("nothing", "values that are not finite"),
        ("meta", "weights on the meta device"),
        ("string", r"returned str, expected a torch\.nn\.Module"),
        ("fails", r"failed \(RuntimeError: no weights here\)"),
        ("absent", "has no function 'absent'"),
        ("value", "has no function 'value'"),
    ],
)
def test_what_a_users_network_does_wrong_is_named(users: str, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _of_user(users, function)
    assert "\n" not in str(caught.value)
    assert "train.model" in str(caught.value)


def test_pictures_of_the_wrong_shape_are_named(users: str) -> None:
    with pytest.raises(InputError, match=r"cannot take pictures of shape \(3, 16, 16\)"):
        load_foreign(_settings(model=f"{users}:plain", normalisation="none"), _images(side=16), NAMES)


def test_only_files_under_the_folder_are_run(users: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'os:system' means the file os\.py, which is not there"):
        load_foreign(_settings(model="os:system", normalisation="none"), _images(), NAMES)
    (tmp_path / "json.py").write_text("def build(): return None")
    with pytest.raises(InputError, match="another module is called 'json'"):
        load_foreign(_settings(model="json:build", normalisation="none"), _images(), NAMES)
    (tmp_path / "own" / "broken_module.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match=r"broken_module\.py cannot be run \(ModuleNotFoundError"):
        load_foreign(_settings(model="own.broken_module:build", normalisation="none"), _images(), NAMES)
