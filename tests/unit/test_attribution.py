"""DeepLiftSHAP against oracles of its own kind: brute force, Shapley values, gradients, captum; and what it refuses."""

import contextlib
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import DeepLift
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lvlmva_core.attribution import (
    CompletenessError,
    UnsupportedOperationError,
    deep_lift_shap,
    explain,
    gradient,
    integrated_gradients,
)
from lvlmva_core.attribution.deep_lift import full_precision
from lvlmva_core.errors import InputError
from lvlmva_core.testing.attribution import (
    AttributionTests,
    Product,
    Sum,
    assert_close,
    random_images,
    reference_deep_lift,
    shapley_values,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model in eval mode with weights from a seed, and BatchNorm statistics as if it had been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.3, 2.0),
                    (module.weight.data, 0.5, 1.5),
                    (module.bias.data, -0.5, 0.5),
                ):
                    tensor.copy_(torch.empty_like(tensor).uniform_(low, high))
        return model


def cnn() -> nn.Module:
    """Every trap at once: reused in-place ReLU before overlapping max-pooling, BatchNorm, a residual, dropout."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        relu,
        nn.MaxPool2d(3, stride=2, padding=1),
        Sum(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)), nn.Identity()),
        relu,
        nn.Dropout(0.5),
        nn.Conv2d(6, 4, 3, dilation=2),
        relu,
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3),
    )


class TestCnn(AttributionTests):
    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return seeded(cnn).to(device, dtype)


class TestMlp(AttributionTests):
    shape = (1, 4, 4)

    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return seeded(
            lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
            )
        ).to(device, dtype)


class TestGradientTimesDifferenceOfALinearModel(AttributionTests):
    """The suite holds other methods too: on a linear model, the gradient times the difference is complete."""

    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))).to(device, dtype)

    def explain(
        self, model: nn.Module, inputs: Tensor, baselines: Tensor, targets: int | Tensor, batch_size: int
    ) -> Tensor:
        return gradient(model, inputs, targets) * (inputs - baselines.mean(0))


@pytest.mark.parametrize("method", ["gradient", "overwriting"])
def test_the_suite_finds_incomplete_methods(method: str) -> None:
    """A suite that nothing can fail would hold nobody to account."""

    class Wrong(TestCnn):
        def explain(
            self, model: nn.Module, inputs: Tensor, baselines: Tensor, targets: int | Tensor, batch_size: int
        ) -> Tensor:
            if method == "gradient":
                return gradient(model, inputs, targets) * (inputs - baselines.mean(0))
            found = deep_lift_shap(model, inputs, baselines, targets)
            model.train()
            return found

    check = Wrong().test_attributions_add_up if method == "gradient" else Wrong().test_model_comes_back
    with pytest.raises(AssertionError):
        check()


# ----------------------------------------------------------------------------------------------------- against oracles

SMALL = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 7), nn.ReLU(), nn.Linear(7, 3)),
    "overlapping_pool": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ),
    "pool_first": lambda: nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(8, 3)),
    "strided_grouped": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(36, 3),
    ),
    "transposed": lambda: nn.Sequential(
        nn.AvgPool2d(3, 2, 1), nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), nn.BatchNorm2d(3), nn.ELU(1.3),
        nn.Flatten(), nn.Linear(192, 3),
    ),
    "residual": lambda: nn.Sequential(
        Sum(nn.Identity(), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3),
    ),
    "squeeze_excitation": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(),
        Product(nn.Identity(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())),
        nn.Flatten(), nn.Linear(144, 3),
    ),
    "curves": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GELU(), nn.Conv2d(3, 3, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(),
        nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_brute_force(name: str) -> None:
    """Loops over units and dense matrices of every affine layer give the same maps."""
    model = seeded(SMALL[name])
    inputs, baselines = random_images(2, (2, 6, 6), 3) * 2 - 0.5, random_images(3, (2, 6, 6), 4) * 2 - 0.5
    found = deep_lift_shap(model, inputs, baselines, torch.tensor([2, 0]), batch_size=4)
    for place, target in enumerate((2, 0)):
        wanted = [reference_deep_lift(model, inputs[place], baseline, target) for baseline in baselines]
        assert_close(found[place], torch.stack(wanted).mean(0))


def test_ties_follow_the_derivative() -> None:
    """Where an activation is the same for input and baseline, the multiplier is the derivative there."""
    model = seeded(SMALL["overlapping_pool"])
    inputs, baseline = random_images(1, (2, 6, 6), 5), random_images(1, (2, 6, 6), 6)
    baseline[..., :3] = inputs[..., :3]  # as in pictures that share a black margin
    found = deep_lift_shap(model, inputs, baseline, 1)
    assert_close(found[0], reference_deep_lift(model, inputs[0], baseline[0], 1))
    assert bool((found[..., :2] == 0).all())


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    values=st.lists(st.floats(-2, 2), min_size=10, max_size=10),
)
def test_shapley_values_where_they_are_the_same(weights: list[float], values: list[float]) -> None:
    """Linear models, sums of ReLUs of one feature each, and products of two features: equal to Shapley values."""
    w = torch.tensor(weights, dtype=torch.float64)
    x, b = torch.tensor(values, dtype=torch.float64).view(2, 5)

    class Additive(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            additive = (t * w + 0.3).relu().sum(1, keepdim=True)
            product = t[:, :1] * t[:, 1:2]
            return torch.cat([(t * w).sum(1, keepdim=True), additive, product], 1)

    for target in range(3):
        found = deep_lift_shap(Additive(), x[None], b[None], target)[0]
        wanted = shapley_values(lambda t, k=target: Additive()(t)[:, k], x, b)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_shapley_values_average_over_baselines() -> None:
    """DeepLiftSHAP of a linear model: w·(x - mean b)."""
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 2)))
    x, baselines = random_images(1, (2, 2, 2), 7), random_images(5, (2, 2, 2), 8)
    weight = model[1].weight.detach()[1].view(2, 2, 2)  # type: ignore[index]
    assert_close(deep_lift_shap(model, x, baselines, 1)[0], weight * (x[0] - baselines.mean(0)))


class Wrap(nn.Module):
    """conv, then `op` on (n, 4, 6, 6), then a linear head."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.op = op
        with torch.no_grad():
            features = op(torch.rand(2, 4, 6, 6)).flatten(1).shape[1]
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


def attention(t: Tensor) -> Tensor:
    tokens = t.flatten(2).transpose(1, 2).unsqueeze(1)  # one head
    return functional.scaled_dot_product_attention(tokens, tokens * 2.0, tokens + 1.0)


def numbers(like: Tensor, *shape: int) -> Tensor:
    """Weights that are the same at every call."""
    return torch.linspace(-1, 1, int(np.prod(shape))).view(shape).cos().to(like)


def windows(t: Tensor) -> Tensor:
    """(n, 4, 6, 6) as four windows of 3x3 tokens, which stand beside the samples in the first dimension."""
    return t.view(-1, 4, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, 4)


def sequence_first(t: Tensor) -> Tensor:
    tokens = t.flatten(2).permute(2, 0, 1)  # (36, n, 4)
    query, key, value = (tokens @ numbers(t, 4, 12)).view(36, -1, 3, 4).permute(2, 1, 0, 3)
    return (torch.bmm(query, key.mT) / 2).softmax(-1) @ value


def torch_attention(t: Tensor, need_weights: bool = False) -> Tensor:
    """With its packed weights, two heads and an additive mask, sequence first."""
    tokens = t.flatten(2).permute(2, 0, 1)
    weights, mask = numbers(t, 12, 4) * 2, numbers(t, 36, 36)
    out: Tensor = functional.multi_head_attention_forward(
        tokens, tokens * 1.5, tokens.relu(), 4, 2, weights, numbers(t, 12), None, None, False, 0.0, numbers(t, 4, 4),
        None, training=False, need_weights=need_weights, attn_mask=mask,
    )[0]  # fmt: skip
    return out.transpose(0, 1)


def in_place_chain(t: Tensor) -> Tensor:
    t = t + 0
    t.mul_(2).add_(0.1).mul_(3)
    return functional.hardtanh_(t, 0.1, 1.5)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu_method": lambda t: t.relu(),
    "relu_in_place": lambda t: (t * 1.0).relu_(),
    "leaky_relu": lambda t: functional.leaky_relu(t, 0.1),
    "prelu": lambda t: functional.prelu(t, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=t.dtype)),
    "elu": lambda t: functional.elu(t, 0.7),
    "selu": functional.selu,
    "celu": lambda t: functional.celu(t, 1.5),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
    "mish": functional.mish,
    "softplus": functional.softplus,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "relu6": functional.relu6,
    "hardtanh": lambda t: functional.hardtanh(t, -0.3, 0.4),
    "clamp": lambda t: t.clamp(-0.2, 0.3),
    "clamp_min": lambda t: t.clamp(min=0.1),
    "clamp_max": lambda t: t.clamp(max=0.1),
    "abs": torch.abs,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": lambda t: (t.abs() + 0.5).log(),
    "sqrt": lambda t: (t.abs() + 0.1).sqrt(),
    "rsqrt": lambda t: (t.abs() + 0.1).rsqrt(),
    "square": lambda t: t**2,
    "cube": lambda t: t.pow(3),
    "negative_power": lambda t: (t.abs() + 0.5) ** -1.5,
    "max_pool": lambda t: functional.max_pool2d(t, 3, 2, 1),
    "max_pool_dilated": lambda t: functional.max_pool2d(t, 2, 1, dilation=2),
    "max_pool_ceil": lambda t: functional.max_pool2d(t, 4, 3, ceil_mode=True),
    "max_pool_1d": lambda t: functional.max_pool1d(t.flatten(2), 3, 2),
    "max_pool_3d": lambda t: functional.max_pool3d(t.unsqueeze(1), 2, 1),
    "adaptive_max_pool": lambda t: functional.adaptive_max_pool2d(t, (4, 3)),
    "avg_pool": lambda t: functional.avg_pool2d(t, 3, 2, 1),
    "adaptive_avg_pool": lambda t: functional.adaptive_avg_pool2d(t, (4, 5)),
    "global_avg_pool": lambda t: functional.adaptive_avg_pool2d(t, 1),
    "upsample": lambda t: functional.interpolate(t, scale_factor=2, mode="bilinear"),
    "nearest": lambda t: functional.interpolate(t, size=(7, 9)),
    "pad": lambda t: functional.pad(t, (1, 2, 0, 1), value=0.3),
    "reflect": lambda t: functional.pad(t, (1, 2, 2, 1), mode="reflect"),
    "pixel_shuffle": lambda t: functional.pixel_shuffle(t, 2),
    "permute": lambda t: t.permute(0, 2, 3, 1).contiguous().view(t.shape[0], -1),
    "merged_rows": lambda t: functional.relu(t.reshape(t.shape[0] * 4, 36) - 0.1).view(t.shape[0], 4, 36),
    "swap": lambda t: t.transpose(1, 3) * torch.arange(6.0, dtype=t.dtype)[:, None, None],
    "cat": lambda t: torch.cat([t, t.relu(), torch.ones_like(t)], 1),
    "stack": lambda t: torch.stack([t.relu(), t * 2], 1),
    "chunk": lambda t: t.chunk(2, 1)[0] + t.chunk(2, 1)[1].relu(),
    "unbind": lambda t: t.unbind(1)[2].relu(),
    "slice": lambda t: t[:, 1:, ::2, 1].relu() - t[:, :3, ::2, 0],
    "roll": lambda t: t.roll((1, 2), (2, 3)).flip(2),
    "constants": lambda t: 2.0 - (3 * t + 1) / 4.0 - t * torch.linspace(0, 1, 6, dtype=t.dtype),
    "broadcast": lambda t: t + t.mean((2, 3), keepdim=True).relu(),
    "square_by_itself": lambda t: t * t,
    "product": lambda t: t * t.roll(1, 3).sigmoid(),
    "excitation": lambda t: t * t.mean((2, 3), keepdim=True).sigmoid(),
    "quotient": lambda t: t / (t.abs().sum(1, keepdim=True) + 1.0),
    "reciprocal": lambda t: 1.0 / (t.abs() + 0.7),
    "where": lambda t: torch.where(torch.arange(6) % 2 == 0, t, t.relu()),
    "masked_fill": lambda t: t.masked_fill(torch.arange(6) == 2, 0.5),
    "softmax": lambda t: t.flatten(2).softmax(-1),
    "layer_norm": lambda t: functional.layer_norm(t, (6, 6), torch.linspace(0.5, 1.5, 36, dtype=t.dtype).view(6, 6)),
    "group_norm": lambda t: functional.group_norm(t, 2, torch.linspace(0.5, 1.5, 4, dtype=t.dtype)),
    "log_softmax": lambda t: t.flatten(2).log_softmax(1),
    "softmax_with_a_mask": lambda t: (t + torch.where(torch.arange(6) > 3, -torch.inf, 0.0)).softmax(-1),
    "logsumexp": lambda t: t.logsumexp((1, 3), keepdim=True) - t.logsumexp(2).unsqueeze(2),
    "rms_norm": lambda t: functional.rms_norm(t, (6,), torch.linspace(0.5, 1.5, 6, dtype=t.dtype)),
    "instance_norm": lambda t: functional.instance_norm(t, weight=torch.linspace(0.5, 1.5, 4, dtype=t.dtype)),
    "instance_norm_with_statistics": lambda t: functional.instance_norm(
        t, torch.linspace(0, 1, 4, dtype=t.dtype), torch.linspace(0.5, 1, 4, dtype=t.dtype), use_input_stats=False
    ),
    "unit_length": lambda t: functional.normalize(t, dim=1),
    "length": lambda t: torch.linalg.vector_norm(t, dim=(1, 2)),
    "variance": lambda t: t.var((1, 3), keepdim=True) + t.var(2, correction=0)[:, :, None],
    "variance_and_mean": lambda t: sum(torch.var_mean(t, 1)),
    "deviation": lambda t: t / t.std((1, 2), keepdim=True),
    "amax": lambda t: t - t.amax((1, 3), keepdim=True),
    "largest_and_smallest": lambda t: t.max(2)[0] - t.min(3).values,
    "maximum": lambda t: torch.maximum(t, t.roll(1, 2)) - torch.minimum(torch.zeros(4, 6, 6, dtype=t.dtype), t),
    "glu": lambda t: functional.glu(t, 1),
    "addcmul": lambda t: torch.addcmul(t, t, t.roll(1, 3), value=0.5) + torch.addcmul(numbers(t, 6), t, numbers(t, 6)),
    "waves": lambda t: t.sin() + t.cos() * t.expm1() + t.abs().log1p(),
    "index": lambda t: t[:, torch.tensor([[0, 2], [3, 1]]), :, 2].relu(),
    "repeat": lambda t: t.repeat(1, 2, 1, 3).relu(),
    "unfold": lambda t: t.unfold(3, 2, 1).amax(-1),
    "fold": lambda t: functional.fold(functional.unfold(t, 2, stride=2).relu(), (6, 6), 2, stride=2),
    "samples_second": lambda t: (t.transpose(0, 1).relu() * numbers(t, 4, 1, 1, 1)).transpose(0, 1),
    "samples_last": lambda t: functional.gelu(t.flatten(1).t() * 2.0).softmax(0).t(),
    "samples_merged": lambda t: (t.permute(1, 0, 2, 3).reshape(-1, 6) @ torch.eye(6).to(t)).view(4, len(t), 36)[1],
    "samples_inside": lambda t: functional.silu(t.permute(2, 0, 1, 3).reshape(6, -1, 3)).view(6, -1, 24).movedim(1, 0),
    "windows": lambda t: windows(t).softmax(1).square().view(-1, 4, 9, 4),
    "einsum": lambda t: torch.einsum("bchw,bdhw->bcd", t, t.relu()),
    "einsum_with_constants": lambda t: torch.einsum("bchw,hwe->cbe", t, numbers(t, 6, 6, 5)).transpose(0, 1),
    "baddbmm": lambda t: torch.baddbmm(t[:, 0], t[:, 1], t[:, 2], beta=0.5, alpha=2.0),
    "matrix_of_constants": lambda t: numbers(t, 4, 6, 6) @ t,
    "attention": attention,
    "attention_with_the_samples_second": sequence_first,
    "attention_of_torch": torch_attention,
    "attention_of_torch_with_weights": lambda t: torch_attention(t, need_weights=True),
    "expand": lambda t: t.mean(1, keepdim=True).expand(-1, 3, -1, -1).relu() * 0.5,
    "in_place_chain": in_place_chain,
    "detach": lambda t: t + t.detach().relu(),
    "item_assignment_of_constants": lambda t: t * torch.ones_like(t).fill_(0.5),
}  # fmt: skip


@pytest.fixture(params=OPS)
def wrapped(request: pytest.FixtureRequest) -> nn.Module:
    return seeded(lambda: Wrap(OPS[request.param]))


def test_every_operation_is_complete(wrapped: nn.Module) -> None:
    """Also for images far apart, of which several share a pass, in float64 to 1e-12."""
    inputs, baselines = random_images(3, (2, 6, 6), 9) * 4 - 2, random_images(4, (2, 6, 6), 10) * 4 - 2
    errors = explain(wrapped, inputs, baselines, torch.tensor([0, 1, 2]), batch_size=8).completeness_error()
    assert float(errors.max()) < 1e-12
    singles = [deep_lift_shap(wrapped, inputs[:1], baseline[None], 0) for baseline in baselines]
    assert_close(deep_lift_shap(wrapped, inputs, baselines, 0, batch_size=12)[:1], torch.stack(singles).mean(0))


def test_every_operation_has_the_gradient_as_its_limit(wrapped: nn.Module) -> None:
    """For a baseline 1e-5 away, multipliers are autograd's gradient halfway but for O(step²); kinks are avoided by the
    seed, except that the path may cross one, which one unit of many may do."""
    x = random_images(1, (2, 6, 6), 11)
    step = (random_images(1, (2, 6, 6), 12) - 0.5) * 1e-6
    multipliers = deep_lift_shap(wrapped, x + step, (x - step), 1) / (2 * step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "detach", lambda t: t)  # the method looks through detach, the gradient does not
        slope = gradient(wrapped, x, 1)
    assert_close(multipliers, slope, 2e-5)


@pytest.mark.parametrize(
    "name", ["mlp", "strided_grouped", "residual_relu", "separate_pool", "tanh_sigmoid", "elu_softplus"]
)
def test_agrees_with_captum_where_captum_is_right(name: str) -> None:
    """Modules used once, windows that do not overlap, no ReLU next to a pool: to rounding."""
    build: dict[str, Callable[[], nn.Module]] = {
        **SMALL,
        "strided_grouped": lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        "residual_relu": lambda: nn.Sequential(
            Sum(nn.Identity(), nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())), nn.Flatten(), nn.Linear(72, 3)
        ),
        "separate_pool": lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 3, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(27, 3),
        ),
        "tanh_sigmoid": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3)
        ),
        "elu_softplus": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(72, 5), nn.ELU(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, 3)
        ),
    }
    model = seeded(build[name])
    inputs, baselines = random_images(2, (2, 6, 6), 13) * 2 - 1, random_images(3, (2, 6, 6), 14) * 2 - 1
    found = deep_lift_shap(model, inputs, baselines, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum announces its hooks
        parts = [DeepLift(model).attribute(inputs, b.expand_as(inputs).clone(), target=2) for b in baselines]
    assert_close(found, torch.stack(parts).mean(0).detach())


# ------------------------------------------------------------------------------------------------------------- refusals


class Function(nn.Module):
    """A model that is one function of (n, 4, 6, 6) and a head."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x).reshape(len(x), -1))  # type: ignore[no-any-return]


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x


def write_into_a_constant(t: Tensor) -> Tensor:
    out = torch.zeros_like(t)
    out[:, :2] = t[:, :2]
    return out


def stale_view(t: Tensor) -> Tensor:
    t = t * 1.0
    view = t.view(len(t), -1)
    t.relu_()
    return view


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "comparison": (lambda t: t * (t > 0), r"head|Function.*aten\.gt"),
    "branch": (lambda t: t if t.sum() > 0 else -t, "aten"),
    "item": (lambda t: t * t.flatten(1)[0, 0].item(), "samples|reads a value"),
    "round": (torch.round, r"aten\.round"),
    "sort": (lambda t: t.sort(1)[0], r"aten\.sort"),
    "fourier": (lambda t: torch.fft.fft2(t).real, "aten"),
    "batch_statistics": (lambda t: functional.batch_norm(t, None, None, training=True), "statistics of the batch"),
    "mean_over_samples": (lambda t: t - t.mean(0, keepdim=True), "dimension 0, which holds the samples"),
    "mean_over_all": (lambda t: t - t.mean(), r"aten\.mean"),
    "roll_samples": (lambda t: t.roll(1, 0), "dimension 0, which holds the samples"),
    "flip_samples": (lambda t: t.flip(0), "dimension 0, which holds the samples"),
    "cat_samples": (lambda t: torch.cat([t, t]).view(len(t), 2, 4, 6, 6).mean(1), "dimension 0, which holds"),
    "one_sample": (lambda t: t + t[0], "dimension 0, which holds the samples"),
    "some_samples": (lambda t: torch.cat([t[:1], t[1:]]), "dimension 0, which holds the samples"),
    "write_into_a_constant": (write_into_a_constant, "depends on the input into a tensor|aten"),
    "stale_view": (stale_view, "in place through another view"),
    "strides": (lambda t: t.contiguous().as_strided(t.shape, (144, 36, 1, 6)), "another order"),
    "cast": (lambda t: t.half().to(t.dtype), "dtype"),
    "noise": (lambda t: t * torch.rand(4, 6, 6, dtype=t.dtype), "at random|random draws"),
    "dropout_that_is_on": (lambda t: functional.dropout(t, 0.5, training=True), "aten"),
    "data_dependent_weights": (
        lambda t: functional.conv2d(t, t[:, :1, :4, :1].transpose(1, 2)[..., :1]), "depends on the input|samples",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name: str) -> None:
    """Whatever has no sound rule is an error that names the operation, never a plain gradient."""
    function, message = REFUSED[name]
    model = seeded(lambda: Function(function))
    inputs = random_images(3, (4, 6, 6), 15)
    with torch.random.fork_rng(devices=[]), pytest.raises(UnsupportedOperationError, match=message):
        deep_lift_shap(model, inputs, random_images(4, (4, 6, 6), 16), 0)


def test_refusal_says_where() -> None:
    """The module's name in the model, its class, and the line of the user's code."""
    model = seeded(lambda: nn.Sequential(nn.Sequential(nn.Identity(), Function(torch.round)), nn.ReLU()))
    with pytest.raises(UnsupportedOperationError, match=r"0\.1 \(Function\), test_attribution\.py:\d+: .*aten\.round"):
        deep_lift_shap(model, random_images(1, (4, 6, 6), 15), random_images(1, (4, 6, 6), 16), 0)


def test_refuses_a_model_that_changes_itself() -> None:
    model = seeded(lambda: nn.Sequential(Counter(), nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(UnsupportedOperationError, match=r"Counter.*changes a parameter or buffer"):
        deep_lift_shap(model, random_images(1, (1, 2, 2), 1), random_images(1, (1, 2, 2), 2), 0)


def test_notices_a_detour_through_numpy() -> None:
    """What no rule can see shows in the sum."""

    class Detour(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.from_numpy(np.square(x.detach().numpy()))
            return torch.stack([x.flatten(1).sum(1), hidden.flatten(1).sum(1)], 1).sum(1, keepdim=True)

    with pytest.raises((CompletenessError, UnsupportedOperationError), match=r"add up|expected|differs"):
        deep_lift_shap(Detour(), random_images(2, (1, 2, 2), 1), random_images(2, (1, 2, 2), 2), 0)


def test_a_value_that_is_not_finite_is_an_error() -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    inputs = random_images(2, (1, 2, 2), 1)
    inputs[1, 0, 0, 0] = float("nan")
    with pytest.raises(CompletenessError, match=r"samples \[1\]"):
        deep_lift_shap(model, inputs, random_images(2, (1, 2, 2), 2), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 2}, r"outside 0\.\.1"),
        ({"target": torch.tensor([0, -1])}, r"outside 0\.\.1"),
        ({"target": torch.tensor([0.0, 1.0])}, "expected an int or int64"),
        ({"target": torch.tensor([0])}, "expected an int or int64"),
        ({"inputs": torch.zeros(2, 1, 2, 2)}, "float32.*one dtype|one dtype"),
        ({"inputs": torch.zeros(2, 1, 2, 2, dtype=torch.int64)}, "expected float32 or float64"),
        ({"inputs": torch.zeros(0, 1, 2, 2, dtype=torch.float64)}, "B > 0"),
        ({"baselines": torch.zeros(0, 1, 2, 2, dtype=torch.float64)}, "R > 0"),
        ({"baselines": torch.zeros(2, 1, 2, 3, dtype=torch.float64)}, "baselines have shape"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"samples_at_once": 0}, "samples_at_once is 0"),
        ({"model": nn.Identity()}, r"expected logits \(n, K\)"),
    ],
)  # fmt: skip
def test_mistakes_in_the_call(change: dict[str, object], message: str) -> None:
    call: dict[str, object] = {
        "model": seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2))),
        "inputs": random_images(2, (1, 2, 2), 1),
        "baselines": random_images(3, (1, 2, 2), 2),
        "target": 0,
        **change,
    }
    with pytest.raises(InputError, match=message):
        deep_lift_shap(**call)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- cost and memory


def test_same_bits_whatever_else_is_explained() -> None:
    """With one sample a pass, in float32: the map of a sample does not know its neighbours."""
    model = seeded(cnn).float()
    inputs = random_images(5, (3, 16, 16), 1, torch.float32)
    baselines = random_images(7, (3, 16, 16), 2, torch.float32)
    together = deep_lift_shap(model, inputs, baselines, 1, batch_size=3, samples_at_once=1)
    alone = deep_lift_shap(model, inputs[3:4], baselines, 1, batch_size=3, samples_at_once=1)
    assert torch.equal(together[3:4], alone)


@pytest.mark.parametrize(("batch_size", "samples"), [(100, 5 + 7), (7, 5 + 7), (14, 5 + 7), (3, 3 * 5 + 7)])
def test_each_image_runs_through_the_model_once(batch_size: int, samples: int) -> None:
    """R + B samples run forward; only where not all baselines fit are the inputs run again for each part of them."""
    model, seen = seeded(cnn), []
    model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    deep_lift_shap(model, random_images(5, (3, 16, 16), 1), random_images(7, (3, 16, 16), 2), 1, batch_size=batch_size)
    assert sum(seen) == samples
    assert max(seen) <= batch_size


class OutOfMemory(nn.Module):
    """Raises as a GPU does for batches above a limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return x


def test_out_of_memory_halves_the_batch_and_says_so() -> None:
    model = seeded(cnn)
    inputs, baselines = random_images(5, (3, 16, 16), 1), random_images(7, (3, 16, 16), 2)
    small = nn.Sequential(OutOfMemory(2), model)
    with pytest.warns(RuntimeWarning, match="out of memory: going on with") as caught:
        found = deep_lift_shap(small, inputs, baselines, 1, batch_size=8)
    assert [str(warning.message).rsplit("=")[-1] for warning in caught] == ["4", "2"]
    assert_close(found, deep_lift_shap(model, inputs, baselines, 1))
    with (
        pytest.warns(RuntimeWarning, match="out of memory"),
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"),
    ):
        deep_lift_shap(nn.Sequential(OutOfMemory(0), model), inputs, baselines, 1)


def test_models_that_call_view_on_their_activations() -> None:
    """`.view()` refuses channels_last memory; such models run in the contiguous layout, with the same result."""

    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).relu().view(len(x), -1))  # type: ignore[no-any-return]

    model = seeded(View).float()
    inputs = random_images(2, (3, 16, 16), 1, torch.float32)
    found = deep_lift_shap(model, inputs, inputs.flip(0) * 0.5, 0)
    assert_close(found, deep_lift_shap(model, inputs, inputs.flip(0) * 0.5, 0, channels_last=False), 1e-6)
    with pytest.raises(RuntimeError, match="view size"):
        deep_lift_shap(model, inputs, inputs, 0, channels_last=True)


def test_reduced_precision_is_off_and_comes_back() -> None:
    """TF32 would cost the exactness; the settings are the caller's again after, also after an exception."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = "tf32"
        with contextlib.suppress(KeyError), full_precision(torch.device("cuda")):
            assert [each.fp32_precision for each in settings] == ["ieee", "ieee"]
            raise KeyError("in the middle of a call")
        assert [each.fp32_precision for each in settings] == ["tf32", "tf32"]
    finally:
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


def test_runs_inside_other_modes() -> None:
    """Under inference_mode, no_grad and autocast the result is the same."""
    model, x, b = seeded(cnn), random_images(2, (3, 16, 16), 1), random_images(2, (3, 16, 16), 2)
    wanted = deep_lift_shap(model, x, b, 0)
    with torch.inference_mode():
        assert_close(deep_lift_shap(model, x, b, 0), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(deep_lift_shap(model, x, b, 0), wanted)


# -------------------------------------------------------------------------------------------------------- other methods


def test_integrated_gradients_converge_to_completeness() -> None:
    """And equal DeepLIFT where the model is linear."""
    model = seeded(SMALL["curves"])
    x, b = random_images(2, (2, 6, 6), 1), random_images(3, (2, 6, 6), 2)
    found = integrated_gradients(model, x, b, torch.tensor([0, 2]), steps=64, batch_size=32)
    wanted = explain(model, x, b, torch.tensor([0, 2]))
    torch.testing.assert_close(found.flatten(1).sum(1), wanted.output - wanted.expected, rtol=1e-4, atol=1e-8)
    linear = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))
    found = integrated_gradients(linear, x, b, 1, steps=2, batch_size=8)
    assert_close(found, deep_lift_shap(linear, x, b, 1))


def test_gradient_is_the_slope() -> None:
    """Central differences of the logit."""
    model = seeded(SMALL["curves"])
    x = random_images(1, (2, 6, 6), 1)
    slope, step = gradient(model.train(), x, 1), 1e-6
    assert model.training
    units = torch.eye(72, dtype=torch.float64).view(72, 2, 6, 6) * step
    with torch.no_grad():
        wanted = (model(x + units) - model(x - units))[:, 1] / (2 * step)
    assert_close(slope.flatten(), wanted, 1e-7)
