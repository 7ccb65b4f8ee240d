"""Features of linear and recurrent layers, groups of norms, and numbers that modules keep, are followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_contract, difference
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import torch_rsst
from torch_rsst.discovery import survey
from torch_rsst.groups.groups import GroupLayer, Groups, Member


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def units_of(groups: Groups) -> dict[str, int]:
    return {layer.name: layer.units for layer in groups.layers}


class Net(nn.Module):
    """Layers by name, run by a function."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def flattened(net: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(net.c2(net.c1(x).relu()).relu(), 2)
    return net.f3(net.f2(net.f1(x.view(-1, x[0].numel())).relu()).relu())


def read_in_order(net: Any, x: Tensor) -> Tensor:
    x = net.c2(net.c1(x).relu()).relu()
    x = x.permute(0, 3, 1, 2).flatten(2)
    return net.last(net.rnn(x)[0])


def in_turn(net: Any, x: Tensor) -> Tensor:
    return net.last(net.rnn(x)[0])


def stacked_experts(net: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    out = torch.zeros_like(tokens)
    for expert, (up, down) in enumerate(zip(net.up, net.down, strict=True)):
        (mine,) = torch.where(torch.arange(len(tokens)) % net.used == expert)
        gate, value = F.linear(tokens[mine], up).chunk(2, -1)
        out.index_add_(0, mine, F.linear(F.silu(gate) * value, down))
    return net.last(out.view(x.shape))


def tied_to_its_transpose(net: Any, x: Tensor) -> Tensor:
    return F.linear(net.encoder(x).relu(), net.encoder.weight.t(), net.bias)


def keeping_numbers(net: Any, x: Tensor) -> Tensor:
    x = F.group_norm(net.first(net.stem(x)), net.count).relu()
    x = x.view(len(x), net.width, -1).cumsum(-1).view(x.shape)
    left, right = net.inner(x).split(net.sizes, 1)
    return net.last(torch.cat([left.relu(), right.tanh()], 1))


def functional(net: Any, x: Tensor) -> Tensor:
    x = F.conv2d(F.conv2d(x, net.a, padding=1).relu(), net.b, padding=1).relu()
    return F.conv2d(F.conv2d(x, net.c, padding=1).relu(), net.d, padding=1)


def regions(net: Any, x: Tensor) -> Tensor:
    from torchvision.ops import roi_align

    x = net.first(x).relu()
    x = net.deformed(x, net.offsets(x)).relu()
    return net.last(roi_align(x, [torch.tensor([[0.0, 0, 4, 4]]).to(x)] * len(x), 3))


def unshuffled(net: Any, x: Tensor) -> Tensor:
    return net.last(F.pixel_unshuffle(net.first(x), 2))


def multiplied(net: Any, x: Tensor) -> Tensor:
    return net.last((net.mix @ net.first(x).flatten(2)).unflatten(2, x.shape[2:]))


def summed_by_einsum(net: Any, x: Tensor) -> Tensor:
    return net.last(torch.einsum("oc,bchw->bohw", net.mix, net.first(x)))


def conv(given: int, taken: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(given, taken, 3, padding=1, **options)


def through(norm: nn.Module) -> nn.Module:
    """A stem, two convolutions with a norm between them."""
    return nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 8), norm, nn.ReLU(), conv(8, 2))


def test_hidden_features_of_long_chains_are_units() -> None:
    chain = nn.Sequential(
        *(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.PReLU(5)),
        *(nn.Dropout(0.5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softmax(-1)),
    )
    found = assert_contract(chain, inputs(4, 7), kinds=["neurons"], amounts=(0.5, 0.9))
    assert units_of(found) == {"0": 6, "3": 5, "6": 4}


def test_chains_behind_flattened_convolutions_are_followed() -> None:
    net = Net(
        flattened,
        c1=conv(1, 3),
        c2=conv(3, 4),
        f1=nn.Linear(36, 9),
        f2=nn.Linear(9, 8),
        f3=nn.Linear(8, 2),
    )
    found = assert_contract(
        net, inputs(2, 1, 6, 6), kinds=["channels", "neurons"], example_inputs=True
    )
    assert units_of(found) == {"c2": 4, "f1": 9, "f2": 8}


@pytest.mark.parametrize(
    "after", [nn.Sigmoid(), nn.Tanh(), nn.Dropout(0.5), nn.Sequential(nn.ReLU(), nn.Dropout())]
)
def test_what_follows_an_emptied_layer_stays(after: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), after).double()
    groups = torch_rsst.find_groups(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=1.0, min_keep=0))
    small = torch_rsst.compact(model, groups)
    assert not [m for m in small.modules() if isinstance(m, nn.Linear)]
    for mode in (False, True):
        outputs = []
        for net in (model.train(mode), small.train(mode)):
            torch.manual_seed(0)
            outputs.append(net(inputs(3, 4)))
        assert torch.equal(*outputs)


def test_where_only_the_last_unit_cannot_go_it_stays() -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(7, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu()
            # True of no number of neurons, but where the first layer is gone.
            return self.last(hidden) + float(hidden.shape[-1] == 7)

    groups = torch_rsst.find_groups(Divided())
    assert [(layer.units, layer.least) for layer in groups.layers] == [(6, 1)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("groups", "units"), [(2, 2), (4, 4), (8, 8)])
def test_whole_groups_of_a_group_norm_are_units(groups: int, units: int, affine: bool) -> None:
    model = through(nn.GroupNorm(groups, 8, affine=affine))
    found = assert_contract(model, inputs(2, 3, 6, 6), kinds=["channels"], amounts=(0.5, 1.0))
    assert units_of(found) == {"2": units}


def test_sizes_of_norms_without_parameters_are_followed() -> None:
    for norm in (nn.GroupNorm(4, 8, affine=False), nn.InstanceNorm2d(8)):
        model = through(norm)
        groups = torch_rsst.find_groups(model)
        torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
        small = torch_rsst.compact(model, groups)
        assert getattr(small[3], "num_channels", getattr(small[3], "num_features", 0)) == 4
        assert getattr(small[3], "num_groups", 2) == 2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_channels_into_recurrent_layers_and_their_hidden_units(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    rnn = kind(4 * 6, 5, batch_first=True, **options)
    width = 5 * (1 + bool(options))
    net = Net(read_in_order, c1=conv(1, 3), c2=conv(3, 4), rnn=rnn, last=nn.Linear(width, 2))
    found = assert_contract(
        net, inputs(2, 1, 6, 4), kinds=["channels", "neurons"], example_inputs=True
    )
    assert units_of(found) == {"c2": 4, "rnn": 5}


class FromZeros(nn.Module):
    """As tutorials write it: the first state is made by the model, in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.lstm, self.out = 12, nn.LSTM(7, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, x.shape[0], self.hidden)
        return self.out(self.lstm(x, (state, state))[0][:, -1])


def test_hidden_units_are_found_where_the_first_state_is_zeros_of_single_precision() -> None:
    model, x = FromZeros(), inputs(2, 5, 7).float()
    groups = torch_rsst.find_groups(model, example_inputs=x)
    assert units_of(groups) == {"lstm": 12}
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups, example_inputs=x, keep_masks=False)
    assert small.lstm.hidden_size == small.hidden == 6
    assert difference(model, small, x) <= 1e-6


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_projected_hidden_units_stay_more_than_what_they_are_projected_to(
    options: dict[str, Any],
) -> None:
    def net(hidden: int, projected: int) -> Net:
        rnn = nn.LSTM(3, hidden, proj_size=projected, batch_first=True, **options)
        return Net(in_turn, rnn=rnn, last=nn.Linear(projected * (1 + bool(options)), 2))

    found = assert_contract(
        net(8, 3), inputs(2, 5, 3), kinds=["neurons"], amounts=(0.5, 1.0), example_inputs=True
    )
    assert units_of(found) == {"rnn": 8, "last": 3}
    assert {layer.name: layer.least for layer in found.layers} == {"rnn": 4, "last": 0}
    found, refused = survey(net(4, 3), ["neurons"])
    assert units_of(found) == {"last": 3}
    assert [str(item) for item in refused] == [
        "rnn (neurons): it has no more neurons than it needs to run (4)"
    ]


@pytest.mark.parametrize("used", [2, 3])
def test_an_expert_without_tokens_hides_no_neurons(used: int) -> None:
    up, down = (nn.Parameter(torch.randn(3, *shape)) for shape in ((10, 4), (4, 5)))
    net = Net(stacked_experts, up=up, down=down, last=nn.Linear(4, 2))
    net.used = used
    found = assert_contract(net, inputs(2, 6, 4), kinds=["neurons"], example_inputs=True)
    assert units_of(found)[""] == 5


def test_hidden_units_of_a_weight_that_is_used_both_ways() -> None:
    net = Net(tied_to_its_transpose, encoder=nn.Linear(6, 4), bias=nn.Parameter(torch.randn(6)))
    found = assert_contract(net, inputs(5, 6), kinds=["neurons"], example_inputs=True)
    assert units_of(found) == {"encoder": 4}
    (whole,) = survey(nn.Linear(6, 4))[0].whole
    assert whole.reason == "they are outputs of the model"


def test_numbers_that_a_module_keeps_are_found_by_trying() -> None:
    net = Net(keeping_numbers, stem=conv(3, 3), first=conv(3, 8), inner=conv(8, 6), last=conv(6, 2))
    net.count, net.width, net.sizes = 4, 8, (3, 3)
    found = assert_contract(net, inputs(2, 3, 6, 6), kinds=["channels"], example_inputs=True)
    assert units_of(found) == {"first": 4, "inner": 3}


def test_several_convolution_parameters_in_one_module() -> None:
    shapes = {"a": (4, 1, 3, 3), "b": (5, 4, 3, 3), "c": (6, 5, 3, 3), "d": (2, 6, 3, 3)}
    inner = Net(
        functional, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    )
    net = nn.Sequential(conv(3, 1), inner)
    found = assert_contract(net, inputs(2, 3, 6, 6), kinds=["channels"], example_inputs=True)
    assert sorted(units_of(found).values()) == [4, 5, 6]


OPERATORS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], list[int]]] = {
    "pixel_unshuffle": (
        unshuffled,
        {"last": conv(16, 2)},
        [4],
    ),
    "a product with a parameter": (
        multiplied,
        {"mix": nn.Parameter(torch.randn(5, 4)), "last": conv(5, 2)},
        [4, 5],
    ),
    "einsum": (
        summed_by_einsum,
        {"mix": nn.Parameter(torch.randn(5, 4)), "last": conv(5, 2)},
        [4, 5],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_channels_are_followed_through(name: str) -> None:
    run, layers, units = OPERATORS[name]
    net = nn.Sequential(conv(3, 3), Net(run, first=conv(3, 4), **layers))
    kinds = ["channels", "neurons"] if len(units) > 1 else ["channels"]
    found = assert_contract(net, inputs(2, 3, 6, 6), kinds=kinds, example_inputs=True)
    assert sorted(units_of(found).values()) == units


@pytest.mark.needs_timm
def test_channels_are_followed_through_operators_of_torchvision() -> None:
    from torchvision.ops import DeformConv2d

    layers = {"offsets": conv(4, 18), "deformed": DeformConv2d(4, 6, 3, padding=1)}
    net = nn.Sequential(conv(3, 3), Net(regions, first=conv(3, 4), last=conv(6, 2), **layers))
    found = assert_contract(net, inputs(2, 3, 6, 6), kinds=["channels"], example_inputs=True)
    assert units_of(found) == {"1.first": 4, "1.deformed": 6}


def by_hand(model: nn.Module, unit_of: Tensor) -> GroupLayer:
    """Units over the two convolutions of ``through``, and their norm's parameters."""
    names = [name for name, _ in model[3].named_parameters()]
    members = [
        Member("2.weight", 0, unit_of, ranked=True),
        Member("2.bias", 0, unit_of, ranked=False),
        *(Member(f"3.{name}", 0, unit_of, ranked=False) for name in names),
        Member("5.weight", 1, unit_of, ranked=True, consumes=True),
    ]
    return GroupLayer("2", "channels", int(unit_of.max()) + 1, tuple(members))


def masked_by_hand(norm: nn.Module, unit_of: Tensor) -> tuple[nn.Module, GroupLayer]:
    torch.manual_seed(0)
    model = through(norm).eval()
    layer = by_hand(model, unit_of)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, [layer], amount=0.5))
    return model, layer


def test_groups_by_hand_over_a_group_norm_are_exact_where_they_are_whole() -> None:
    model, layer = masked_by_hand(nn.GroupNorm(4, 8), torch.arange(4).repeat_interleave(2))
    small = torch_rsst.compact(model, [layer])
    assert (small[3].num_groups, small[3].num_channels) == (2, 4)
    assert difference(model, small, inputs(2, 3, 6, 6).float()) < 1e-6


@pytest.mark.parametrize(
    ("norm", "error", "text"),
    [
        (nn.GroupNorm(4, 8), RuntimeError, r"the same outputs, got a difference.*use find_groups"),
        (nn.GroupNorm(1, 8), ValueError, r"whole groups of 8, got 4 channels left"),
        (nn.GroupNorm(2, 8, affine=False), RuntimeError, "the same outputs"),
    ],
)
def test_groups_by_hand_that_are_not_exact_are_refused(
    norm: nn.Module, error: type[Exception], text: str
) -> None:
    model, layer = masked_by_hand(norm, torch.arange(8))
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(error, match=text):
        torch_rsst.compact(model, [layer])
    assert {name: p.shape for name, p in model.named_parameters()} == before


def test_groups_by_hand_that_cannot_be_verified_ask_for_inputs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = through(nn.Identity())

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.net(x + y)

    model = TwoInputs()
    unit_of = torch.arange(8)
    members = (
        Member("net.2.weight", 0, unit_of, ranked=True),
        Member("net.2.bias", 0, unit_of, ranked=False),
        Member("net.5.weight", 1, unit_of, ranked=True, consumes=True),
    )
    layer = GroupLayer("net.2", "channels", 8, members)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, [layer], amount=0.5))
    with pytest.raises(
        ValueError, match="Pass example_inputs, so that the outputs can be compared"
    ):
        torch_rsst.compact(model, [layer])
    x = inputs(2, 3, 6, 6).float()
    small = torch_rsst.compact(model, [layer], example_inputs=(x, x))
    assert small.net[5].in_channels == 4
