"""Hold any model and any attribution method to account: a conformance suite for pytest, and two slow oracles.

    from lvlmva_core.testing.attribution import AttributionTests

    class TestMyModel(AttributionTests):
        def model(self, dtype, device):
            return MyModel().to(device, dtype)

runs every check below on the model with `deep_lift_shap`; override `explain` to check another method.
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lvlmva_core.attribution.deep_lift import deep_lift_shap
from lvlmva_core.attribution_methods.interface import AttributionMethod
from lvlmva_core.testing.checks import global_generators_left_alone

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # of the sum of absolute attributions


def random_images(count: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images (count, *shape), uniform in [0, 1), the same on every platform."""
    return torch.from_numpy(np.random.default_rng(seed).random((count, *shape))).to(dtype)


class AttributionTests:
    """What a complete attribution method owes its caller. Subclass it, override `model`, and let pytest collect it.

    complete: whether maps add up to the difference of outputs. shape: (C, H, W) of an image.
    n_inputs, n_baselines, batch_sizes: kept small where the model is large.
    """

    shape: tuple[int, ...] = (3, 16, 16)
    n_inputs = 3
    n_baselines = 4
    batch_sizes: tuple[int, ...] = (1, 3, 5, 100)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    n_classes = 3
    complete = True

    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The classifier under test, the same at every call. Its mode is left to the tests."""
        raise NotImplementedError

    def explain(
        self, model: nn.Module, inputs: Tensor, baselines: Tensor, targets: int | Tensor, batch_size: int
    ) -> Tensor:
        """Attributions, shaped like the inputs."""
        return deep_lift_shap(model, inputs, baselines, targets, batch_size=batch_size)

    def devices(self) -> list[torch.device]:
        """The CPU, and a GPU where there is one."""
        return [torch.device(name) for name in ("cpu", "cuda") if name == "cpu" or torch.cuda.is_available()]

    def images(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, baselines and targets."""
        inputs = random_images(self.n_inputs, self.shape, 1, dtype).to(device)
        baselines = random_images(self.n_baselines, self.shape, 2, dtype).to(device)
        return inputs, baselines, (torch.arange(self.n_inputs) % self.n_classes).to(device)

    def test_attributions_add_up(self) -> None:
        """Σ attributions = f(x) - mean f(b), in each dtype, on each device."""
        for dtype, device in itertools.product(self.dtypes, self.devices()):
            model, (inputs, baselines, targets) = self.model(dtype, device).eval(), self.images(dtype, device)
            found = self.explain(model, inputs, baselines, targets, 4)
            assert found.shape == inputs.shape
            assert found.dtype == dtype
            assert found.device == inputs.device
            if not self.complete:
                continue
            with torch.no_grad():
                wanted = logit(model(inputs), targets) - model(baselines).double().mean(0)[targets]
            gap = (found.double().flatten(1).sum(1) - wanted).abs() / found.double().abs().flatten(1).sum(1)
            assert float(gap.max()) <= TOLERANCE[dtype], (dtype, device, gap)

    def test_batch_size_changes_nothing(self) -> None:
        """Nor does the order of the baselines."""
        model, (inputs, baselines, targets) = self._in_float64()
        wanted = self.explain(model, inputs, baselines, targets, self.n_inputs * self.n_baselines)
        for batch_size in self.batch_sizes:
            assert_close(self.explain(model, inputs, baselines, targets, batch_size), wanted)
        assert_close(self.explain(model, inputs, baselines.flip(0), targets, 5), wanted)

    def test_samples_are_independent(self) -> None:
        """A sample's map is what it is alone, and the mean of its maps against each baseline."""
        model, (inputs, baselines, targets) = self._in_float64()
        together = self.explain(model, inputs, baselines, targets, 5)
        assert_close(self.explain(model, inputs[1:2], baselines, targets[1:2], 5), together[1:2])
        assert_close(self.explain(model, inputs, baselines, int(targets[0]), 5)[:1], together[:1])
        single = [self.explain(model, inputs[:1], baseline[None], targets[:1], 5) for baseline in baselines]
        assert_close(torch.stack(single).mean(0), together[:1])

    def test_an_input_that_is_its_baseline_has_no_attribution(self) -> None:
        """x = b leaves nothing to explain, and no NaN."""
        if not self.complete:
            return
        model, (inputs, _, targets) = self._in_float64()
        found = self.explain(model, inputs[:1], inputs[:1], targets[:1], 5)
        assert bool((found == 0).all())

    def test_model_comes_back(self) -> None:
        """Outputs, parameters, buffers, gradients, hooks, modes and inputs are bit-identical after, in any mode."""
        for train in (False, True):
            model, (inputs, baselines, targets) = self._in_float64()
            model.train(train)
            next(iter(model.modules())).training = not train  # a module's mode may differ from its children's
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            before = _state(model, inputs, baselines)
            self.explain(model, inputs, baselines, targets, 5)
            _assert_same_state(_state(model, inputs, baselines), before)

    def test_model_comes_back_after_an_exception(self) -> None:
        """Also when the model raises in the middle of its forward."""
        model, (inputs, baselines, targets) = self._in_float64()
        model.train()
        last = list(model.modules())[-1]
        handle = last.register_forward_hook(_raise)
        before = _state(model, inputs, baselines)
        try:
            self.explain(model, inputs, baselines, targets, 5)
        except _DeliberateError:
            pass
        else:
            raise AssertionError("the model's own exception was swallowed")
        _assert_same_state(_state(model, inputs, baselines), before)
        handle.remove()

    def test_random_generators_are_left_alone(self) -> None:
        """Nothing is drawn from, or seeds, the global generators."""
        model, (inputs, baselines, targets) = self._in_float64()
        with global_generators_left_alone():
            self.explain(model, inputs, baselines, targets, 5)

    def test_layout_of_the_inputs_changes_nothing(self) -> None:
        """Strided and channels_last inputs give what contiguous ones give."""
        model, (inputs, baselines, targets) = self._in_float64()
        wanted = self.explain(model, inputs, baselines, targets, 5)
        strided = torch.stack([inputs, inputs], dim=-1)[..., 0]
        assert not strided.is_contiguous()
        assert_close(self.explain(model, strided, baselines, targets, 5), wanted)
        if inputs.ndim == 4:
            last = inputs.contiguous(memory_format=torch.channels_last)
            assert_close(self.explain(model, last, baselines, targets, 5), wanted)

    def _in_float64(self) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
        cpu = torch.device("cpu")
        return self.model(torch.float64, cpu).eval(), self.images(torch.float64, cpu)


class AttributionMethodTests(AttributionTests):
    """What an attribution method of the pipeline owes it. Override `method`; the model is a small network."""

    @property
    def complete(self) -> bool:  # type: ignore[override]
        """As the method says."""
        return self.method(1).complete

    def method(self, batch_size: int) -> AttributionMethod:
        """The method under test."""
        raise NotImplementedError

    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Convolution, BatchNorm, a smooth and a piecewise linear activation, pooling, a linear layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Conv2d(self.shape[0], 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU(), nn.MaxPool2d(2)]
            layers += [nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
            return nn.Sequential(*layers, nn.Linear(16, self.n_classes)).to(device, dtype)

    def explain(
        self, model: nn.Module, inputs: Tensor, baselines: Tensor, targets: int | Tensor, batch_size: int
    ) -> Tensor:
        """By the method."""
        wanted = torch.as_tensor(targets, device=inputs.device).expand(len(inputs))
        return self.method(batch_size).explain(model, inputs, baselines, wanted).attributions

    def test_it_is_found_by_its_name(self) -> None:
        """In params.yaml, beside keys of other methods; whatever of its settings changes a map is said to."""
        method = self.method(4)
        others = {key: 1 for key in AttributionMethod.known_keys() if key not in type(method).model_fields}
        assert AttributionMethod.model_validate({**others, **method.model_dump()}) == method
        model, (inputs, baselines, targets) = self._in_float64()
        wanted = method.explain(model, inputs, baselines, targets).attributions
        for name, value in method.model_dump().items():
            if type(value) not in (int, float):
                continue
            other = method.model_copy(update={name: value + 1})
            gap = (other.explain(model, inputs, baselines, targets).attributions - wanted).abs().max()
            assert name in method.decisive or float(gap) <= 1e-9, f"{name} changes the maps, but is not decisive"


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    """Equal but for rounding, measured against the largest value of `wanted`. Raises AssertionError."""
    scale = float(wanted.abs().max())
    gap = float((found - wanted).abs().max())
    assert gap <= tolerance * scale, f"off by {gap:.3g}, where the largest value is {scale:.3g}"


def logit(logits: Tensor, targets: Tensor) -> Tensor:
    """The target logit of each sample, (B, K) to (B,) float64."""
    return logits.double().gather(1, targets[:, None])[:, 0]


class _DeliberateError(Exception):
    pass


def _raise(*_: Any) -> None:
    raise _DeliberateError


def _state(model: nn.Module, inputs: Tensor, baselines: Tensor) -> dict[str, Any]:
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
    with torch.no_grad():
        output = twin(inputs)
    return {
        "output": output,
        "inputs": inputs.clone(),
        "baselines": baselines.clone(),
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            [list(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for m in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def _assert_same_state(found: Any, wanted: Any, where: str = "model") -> None:
    assert type(found) is type(wanted), where
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted), f"{where} changed"
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), f"{where} changed"
        for key in wanted:
            _assert_same_state(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), f"{where} changed"
        for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
            _assert_same_state(a, b, f"{where}[{place}]")
    else:
        assert found == wanted, f"{where} changed"


# ------------------------------------------------------------------------------------------------------------- oracles


class Sum(nn.Module):
    """The sum of several branches of one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Same input to all branches, which give the same shape."""
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class Product(nn.Module):
    """The product of two branches of one input."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        """Same input to both branches; shapes broadcast."""
        return self.left(x) * self.right(x)  # type: ignore[no-any-return]


def reference_deep_lift(model: nn.Module, x: Tensor, baseline: Tensor, target: int) -> Tensor:
    """DeepLIFT by the rescale rule, plain and slow: one sample, one baseline, dense matrices and loops over units.

    Args:
        model: nested nn.Sequential, `Sum` and `Product` of layers: affine ones (any), nn.MaxPool2d and activations.
        x, baseline: (C, H, W) float64.

    Returns:
        (C, H, W) attributions of the target logit.
    """
    with torch.no_grad():
        out = model(x[None])
        m = torch.zeros_like(out)
        m[0, target] = 1.0
        return (_reference(model, x[None], baseline[None], m) * (x - baseline))[0]


_AFFINE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Upsample, nn.ZeroPad2d),
)


def _reference(model: nn.Module, x: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """Multipliers at the input, from multipliers `m` at the output."""
    if isinstance(model, nn.Sequential):
        states = [(x, b)]
        for layer in model:
            states.append((layer(states[-1][0]), layer(states[-1][1])))
        for layer, (x_in, b_in) in zip(reversed(model), reversed(states[:-1]), strict=True):
            m = _reference(layer, x_in, b_in, m)
        return m
    if isinstance(model, Sum):
        return torch.stack([_reference(branch, x, b, m) for branch in model.branches]).sum(0)
    if isinstance(model, Product):
        left = (model.left(x) + model.left(b)) / 2
        right = (model.right(x) + model.right(b)) / 2
        to_left, to_right = (m * right).sum_to_size(left.shape), (m * left).sum_to_size(right.shape)
        return _reference(model.left, x, b, to_left) + _reference(model.right, x, b, to_right)
    if isinstance(model, _AFFINE):
        units = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
        rows = torch.cat([model(unit[None]) - model(torch.zeros_like(x)) for unit in units])
        return (rows.flatten(1) @ m.flatten()).reshape(x.shape)
    if isinstance(model, nn.MaxPool2d):
        return _reference_max_pool(model, x, b, m)
    multipliers = torch.empty(x.numel(), dtype=x.dtype)
    for unit, (u, v) in enumerate(zip(x.flatten(), b.flatten(), strict=True)):
        if u == v:
            step = 1e-6
            multipliers[unit] = (model(u + step) - model(u - step)) / (2 * step)
        else:
            multipliers[unit] = (model(u) - model(v)) / (u - v)
    return m * multipliers.reshape(x.shape)


def _reference_max_pool(pool: nn.MaxPool2d, x: Tensor, b: Tensor, m: Tensor) -> Tensor:
    size, stride, pad = (v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.stride, pool.padding))
    sent = torch.zeros_like(x)
    for c, i, j in itertools.product(*(range(n) for n in m.shape[1:])):
        window = [
            (c, row, column)
            for row in range(i * stride[0] - pad[0], i * stride[0] - pad[0] + size[0])
            for column in range(j * stride[1] - pad[1], j * stride[1] - pad[1] + size[1])
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]
        ]
        x_place = max(window, key=lambda place: float(x[0][place]))
        b_place = max(window, key=lambda place: float(b[0][place]))
        most = max(float(x[0][x_place]), float(b[0][b_place]))
        sent[0][x_place] += m[0, c, i, j] * (most - b[0][b_place])
        sent[0][b_place] += m[0, c, i, j] * (x[0][x_place] - most)
    return torch.where(sent == 0, 0.0, sent / torch.where(x == b, 1.0, x - b))


class Unit:
    """One number of a network at an input and at a baseline, from which DeepLIFT is done number by number.

    Sums and products with plain numbers are linear, `apply` follows the rescale rule, a product of two units gives
    each the mean of the other. An oracle for whatever can be written in loops over numbers; no tensor is involved.
    """

    def __init__(self, x: float, baseline: float, sources: "tuple[tuple[Unit, float], ...]" = ()) -> None:
        self.x, self.baseline, self.sources = x, baseline, sources

    def __add__(self, other: "Unit | float") -> "Unit":
        if isinstance(other, Unit):
            return Unit(self.x + other.x, self.baseline + other.baseline, ((self, 1.0), (other, 1.0)))
        return Unit(self.x + other, self.baseline + other, ((self, 1.0),))

    def __mul__(self, other: "Unit | float") -> "Unit":
        if not isinstance(other, Unit):
            return Unit(self.x * other, self.baseline * other, ((self, other),))
        means = (self.x + self.baseline) / 2, (other.x + other.baseline) / 2
        return Unit(self.x * other.x, self.baseline * other.baseline, ((self, means[1]), (other, means[0])))

    def __sub__(self, other: "Unit") -> "Unit":
        return self + other * -1.0

    __radd__, __rmul__ = __add__, __mul__

    def apply(self, function: Callable[[float], float]) -> "Unit":
        """function(self) by the rescale rule; by its slope where input and baseline are the same."""
        y, y_baseline, step = function(self.x), function(self.baseline), 1e-6
        if self.x == self.baseline:
            slope = (function(self.x + step) - function(self.x - step)) / (2 * step)
        else:
            slope = (y - y_baseline) / (self.x - self.baseline)
        return Unit(y, y_baseline, ((self, slope),))

    def multipliers(self, inputs: "list[Unit]") -> list[float]:
        """Of this unit, for each of `inputs`: what reaches them along all paths."""
        order: list[Unit] = []
        seen: set[int] = set()
        stack = [(self, False)]
        while stack:
            unit, done = stack.pop()
            if done:
                order.append(unit)
            elif id(unit) not in seen:
                seen.add(id(unit))
                stack.append((unit, True))
                stack.extend((source, False) for source, _ in unit.sources)
        arrived = {id(self): 1.0}
        for unit in reversed(order):
            for source, slope in unit.sources:
                arrived[id(source)] = arrived.get(id(source), 0.0) + arrived.get(id(unit), 0.0) * slope
        return [arrived.get(id(unit), 0.0) for unit in inputs]


def shapley_values(function: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor) -> Tensor:
    """Exact Shapley values of `function` by enumerating all coalitions of features; absent features take the baseline.

    Args:
        function: (n, F) to (n,). x, baseline: (F,), F at most 16.
    """
    count = len(x)
    present = torch.tensor(list(itertools.product([False, True], repeat=count)))
    values = function(torch.where(present, x, baseline))
    sizes = present.sum(1)
    found = torch.zeros_like(x)
    for feature in range(count):
        without = ~present[:, feature]
        place = 1 << (count - 1 - feature)  # rows count in binary, the first feature being the highest digit
        index = torch.nonzero(without)[:, 0]
        weight = torch.tensor(
            [math.factorial(int(s)) * math.factorial(count - 1 - int(s)) / math.factorial(count) for s in sizes[index]],
            dtype=x.dtype,
        )
        found[feature] = (weight * (values[index + place] - values[index])).sum()
    return found
