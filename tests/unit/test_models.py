from itertools import product
from pathlib import Path

import pytest
import torch

from lvlmva_core.compute import set_up_compute
from lvlmva_core.efficientnet_lite import SameConv2d
from lvlmva_core.errors import InputError
from lvlmva_core.models import (
    ModelSpec,
    build_model,
    last_linear,
    load_checkpoint,
    load_weights,
    penultimate_features,
    predict_logits,
    save_checkpoint,
    weights_digest,
)
from lvlmva_core.samples import Split
from lvlmva_core.training import accuracy, train_classifier

SPEC = ModelSpec("mlp", 1, 6, 5, n_classes=3, hidden=7)
CPU = torch.device("cpu")


def test_the_mlp_is_one_hidden_relu_layer() -> None:
    model = build_model(SPEC, seed=0)
    images = torch.rand(4, 1, 6, 5)
    weights = model.state_dict()
    hidden = (images.reshape(4, 30) @ weights["hidden.weight"].T + weights["hidden.bias"]).clamp(min=0)
    torch.testing.assert_close(model(images), hidden @ weights["output.weight"].T + weights["output.bias"])


def test_initial_weights_come_from_the_seed_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digests = [weights_digest(build_model(SPEC, seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_brings_the_same_model_back_in_the_same_bytes(tmp_path: Path) -> None:
    model = build_model(SPEC, seed=3)
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, SPEC, model)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, spec = load_checkpoint(tmp_path / "a", CPU)
    assert spec == SPEC
    assert not loaded.training
    images = torch.rand(4, 1, 6, 5)
    assert torch.equal(predict_logits(loaded, images), predict_logits(model, images))
    torch.testing.assert_close(predict_logits(loaded, images, batch_size=3), predict_logits(model, images))


def test_a_bad_checkpoint_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(file, CPU)
    save_checkpoint(file, SPEC, build_model(SPEC, 0))
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(file, CPU)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, str(file))
    with pytest.raises(InputError, match="not a checkpoint of format 1"):
        load_checkpoint(file, CPU)
    model = build_model(SPEC, 0)
    with torch.no_grad():
        model.output.bias[0] = float("nan")  # type: ignore[union-attr, operator, index]
    save_checkpoint(file, SPEC, model)
    with pytest.raises(InputError, match="weights that are not finite"):
        load_checkpoint(file, CPU)


def test_unknown_names_and_devices_are_refused() -> None:
    with pytest.raises(
        InputError, match="no model 'vit'; known: mlp, small_resnet, efficientnet_lite0, and torchvision's"
    ):
        build_model(ModelSpec("vit", 1, 6, 5, 3, 7), 0)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device for 'cuda'"):
            set_up_compute("cuda", 1)


def test_training_learns_what_can_be_learned_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = torch.rand((90, 1, 6, 5), generator=generator)
    images[torch.arange(90), 0, labels, 0] += 1
    digests = []
    for _ in range(2):
        model = build_model(SPEC, 0)
        curve = train_classifier(
            model, Split(images, labels), Split(images, labels), learning_rate=0.01, batch_size=16, epochs=15, seed=0
        )
        digests.append(weights_digest(model))
    assert digests[0] == digests[1]
    assert curve["epoch"].tolist() == list(range(1, 16))
    assert curve["loss"].iloc[-1] < 0.3 * curve["loss"].iloc[0]
    assert accuracy(model, images, labels) == curve["val_accuracy"].iloc[-1] > 0.9


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_model_comes_back_from_its_checkpoint_and_ends_in_its_last_layer(
    name: str, channels: int, tmp_path: Path
) -> None:
    spec = ModelSpec(name, channels, 32, 32, n_classes=3, hidden=4)
    model = build_model(spec, seed=1).eval()
    images = torch.rand((5, channels, 32, 32), generator=torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path / "m", spec, model)
    loaded, _ = load_checkpoint(tmp_path / "m", CPU)
    logits = predict_logits(model, images)
    assert logits.shape == (5, 3)
    assert torch.equal(predict_logits(loaded, images), logits)
    features = penultimate_features(model, images, batch_size=2)
    layer = last_linear(model)
    torch.testing.assert_close(features @ layer.weight.detach().T + layer.bias.detach(), logits)


def test_torchvisions_models_are_torchvisions_on_normalised_pixels() -> None:
    from torchvision import models, transforms

    spec = ModelSpec("resnet18", 1, 32, 32, n_classes=4, hidden=1)
    ours = build_model(spec, seed=0).eval()
    official = models.resnet18(weights=None, num_classes=4).eval()
    official.load_state_dict(ours.net.state_dict())  # type: ignore[union-attr, operator]
    grey = torch.rand((3, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(ours(grey), official(normalise(grey.expand(-1, 3, -1, -1))))


def test_the_small_resnet_is_residual() -> None:
    """With the inner convolutions at zero a block passes on its shortcut, by hand."""
    model = build_model(ModelSpec("small_resnet", 1, 32, 32, n_classes=2, hidden=4), seed=0).eval()
    block = model.net[3]  # type: ignore[index, union-attr]
    features = torch.randn(2, 4, 6, 6)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(features), features.clamp(min=0))
    assert sum(isinstance(module, torch.nn.ReLU) for module in model.modules()) == 7  # none is used twice


@pytest.mark.parametrize("channels", [1, 3])
def test_efficientnet_lite0_is_the_published_network(channels: int, tmp_path: Path) -> None:
    """Against the port whose names the published weights have, with all its weights drawn, through a file of them."""
    from efficientnet_lite_pytorch import EfficientNet

    peer = EfficientNet.from_name("efficientnet-lite0").eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in peer.state_dict().items():
        if tensor.ndim == 1:  # norms and biases, which start at 0 and 1
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1 if "running" not in name else 1.0)
    torch.save(peer.state_dict(), tmp_path / "published.pth")
    spec = ModelSpec("efficientnet_lite0", channels, 96, 96, n_classes=1000, hidden=1)
    ours = build_model(spec, seed=0).eval()
    load_weights(ours, spec, str(tmp_path / "published.pth"))
    assert sum(parameter.numel() for parameter in ours.parameters()) == 4_652_008
    images = torch.rand((2, channels, 96, 96), generator=generator)
    with torch.no_grad():
        expected = peer((images.expand(-1, 3, -1, -1) - 127 / 255) / (128 / 255))
        torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (9, 6)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_convolutions_pad_the_extra_row_at_the_end(size: tuple[int, int], kernel: int, stride: int) -> None:
    """By a loop over the windows of TensorFlow's rule: output o starts at o * stride - (total padding // 2)."""
    generator = torch.Generator().manual_seed(0)
    conv = SameConv2d(2, 3, kernel, stride)
    image = torch.rand((1, 2, *size), generator=generator)
    outputs = [-(-n // stride) for n in size]
    first = [max((out - 1) * stride + kernel - n, 0) // 2 for out, n in zip(outputs, size, strict=True)]
    expected = torch.zeros((1, 3, *outputs))
    for row, column in product(range(outputs[0]), range(outputs[1])):
        for i, j in product(range(kernel), range(kernel)):
            u, v = row * stride - first[0] + i, column * stride - first[1] + j
            if 0 <= u < size[0] and 0 <= v < size[1]:
                expected[0, :, row, column] += conv.weight[:, :, i, j].detach() @ image[0, :, u, v]
    torch.testing.assert_close(conv(image).detach(), expected)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_weights_from_a_file_replace_all_but_a_head_of_another_size(ending: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision import models

    official = models.resnet18(weights=None, num_classes=7).state_dict()
    file = tmp_path / f"w{ending}"
    torch.save(official, file) if ending == ".pt" else save_file(official, str(file))
    spec = ModelSpec("resnet18", 1, 32, 32, n_classes=2, hidden=1)
    model, fresh = build_model(spec, seed=0), build_model(spec, seed=0)
    load_weights(model, spec, str(file))
    for name, tensor in model.net.state_dict().items():  # type: ignore[union-attr, operator]
        expected = fresh.net.state_dict() if name.startswith("fc.") else official  # type: ignore[union-attr, operator]
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_ours_serves_as_weights(tmp_path: Path) -> None:
    spec = ModelSpec("small_resnet", 1, 32, 32, n_classes=2, hidden=4)
    trained = build_model(spec, seed=5)
    save_checkpoint(tmp_path / "w.safetensors", spec, trained)
    model = build_model(spec, seed=0)
    load_weights(model, spec, str(tmp_path / "w.safetensors"))
    assert weights_digest(model) == weights_digest(trained)


def test_weights_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    spec = ModelSpec("resnet18", 3, 32, 32, n_classes=2, hidden=1)
    model = build_model(spec, seed=0)
    with pytest.raises(InputError, match=r"gone\.pt: no such file"):
        load_weights(model, spec, str(tmp_path / "gone.pt"))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad\.safetensors: not a readable checkpoint"):
        load_weights(model, spec, str(tmp_path / "bad.safetensors"))
    torch.save({"fc.weight": torch.zeros(2, 512)}, tmp_path / "part.pt")
    with pytest.raises(InputError, match="does not fit model 'resnet18'"):
        load_weights(model, spec, str(tmp_path / "part.pt"))
    torch.save(Path("not tensors"), tmp_path / "pickle.pt")
    with pytest.raises(InputError, match=r"pickle\.pt: not a readable checkpoint"):
        load_weights(model, spec, str(tmp_path / "pickle.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        load_weights(model, spec, str(tmp_path / "list.pt"))
    with pytest.raises(InputError, match="'resnet18' has no weights 'BEST'; known: IMAGENET1K_V1"):
        load_weights(model, spec, "BEST")
    with pytest.raises(InputError, match="torchvision has no weights for 'mlp'"):
        load_weights(build_model(SPEC, 0), SPEC, "DEFAULT")
    with pytest.raises(InputError, match="outputs beside its logits"):
        build_model(ModelSpec("googlenet", 3, 32, 32, 2, 1), 0)
    with pytest.raises(InputError, match="takes 1 or 3 channels, the data has 2"):
        build_model(ModelSpec("resnet18", 2, 32, 32, 2, 1), 0)
