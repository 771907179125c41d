"""DeepLiftSHAP of transformers: against DeepLIFT done number by number, closed forms, Shapley values; and the zoo."""

import importlib.util
import itertools
import math
from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo import ZOO, build, pictures
from lvlmva_core.attribution import UnsupportedOperationError, deep_lift_shap, explain
from lvlmva_core.attribution.rules import CONSTANT_OPS, RULES
from lvlmva_core.attribution.tape import Keep, record
from lvlmva_core.testing.attribution import (
    TOLERANCE,
    AttributionTests,
    Unit,
    assert_close,
    random_images,
    shapley_values,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Function(nn.Module):
    """A model that is one function from (n, ...) to (n, K)."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# -------------------------------------------------------------------------------------------------- rules, one by one


def units(x: Tensor, baseline: Tensor) -> list[Unit]:
    return [Unit(float(a), float(b)) for a, b in zip(x.flatten(), baseline.flatten(), strict=True)]


def log_sum_exp_of(scores: list[Unit]) -> Unit:
    return sum((each.apply(math.exp) for each in scores[1:]), scores[0].apply(math.exp)).apply(math.log)


def softmax_of(scores: list[Unit]) -> list[Unit]:
    total = log_sum_exp_of(scores)
    return [(each - total).apply(math.exp) for each in scores]


def mean_of(values: list[Unit]) -> Unit:
    return sum(values[1:], values[0]) * (1 / len(values))


def scaled_of(values: list[Unit], eps: float) -> list[Unit]:
    size = (mean_of([each.apply(lambda u: u * u) for each in values]) + eps).apply(lambda u: u**-0.5)
    return [each * size for each in values]


def layer_norm_of(values: list[Unit], eps: float = 1e-5) -> list[Unit]:
    mean = mean_of(values)
    return scaled_of([each - mean for each in values], eps)


def gelu(u: float) -> float:
    return u * (1 + math.erf(u / math.sqrt(2))) / 2


def sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u))


def product_of(values: list[Unit]) -> list[Unit]:
    """(2, 3) times (3, 2)."""
    left, right = values[:6], values[6:]
    return [
        sum((left[3 * i + k] * right[2 * k + j] for k in range(1, 3)), left[3 * i] * right[j])
        for i, j in itertools.product(range(2), range(2))
    ]


CLOSED_FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[list[Unit]], list[Unit]]]] = {
    "softmax": (lambda t: t.softmax(1), softmax_of),
    "log_softmax": (
        lambda t: t.log_softmax(1), lambda u: [each - log_sum_exp_of(u) for each in u],
    ),
    "logsumexp": (lambda t: t.logsumexp(1, keepdim=True), lambda u: [log_sum_exp_of(u)]),
    "layer_norm": (lambda t: functional.layer_norm(t, (12,)), layer_norm_of),
    "rms_norm": (lambda t: functional.rms_norm(t, (12,), eps=1e-3), lambda u: scaled_of(u, 1e-3)),
    "group_norm": (
        lambda t: functional.group_norm(t.view(-1, 4, 3), 2).flatten(1),
        lambda u: layer_norm_of(u[:6]) + layer_norm_of(u[6:]),
    ),
    "instance_norm": (
        lambda t: functional.instance_norm(t.view(-1, 2, 6)).flatten(1),
        lambda u: layer_norm_of(u[:6]) + layer_norm_of(u[6:]),
    ),
    "deviation": (
        lambda t: t.std(1, keepdim=True),
        lambda u: [(mean_of([(e - mean_of(u)).apply(lambda v: v * v) for e in u]) * (12 / 11)).apply(math.sqrt)],
    ),
    "length": (
        lambda t: torch.linalg.vector_norm(t, dim=1, keepdim=True),
        lambda u: [(mean_of([each.apply(lambda v: v * v) for each in u]) * 12.0).apply(math.sqrt)],
    ),
    "gelu": (functional.gelu, lambda u: [each.apply(gelu) for each in u]),
    "silu": (functional.silu, lambda u: [each.apply(lambda v: v * sigmoid(v)) for each in u]),
    "quick_gelu": (
        lambda t: t * torch.sigmoid(1.702 * t), lambda u: [each * (each * 1.702).apply(sigmoid) for each in u],
    ),
    "gate": (
        lambda t: functional.silu(t[:, :6]) * t[:, 6:],
        lambda u: [a.apply(lambda v: v * sigmoid(v)) * b for a, b in zip(u[:6], u[6:], strict=True)],
    ),
    "glu": (
        lambda t: functional.glu(t, 1), lambda u: [a * b.apply(sigmoid) for a, b in zip(u[:6], u[6:], strict=True)],
    ),
    "quotient": (
        lambda t: t[:, :6] / (t[:, 6:] + 3.0),
        lambda u: [a * (b + 3.0).apply(lambda v: 1 / v) for a, b in zip(u[:6], u[6:], strict=True)],
    ),
    "matrices": (lambda t: (t[:, :6].view(-1, 2, 3) @ t[:, 6:].view(-1, 3, 2)).flatten(1), product_of),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_each_rule_is_what_it_is_number_by_number(name: str) -> None:
    """Every output's multipliers, in float64, from loops over numbers that know nothing of tensors."""
    function, by_units = CLOSED_FORMS[name]
    x, b = random_images(1, (12,), 1) * 4 - 2, random_images(1, (12,), 2) * 4 - 2
    b[0, 3] = x[0, 3]  # no change there
    outputs = by_units(inputs := units(x, b))
    for place, unit in enumerate(outputs):
        found = deep_lift_shap(Function(function), x, b, place)[0]
        wanted = torch.tensor(unit.multipliers(inputs), dtype=torch.float64) * (x - b)[0]
        assert_close(found, wanted, 1e-9)


numbers = st.lists(st.floats(-3, 3), min_size=8, max_size=8)


@settings(max_examples=40, deadline=None)
@given(numbers, numbers)
def test_a_product_of_matrices_has_shapley_values(left: list[float], right: list[float]) -> None:
    """Each product of two numbers is a game of two players, and Shapley values are linear in games."""
    x, b = (torch.tensor(each, dtype=torch.float64) for each in (left, right))
    model = Function(lambda t: (t[:, :4].view(-1, 2, 2) @ t[:, 4:].view(-1, 2, 2)).flatten(1))
    for place in range(4):
        found = deep_lift_shap(model, x[None], b[None], place)[0]
        wanted = shapley_values(lambda t, k=place: model(t)[:, k], x, b)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=5, max_size=5),
    st.lists(st.floats(-1, 1), min_size=5, max_size=5),
    st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 30.0, 1e4]),
)
def test_softmax_stays_bounded(x: list[float], b: list[float], size: float) -> None:
    """Multipliers of softmax lie in [-1, 1] and add up to the change, however far apart scores are, in both dtypes."""
    for dtype in (torch.float32, torch.float64):
        there, from_here = (torch.tensor([each], dtype=dtype) * size for each in (x, b))
        for place in range(2):
            found = explain(Function(lambda t: t.softmax(1)), there, from_here, place)
            assert bool((found.attributions.abs() <= (there - from_here).abs() * (1 + 1e-5)).all())
            gap = (found.attributions.double().sum() - (found.output - found.expected).double()).abs()
            rounding = torch.finfo(dtype).eps * (1 + float((there - from_here).abs().max()))  # of the scores
            assert float(gap) <= 4 * rounding * (1 + float(found.attributions.abs().sum()))


def test_softmax_of_shifted_scores() -> None:
    """A shift of all scores by c changes nothing; each score then has y_j·(g_j - Σ_i g_i·y_i)·c, as integrated
    gradients have, not a multiple that grows as e^c."""
    x = random_images(1, (5,), 3)
    y = x.softmax(1)
    for shift in (1.0, 40.0, 1e4):
        for place in range(5):
            found = deep_lift_shap(Function(lambda t: t.softmax(1)), x + shift, x, place)
            change = (x + shift) - x
            wanted = y * (functional.one_hot(torch.tensor([place]), 5) - y[:, place : place + 1]) * change
            assert_close(found, wanted, 1e-9)


def test_masked_scores_have_no_part() -> None:
    """-inf in some places, and a row in which all is masked, which torch's attention answers with zeros."""
    mask = torch.zeros(4, 4, dtype=torch.float64)
    mask[0, 1:], mask[2] = -math.inf, -math.inf

    def attend(t: Tensor) -> Tensor:
        tokens = t.view(-1, 1, 4, 3)
        out = functional.scaled_dot_product_attention(tokens, tokens * 2, tokens.square(), attn_mask=mask)
        return out.flatten(1)

    x, b = random_images(2, (12,), 4), random_images(3, (12,), 5)
    for place in range(12):
        found = explain(Function(attend), x, b, place)
        assert float(found.completeness_error().max()) <= 1e-12
        assert bool((found.attributions[:, 3:] == 0).all()) or place >= 3  # the first token sees itself only
        assert bool((found.attributions == 0).all()) == (6 <= place < 9)


# -------------------------------------------------------------------------------------------- DeepLIFT by brute force


class TinyViT(nn.Module):
    """A vision transformer of one block whose every number fits in a loop: 4 patches of a 4x4 picture, width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 5, 4))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.grow, self.shrink = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        seen = self.norm(tokens)
        tokens = tokens + self.attention(seen, seen, seen, need_weights=False)[0]
        tokens = tokens + self.shrink(functional.gelu(self.grow(tokens)))
        return self.head(tokens[:, 0])  # type: ignore[no-any-return]


def affine_of(layer: nn.Module | tuple[Tensor, Tensor], values: list[Unit]) -> list[Unit]:
    weight, bias = (layer.weight, layer.bias) if isinstance(layer, nn.Module) else layer
    rows = zip(weight.flatten(1).tolist(), bias.tolist(), strict=True)  # type: ignore[union-attr, operator]
    return [sum((u * w for u, w in zip(values, row, strict=True)), Unit(shift, shift)) for row, shift in rows]


def tiny_vit_of(model: TinyViT, pixels: list[Unit]) -> list[Unit]:
    """The same network, number by number."""
    corners = [(0, 0), (0, 2), (2, 0), (2, 2)]
    patches = [[pixels[4 * (i + di) + j + dj] for di in (0, 1) for dj in (0, 1)] for i, j in corners]
    tokens = [[Unit(v, v) for v in model.token.flatten().tolist()]]
    tokens += [affine_of(model.patches, patch) for patch in patches]
    places = model.places[0].tolist()
    tokens = [[u + v for u, v in zip(token, place, strict=True)] for token, place in zip(tokens, places, strict=True)]
    gain, shift = model.norm.weight.tolist(), model.norm.bias.tolist()
    seen = [[u * w + v for u, w, v in zip(layer_norm_of(t), gain, shift, strict=True)] for t in tokens]
    packed, bias = model.attention.in_proj_weight, model.attention.in_proj_bias
    query, key, value = (
        [affine_of((packed[part], bias[part]), token) for token in seen]
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    )
    attended: list[list[Unit]] = [[] for _ in tokens]
    for head in (slice(0, 2), slice(2, 4)):
        for i in range(5):
            scores = [
                sum((a * b for a, b in zip(query[i][head], key[j][head], strict=True)), Unit(0.0, 0.0))
                * (1 / math.sqrt(2))
                for j in range(5)
            ]
            weights = softmax_of(scores)
            for place in range(head.start, head.stop):
                attended[i].append(sum((weights[j] * value[j][place] for j in range(5)), Unit(0.0, 0.0)))
    out = affine_of(model.attention.out_proj, attended[0])
    first = [u + v for u, v in zip(tokens[0], out, strict=True)]
    hidden = [each.apply(gelu) for each in affine_of(model.grow, first)]
    first = [u + v for u, v in zip(first, affine_of(model.shrink, hidden), strict=True)]
    return affine_of(model.head, first)


def test_a_whole_vision_transformer_number_by_number() -> None:
    """Patches, class token, position embeddings, LayerNorm, two heads, GELU, residuals: brute-force DeepLIFT agrees."""
    model = drawn(TinyViT)
    x, baselines = random_images(1, (1, 4, 4), 6), random_images(2, (1, 4, 4), 7)
    for target in range(3):
        maps = []
        for baseline in baselines:
            outputs = tiny_vit_of(model, pixels := units(x, baseline))
            with torch.no_grad():
                assert outputs[target].x == pytest.approx(float(model(x)[0, target]), rel=1e-12)
            maps.append(
                torch.tensor(outputs[target].multipliers(pixels), dtype=torch.float64) * (x - baseline).flatten()
            )
        assert_close(deep_lift_shap(model, x, baselines, target).flatten(), torch.stack(maps).mean(0), 1e-10)


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model in eval mode with weights from a seed, none of which is 0 or 1 for all units."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model


# ------------------------------------------------------------------------------------------------------ random blocks


class Block(nn.Module):
    """A transformer block in one of the ways in which they are written."""

    def __init__(self, tokens: int, width: int, heads: int, norm: str, gate: str, layout: str, pool: str) -> None:
        super().__init__()
        self.heads, self.gate, self.layout, self.pool, self.side = heads, gate, layout, pool, int(math.sqrt(tokens))
        self.patches = nn.Conv2d(2, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.first, self.second = ({"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm](width) for _ in range(2))
        self.packed = nn.MultiheadAttention(width, heads, batch_first=layout != "sequence_first")
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, 1, 1))
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(width if "glu" in gate else 2 * width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.probe, self.head = nn.Parameter(torch.zeros(1, 1, width)), nn.Linear(width, 3)

    def attend(self, t: Tensor) -> Tensor:
        if self.layout in ("sequence_first", "batch_first"):
            if self.layout == "sequence_first":
                t = t.transpose(0, 1)
            t = self.packed(t, t, t, need_weights=False)[0]
            return t.transpose(0, 1) if self.layout == "sequence_first" else t
        n, length, width = t.shape
        q, k, v = self.qkv(t).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "fused":
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(-1, length, length))
        else:
            scores = torch.einsum("bhqd,bhkd->bhqk", functional.normalize(q, dim=-1), functional.normalize(k, dim=-1))
            attended = (scores * self.bias.exp().clamp(max=100) + self.bias).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).reshape(n, length, width))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x)
        n, width = tokens.shape[:2]
        if self.layout == "windows":
            tokens = tokens.permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
            windows = tokens.view(n, 2, self.side // 2, 2, self.side // 2, width).transpose(2, 3)
            windows = windows.reshape(n * 4, -1, width)
            windows = windows + self.attend(self.first(windows)) * self.scale
            tokens = windows.view(n, 2, 2, self.side // 2, self.side // 2, width).transpose(2, 3)
            tokens = tokens.reshape(n, self.side, self.side, width).roll((1, 1), (1, 2)).flatten(1, 2)
        else:
            tokens = torch.cat([self.token.expand(n, -1, -1), tokens.flatten(2).transpose(1, 2)], 1)
            tokens = tokens + self.attend(self.first(tokens)) * self.scale
        hidden = self.grow(self.second(tokens))
        if self.gate == "swiglu":
            gate, hidden = hidden.chunk(2, -1)
            hidden = functional.silu(gate) * hidden
        elif self.gate == "glu":
            hidden = functional.glu(hidden)
        elif self.gate == "quick_gelu":
            hidden = hidden * torch.sigmoid(1.702 * hidden)
        else:
            hidden = functional.gelu(hidden, approximate=self.gate)
        tokens = tokens + self.shrink(hidden)
        if self.pool == "attention":
            return self.head(self.packed_pool(tokens))  # type: ignore[no-any-return]
        return self.head(tokens[:, 0] if self.pool == "token" else tokens.mean(1))  # type: ignore[no-any-return]

    def packed_pool(self, tokens: Tensor) -> Tensor:
        probe = self.probe.repeat(len(tokens), 1, 1)
        if self.layout == "sequence_first":
            return self.packed(probe.transpose(0, 1), tokens.transpose(0, 1), tokens.transpose(0, 1))[0][0]  # type: ignore[no-any-return]
        return self.packed(probe, tokens, tokens)[0][:, 0]  # type: ignore[no-any-return]


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3]),
    norm=st.sampled_from(["layer", "rms"]),
    gate=st.sampled_from(["none", "tanh", "quick_gelu", "swiglu", "glu"]),
    layout=st.sampled_from(["batch_first", "sequence_first", "fused", "einsum", "windows"]),
    pool=st.sampled_from(["token", "mean", "attention"]),
    samples=st.integers(1, 3),
    baselines=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_random_blocks(
    heads: int, norm: str, gate: str, layout: str, pool: str, samples: int, baselines: int, seed: int
) -> None:
    """Complete to 1e-12 and the rounding of the logits, and each pair as if it were alone."""
    model = drawn(partial(Block, 16, 4 * heads, heads, norm, gate, layout, pool), seed)
    x, b = random_images(samples, (2, 8, 8), seed), random_images(baselines, (2, 8, 8), seed + 1)
    found = explain(model, x, b, seed % 3)
    gap = (found.attributions.flatten(1).sum(1) - (found.output - found.expected)).abs()
    rounding = 1e-15 * (found.output.abs() + found.expected.abs())
    assert bool((gap <= TOLERANCE[torch.float64] * found.attributions.abs().flatten(1).sum(1) + rounding).all())
    pairs = [deep_lift_shap(model, x[-1:], each[None], seed % 3) for each in b]
    assert_close(found.attributions[-1:], torch.stack(pairs).mean(0), 1e-9)


# ------------------------------------------------------------------------------------------------- where samples stand


def attention_block(layout: str) -> nn.Module:
    return drawn(partial(Block, 16, 4, 2, "layer", "none", layout, "mean"))


@pytest.mark.parametrize(
    "model",
    [*(partial(attention_block, layout) for layout in ("batch_first", "sequence_first", "einsum", "windows")),
     *(partial(build, name, small=True) for name in ("torchvision swin_v2_t", "torchvision maxvit_t"))],
    ids=["batch_first", "sequence_first", "einsum", "windows", "swin_v2_t", "maxvit_t"],
)  # fmt: skip
@pytest.mark.parametrize("changed", [0, 2])
def test_samples_are_where_they_are_said_to_be(model: Callable[[], nn.Module], changed: int) -> None:
    """Another picture in one place changes every recorded tensor there, and nowhere else."""
    net = model().double()
    channels = next(module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d))
    side = 8 if channels == 2 else 32
    images = random_images(3, (channels, side, side), 1)
    other = images.clone()
    other[changed] = random_images(1, (channels, side, side), 2)[0]
    everything = {op: rule._replace(keep=Keep.ALL) for op, rule in RULES.items()}
    with torch.no_grad():
        tapes = [record(net, each, everything, CONSTANT_OPS) for each in (images, other)]
    assert len(tapes[0].nodes) > 20
    for node, twin in zip(tapes[0].nodes, tapes[1].nodes, strict=True):
        before, after = (node.axis.to_front(each.saved[-1], 3) for each in (node, twin))
        differs = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert differs == [sample == changed for sample in range(3)], str(node.op)


CROSS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    # (n, tokens, width) given to attention that expects (tokens, n, width): a classic mistake
    "attention_over_samples": (
        lambda t: functional.multi_head_attention_forward(
            t, t, t, 4, 2, torch.ones(12, 4).to(t), None, None, None, False, 0.0, torch.ones(4, 4).to(t), None,
            training=False, need_weights=False,
        )[0],
        "holds the samples",
    ),
    "similarity_of_samples": (lambda t: t.flatten(1) @ t.flatten(1).t(), "which mixes them"),
    "softmax_over_samples": (lambda t: t.softmax(0), "dimension 0, which holds the samples"),
    "norm_over_samples": (lambda t: functional.layer_norm(t.movedim(0, -1), (len(t),)), "dimension 2, which holds"),
    "view_across_samples": (lambda t: t.reshape(2, -1), "does not keep the 4 samples apart"),
    "different_dimensions": (lambda t: t[:, :4] + t[:, :4].transpose(0, 1), "different dimensions"),
    "some_of_a_window": (lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2], "dimension 0, which holds"),
    "picked_samples": (lambda t: t[torch.tensor([0, 0, 0, 0])], "dimension 0, which holds the samples"),
    "batch_statistics_of_tokens": (
        lambda t: functional.batch_norm(t.transpose(1, 2), None, None, training=True), "statistics of the batch",
    ),
    "written_window": (lambda t: written(t), r"aten\.copy_"),
}  # fmt: skip


def written(t: Tensor) -> Tensor:
    t = t * 1.0
    t[:, :2] = t[:, 2:4]
    return t


@pytest.mark.parametrize("name", CROSS)
def test_what_mixes_samples_is_refused(name: str) -> None:
    """Wherever the samples stand; the message names the place."""
    function, message = CROSS[name]
    model = nn.Sequential(nn.Identity(), Function(function))
    with pytest.raises(UnsupportedOperationError, match=rf"1 \(Function\), test_attribution_transformers.*{message}"):
        deep_lift_shap(model, random_images(4, (6, 4), 1), random_images(4, (6, 4), 2), 0)


def test_the_fast_path_of_attention_is_off_and_comes_back() -> None:
    """Without gradients torch runs an encoder layer as one operation; the switch is the caller's again after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        model = nn.Sequential(
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), nn.Flatten(), nn.Linear(24, 3)
        )
    model = model.double().eval().requires_grad_(False)
    x, b = random_images(3, (6, 4), 1), random_images(2, (6, 4), 2)
    broken = nn.Sequential(nn.Identity(), Function(torch.round))
    for switch in (True, False):
        torch.backends.mha.set_fastpath_enabled(switch)
        try:
            with torch.no_grad():
                assert float(explain(model, x, b, 1).completeness_error().max()) <= 1e-12
            with pytest.raises(UnsupportedOperationError, match=r"aten\.round"):
                deep_lift_shap(broken, x, b, 1)
            assert torch.backends.mha.get_fastpath_enabled() is switch
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_one_sample_runs_twice_only_where_torch_runs_it_otherwise() -> None:
    """Convolutions run one picture alone; einsum leaves out a dimension of size 1, so that it has to be one of two."""
    image, baselines = random_images(1, (2, 8, 8), 1), random_images(3, (2, 8, 8), 2)
    with torch.random.fork_rng(devices=[]):
        plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)).double()
    for model, wanted in ((plain, [3, 1]), (attention_block("einsum"), [3, 1, 2])):
        seen: list[int] = []
        handle = model.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
        deep_lift_shap(model, image, baselines, 0)
        handle.remove()
        assert seen == wanted


# --------------------------------------------------------------------------------------------------------- whole models


class TestViT(AttributionTests):
    name = "torchvision vit_b_16"
    shape = (3, 32, 32)

    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return build(self.name, small=True).to(device, dtype)


class TestSwinV2(TestViT):
    """Windows, shifted and masked; pictures that do not fill the windows; cosine attention."""

    name = "torchvision swin_v2_t"
    shape = (3, 36, 36)
    n_inputs, n_baselines, batch_sizes = 2, 2, (1, 3)


class TestInstanceNorm(TestViT):
    name = "InstanceNorm"
    shape = (3, 16, 16)


@lru_cache
def exported() -> nn.Module:
    """The exported program of the zoo, which takes a second to make."""
    return build("torch.export of vit_b_16", small=True)


REFUSED = {
    "timm mvitv2_tiny": r"blocks\.0\.attn \(MultiScaleAttention\), mvitv2\.py:\d+: no attribution rule for aten\.copy_",
    "timm sequencer2d_s": r"rnn_v \(LSTM\), sequencer\.py:\d+: ",
}


@pytest.mark.parametrize("name", ZOO)
def test_models_add_up(name: str) -> None:
    """To 1e-6 of the absolute sum in float32 and 1e-12 in float64, for several samples and for one."""
    entry = ZOO[name]
    if importlib.util.find_spec(entry.library) is None:
        pytest.skip(f"{entry.library} is not installed")
    model = exported() if name.startswith("torch.export") else build(name, small=True)
    for dtype in (torch.float32, torch.float64) if entry.float64 else (torch.float32,):
        x, b = (pictures(count, entry.small_side, count, dtype) for count in (2, 3))
        if name in REFUSED:
            with pytest.raises(UnsupportedOperationError, match=REFUSED[name]):
                deep_lift_shap(model.to(dtype), x, b, 0)
            continue
        found = explain(model.to(dtype), x, b, torch.tensor([0, 2]))
        assert float(found.completeness_error().max()) < TOLERANCE[dtype]
        assert float((found.output - found.expected).abs().min()) > 1e-9  # there is something to explain
    if name not in REFUSED:
        alone = explain(model, x[1:], b[:1], 2)
        assert float(alone.completeness_error()) < TOLERANCE[dtype]


def test_an_exported_program_gives_the_maps_of_its_model() -> None:
    x, b = pictures(2, 32, 1), pictures(3, 32, 2)
    maps = [
        deep_lift_shap(model(), x, b, 1) for model in (exported, partial(build, "torchvision vit_b_16", small=True))
    ]
    assert_close(maps[0], maps[1], 1e-5)
