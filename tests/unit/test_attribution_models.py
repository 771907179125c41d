"""DeepLiftSHAP of torchvision's models and of a trained one."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import DeepLift
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lvlmva_core.attribution import deep_lift_shap, explain, gradient
from lvlmva_core.efficientnet_lite import EfficientNetLite0
from lvlmva_core.testing.attribution import TOLERANCE, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def digits(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Handwritten digits as colour images (count, 3, side, side) float32 in [0, 1], and their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images[:count] / 16.0).float()[:, None]
    images = nn.functional.interpolate(images, size=(side, side), mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(data.target[:count].astype(np.int64))


def settled(name: str, side: int) -> nn.Module:
    """A model with drawn weights, and BatchNorm statistics of the digits, as after training."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet's initialisation
        torch.manual_seed(0)
        model: nn.Module = (
            EfficientNetLite0(10)
            if name == "efficientnet_lite0"
            else getattr(torchvision.models, name)(weights=None, num_classes=10)
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over all that is seen
        with torch.no_grad():
            model.train()(digits(8, side)[0])
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms' weights start at 0 and 1: move them as training does
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet18", 64),
        ("resnet50", 64),
        ("resnext50_32x4d", 64),
        ("vgg16_bn", 32),
        ("densenet121", 64),
        ("mobilenet_v2", 64),
        ("mobilenet_v3_large", 64),
        ("efficientnet_b0", 64),
        ("efficientnet_lite0", 64),
        ("convnext_tiny", 64),
        ("regnet_y_400mf", 64),
        ("shufflenet_v2_x0_5", 64),
        ("squeezenet1_1", 64),
        ("googlenet", 64),
    ],
)
def test_models_add_up(name: str, side: int) -> None:
    """Local accuracy of 1e-6 of the absolute sum in float32 and 1e-12 in float64."""
    model = settled(name, side)
    images = digits(12, side)[0]
    inputs, baselines, targets = images[8:10], images[10:12], torch.tensor([3, 7])
    for dtype in (torch.float32, torch.float64):
        found = explain(model.to(dtype), inputs.to(dtype), baselines.to(dtype), targets)
        assert float(found.completeness_error().max()) < TOLERANCE[dtype]
        assert float((found.output - found.expected).abs().min()) > 1e-9  # there is something to explain


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small ResNet, trained on digits until it is right about almost all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
        images, labels = digits(256, 32)
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        for step in range(48):
            part = slice(step % 8 * 32, (step % 8 + 1) * 32)
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        assert float((model(images).argmax(1) == labels).float().mean()) > 0.9
    return model


def test_trained_weights_add_up(trained: nn.Module) -> None:
    """On the logit of the true class, against digits as baselines."""
    images, labels = digits(32, 32)
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(trained).to(dtype)
        found = explain(model, images[:7].to(dtype), images[7:].to(dtype), labels[:7], batch_size=40)
        assert float(found.completeness_error().max()) < TOLERANCE[dtype]


def test_captum_misses_the_difference_on_a_resnet(trained: nn.Module) -> None:
    """The documented case: even with every ReLU a module of its own, captum's map of a ResNet does not add up."""
    images, labels = digits(2, 32)
    model = copy.deepcopy(trained).double()
    x, b, target = images[:1].double(), images[1:].double(), labels[:1]
    unshared = unshare_relus(model)
    with torch.no_grad():
        assert torch.equal(unshared(x), model(x))
        difference = float((model(x) - model(b))[0, target])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum announces its hooks
        captum = DeepLift(unshared).attribute(x, b, target=target).detach()
    ours = deep_lift_shap(model, x, b, target)
    assert abs(float(captum.sum()) - difference) > 1e-4 * float(captum.abs().sum())
    assert float((captum - ours).abs().max()) > 0.05 * float(ours.abs().max())
    assert abs(float(ours.sum()) - difference) < 1e-12 * float(ours.abs().sum())


def unshare_relus(model: nn.Module) -> nn.Module:
    """A copy in which every call of a ReLU has a module of its own, which captum needs."""
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for place, node in enumerate(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.ReLU):
            traced.add_submodule(f"relu_{place}", nn.ReLU())
            node.target = f"relu_{place}"
    traced.recompile()
    return traced


def test_frozen_relus_give_the_gradient(trained: nn.Module) -> None:
    """For a baseline so near that no unit changes sign, the multipliers are the gradient of the whole network."""
    images, labels = digits(1, 32)
    model, x = copy.deepcopy(trained).double(), images.double() * 0.9 + 0.05
    shift = torch.full_like(x, 1e-9)
    assert_close(deep_lift_shap(model, x + shift, x - shift, labels) / (2 * shift), gradient(model, x, labels), 1e-4)
