"""Compaction: what is dead goes, what it still emits is folded, what is refused stays untouched."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from contract import difference, outputs_of, randomize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_rsst
from torch_rsst import CompactionWarning, compact, find_groups
from torch_rsst.discovery.examples import small_guesses
from torch_rsst.groups.groups import GroupLayer, Groups, Member, as_groups


def mlp(hidden: int = 8, act: nn.Module | None = None, **options: Any) -> nn.Sequential:
    first, last = nn.Linear(4, hidden, **options), nn.Linear(hidden, 3, **options)
    return nn.Sequential(first, act or nn.GELU(), last).double()


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape or (5, 4), generator=generator, dtype=torch.float64)


def drop(model: nn.Module, groups: Groups, *units: int) -> None:
    """Mask units of the first layer, whole."""
    gone = torch.zeros(groups.layers[0].units, dtype=torch.bool)
    gone[list(units)] = True
    weights = dict(model.named_parameters())
    members = groups.layers[0].members
    masks = {m.parameter: m.spread(~gone, weights[m.parameter]) for m in members}
    torch_rsst.apply_mask(model, masks)


def test_dead_units_go_and_the_model_stays_as_it_was() -> None:
    model = mlp()
    groups = find_groups(model)
    drop(model, groups, 1, 2, 6)
    before = pickle.dumps(model.state_dict())
    small = compact(model, groups, example_inputs=tokens())
    assert small[0].weight.shape == (5, 4)
    assert small[2].weight.shape == (3, 5)
    assert (small[0].out_features, small[2].in_features) == (5, 5)
    kept = [0, 3, 4, 5, 7]
    assert torch.equal(small[0].bias, model[0].bias_orig[kept])
    assert pickle.dumps(model.state_dict()) == before
    assert not any("_mask" in name for name in small.state_dict())
    assert difference(model, small, tokens()) <= 1e-12


def test_nothing_dead_gives_an_equal_copy() -> None:
    model = mlp()
    small = compact(model, find_groups(model))
    assert small is not model
    assert all(map(torch.equal, model.parameters(), small.parameters()))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in small.parameters()}


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_requires_grad_are_kept(training: bool) -> None:
    model = mlp().train(training)
    model[0].bias.requires_grad_(False)
    groups = find_groups(model)
    drop(model, groups, 0)
    small = compact(model, groups)
    assert [m.training for m in small.modules()] == [training] * 4
    assert [p.requires_grad for p in small.parameters()] == [True, False, True, True]


def test_element_masks_of_units_that_stay_are_cut_along() -> None:
    model = mlp()
    groups = find_groups(model)
    drop(model, groups, 0, 1)
    masks = torch_rsst.extract_mask(model)
    masks["0.weight"][4, 1] = masks["2.weight"][2, 5] = False
    torch_rsst.apply_mask(model, masks)
    small = compact(model, groups, keep_masks=True)
    left = torch_rsst.extract_mask(small)
    assert left.keys() == {"0.weight", "2.weight"}  # the bias's mask had no zeros left
    assert torch.equal(left["0.weight"], masks["0.weight"][2:])
    assert torch.equal(left["2.weight"], masks["2.weight"][:, 2:])
    assert difference(model, small, tokens()) <= 1e-12
    small(tokens()).sum().backward()
    assert float(small[0].weight_orig.grad[2, 1]) == 0.0


def with_element_masks() -> tuple[nn.Module, Groups]:
    """Two units and three single weights masked, one of these in a unit that goes."""
    model = mlp()
    groups = find_groups(model)
    drop(model, groups, 0, 1)
    masks = torch_rsst.extract_mask(model)
    masks["0.weight"][4, 1] = masks["2.weight"][2, 5] = masks["2.weight"][2, 0] = False
    torch_rsst.apply_mask(model, masks | {"2.bias": torch.tensor([True, False, True])})
    return model, groups


def test_the_result_has_plain_parameters_and_a_warning_counts_the_zeros() -> None:
    model, groups = with_element_masks()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(
        torch_rsst.UnfrozenZerosWarning, match="^compact: 3 masked weights that were not"
    ):
        small = compact(model, groups, example_inputs=tokens())
    assert list(dict(small.named_parameters())) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not list(small.buffers())
    assert not any(module._forward_pre_hooks for module in small.modules())
    assert [type(m) for m in small] == [nn.Linear, nn.GELU, nn.Linear]
    with torch.no_grad():
        assert (small[0].weight[2, 1], small[2].weight[2, 3], small[2].bias[1]) == (0.0, 0.0, 0.0)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert difference(model, small, tokens()) <= 1e-15


def test_keep_masks_decides_without_a_warning_and_an_optimizer_keeps_them() -> None:
    model, groups = with_element_masks()
    assert torch_rsst.extract_mask(compact(model, groups, keep_masks=False)) == {}
    kept = torch_rsst.extract_mask(compact(model, groups, keep_masks=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    small = compact(model, groups, optimizer=optimizer)
    moved = torch_rsst.extract_mask(small)
    assert kept.keys() == moved.keys() == {"0.weight", "2.weight", "2.bias"}
    small(tokens()).sum().backward()
    optimizer.step()
    assert small[2].bias[1].item() == 0.0
    plain = compact(model := with_element_masks()[0], groups, optimizer=(
        optimizer := torch.optim.SGD(model.parameters(), lr=0.1)), keep_masks=False)  # fmt: skip
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in plain.parameters()
    ]


def test_nothing_under_a_mask_comes_along() -> None:
    model, groups = with_element_masks()
    with torch.no_grad():
        model[0].weight_orig[4, 1] = float("nan")
        model[2].weight_orig[2, 5] = float("inf")
    small = compact(model, groups, keep_masks=False)
    assert difference(model, small, tokens()) <= 1e-15


def test_a_bias_made_for_constants_is_trained_as_its_weight_is() -> None:
    model = mlp(act=nn.Sigmoid(), bias=False)
    groups = find_groups(model)
    drop(model, groups, 0)
    with torch.no_grad():
        model[0].weight_orig[1] = 0.0
    assert compact(model, groups)[2].bias.requires_grad
    model[2].weight_orig.requires_grad_(False)
    assert not compact(model, groups)[2].bias.requires_grad


@pytest.mark.parametrize("act", [nn.GELU(), nn.Sigmoid(), nn.ReLU(), nn.Softplus()])
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_unit_without_inputs_still_emits_is_folded(act: nn.Module, bias: bool) -> None:
    """A neuron with a zero row emits act(bias): removing it without more would change the output."""
    model = mlp(act=act, bias=bias)
    groups = find_groups(model)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0.0
    small = compact(model, groups, example_inputs=tokens())
    assert small[0].out_features == 6
    assert difference(model, small, tokens()) <= 1e-12
    emits = bool(act(torch.zeros(()))) or bias
    assert (small[2].bias is not None) == (bias or emits)


def test_folding_into_a_masked_bias_keeps_what_was_folded() -> None:
    model = mlp(act=nn.Sigmoid())
    groups = find_groups(model)
    torch_rsst.apply_mask(model, {"2.bias": torch.zeros(3, dtype=torch.bool)})
    with torch.no_grad():
        model[0].weight[1] = 0.0
    for keep in (True, False):
        small = compact(model, groups, keep_masks=keep)
        assert difference(model, small, tokens()) <= 1e-12


class Normalized(nn.Module):
    """Its hidden units hear of each other, unless all of a unit is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(nn.functional.gelu(x), dim=-1)


@pytest.mark.parametrize("act", [nn.GELU(), Normalized()])
def test_a_unit_that_lives_stays_even_where_nothing_takes_it_in(act: nn.Module) -> None:
    model = mlp(act=act)
    groups = find_groups(model)
    with torch.no_grad():
        model[2].weight[:, 3] = 0.0
    with pytest.warns(
        CompactionWarning, match="Nothing was cut: no unit of these groups is wholly"
    ):
        small = compact(model, groups)
    assert small[0].out_features == 8
    assert difference(model, small, tokens()) <= 1e-12


def test_a_constant_that_batch_norm_makes_another_in_training_keeps_its_unit() -> None:
    model, groups = convolutions(last=1)
    with torch.no_grad():
        model[0].weight[[1, 2]] = 0.0
        model[1].bias.fill_(1.5)
        model[1].running_mean[1] = model[0].bias[1]  # as after training with it
    with pytest.warns(CompactionWarning, match="1 of 0"):
        small = compact(model, groups, example_inputs=tokens(2, 2, 6, 6))
    assert small[0].out_channels == 5
    for mode in (True, False):
        model.train(mode), small.train(mode)
        assert difference(model, small, tokens(2, 2, 6, 6)) <= 1e-5


class AlongTokens(nn.Module):
    """Its constants depend on how many tokens there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1)


def test_a_constant_that_depends_on_the_number_of_tokens_keeps_its_unit() -> None:
    model = mlp(act=AlongTokens())
    groups = find_groups(model)
    with torch.no_grad():
        model[0].weight[:3] = 0.0
    with pytest.warns(CompactionWarning, match="3 of the model"):
        small = compact(model, groups)
    assert difference(model, small, tokens(2, 7, 4)) <= 1e-12


def test_a_bias_of_several_modules_takes_nothing_up() -> None:
    model = nn.Sequential(mlp(act=nn.Sigmoid()), nn.Linear(3, 3)).double()
    model[1].bias = model[0][2].bias
    groups = find_groups(model)
    with torch.no_grad():
        model[0][0].weight[1] = 0.0
    with pytest.warns(CompactionWarning, match="cannot be added to the next layer's bias"):
        small = compact(model, groups)
    assert difference(model, small, tokens()) <= 1e-12


def test_masks_of_the_stock_module_are_compacted() -> None:
    from torch.nn.utils import prune as stock

    model = mlp()
    groups = find_groups(model)
    stock.ln_structured(model[0], "weight", amount=4, n=2, dim=0)
    small = compact(model, groups)
    assert small[0].out_features == 4
    assert difference(model, small, tokens()) <= 1e-12
    assert len(find_groups(model)) == 8
    stock.random_unstructured(model[2], "weight", amount=3)
    assert difference(model, compact(model, groups, keep_masks=False), tokens()) <= 1e-12


def test_attention_that_needs_a_head_keeps_one(request: pytest.FixtureRequest) -> None:
    class Views(FixedWidth):
        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(out.transpose(1, 2).flatten(2))

    class Family(torch_rsst.discovery.FusedAttention):
        def shrink(self, module: nn.Module, removal: Any) -> nn.Module:
            module.num_heads -= removal.count
            return module

    model = Views().double()
    torch_rsst.discovery.register(Family())
    request.addfinalizer(lambda: torch_rsst.discovery.ADAPTERS.pop(0))
    groups = find_groups(model)
    assert (groups.layers[0].fixed, groups.layers[0].least) == ("", 1)
    for amount in (0.5, 1.0):
        torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=amount, min_keep=0))
        small = compact(model, groups, example_inputs=tokens(2, 3, 4), keep_masks=False)
        assert small.num_heads == 1
    assert difference(model, small, tokens(2, 3, 4)) <= 1e-12


def test_optimizers_that_cannot_go_on_are_refused() -> None:
    model = mlp()
    groups = find_groups(model)
    drop(model, groups, 0)
    with pytest.raises(ValueError, match="expected an optimizer of the model's parameters"):
        compact(model, groups, optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="got LBFGS"):
        compact(model, groups, optimizer=torch.optim.LBFGS(model.parameters()))


def test_a_bias_that_folding_makes_is_trained_on() -> None:
    model = mlp(act=nn.Sigmoid(), bias=False)
    groups = find_groups(model)
    with torch.no_grad():
        model[0].weight[1] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    small = compact(model, groups, optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in small.parameters()
    }


def test_a_layer_without_units_becomes_its_bias() -> None:
    model = nn.Sequential(nn.Linear(4, 4), mlp(), nn.Linear(3, 2)).double()
    groups = as_groups(find_groups(model).layers[:1])  # not the features between the modules
    drop(model, groups, *range(8))
    small = compact(model, groups)
    assert str(small[1]) == "BiasOnly()"
    assert difference(model, small, tokens()) <= 1e-12
    assert difference(copy.deepcopy(small), pickle.loads(pickle.dumps(small)), tokens()) == 0.0


def test_padding_keeps_dead_units_for_round_widths() -> None:
    model = mlp(hidden=16)
    groups = find_groups(model)
    drop(model, groups, *range(5))  # 11 are left
    for round_to, width in ((1, 11), (4, 12), (8, 16), (6, 12), (32, 16)):
        small = compact(model, groups, round_to=round_to, keep_masks=False)
        assert small[0].out_features == width
        assert difference(model, small, tokens()) <= 1e-12
    with pytest.raises(ValueError, match="round_to"):
        compact(model, groups, round_to=0)


def convolutions(*, padding: int = 0, norm: bool = True, last: int = 1) -> tuple[nn.Module, Groups]:
    """Two convolutions and their groups, by hand."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 3, last, padding=padding),
    )
    channel = torch.arange(6)
    members = [
        Member("0.weight", 0, channel, ranked=True),
        Member("0.bias", 0, channel, ranked=False),
        Member("3.weight", 1, channel, ranked=True, consumes=True),
    ]
    buffers = []
    if norm:
        members += [Member(f"1.{name}", 0, channel, ranked=False) for name in ("weight", "bias")]
        buffers = [Member(f"1.running_{n}", 0, channel, ranked=False) for n in ("mean", "var")]
    layer = GroupLayer("0", "channels", 6, tuple(members), tuple(buffers))
    return randomize(model.double().eval()), Groups((layer,))


def test_channels_by_hand_with_their_batch_norm() -> None:
    model, groups = convolutions(padding=1, last=3)
    drop(model, groups, 0, 3)
    small = compact(model, groups)
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (4, 4, 4)
    assert small[1].running_mean.shape == (4,)
    assert difference(model, small, tokens(2, 2, 6, 6)) <= 1e-12
    model.train(), small.train()
    assert difference(model, small, tokens(2, 2, 6, 6)) <= 1e-12
    assert torch.allclose(model[1].running_var[[1, 2, 4, 5]], small[1].running_var)


@pytest.mark.parametrize("last", [1, 3])
def test_the_shift_of_a_batch_norm_is_folded_where_nothing_is_padded(last: int) -> None:
    model, groups = convolutions(last=last)
    with torch.no_grad():
        model[0].weight[[1, 2]] = 0.0
        model[1].bias.fill_(1.5)
        model[1].running_mean[[1, 2]] = model[0].bias[[1, 2]]
    small = compact(model, groups, example_inputs=tokens(2, 2, 6, 6))
    assert small[0].out_channels == 4
    assert difference(model, small, tokens(2, 2, 6, 6)) <= 1e-12


def test_a_shift_before_a_padded_convolution_keeps_its_unit_and_says_so() -> None:
    model, groups = convolutions(padding=1, last=3)
    with torch.no_grad():
        model[0].weight[[1, 2]] = 0.0
        model[1].bias[1], model[1].bias[2] = 1.5, -9.0  # the second is silenced by the ReLU
        model[1].running_mean[[1, 2]] = model[0].bias[[1, 2]]
    with pytest.warns(
        CompactionWarning, match=r"1 of 0 \(6 channels\): their output cannot be added"
    ):
        small = compact(model, groups, example_inputs=tokens(2, 2, 6, 6))
    assert small[0].out_channels == 5
    assert difference(model, small, tokens(2, 2, 6, 6)) <= 1e-12


def test_a_convolution_keeps_one_channel_to_run() -> None:
    model, groups = convolutions()
    drop(model, groups, *range(6))
    small = compact(model, groups, keep_masks=False)
    assert small[0].out_channels == 1
    assert difference(model, small, tokens(2, 2, 6, 6)) <= 1e-12


class FixedWidth(nn.Module):
    """Attention whose forward spells the width out."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        self.num_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, 2).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


def test_a_module_whose_forward_fixes_its_width_stays_whole_and_is_named() -> None:
    model = FixedWidth().double()
    groups = find_groups(model)
    assert "its forward fixes how many it has" in groups.layers[0].fixed
    drop(model, groups, 1)
    with pytest.warns(CompactionWarning, match="1 of the model .2 heads.: it does not run without"):
        small = compact(model, groups, keep_masks=False)
    assert difference(model, small, tokens(2, 3, 4)) == 0.0


# The optimizer goes on.

OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.Adam, {"foreach": True}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adamax, {}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_training_goes_on_without_a_jump(kind: Any, options: dict[str, Any]) -> None:
    model = mlp(act=nn.Tanh())
    groups = find_groups(model)
    drop(model, groups, 0, 5)
    optimizer = kind(model.parameters(), lr=0.01, **options)

    def train(net: nn.Module, with_: Any) -> None:
        for step in range(3):
            with_.zero_grad()
            net(tokens(step + 2, 4)).square().sum().backward()
            with_.step()

    train(model, optimizer)
    twin = copy.deepcopy(model)
    other = kind(twin.parameters(), lr=0.01, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = compact(model, groups, optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in small.parameters()
    ]
    train(small, optimizer)
    train(twin, other)
    assert difference(twin, small, tokens()) <= 1e-9  # NAdam keeps a product in float32


def with_held_zeros() -> tuple[nn.Module, Groups, Tensor]:
    """Half of the units gone, and entries of the others held at 0; and those of the first weight."""
    model, groups = with_element_masks()
    torch_rsst.remove_all(model, freeze_zeros=True)
    left = model[0].weight.detach().any(1)
    return model, groups, (model[0].weight.detach() == 0)[left]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        model(tokens() + number).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("keep_masks", [None, True, False])
def test_frozen_zeros_stay_zero_in_the_result_that_is_trained_on(keep_masks: bool | None) -> None:
    model, groups, zeros = with_held_zeros()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trained(model, optimizer)
    small = compact(model, groups, optimizer=optimizer, keep_masks=keep_masks)
    trained(small, optimizer)
    assert bool(zeros.any())
    assert torch.equal(small[0].weight == 0, zeros)
    trained(model, torch.optim.SGD(model.parameters(), lr=0.1))  # held there, as before
    assert torch.equal((model[0].weight == 0)[model[0].weight.any(1)], zeros)


def test_frozen_zeros_of_a_result_without_an_optimizer_stay_with_keep_masks_or_are_counted() -> (
    None
):
    model, groups, zeros = with_held_zeros()
    held = compact(model, groups, keep_masks=True)
    trained(held, torch.optim.AdamW(held.parameters(), lr=0.1))
    assert torch.equal(held[0].weight == 0, zeros)
    count = sum(int((p == 0).sum()) for p in compact(model, groups, keep_masks=False).parameters())
    text = rf"compact: {count} zeros that freeze_zeros=True holds .* Pass optimizer= or keep_masks"
    with pytest.warns(torch_rsst.UnfrozenZerosWarning, match=text):
        free = compact(model, groups)
    trained(free, torch.optim.AdamW(free.parameters(), lr=0.1))
    assert bool((free[0].weight != 0).all())


def test_frozen_zeros_of_a_tied_weight_are_counted_once() -> None:
    model = nn.Sequential(mlp(), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[1].weight
    groups = find_groups(model, on_unsupported="ignore")
    torch_rsst.apply_mask(model, {"1.weight": torch.eye(3)})
    torch_rsst.remove_all(model, freeze_zeros=True)
    with (
        pytest.warns(torch_rsst.UnfrozenZerosWarning, match=r"compact: 6 zeros"),
        pytest.warns(CompactionWarning, match="Nothing was cut"),
    ):
        compact(model, groups)


def test_frozen_zeros_of_a_bias_that_takes_a_constant_up_let_it_stay() -> None:
    model = mlp()
    groups = find_groups(model)
    torch_rsst.apply_mask(model, {"2.bias": torch.zeros(3)})
    torch_rsst.remove_all(model, freeze_zeros=True)
    with torch.no_grad():
        model[0].weight[2] = 0.0  # a constant, act(bias), into all outputs
        model[0].bias[2], model[2].weight[1, 2] = 2.0, 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    small = compact(model, groups, optimizer=optimizer)
    trained(small, optimizer, 1)
    assert (small[2].bias != 0).tolist() == [True, False, True]
    assert difference(model, small, tokens()) <= 1e-6


def test_frozen_latents_stay_frozen_in_the_result_until_their_handle_lifts_it() -> None:
    model, groups = with_element_masks()
    handle = torch_rsst.freeze_masked(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    trained(model, optimizer)
    small = compact(model, groups, optimizer=optimizer)
    dead, before = small[0].weight_mask == 0, small[0].weight_orig.detach().clone()
    trained(small, optimizer)
    assert torch.equal(small[0].weight_orig == before, dead)
    handle.remove()
    trained(small, optimizer)
    assert bool((small[0].weight_orig != before).all())


def test_parameters_that_are_gone_leave_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), mlp(), nn.Linear(3, 2)).double()
    groups = as_groups(find_groups(model).layers[:1])  # not the features between the modules
    drop(model, groups, *range(8))
    named = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(named, lr=0.1, momentum=0.9)
    small = compact(model, groups, optimizer=optimizer)
    assert optimizer.param_groups[1]["params"] == [small[1].bias]
    assert optimizer.param_groups[1]["lr"] == 0.5
    small(tokens()).sum().backward()
    optimizer.step()


def test_state_that_cannot_be_cut_is_refused_before_anything_is_changed() -> None:
    model = mlp()
    groups = find_groups(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drop(model, groups, 0)
    optimizer.state[model[0].weight_orig] = {"factor": torch.ones(8, 1, dtype=torch.float64)}
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"SGD: 'factor': expected state of the parameter's shape"):
        compact(model, groups, optimizer=optimizer)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
    with pytest.raises(TypeError, match="optimizer: expected an optimizer, got str"):
        compact(model, groups, optimizer="adam")  # type: ignore[arg-type]


# Bad input.


def test_groups_of_another_model_are_refused() -> None:
    model, other = mlp(), mlp(hidden=6)
    with pytest.raises(ValueError, match=r"Find the groups of this very model"):
        compact(model, find_groups(other))
    with pytest.raises(KeyError, match="no such name"):
        compact(nn.Sequential(model), find_groups(model))


def test_a_model_that_has_changed_since_discovery_is_refused() -> None:
    model = mlp()
    groups = find_groups(model)
    model[0] = nn.Linear(4, 9)
    with pytest.raises(ValueError, match=r"expected size 8 along dim 0"):
        compact(model, groups)


def test_tied_weights_are_refused() -> None:
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    groups = find_groups(model["a"])
    model["a"][0].weight = model["b"][0].weight
    layer = groups.layers[0]
    members = tuple(
        Member(f"a.{m.parameter}", m.dim, m.unit_of, m.ranked, m.consumes) for m in layer.members
    )
    tied = GroupLayer("a", "neurons", 8, members, family=layer.family)
    with pytest.raises(ValueError, match=r"expected parameters of one module, got 'a\.0\.weight'"):
        compact(model, Groups((tied,)))


def test_groups_that_do_not_say_who_takes_their_units_in_are_refused() -> None:
    model = nn.Linear(4, 6)
    layer = torch_rsst.head_layer("weight", rows=6, num_heads=2, projections=1)
    with pytest.raises(ValueError, match=r"expected a member that takes the units in"):
        compact(model, [layer])


def test_an_unknown_family_is_refused() -> None:
    model = mlp()
    layer = find_groups(model).layers[0]
    unknown = GroupLayer("", "neurons", 8, layer.members, family="TwoLayerMPL")
    with pytest.raises(KeyError, match="Did you mean 'TwoLayerMLP'"):
        compact(model, [unknown])


def test_buffers_that_do_not_fit_are_refused() -> None:
    model, groups = convolutions()
    layer = groups.layers[0]
    wrong = (Member("1.running_meen", 0, torch.arange(6), ranked=False),)
    bad = GroupLayer("0", "channels", 6, layer.members, wrong)
    with pytest.raises(ValueError, match=r"expected a buffer '1\.running_meen' of size 6"):
        compact(model, [bad])


def test_inputs_that_the_model_does_not_run_on_are_named() -> None:
    model = mlp()
    groups = find_groups(model)
    drop(model, groups, 1)
    text = r"example_inputs: expected inputs that the model runs on, got a Tensor of shape \(2, 5\) \(RuntimeError: mat1 "
    with pytest.raises(
        ValueError, match=text + r".*\)\. Pass inputs of the size, dtype and device"
    ):
        compact(model, groups, example_inputs=tokens(2, 5))


@pytest.mark.parametrize(
    ("left_out", "text"),
    [
        (["1.running_mean", "1.running_var"], "do not list '1.running_mean', '1.running_var'"),
        (["0.bias"], r"an error in 0 \(Conv2d: .* do not list '0.bias': add what its units touch"),
        (["1.weight", "1.bias"], "do not list '1.bias', '1.weight'"),
        (["3.bias"], ""),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_groups_by_hand_that_leave_out_what_their_units_touch_are_named(
    left_out: list[str], text: str, given: bool
) -> None:
    model, groups = convolutions()
    drop(model, groups, 1, 4)
    layer, before = groups.layers[0], pickle.dumps(model.state_dict())
    members, buffers = (
        tuple(m for m in kept if m.parameter not in left_out)
        for kept in (layer.members, layer.buffers)
    )
    bad = GroupLayer("0", "channels", 6, members, buffers)
    example = tokens(2, 2, 6, 6) if given else None
    if not text:  # what no unit touches need not be listed
        assert compact(model, [bad], example_inputs=example, keep_masks=False)[0].out_channels == 4
        return
    start = r"groups of 0 \(6 channels\): expected a model that runs without some of its units, "
    with pytest.raises(RuntimeError, match=f"{start}.*{text}"):
        compact(model, [bad], example_inputs=example)
    assert pickle.dumps(model.state_dict()) == before


def test_groups_by_hand_along_a_wrong_dimension_are_named() -> None:
    model, members = mlp(), find_groups(mlp()).layers[0].members
    rows = Member("0.weight", 1, torch.arange(4), ranked=True)
    bad = Groups((GroupLayer("0", "neurons", 8, (rows, *members[1:])),))
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, bad, amount=0.5))
    with pytest.raises(RuntimeError, match=r"groups of 0 .* \(Linear: .* Check dim and unit_of of"):
        compact(model, bad)
    outputs = Member("2.weight", 0, torch.arange(3), ranked=True, consumes=True)
    layer = GroupLayer("0", "neurons", 8, (*members[:2], outputs))
    model = mlp()
    with torch.no_grad():
        model[0].weight[1], model[2].weight[1] = 0.0, 1.0  # a constant to be measured
    text = r"'2.weight': expected a unit for each of its 8 inputs, got 3 along dim 0\. Deal"
    with pytest.raises(ValueError, match=text):
        compact(model, [layer], example_inputs=tokens())


def test_groups_by_hand_are_verified_on_inputs_on_which_their_units_are_active() -> None:
    model = mlp(act=nn.ReLU())
    few = next(iter(small_guesses(model)))  # neither of which activates the unit
    with torch.no_grad():
        model[0].weight[:2] = -torch.nn.functional.normalize(few).sum(0)
        model[0].bias[:] = torch.arange(1, 9) / 100
    assert bool((model[0](few)[:, :2] < 0).all())
    layer = find_groups(model).layers[0]
    swapped = Member("0.bias", 0, torch.tensor([1, 0, *range(2, 8)]), ranked=False)
    members = (layer.members[0], swapped, layer.members[2])
    rows = torch.ones(8, dtype=torch.bool)
    rows[0] = False
    masks = {
        m.parameter: m.spread(rows, w)
        for m, w in zip(members[::2], (model[0].weight, model[2].weight), strict=True)
    }
    torch_rsst.apply_mask(model, masks | {"0.bias": rows.roll(1)})
    with pytest.raises(RuntimeError, match="compact: expected the same outputs, got a difference"):
        compact(model, [GroupLayer("0", "neurons", 8, members)])


def test_a_result_that_differs_is_not_returned() -> None:
    """Groups by hand that forget a member: the comparison on example inputs notices."""
    model, groups = convolutions(norm=False)
    with torch.no_grad():
        model[0].bias.fill_(2.0)
    members = tuple(m for m in groups.layers[0].members)
    torch_rsst.apply_mask(model, {"3.weight": torch.zeros(3, 6, 1, 1, dtype=torch.bool)})
    layer = GroupLayer("0", "channels", 6, members)
    assert compact(model, [layer], example_inputs=tokens(2, 2, 6, 6), keep_masks=False) is not None

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net[0].weight.shape[0]

    odd = Odd().double()
    groups = find_groups(odd.net)
    named = tuple(
        Member(f"net.{m.parameter}", m.dim, m.unit_of, m.ranked, m.consumes)
        for m in groups.layers[0].members
    )
    found = Groups((GroupLayer("net", "neurons", 8, named, family="TwoLayerMLP"),))
    drop(odd, found, 1)
    with pytest.raises(RuntimeError, match=r"compact: expected the same outputs, got a difference"):
        compact(odd, found, example_inputs=tokens())


# Any mask.


@given(st.data())
def test_whatever_the_masks_the_outputs_stay(data: st.DataObject) -> None:
    model = randomize(mlp(hidden=5, act=nn.GELU()))
    groups = find_groups(model)
    masks = {
        name: torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=p.numel(), max_size=p.numel()))
        ).view_as(p)
        for name, p in model.named_parameters()
        if data.draw(st.booleans())
    }
    rows = data.draw(st.sets(st.integers(0, 4)))
    masks["0.weight"] = masks.get("0.weight", torch.ones(5, 4, dtype=torch.bool))
    masks["0.weight"][list(rows)] = False
    torch_rsst.apply_mask(model, masks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompactionWarning)
        small = compact(model, groups, example_inputs=tokens(), keep_masks=data.draw(st.booleans()))
    assert difference(model, small, tokens()) <= 1e-10
    assert all(t.isfinite().all() for t in outputs_of(small, tokens()))


def test_wrappers_are_left_out_of_the_result() -> None:
    model = mlp()
    groups = find_groups(model)
    drop(model, groups, 0)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        small = compact(wrapped, groups)
        assert type(small) is nn.Sequential
        assert small[0].out_features == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    model = mlp(act=nn.Sigmoid()).to(dtype)
    groups = find_groups(model)
    drop(model, groups, 0)
    with torch.no_grad():
        model[0].weight_orig[3] = 0.0
    small = compact(model, groups, example_inputs=tokens().to(dtype))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small[0].out_features == 6


def test_features_of_an_emptied_mlp_ask_for_inputs_to_be_measured():
    """Its bias is all that they are: they go once the model can be run."""
    first, second = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))
    model = nn.Sequential(first, second, nn.Linear(4, 3)).double()
    groups = find_groups(model)
    dead = {
        name: torch.zeros_like(p).bool()
        for name, p in second.named_parameters()
        if name != "2.bias"
    }
    torch_rsst.apply_mask(model, {f"1.{name}": mask for name, mask in dead.items()})
    with pytest.warns(CompactionWarning, match="pass example_inputs to measure"):
        compact(model, groups)
    x = torch.randn(5, 4, dtype=torch.float64)
    small = compact(model, groups, example_inputs=x)
    assert small[2].in_features == 1
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_warning_that_is_an_error_leaves_the_optimizer_with_the_model():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompactionWarning)
        with pytest.raises(CompactionWarning, match="Nothing was cut"):
            compact(model, find_groups(model), optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
