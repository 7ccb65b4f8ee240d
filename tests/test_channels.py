"""Channels: each rule by a small net that needs it, and whole models; refusals with their reasons."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_contract
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import torch_rsst
from torch_rsst import UnsupportedModuleWarning, find_groups
from torch_rsst.discovery import survey
from torch_rsst.discovery.channels.ledger import Ledger
from torch_rsst.groups import GroupLayer


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape or (3, 3, 8, 8), generator=generator, dtype=torch.float64)


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def norm_conv(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        conv(inputs, outputs, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Net(nn.Module):
    """Any layers, and what to do with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def table(layer: GroupLayer) -> dict[tuple[str, int], list[int]]:
    return {(m.parameter, m.dim): m.unit_of.tolist() for m in layer.members}


def layers_of(model: nn.Module) -> dict[str, int]:
    groups = find_groups(model, ["channels"], on_unsupported="ignore")
    return {layer.name: layer.units for layer in groups.layers}


def reasons(model: nn.Module) -> dict[str, str]:
    _, refused = survey(model, ["channels"])
    return {item.layer: item.reason for item in refused}


# What runs have in common: a first layer, something in between, a last layer.


def add(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.last(x + net.inner(x))


def concatenate(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.last(torch.cat([x, net.inner(x), x[:, :0]], 1))


def squeeze_excite(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    gate = net.expand(F.relu(net.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
    return net.last(x * gate)


def linear_gate(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    gate = net.expand(F.silu(net.reduce(F.adaptive_avg_pool2d(x, 1).flatten(1)))).sigmoid()
    return net.last(x * gate[:, :, None, None])


def flatten(net: Any, x: Tensor) -> Tensor:
    return net.last(F.adaptive_max_pool2d(net.stem(x), 2).flatten(1))


def twice(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(net.inner(net.stem(x))))


def gated(net: Any, x: Tensor) -> Tensor:
    return net.last(F.glu(net.stem(x), 1) if net.fused else torch.mul(*net.stem(x).chunk(2, 1)))


def shuffle(net: Any, x: Tensor) -> Tensor:
    x = torch.cat([net.stem(x), net.inner(x)], 1)
    x = x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    return net.last(x)


def pixel_shuffle(net: Any, x: Tensor) -> Tensor:
    return net.last(F.pixel_shuffle(net.stem(x), 2))


def resized(net: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.pad(net.stem(x), (1, 1, 1, 1), mode="reflect"), 2)
    return net.last(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear"))


def channels_last(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x).permute(0, 2, 3, 1)
    return net.last(net.inner(x).permute(0, 3, 1, 2))


def scaled(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    x = torch.where(x > 0, x, x * net.scale.weight[None, :, None, None])
    return net.last(torch.stack([x, net.inner(x)], 1).sum(1))


def gated_net(fused: bool) -> Net:
    net = Net(gated, stem=conv(3, 8), last=conv(4, 2))
    net.fused = fused
    return net


def separable() -> nn.Sequential:
    return nn.Sequential(
        norm_conv(3, 6), norm_conv(6, 6, groups=6), norm_conv(6, 12, groups=6), nn.Conv2d(12, 5, 1)
    )


NETS = {
    "plain": lambda: nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 2)),
    "norm": lambda: nn.Sequential(norm_conv(3, 6), nn.Dropout2d(0.0), conv(6, 2)),
    "residual": lambda: Net(add, stem=norm_conv(3, 6), inner=norm_conv(6, 6), last=conv(6, 2)),
    "concatenated": lambda: Net(
        concatenate, stem=norm_conv(3, 6), inner=norm_conv(6, 4), last=conv(10, 2)
    ),
    "separable": separable,
    "grouped": lambda: nn.Sequential(norm_conv(3, 8), norm_conv(8, 12, groups=4), conv(12, 2)),
    "squeeze-excite": lambda: Net(
        squeeze_excite,
        stem=norm_conv(3, 6),
        reduce=nn.Conv2d(6, 4, 1),
        expand=nn.Conv2d(4, 6, 1),
        last=conv(6, 2),
    ),
    "linear gate": lambda: Net(
        linear_gate,
        stem=norm_conv(3, 6),
        reduce=nn.Linear(6, 4),
        expand=nn.Linear(4, 6),
        last=conv(6, 2),
    ),
    "flattened": lambda: Net(flatten, stem=norm_conv(3, 6), last=nn.Linear(24, 2)),
    "used twice": lambda: Net(twice, stem=norm_conv(3, 6), inner=norm_conv(6, 6), last=conv(6, 2)),
    "chunked": lambda: gated_net(False),
    "glu": lambda: gated_net(True),
    "shuffled": lambda: Net(shuffle, stem=norm_conv(3, 6), inner=norm_conv(3, 6), last=conv(12, 2)),
    "pixel-shuffled": lambda: Net(pixel_shuffle, stem=norm_conv(3, 16), last=conv(4, 2)),
    "resized": lambda: Net(resized, stem=norm_conv(3, 6), last=conv(6, 2)),
    "transposed": lambda: nn.Sequential(
        norm_conv(3, 6), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), conv(4, 2)
    ),
    "transposed groups": lambda: nn.Sequential(
        norm_conv(3, 6), nn.ConvTranspose2d(6, 12, 2, stride=2, groups=3), conv(12, 2)
    ),
    "channels last": lambda: Net(
        channels_last, stem=norm_conv(3, 6), inner=nn.Linear(6, 4), last=conv(4, 2)
    ),
    "scaled and stacked": lambda: Net(
        scaled, stem=conv(3, 6), inner=conv(6, 6), scale=nn.PReLU(6), last=conv(6, 2)
    ),
    "prelu": lambda: nn.Sequential(
        conv(3, 6), nn.PReLU(6), nn.InstanceNorm2d(6, affine=True), conv(6, 2)
    ),
}


@pytest.mark.parametrize("amount", [0.5, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_contract(name: str, amount: float) -> None:
    assert_contract(NETS[name](), images(), kinds=["channels"], amounts=[amount])


def test_contract_in_one_and_three_dimensions() -> None:
    line = nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.MaxPool1d(2), nn.Conv1d(6, 2, 3))
    assert_contract(line, images(3, 3, 16), kinds=["channels"])
    block = nn.Sequential(
        nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.AvgPool3d(2), nn.Conv3d(6, 2, 1)
    )
    assert_contract(block, images(2, 3, 6, 6, 6), kinds=["channels"])


def test_a_unit_is_a_channel_with_all_that_it_touches() -> None:
    model = nn.Sequential(conv(3, 2), nn.BatchNorm2d(2), nn.ReLU(), conv(2, 4))
    (layer,) = find_groups(model, ["channels"]).layers
    assert (layer.name, layer.units, layer.family) == ("0", 2, "ConvolutionChannels")
    assert table(layer) == {
        ("0.weight", 0): [0, 1],
        ("0.bias", 0): [0, 1],
        ("1.weight", 0): [0, 1],
        ("1.bias", 0): [0, 1],
        ("3.weight", 1): [0, 1],
    }
    assert [m.parameter for m in layer.members if m.ranked] == ["0.weight", "3.weight"]
    assert [m.parameter for m in layer.members if m.consumes] == ["3.weight"]
    assert [m.parameter for m in layer.buffers] == ["1.running_mean", "1.running_var"]


def test_what_is_added_stands_or_falls_together() -> None:
    (layer,) = find_groups(NETS["residual"](), ["channels"]).layers
    names = {m.parameter for m in layer.ranked}
    assert names == {"stem.0.weight", "inner.0.weight", "last.weight"}
    assert table(layer)["inner.0.weight", 0] == table(layer)["inner.0.weight", 1] == [*range(6)]


def test_concatenated_channels_take_their_place_in_the_columns() -> None:
    stem, inner = find_groups(NETS["concatenated"](), ["channels"]).layers
    assert (stem.name, inner.name) == ("stem.0", "inner.0")
    assert table(stem)["last.weight", 1] == [*range(6), *[-1] * 4]
    assert table(inner)["last.weight", 1] == [*[-1] * 6, *range(4)]


def test_of_a_grouped_convolution_whole_groups_go() -> None:
    (layer,) = find_groups(NETS["grouped"](), ["channels"]).layers
    assert table(layer)["0.0.weight", 0] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table(layer)["1.0.weight", 0] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert ("1.0.weight", 1) not in table(layer)


def test_a_depthwise_convolution_passes_channels_on() -> None:
    (layer,) = find_groups(separable(), ["channels"]).layers
    assert layer.units == 6
    assert table(layer)["1.0.weight", 0] == [*range(6)]
    assert table(layer)["3.weight", 1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_flattened_channel_owns_a_block_of_columns() -> None:
    (layer,) = find_groups(NETS["flattened"](), ["channels"]).layers
    assert table(layer)["last.weight", 1] == [unit for unit in range(6) for _ in range(4)]


def test_parts_are_kept_even() -> None:
    (layer,) = find_groups(gated_net(True), ["channels"]).layers
    assert table(layer)["stem.weight", 0] == [0, 1, 2, 3, 0, 1, 2, 3]
    (layer,) = find_groups(NETS["pixel-shuffled"](), ["channels"]).layers
    assert table(layer)["stem.0.weight", 0] == [unit for unit in range(4) for _ in range(4)]


def test_masked_and_wrapped_models() -> None:
    model = NETS["residual"]()
    groups = find_groups(model, ["channels"])
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = find_groups(nn.DataParallel(model), ["channels"])
    assert [table(layer) for layer in again.layers] == [table(layer) for layer in groups.layers]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_random_state_is_left_alone() -> None:
    model = NETS["residual"]()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    find_groups(model, ["channels"])
    assert torch.equal(torch.rand(1), expected)


class WithAuxiliaryHead(nn.Module):
    """A part of it runs in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = norm_conv(3, 6), conv(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        out = self.last(x)
        return (out, self.head(x.mean((2, 3)))) if self.training else out


def test_what_runs_in_training_only_is_cut_along() -> None:
    model = WithAuxiliaryHead()
    (layer,) = find_groups(model, ["channels"]).layers
    assert ("head.weight", 1) in table(layer)
    assert_contract(model, images(), kinds=["channels"])


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = norm_conv(3, 6), conv(6, 2)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_kinds_found_before_keep_what_is_theirs() -> None:
    found = find_groups(Both(), ["neurons", "channels"])
    assert [(la.name, la.kind, la.units) for la in found.layers] == [
        ("mlp", "neurons", 8),
        ("stem.0", "channels", 6),
    ]
    assert_contract(Both(), images(), kinds=["neurons", "channels"])


def test_a_part_that_trains_on_large_images_only_is_cut_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WithAuxiliaryHead, "forward", _convolving_head)
    model = WithAuxiliaryHead()
    model.head = nn.Sequential(nn.AvgPool2d(16, 16), nn.Conv2d(6, 2, 5))
    (layer,) = find_groups(model, ["channels"]).layers
    assert ("head.1.weight", 1) in table(layer)
    model.head[1] = nn.Conv2d(7, 2, 5)
    expected = "it cannot be run (in training mode, where alone some of it is used: RuntimeError: "
    assert reasons(model)[""].startswith(expected)


def _convolving_head(self: WithAuxiliaryHead, x: Tensor) -> Any:
    x = self.first(x)
    return (self.last(x), self.head(x)) if self.training else self.last(x)


# Refusals.


def middle(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(3, 6), *between, conv(6, 6), nn.ReLU(), conv(6, 2))


def mixing(run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> Net:
    return Net(run, stem=conv(3, 6), inner=conv(6, 6), last=conv(6, 2), **layers)


def layer_norm(net: Any, x: Tensor) -> Tensor:
    x = net.norm(net.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return net.last(net.inner(x).relu())


def spatial_attention(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.last(net.inner(x * x.mean(1, keepdim=True).sigmoid()).relu())


def channel_softmax(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(net.stem(x).softmax(1)).relu())


def attention(net: Any, x: Tensor) -> Tensor:
    tokens = F.adaptive_avg_pool2d(net.stem(x), 4).flatten(2)
    mixed = (tokens.transpose(1, 2) @ tokens).softmax(-1) @ tokens.transpose(1, 2)
    return net.last(net.inner(mixed.transpose(1, 2).reshape(len(x), 6, 4, 4)).relu())


def uneven(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.last(net.inner(torch.cat([x[:, :2] * 2, x[:, 2:]], 1)).relu())


def unknown_operator(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(torch.fft.fft(net.stem(x)).real).relu())


def conv_over_channels(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    gate = net.eca(x.mean((2, 3))[:, None]).sigmoid().view(len(x), 6, 1, 1)
    return net.last(net.inner(x * gate).relu())


def fixed_tensor(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(net.stem(x) + torch.tensor(range(6)).view(6, 1, 1)).relu())


REFUSED = {
    "LayerNorm": (
        lambda: mixing(layer_norm, norm=nn.LayerNorm(6)),
        "they are joined by LayerNorm",
    ),
    "GroupNorm": (lambda: middle(nn.GroupNorm(2, 6)), "they are joined by GroupNorm"),
    "mean": (lambda: mixing(spatial_attention), "they are joined by mean"),
    "softmax": (lambda: mixing(channel_softmax), "they are joined by softmax"),
    "attention": (
        lambda: mixing(attention),
        "they meet in a product of activations, as those of an attention do",
    ),
    "uneven": (lambda: mixing(uneven), "they are split at a place that pruning would move"),
    "unknown": (
        lambda: mixing(unknown_operator),
        "they go through _fft_r2c, which may join them",
    ),
    "eca": (
        lambda: mixing(conv_over_channels, eca=nn.Conv1d(1, 1, 3, padding=1)),
        "a convolution mixes them as positions",
    ),
    "fixed": (lambda: mixing(fixed_tensor), "they meet entries that are no channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_are_joined_stay(name: str) -> None:
    build, reason = REFUSED[name]
    model = build()
    first = "0" if isinstance(model, nn.Sequential) else "stem"
    found, refused = survey(model, ["channels"])
    assert {item.layer: item.reason for item in refused} == {first: reason}
    assert [layer.units for layer in found.layers] == [6]
    assert_contract(model, images(), kinds=["channels"])


def test_widths_that_a_forward_fixes_are_found_out() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.last(net.inner(net.stem(x).view(-1, 6, *x.shape[2:])).relu())

    model = mixing(run)
    reason = reasons(model)["stem"]
    assert reason.startswith("its forward fixes how many it has (RuntimeError: ")
    assert layers_of(model) == {"inner": 6}


def test_a_wrong_rule_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_rsst.discovery.channels.walk import RULES

    monkeypatch.setitem(RULES, "_softmax", RULES["relu"])
    assert reasons(mixing(channel_softmax)) == {
        "stem": "its output without some of its channels differs"
    }


def test_tied_convolutions_are_refused() -> None:
    model = NETS["residual"]()
    model.inner[0] = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    model.other = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    model.other.weight = model.inner[0].weight
    assert reasons(model) == {
        "stem.0": "its inner.0.weight is tied to a parameter of another module"
    }


def test_channels_that_all_hang_together() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.last(x + x.roll(1, 1)) if net.rolled else net.last(net.inner(x))

    model = Net(run, stem=conv(3, 4), inner=conv(4, 4, groups=1), last=conv(4, 2))
    model.rolled = True
    assert reasons(model) == {"stem": "they are split at a place that pruning would move"}
    whole = nn.Sequential(conv(4, 6), conv(6, 4, groups=2), conv(4, 2))
    assert layers_of(whole) == {"0": 2}


def test_a_model_that_does_not_run_is_reported() -> None:
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(3, 4), conv(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.second(self.first(x + y))

    model = Hungry()
    with pytest.warns(UnsupportedModuleWarning, match=r"the model \(channels\): it cannot be run"):
        find_groups(nn.Sequential(model, nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))))
    found = find_groups(model, ["channels"], example_inputs=(images().float(), images().float()))
    assert found.layers[0].units == 4
    meta = NETS["plain"]().to("meta")
    reason = "its weights are on the meta device, so that it cannot be run"
    assert reasons(meta) == {"": reason}


def test_half_precision_models() -> None:
    assert layers_of(NETS["residual"]().bfloat16()) == {"stem.0": 6}


def test_a_patch_embedding_alone_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_rsst.discovery.channels import convolutions

    def fail(*_: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(convolutions, "_traced", fail)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(4, 2))
    _, refused = survey(model, ["channels"])
    assert refused == []


def test_ties_are_followed_to_the_end() -> None:
    ledger = Ledger()
    (labels,) = ledger.enter("w", torch.zeros(6), buffer=False)
    ledger.tie(labels[:4], labels[1:5], "chained")
    assert ledger.roots().tolist() == [0, 0, 0, 0, 0, 5]
    ledger.freeze(labels[3], "first")
    ledger.freeze(labels[1], "second")
    ledger.tie(labels[5], torch.tensor(-1), "nobody")
    assert ledger.why_frozen(ledger.roots()) == {0: "first", 5: "nobody"}


# Whole models.

TORCHVISION = {
    "resnet18": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "regnet_y_400mf": 64,
    "googlenet": 64,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(weights=None, num_classes=4, **options)
    inputs = images(2, 3, TORCHVISION[name], TORCHVISION[name])
    train = name != "googlenet"  # dropout of its auxiliary heads
    assert_contract(model, inputs, kinds=["channels"], train=train)


def test_finding_takes_seconds() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(weights=None)
    find_groups(model, ["channels"])
    begin = time.perf_counter()
    find_groups(model, ["channels"])
    assert time.perf_counter() - begin < 15
    transformer = models.vit_b_16(weights=None, num_classes=4)
    begin = time.perf_counter()
    survey(transformer, ["channels"])
    assert time.perf_counter() - begin < 0.5


@pytest.mark.needs_timm
@pytest.mark.parametrize("family", ["blur", "res2net", "dla"])
def test_widths_that_timms_blocks_note_follow(family: str) -> None:
    from timm.layers import BlurPool2d
    from timm.models.dla import DLA, DlaBottle2neck
    from timm.models.res2net import Bottle2neck
    from timm.models.resnet import Bottleneck, ResNet

    sizes = {"num_classes": 3, "channels": (16, 16, 16, 16), "layers": (1, 2, 1, 1)}
    model: nn.Module
    if family == "blur":
        model = ResNet(Bottleneck, aa_layer=BlurPool2d, **sizes)
    elif family == "res2net":
        model = ResNet(Bottle2neck, base_width=32, block_args={"scale": 4}, **sizes)
    else:
        model = DLA(
            levels=[1, 1, 1, 2, 1, 1],
            channels=[8, 8, 32, 64, 64, 64],
            block=DlaBottle2neck,
            base_width=28,
            cardinality=1,
            num_classes=3,
        )
    assert reasons(model) == {}
    assert_contract(model, images(2, 3, 64, 64), kinds=["channels"])


@pytest.mark.needs_timm
@pytest.mark.parametrize("family", ["mixed", "selective", "shortcut", "dual paths", "stages"])
def test_places_where_timms_blocks_split_follow(family: str) -> None:
    from timm.layers import MixedConv2d, SelectiveKernel
    from timm.models.cspnet import BottleneckBlock, CrossStage, CrossStage3
    from timm.models.dpn import DualPathBlock
    from timm.models.rexnet import LinearBottleneck

    options: dict[str, Any] = {
        "stride": 2,
        "dilation": 1,
        "depth": 2,
        "block_ratio": 0.5,
        "block_fn": BottleneckBlock,
        "act_layer": nn.ReLU,
        "norm_layer": nn.BatchNorm2d,
    }
    blocks = {
        "mixed": [MixedConv2d(10, 10, [3, 5, 7], depthwise=True), MixedConv2d(10, 8, [3, 5, 7])],
        "selective": [nn.Conv2d(10, 8, 1), SelectiveKernel(8, 8, rd_divisor=2)],
        "shortcut": [LinearBottleneck(10, 14, stride=1), LinearBottleneck(14, 8, stride=1)],
        "dual paths": [
            DualPathBlock(10, 4, 4, 6, 3, 2, "proj", True),
            DualPathBlock(15, 4, 4, 6, 2, 2, "normal", True),
            nn.Conv2d(17, 8, 1),
        ],
        "stages": [CrossStage(10, 8, **options), CrossStage3(8, 8, **options)],
    }[family]
    model = nn.Sequential(norm_conv(3, 10), *blocks, nn.Conv2d(8, 2, 1))
    assert reasons(model) == {}
    assert_contract(model, images(2, 3, 16, 16), kinds=["channels"])


@pytest.mark.needs_timm
def test_inputs_of_normalized_weights_stay() -> None:
    from timm.layers import ScaledStdConv2d

    model = nn.Sequential(conv(3, 6), ScaledStdConv2d(6, 4, 3), nn.ReLU(), conv(4, 2))
    assert reasons(model) == {"0": "the weights that take them in are normalized"}
    assert layers_of(model) == {"1": 4}
    assert_contract(model, images(), kinds=["channels"])


def test_a_model_that_cannot_be_copied_is_reported() -> None:
    class Single(nn.Sequential):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("there is but one of it")

    model = Single(conv(3, 4), conv(4, 2))
    expected = "it cannot be run (TypeError: there is but one of it); pass example_inputs"
    assert reasons(model) == {"": expected}
