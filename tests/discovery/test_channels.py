"""Channels: each rule by a small net that needs it; refusals with their reasons."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from channel_nets import (
    NETS,
    Both,
    Net,
    behind_stem,
    conv,
    gated_net,
    images,
    layers_of,
    norm_conv,
    reasons,
    separable,
    table,
)
from contract import assert_contract
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

import torch_rsst
from torch_rsst import UnsupportedModuleWarning, find_groups
from torch_rsst.discovery import survey
from torch_rsst.discovery.channels.ledger import Ledger
from torch_rsst.groups.groups import GroupLayer


@pytest.mark.parametrize("name", NETS)
def test_contract(name: str) -> None:
    model = behind_stem(NETS[name]())
    assert_contract(model, images(), kinds=["channels"], amounts=[0.5, 1.0])


def test_contract_in_one_and_three_dimensions() -> None:
    line = nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.MaxPool1d(2), nn.Conv1d(6, 2, 3))
    assert_contract(behind_stem(line, nn.Conv1d(3, 3, 1)), images(3, 3, 16), kinds=["channels"])
    block = nn.Sequential(
        nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.AvgPool3d(2), nn.Conv3d(6, 2, 1)
    )
    assert_contract(
        behind_stem(block, nn.Conv3d(3, 3, 1)), images(2, 3, 6, 6, 6), kinds=["channels"]
    )


def test_a_unit_is_a_channel_with_all_that_it_touches() -> None:
    model = behind_stem(nn.Sequential(conv(3, 2), nn.BatchNorm2d(2), nn.ReLU(), conv(2, 4)))
    (layer,) = find_groups(model, ["channels"]).layers
    assert (layer.name, layer.units, layer.family) == ("1.0", 2, "ConvolutionChannels")
    assert table(layer) == {
        ("1.0.weight", 0): [0, 1],
        ("1.0.bias", 0): [0, 1],
        ("1.1.weight", 0): [0, 1],
        ("1.1.bias", 0): [0, 1],
        ("1.3.weight", 1): [0, 1],
    }
    assert [m.parameter for m in layer.members if m.ranked] == ["1.0.weight", "1.3.weight"]
    assert [m.parameter for m in layer.members if m.consumes] == ["1.3.weight"]
    assert [m.parameter for m in layer.buffers] == ["1.1.running_mean", "1.1.running_var"]


def only_layer(net: nn.Module) -> GroupLayer:
    (layer,) = find_groups(behind_stem(net), ["channels"]).layers
    return layer


def test_what_is_added_stands_or_falls_together() -> None:
    layer = only_layer(NETS["residual"]())
    names = {m.parameter for m in layer.ranked}
    assert names == {"1.first.0.weight", "1.inner.0.weight", "1.last.weight"}
    assert table(layer)["1.inner.0.weight", 0] == table(layer)["1.inner.0.weight", 1] == [*range(6)]


def test_concatenated_channels_take_their_place_in_the_columns() -> None:
    first, inner = find_groups(behind_stem(NETS["concatenated"]()), ["channels"]).layers
    assert (first.name, inner.name) == ("1.first.0", "1.inner.0")
    assert table(first)["1.last.weight", 1] == [*range(6), *[-1] * 4]
    assert table(inner)["1.last.weight", 1] == [*[-1] * 6, *range(4)]


def test_of_a_grouped_convolution_whole_groups_go() -> None:
    layer = only_layer(NETS["grouped"]())
    assert table(layer)["1.0.0.weight", 0] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table(layer)["1.1.0.weight", 0] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert ("1.1.0.weight", 1) not in table(layer)


def test_a_depthwise_convolution_passes_channels_on() -> None:
    layer = only_layer(separable())
    assert layer.units == 6
    assert table(layer)["1.1.0.weight", 0] == [*range(6)]
    assert table(layer)["1.3.weight", 1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_flattened_channel_owns_a_block_of_columns() -> None:
    layer = only_layer(NETS["flattened"]())
    assert table(layer)["1.last.weight", 1] == [unit for unit in range(6) for _ in range(4)]


def test_parts_are_kept_even() -> None:
    layer = only_layer(gated_net(True))
    assert table(layer)["1.first.weight", 0] == [0, 1, 2, 3, 0, 1, 2, 3]
    layer = only_layer(NETS["pixel-shuffled"]())
    assert table(layer)["1.first.0.weight", 0] == [unit for unit in range(4) for _ in range(4)]


def test_masked_and_wrapped_models() -> None:
    model = behind_stem(NETS["residual"]())
    groups = find_groups(model, ["channels"])
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = find_groups(nn.DataParallel(model), ["channels"])
    assert [table(layer) for layer in again.layers] == [table(layer) for layer in groups.layers]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_random_state_is_left_alone() -> None:
    model = behind_stem(NETS["residual"]())
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
    model = behind_stem(WithAuxiliaryHead())
    (layer,) = find_groups(model, ["channels"]).layers
    assert ("1.head.weight", 1) in table(layer)
    assert_contract(model, images(), kinds=["channels"])


def test_kinds_found_before_keep_what_is_theirs() -> None:
    found = find_groups(behind_stem(Both()), ["neurons", "channels"])
    assert [(la.name, la.kind, la.units) for la in found.layers] == [
        ("1.mlp", "neurons", 8),
        ("1.first.0", "channels", 6),
    ]
    assert_contract(behind_stem(Both()), images(), kinds=["neurons", "channels"])


def test_a_part_that_trains_on_large_images_only_is_cut_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WithAuxiliaryHead, "forward", _convolving_head)
    model = WithAuxiliaryHead()
    model.head = nn.Sequential(nn.AvgPool2d(16, 16), nn.Conv2d(6, 2, 5))
    assert ("1.head.1.weight", 1) in table(only_layer(model))
    model.head[1] = nn.Conv2d(7, 2, 5)
    expected = "it cannot be run (in training mode, where alone some of it is used: RuntimeError: "
    assert reasons(behind_stem(model))[""].startswith(expected)


def _convolving_head(self: WithAuxiliaryHead, x: Tensor) -> Any:
    x = self.first(x)
    return (self.last(x), self.head(x)) if self.training else self.last(x)


# Refusals.


def middle(*between: nn.Module) -> nn.Sequential:
    layers = nn.Sequential(conv(3, 6), *between, conv(6, 6), nn.ReLU(), conv(6, 2))
    return behind_stem(layers)


def mixing(run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> nn.Sequential:
    return behind_stem(Net(run, first=conv(3, 6), inner=conv(6, 6), last=conv(6, 2), **layers))


def layer_norm(net: Any, x: Tensor) -> Tensor:
    x = net.norm(net.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return net.last(net.inner(x).relu())


def spatial_attention(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(net.inner(x * x.mean(1, keepdim=True).sigmoid()).relu())


def channel_softmax(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(net.first(x).softmax(1)).relu())


def attention(net: Any, x: Tensor) -> Tensor:
    tokens = F.adaptive_avg_pool2d(net.first(x), 4).flatten(2)
    mixed = (tokens.transpose(1, 2) @ tokens).softmax(-1) @ tokens.transpose(1, 2)
    return net.last(net.inner(mixed.transpose(1, 2).reshape(len(x), 6, 4, 4)).relu())


def uneven(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(net.inner(torch.cat([x[:, :2] * 2, x[:, 2:]], 1)).relu())


def picked(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(net.first(x)[:, net.order]).relu())


def selected(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(net.first(x).index_select(1, net.order)).relu())


def unknown_operator(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(torch.fft.fft(net.first(x)).real).relu())


def conv_over_channels(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    gate = net.eca(x.mean((2, 3))[:, None]).sigmoid().view(len(x), 6, 1, 1)
    return net.last(net.inner(x * gate).relu())


def fixed_tensor(net: Any, x: Tensor) -> Tensor:
    return net.last(net.inner(net.first(x) + torch.tensor(range(6)).view(6, 1, 1)).relu())


REFUSED = {
    "LayerNorm": (
        lambda: mixing(layer_norm, norm=nn.LayerNorm(6)),
        "they are joined by LayerNorm",
    ),
    "GroupNorm": (lambda: middle(nn.GroupNorm(1, 6)), "they are joined by GroupNorm"),
    "mean": (lambda: mixing(spatial_attention), "they are joined by mean"),
    "softmax": (lambda: mixing(channel_softmax), "they are joined by softmax"),
    "attention": (
        lambda: mixing(attention),
        "they meet in a product of activations, as those of an attention do",
    ),
    "uneven": (lambda: mixing(uneven), "they are split at a place that pruning would move"),
    **{
        name: (
            partial(mixing, run, order=nn.Buffer(torch.arange(6).flip(0))),
            "an index picks them by their numbers, which change when some go: put what it picks, in its "
            "order, into the weights before it, and take the index out",
        )
        for name, run in {"index": picked, "index_select": selected}.items()
    },
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
    first = "1.0" if isinstance(model[1], nn.Sequential) else "1.first"
    found, refused = survey(model, ["channels"])
    assert {item.layer: item.reason for item in refused} == {first: reason}
    assert [layer.units for layer in found.layers] == [6]
    assert_contract(model, images(), kinds=["channels"])


def test_widths_that_a_forward_fixes_are_found_out() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.last(net.inner(net.first(x).view(-1, 6, *x.shape[2:])).relu())

    model = mixing(run)
    reason = reasons(model)["1.first"]
    assert reason.startswith("its forward fixes how many it has (RuntimeError: ")
    remedy = "let sizes follow from its tensors there, x.flatten(1) instead of x.view(-1, 64)"
    assert reason.endswith(remedy)
    assert layers_of(model) == {"1.inner": 6}


def test_neurons_that_a_response_norm_joins_are_named_where_nothing_is_found() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x).permute(0, 2, 3, 1)
        y = F.gelu(net.up(x))
        size = y.norm(p=2, dim=(1, 2), keepdim=True)
        y = y + net.scale * y * size / size.mean(-1, keepdim=True)
        return net.last(x + net.down(y)).mean((1, 2))

    scale = nn.Parameter(torch.randn(1, 1, 1, 12))
    up, down, last = nn.Linear(4, 12), nn.Linear(12, 4), nn.Linear(4, 2)
    model = Net(run, stem=conv(3, 4), up=up, scale=scale, down=down, last=last)
    _, refused = survey(model, example_inputs=images().float())
    assert [str(item) for item in refused] == [
        "stem (channels): they come out of a convolution that reads the model's input, which is left "
        "alone",
        "up (neurons): they are joined by mean",
    ]


def test_a_single_channel_is_no_position_of_a_kernel() -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 1), conv(1, 1), nn.ReLU(), conv(1, 2))
    found, _ = survey(model)
    whole = {item.name: item.reason for item in found.whole}
    assert whole["3"] == "its one feature cannot go"
    assert not any("kernel" in reason for reason in whole.values())


def test_a_plain_tensor_of_the_module_is_to_be_a_buffer() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.last(net.inner(net.first(x) * net.scale[:, None, None]).relu())

    model = mixing(run)
    model[1].scale = torch.rand(6, dtype=torch.float64)
    reason = "they meet 1.scale, a plain tensor: let register_buffer hold it"
    assert reasons(model) == {"1.first": reason}
    scale = model[1].__dict__.pop("scale")
    model[1].register_buffer("scale", scale)
    assert layers_of(model) == {"1.first": 6, "1.inner": 6}


def test_a_wrong_rule_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_rsst.discovery.channels.walk import RULES

    monkeypatch.setitem(RULES, "_softmax", RULES["relu"])
    assert reasons(mixing(channel_softmax)) == {
        "1.first": "the model's output differs without some of them"
    }


class SizeInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(a, b, 3) for a, b in ((3, 8), (8, 8), (8, 8), (8, 6)))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return x * len(self.layers[1].weight) if self.training else x


def test_channels_that_the_output_in_training_mode_tells_of_are_refused() -> None:
    differs = "the model's output in training mode differs without some of them"
    with pytest.warns(UnsupportedModuleWarning, match=f"layers.1 .*: {differs}"):
        groups = find_groups(SizeInTraining(), example_inputs=torch.randn(2, 3, 12, 12))
    assert [layer.name for layer in groups.layers] == ["layers.2"]


def test_tied_convolutions_are_refused() -> None:
    model = NETS["residual"]()
    model.inner[0] = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    model.other = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    model.other.weight = model.inner[0].weight
    assert reasons(behind_stem(model)) == {
        "1.first.0": "its 1.inner.0.weight is tied to a parameter of another module"
    }


def test_channels_that_all_hang_together() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.last(x + x.roll(1, 1)) if net.rolled else net.last(net.inner(x))

    model = Net(run, first=conv(3, 4), inner=conv(4, 4, groups=1), last=conv(4, 2))
    model.rolled = True
    expected = {"1.first": "they are split at a place that pruning would move"}
    assert reasons(behind_stem(model)) == expected
    whole = nn.Sequential(conv(3, 6), conv(6, 4, groups=2), conv(4, 2))
    assert layers_of(behind_stem(whole)) == {"1.0": 2}


def test_a_model_that_does_not_run_is_reported() -> None:
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.second = conv(3, 3), conv(3, 4), conv(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.second(self.first(self.stem(x + y)))

    model = Hungry()
    with pytest.warns(UnsupportedModuleWarning, match=r"the model \(channels\): it cannot be run"):
        find_groups(nn.Sequential(model, nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))))
    found = find_groups(model, ["channels"], example_inputs=(images().float(), images().float()))
    assert found.layers[0].units == 4
    meta = NETS["plain"]().to("meta")
    reason = "its weights are on the meta device, so that it cannot be run"
    assert reasons(meta) == {"": reason}


class Rooted(nn.Module):
    """Scales channels by the roots of parameters close to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.last = conv(3, 3), conv(3, 8), conv(8, 2)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(self.stem(x)).relu() * self.scale.sqrt())
        return out


def test_weights_that_must_stay_positive_are_tried_positive() -> None:
    found, refused = survey(Rooted(), ["channels"])
    assert (found.layers[0].units, refused) == (8, [])


def test_what_is_not_finite_is_named() -> None:
    model = Rooted()
    model.offset = nn.Parameter(torch.zeros(()))
    model.register_forward_hook(lambda model, _, out: out + 1 / model.offset.mul(0))
    expected = "its outputs are not finite with the random weights on which it is tried"
    assert reasons(model) == {"first": expected}
    with torch.no_grad():
        model.scale[0] = float("nan")
    expected = "its scale holds NaN or infinity: look for the step at which training diverged"
    assert reasons(model) == {"first": expected}


def test_half_precision_models() -> None:
    assert layers_of(behind_stem(NETS["residual"]()).bfloat16()) == {"1.first.0": 6}


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


def test_a_model_that_cannot_be_copied_is_reported() -> None:
    class Single(nn.Sequential):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("there is but one of it")

    model = Single(conv(3, 4), conv(4, 2))
    expected = "it cannot be run (TypeError: there is but one of it); pass example_inputs"
    assert reasons(model) == {"": expected}


JOINING: dict[str, tuple[Callable[[nn.Module], nn.Module], str, Callable[..., object]]] = {
    "weight_norm": (
        parametrizations.weight_norm,
        "the parametrization WeightNorm joins them",
        nn.utils.parametrize.remove_parametrizations,
    ),
    "spectral_norm": (
        parametrizations.spectral_norm,
        "the parametrization SpectralNorm joins them",
        nn.utils.parametrize.remove_parametrizations,
    ),
    "orthogonal": (
        parametrizations.orthogonal,
        "the parametrization Orthogonal joins them",
        nn.utils.parametrize.remove_parametrizations,
    ),
    "hook of weight_norm": (
        nn.utils.weight_norm,
        "weight_norm joins them",
        nn.utils.remove_weight_norm,
    ),
    "hook of spectral_norm": (
        nn.utils.spectral_norm,
        "spectral_norm joins them",
        nn.utils.remove_spectral_norm,
    ),
}


@pytest.mark.parametrize("name", JOINING)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weights_that_are_made_of_others_are_told_how_to_be_set_free(name: str) -> None:
    join, reason, remedy = JOINING[name]
    inner = join(nn.Conv2d(6, 6, 3))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), inner, nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = images(2, 3, 8, 8).float()
    found, refused = survey(model, example_inputs=x)
    assert found.layers == ()
    told = [
        *(item.reason for item in refused),
        *(w.reason for w in found.whole if w.role == "left"),
    ]
    start = f"{reason}; take it off before you find groups, with torch.nn.utils."
    assert any(text.startswith(start) and remedy.__name__ in text for text in told)
    assert not any("fixes" in text for text in told)
    remedy(inner, "weight")
    (layer,) = find_groups(model, example_inputs=x).layers
    assert (layer.name, layer.units) == ("1", 6)


def test_a_parametrization_that_keeps_channels_apart_is_cut_along() -> None:
    class Signed(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * weight.abs()

    model = nn.Sequential(conv(3, 3), conv(3, 6), nn.ReLU(), conv(6, 2)).double()
    nn.utils.parametrize.register_parametrization(model[1], "weight", Signed())
    found = find_groups(model, example_inputs=images())
    assert layers_of(model) == {"1.parametrizations.weight": 6}
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, found, amount=0.5))
    small = torch_rsst.compact(model, found)
    assert (small[1].out_channels, small[3].in_channels) == (3, 3)
    torch.testing.assert_close(small(images()), model(images()))


class _Chosen(nn.Module):
    """What it puts out is decided by rounding, as boxes of equal scores are."""

    def forward(self, x: Tensor) -> Tensor:
        return (1e16 * x).sin()


def test_channels_before_a_choice_that_rounding_decides_are_compared_where_they_go() -> None:
    before = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    model = nn.Sequential(*before, _Chosen(), nn.Conv2d(4, 2, 3)).double()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    groups, refused = survey(model, example_inputs=images)
    assert [layer.name for layer in groups.layers] == ["2"]
    assert [item.layer for item in refused] == ["4"]
    assert refused[0].reason.startswith("what follows depends on choices that rounding decides")
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups))
    small = torch_rsst.compact(model, groups)
    torch.testing.assert_close(small[:5](images), model[:5](images))
