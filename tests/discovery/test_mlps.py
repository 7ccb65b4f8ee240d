"""Hidden neurons of MLPs of every form: the contract of their adapters, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contract import assert_contract
from torch import Tensor, nn

import torch_rsst
from torch_rsst.discovery import BiasOnly


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


TOKENS = inputs(2, 5, 8)
IMAGES = inputs(2, 8, 5, 4)


class Halves(nn.Module):
    """A gated MLP whose gate is the second half of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, -1)
        return self.second(value * gate.sigmoid())


class Alternating(Halves):
    """The gate of a value is the feature next to it."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.second(value * gate.sigmoid())


class Joined(Halves):
    """Neurons that a softmax joins."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, -1)
        return self.second((value * gate.sigmoid()).softmax(-1))


class Split(Halves):
    """It keeps the number of its neurons, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = 6

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).split(self.wide, -1)
        return self.second(value * gate.sigmoid())


class SplitBySix(Halves):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).split(6, -1)
        return self.second(value * gate.sigmoid())


class Gated(nn.Module):
    """A gate and a value of their own."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 6, bias=bias), nn.Linear(8, 6, bias=bias)
        self.down = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Nested(nn.Module):
    """Each layer stands in a child of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        self.second = nn.ModuleDict({"layer": nn.Linear(6, 8), "norm": nn.LayerNorm(8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.second["norm"](self.second["layer"](self.first(x)))


class Depthwise(nn.Module):
    """A depthwise convolution over positions between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 8)
        self.mix = nn.Conv1d(6, 6, 3, padding=1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mix(self.fc1(x).mT).mT)


class Moved(nn.Module):
    """Features stand in dimension 1 outside, and last inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.movedim(1, -1)).relu()).movedim(-1, 1)


class Fire(nn.Module):
    """Channels that two convolutions take in."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.one = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.three = nn.Conv2d(6, 8, 3, padding=1)


class Weighing(nn.Module):
    """Squeeze and excite, of which the second half stands in a child of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU())
        self.gate = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Sigmoid())


def pointwise(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 6, 1), *between, nn.Conv2d(6, 8, 1))


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "halves": (Halves, TOKENS),
    "in turns": (Alternating, TOKENS),
    "split by a number": (Split, TOKENS),
    "gated": (Gated, TOKENS),
    "gated without bias": (lambda: Gated(bias=False), TOKENS),
    "nested": (Nested, TOKENS),
    "depthwise": (Depthwise, TOKENS),
    "norm before": (
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)),
        TOKENS,
    ),
    "batch norm between": (
        lambda: nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 8), nn.BatchNorm1d(8)
        ),
        inputs(7, 8),
    ),
    "one slope per neuron": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 8)),
        inputs(7, 8),
    ),
    "one slope for all": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.PReLU(), nn.Linear(6, 8)),
        TOKENS,
    ),
    "1x1 convolutions": (lambda: pointwise(nn.ReLU(), nn.Dropout(0.0)), IMAGES),
    "1x1 convolutions and a norm": (lambda: pointwise(nn.BatchNorm2d(6), nn.ReLU()), IMAGES),
    "permuted": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), Moved(), nn.Conv2d(8, 8, 1, bias=False)
        ),
        IMAGES,
    ),
    "as wide inside": (
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        TOKENS,
    ),
}


@pytest.mark.parametrize("amount", [0.5, 1.0])
@pytest.mark.parametrize("name", STRUCTURES)
def test_mlps_of_every_structure(name: str, amount: float) -> None:
    make, given = STRUCTURES[name]
    found = assert_contract(
        nn.Sequential(make()), given, kinds=["neurons"], amounts=[amount], example_inputs=True
    )
    # What the permuted one puts out goes through a convolution, to which it is one feature after another.
    assert len(found.layers) == 1 + (name == "permuted")


def test_the_members_of_a_neuron() -> None:
    make, given = STRUCTURES["batch norm between"]
    found = torch_rsst.find_groups(make().double(), "neurons", example_inputs=given)
    layer = found.layers[0]
    group = layer.group(2)
    shares = [(m.parameter, m.dim, m.index, m.ranked, m.consumes) for m in group.members]
    assert shares == [
        ("0.weight", 0, (2,), True, False),
        ("0.bias", 0, (2,), False, False),
        ("1.weight", 0, (2,), False, False),
        ("1.bias", 0, (2,), False, False),
        ("3.weight", 1, (2,), True, True),
    ]
    assert [m.parameter for m in group.buffers] == ["1.running_mean", "1.running_var"]
    layer = torch_rsst.find_groups(Halves(), "neurons").layers[0]
    assert [m.index for m in layer.group(2).members] == [(2, 8), (2, 8), (2,)]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: pointwise(nn.GroupNorm(1, 6)), "its 1 (GroupNorm) may join its hidden neurons"),
        (Joined, "its units mix before the output layer"),
    ],
)
def test_what_cannot_be_cut_exactly(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ValueError, match=r"No groups for 1 module\(s\): the model") as raised:
        torch_rsst.find_groups(make(), "neurons", on_unsupported="raise")
    assert reason in str(raised.value)


def test_neurons_to_mask_only_are_announced_with_their_own_remedy() -> None:
    with pytest.warns(torch_rsst.UnsupportedModuleWarning) as caught:
        torch_rsst.find_groups(nn.Sequential(SplitBySix(), SplitBySix()))
    text = str(caught[0].message)
    assert text.startswith(
        "Can be masked but not cut: 0 (6 neurons), 1 (6 neurons): it does not run"
    )
    assert text.endswith("In its forward, let sizes follow from the tensors: chunk(2, -1).")


class Attention(nn.Module):
    """Three layers of one width that are no gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.num_heads = 2


@pytest.mark.parametrize(
    "module",
    [
        Attention(),
        nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), *pointwise(nn.ReLU()), nn.Sigmoid()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), *pointwise(nn.ReLU()), nn.Hardsigmoid()),
        Weighing(),
        nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)]),
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), Attention(), nn.Linear(8, 6)),
        Fire(),
        nn.Sequential(nn.Conv2d(8, 6, 1, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 1)),
        nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6, 8)),
    ],
    ids=[
        "attention",
        "bottleneck",
        "squeeze-excite",
        "hard gate",
        "weighing",
        "list",
        "whole model",
        "fire",
        "strided",
        "mixed",
    ],
)
def test_what_is_no_mlp_is_passed_over(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"got none in this model\."):
        torch_rsst.find_groups(module, "neurons", on_unsupported="raise")


def test_the_bias_of_an_image() -> None:
    layer = BiasOnly(nn.Conv2d(4, 3, 1))
    out = layer(torch.ones(2, 4, 5, 6))
    assert out.shape == (2, 3, 5, 6)
    assert torch.equal(out[1, :, 2, 3], layer.bias)
    assert BiasOnly(nn.Conv2d(4, 3, 1, bias=False))(torch.ones(4, 5, 6)).shape == (3, 5, 6)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(again(torch.ones(2, 4, 5, 6)), out)


def timm_mlps() -> dict[str, tuple[Callable[[], nn.Module], Any]]:
    from timm import layers
    from timm.models import convnext, levit, mambaout, pvt_v2, repvit, tiny_vit, vitamin

    spatial = (inputs(2, 6, 8), [2, 3])
    return {
        "Mlp": (lambda: layers.Mlp(8, 6, out_features=4, drop=0.5), TOKENS),
        "Mlp with its own activation": (lambda: layers.Mlp(8, 6, act_layer=layers.GELU), TOKENS),
        "Mlp of convolutions": (lambda: layers.Mlp(8, 6, use_conv=True), IMAGES),
        "ConvMlp": (lambda: layers.ConvMlp(8, 6), IMAGES),
        "ConvMlp with a norm": (lambda: layers.ConvMlp(8, 6, norm_layer=nn.BatchNorm2d), IMAGES),
        "GluMlp": (lambda: layers.GluMlp(8, 12), TOKENS),
        "GluMlp of convolutions": (lambda: layers.GluMlp(8, 12, use_conv=True), IMAGES),
        "SwiGLU": (lambda: layers.SwiGLU(8, 6), TOKENS),
        "SwiGLUPacked": (lambda: layers.SwiGLUPacked(8, 12), TOKENS),
        "GatedMlp": (lambda: layers.GatedMlp(8, 6), TOKENS),
        "ConvNeXt": (lambda: convnext.ConvNeXtBlock(8), IMAGES),
        "ConvNeXt of convolutions": (lambda: convnext.ConvNeXtBlock(8, conv_mlp=True), IMAGES),
        "LeViT": (lambda: levit.LevitMlp(8, 6), TOKENS),
        "LeViT of convolutions": (lambda: levit.LevitMlp(8, 6, use_conv=True), IMAGES),
        "RepViT": (lambda: repvit.RepVitMlp(8, 6, nn.GELU), IMAGES),
        "TinyViT": (lambda: tiny_vit.NormMlp(8, 6), TOKENS),
        "ViTamin": (lambda: vitamin.GeGluMlp(8, 6), TOKENS),
        "MambaOut": (lambda: mambaout.GatedConvBlock(8, 2.0, conv_ratio=0.5), inputs(2, 4, 3, 8)),
        "PVTv2": (lambda: pvt_v2.MlpWithDepthwiseConv(8, 6), spatial),
    }


class Behind(nn.Module):
    """Calls one module with everything it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


TIMM = [
    *("Mlp", "Mlp with its own activation", "Mlp of convolutions", "ConvMlp"),
    *("ConvMlp with a norm", "GluMlp", "GluMlp of convolutions", "SwiGLU", "SwiGLUPacked"),
    *("GatedMlp", "ConvNeXt", "ConvNeXt of convolutions", "LeViT", "LeViT of convolutions"),
    *("RepViT", "TinyViT", "ViTamin", "PVTv2", "MambaOut"),
]


@pytest.mark.needs_timm
@pytest.mark.parametrize("amount", [0.5, 1.0, 1])
@pytest.mark.parametrize("name", TIMM)
def test_mlps_of_timm(name: str, amount: float) -> None:
    make, given = timm_mlps()[name]
    found = assert_contract(
        Behind(make()), given, kinds=["neurons"], amounts=[amount], example_inputs=True
    )
    assert len(found.layers) == 1


@pytest.mark.needs_timm
def test_norms_over_hidden_neurons_are_refused() -> None:
    from timm import layers
    from timm.models.mlp_mixer import SpatialGatingUnit

    normed = {
        "norm (LayerNorm)": [
            layers.Mlp(8, 6, norm_layer=nn.LayerNorm),
            layers.GluMlp(8, 12, norm_layer=nn.LayerNorm),
            layers.SwiGLU(8, 6, norm_layer=nn.LayerNorm),
        ],
        "norm (LayerNorm2d)": [layers.ConvMlp(8, 6, norm_layer=layers.LayerNorm2d)],
        "grn (GlobalResponseNorm)": [
            layers.GlobalResponseNormMlp(8, 6),
            layers.GlobalResponseNormMlp(8, 6, use_conv=True),
        ],
        "gate.norm (LayerNorm)": [
            layers.GatedMlp(8, 12, gate_layer=partial(SpatialGatingUnit, seq_len=4))
        ],
    }
    for norm, modules in normed.items():
        for module in modules:
            with pytest.raises(ValueError, match="No groups for 1 module") as raised:
                torch_rsst.find_groups(module, "neurons", on_unsupported="raise")
            assert f"its {norm} may join its hidden neurons" in str(raised.value)


def test_layers_behind_a_flattening_are_found() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    assert [layer.units for layer in torch_rsst.find_groups(model).layers] == [5]


def test_two_layers_that_share_a_weight_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"its 2\.weight is tied to another parameter of it"):
        torch_rsst.find_groups(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_is_told_that_it_is_quantized() -> None:
    from torch.ao.quantization import quantize_dynamic

    if not torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantized layers")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        ValueError, match=r"got quantized ones \(Linear\)\. Prune, compact, and quan"
    ):
        torch_rsst.find_groups(quantized)


class _Between(nn.Module):
    """Two linear layers and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(10, 24), between, nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def _one_of_its_own(first: int | None, end: int | None) -> Callable[[Tensor], Tensor]:
    def between(y: Tensor) -> Tensor:
        y = y.clone()
        y[:, first:end] = y[:, first:end].sin() + 1.0
        return y

    return between


@pytest.mark.parametrize("first", [0, 1, 5, 12, 20, 23, -1])
@pytest.mark.parametrize("activation", [nn.functional.relu, nn.functional.gelu])
def test_a_neuron_that_the_forward_tells_by_its_index_is_no_unit(
    first: int, activation: Callable[[Tensor], Tensor]
) -> None:
    special = _one_of_its_own(first, first + 1 if first != -1 else None)
    model = _Between(lambda y: special(activation(y)))
    with pytest.raises(ValueError, match="its output without some of its units differs"):
        torch_rsst.find_groups(model, example_inputs=torch.randn(6, 10))


@pytest.mark.parametrize(
    "some",
    [
        *[lambda y, k=k: y[:, k : k + 1] for k in (0, 1, 4, -2, -3)],
        lambda y: y[:, -1:],
        lambda y: y[:, 1:],
        lambda y: y[:, :-1],
        lambda y: y[:, ::2],
        lambda y: y[:, : y.shape[1] // 2],
    ],
)
@pytest.mark.parametrize("units", [6, 8, 9, 24])
def test_neurons_gated_by_a_slice_of_them_are_not_cut(
    some: Callable[[Tensor], Tensor], units: int
) -> None:
    torch.manual_seed(0)
    model = _Between(lambda y: y.relu() * some(y.relu()).sum(1, keepdim=True).sigmoid())
    model.up, model.down = nn.Linear(10, units), nn.Linear(units, 5)
    with pytest.raises(ValueError, match=r"units mix|differs"):
        torch_rsst.find_groups(model, example_inputs=torch.randn(6, 10))


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y - y.amax(1, keepdim=True),
        lambda y: y - y.amin(1, keepdim=True),
        lambda y: y * (y == y.amax(1, keepdim=True)),
        lambda y: (y - y.amin(1, keepdim=True)) / y.std(1, keepdim=True),
    ],
)
@pytest.mark.parametrize("shift", [-20.0, 0.0, 20.0])
def test_neurons_compared_with_the_largest_of_all_are_no_units(
    between: Callable[[Tensor], Tensor], shift: float
) -> None:
    model = _Between(between)
    with torch.no_grad():
        model.up.bias.add_(shift)
    with pytest.raises(ValueError, match=r"units mix|differs"):
        torch_rsst.find_groups(model, example_inputs=torch.randn(6, 10))


def test_outputs_of_trials_that_are_nan_are_compared() -> None:
    model = _Between(lambda y: y / y.amax(1, keepdim=True))
    with pytest.raises(ValueError, match=r"units mix|differs"):
        torch_rsst.find_groups(model, example_inputs=torch.randn(6, 10))


class _Rooted(_Between):
    """Scaled by the root of a parameter, which must not be below 0."""

    def __init__(self) -> None:
        super().__init__(nn.functional.gelu)
        self.norm = nn.BatchNorm1d(24)
        nn.init.constant_(self.norm.weight, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)) * self.norm.weight.sqrt())


def test_weights_of_a_trial_keep_their_signs_where_others_make_nan() -> None:
    groups = torch_rsst.find_groups(_Rooted(), example_inputs=torch.randn(6, 10))
    assert str(groups) == "24 neurons in 1 layer"
