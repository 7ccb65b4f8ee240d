"""Groups: tables of units, and units made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_rsst import Group, GroupLayer, Groups, Member, find_groups, head_layer
from torch_rsst.groups.groups import NO_UNIT, Slab, as_groups, check_groups, head_rows
from torch_rsst.groups.surgery import Removal, cut
from torch_rsst.masking.names import named_weights
from torch_rsst.testing import models_with_groups


def mlp(width: int = 2, hidden: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


@pytest.mark.parametrize(
    ("rows", "heads", "projections", "head_of"),
    [
        (6, 3, 1, [0, 0, 1, 1, 2, 2]),
        (12, 2, 3, [0, 0, 1, 1] * 3),
        (4, 4, 1, [0, 1, 2, 3]),
        (3, 1, 3, [0, 0, 0]),
        (0, 2, 1, []),
    ],
)
def test_the_head_of_each_row(rows: int, heads: int, projections: int, head_of: list[int]) -> None:
    assert head_rows(rows, heads, projections).tolist() == head_of


def test_heads_must_divide_the_rows() -> None:
    with pytest.raises(ValueError, match=r"divides the 10 rows of 3 projection\(s\), got 2"):
        head_rows(10, 2, 3)


def test_units_of_a_layer_literally() -> None:
    layer = find_groups(mlp()).layers[0]
    unit = layer.group(1)
    assert unit == Group(
        "",
        "neurons",
        1,
        (
            Slab("0.weight", 0, 3, (1,), ranked=True),
            Slab("0.bias", 0, 3, (1,), ranked=False),
            Slab("2.weight", 1, 3, (1,), ranked=True, consumes=True),
        ),
        family="TwoLayerMLP",
    )
    assert str(unit) == "the model neurons[1]"
    assert str(layer) == "the model (3 neurons)"


def test_groups_are_a_sequence() -> None:
    groups = Groups((head_layer("a", rows=6, num_heads=2), head_layer("b", rows=9, num_heads=3)))
    assert len(groups) == 5
    assert [(g.layer, g.unit) for g in groups] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)]
    assert groups[-1] == groups[4] == list(groups)[4]
    assert groups[1:3] == [groups[1], groups[2]]
    assert groups[::-1][0] == groups[4]
    assert groups[3] in groups
    assert groups.index(groups[3]) == 3
    assert str(groups) == "5 heads in 2 layers"
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 5 groups"):
            groups[index]


def test_no_groups() -> None:
    assert len(Groups()) == 0
    assert list(Groups()) == []
    assert str(Groups()) == "no groups in 0 layers"


def test_kinds_are_selected() -> None:
    neurons = find_groups(mlp()).layers
    groups = Groups((head_layer("a", rows=6, num_heads=2), *neurons))
    assert [layer.kind for layer in groups.of_kind("heads").layers] == ["heads"]
    assert len(groups.of_kind("heads", "neurons")) == len(groups)
    assert len(groups.of_kind("channels")) == 0
    assert str(groups) == "2 heads, 3 neurons in 2 layers"


@given(models_with_groups())
def test_single_units_gather_into_the_same_layers(drawn: tuple[nn.Module, Groups]) -> None:
    _, groups = drawn
    gathered = as_groups(unit for unit in groups)
    assert len(gathered) == len(groups)
    for mine, original in zip(gathered.layers, groups.layers, strict=True):
        assert (mine.name, mine.kind, mine.units) == (original.name, original.kind, original.units)
        for a, b in zip(mine.members, original.members, strict=True):
            assert (a.parameter, a.dim, a.ranked) == (b.parameter, b.dim, b.ranked)
            assert torch.equal(a.unit_of, b.unit_of)


@given(models_with_groups(), st.data())
def test_chosen_units_leave_the_rest_to_no_group(
    drawn: tuple[nn.Module, Groups], data: st.DataObject
) -> None:
    _, groups = drawn
    chosen = data.draw(st.lists(st.sampled_from(list(groups)), unique=True))
    slabs = {
        (u.layer, u.kind, s.parameter, s.dim, i) for u in chosen for s in u.members for i in s.index
    }
    found = {
        (layer.name, layer.kind, member.parameter, member.dim, i)
        for layer in as_groups(chosen).layers
        for member in layer.members
        for i in (member.unit_of != NO_UNIT).nonzero().flatten().tolist()
    }
    assert found == slabs


def test_whatever_holds_groups_will_do() -> None:
    groups = find_groups(mlp())
    layer = groups.layers[0]
    assert as_groups(groups) is groups
    assert as_groups(layer).layers == (layer,)
    assert as_groups([layer]).layers == (layer,)
    assert as_groups(()).layers == ()
    assert len(as_groups(groups[0])) == 1
    with pytest.raises(ValueError, match=r"neurons of .*: expected them once, got them twice"):
        as_groups([layer, groups[0]])


def test_a_unit_listed_twice_is_an_error() -> None:
    groups = find_groups(mlp())
    with pytest.raises(ValueError, match=r"neurons\[1\]: expected it once, got it twice"):
        as_groups([groups[0], groups[1], groups[1]])


@pytest.mark.parametrize("groups", [["heads"], "heads", [None], [nn.Linear(1, 1)], {"a": 1}])
def test_what_holds_no_groups(groups: Any) -> None:
    with pytest.raises(TypeError, match=r"groups: expected groups, got .*find_groups\(model\)"):
        as_groups(groups)


@pytest.mark.parametrize("groups", [None, 3, torch.tensor(0.5), torch.tensor(2).numpy()])
def test_what_holds_nothing(groups: Any) -> None:
    with pytest.raises(TypeError, match="expected groups, got"):
        as_groups(groups)


@given(models_with_groups())
def test_sums_per_unit_against_loops(drawn: tuple[nn.Module, Groups]) -> None:
    model, groups = drawn
    weights = named_weights(model)
    for layer in groups.layers:
        for member in layer.members:
            weight = weights[member.parameter]
            totals = [0.0] * layer.units
            for index in range(weight.shape[member.dim]):
                unit = int(member.unit_of[index])
                totals[unit] += float(weight.double().select(member.dim, index).sum())
            found = member.sum_per_unit(weight, layer.units)
            assert found.dtype == torch.float64
            assert found.tolist() == pytest.approx(totals, abs=1e-9)


def test_sums_accumulate_in_float64() -> None:
    member = Member("w", 0, torch.zeros(1, dtype=torch.int64), ranked=True)
    weight = torch.full((1, 70000), 1.0, dtype=torch.float16)
    assert member.sum_per_unit(weight, 1).tolist() == [70000.0]


def test_spread_leaves_free_slices_at_the_filling() -> None:
    member = Member("w", 1, torch.tensor([1, NO_UNIT, 0]), ranked=True)
    values = torch.tensor([True, False])
    over = torch.empty(2, 3)
    assert member.spread(values, over).tolist() == [[False, True, True]] * 2
    assert member.spread(values, over, fill=False).tolist() == [[False, False, True]] * 2
    assert member.spread(values, torch.empty(2, 3, 4)).shape == (2, 3, 4)
    assert member.owned(over).tolist() == [[True, False, True]] * 2


def test_groups_must_fit_the_model() -> None:
    weights = named_weights(mlp())
    check_groups(weights, find_groups(mlp()))
    with pytest.raises(KeyError, match=r"'a': expected a parameter of the model.*this very model"):
        check_groups(weights, Groups((head_layer("a", rows=6, num_heads=2),)))
    with pytest.raises(
        ValueError, match=r"'0.weight': expected size 6 along dim 0, got shape \(3, 2"
    ):
        check_groups(weights, Groups((head_layer("0.weight", rows=6, num_heads=2),)))
    layer = head_layer("0.weight", rows=3, num_heads=3, projections=1, dim=2)
    with pytest.raises(ValueError, match="size 3 along dim 2"):
        check_groups(weights, Groups((layer,)))


def test_every_layer_has_something_to_rank() -> None:
    bias = Member("0.bias", 0, torch.arange(3), ranked=False)
    with pytest.raises(ValueError, match="a ranked member, got none"):
        check_groups(named_weights(mlp()), Groups((GroupLayer("0", "neurons", 3, (bias,)),)))


BAD_TABLES: list[tuple[Any, int, type[Exception], str]] = [
    (torch.arange(3).float(), 0, TypeError, "unit_of: expected an int64 tensor, got torch.float32"),
    (
        torch.ones(3, dtype=torch.bool),
        0,
        TypeError,
        "unit_of: expected an int64 tensor, got torch.bool",
    ),
    ([0, 1, 2], 0, TypeError, "unit_of: expected an int64 tensor, got list"),
    (torch.tensor(0), 0, ValueError, "unit_of: expected one dimension, or two .*, got 0"),
    (torch.arange(3) - 2, 0, ValueError, "unit_of: expected units from 0 on, or -1 .*, got -2"),
    (torch.arange(3), -2, ValueError, "dim: expected an int from 0 on .*, got -2. Count dim"),
    (torch.arange(3), 0.0, ValueError, "dim: expected an int from 0 on .*, got 0.0"),
    (torch.arange(3)[None], 0, ValueError, r"dim: expected an int from 1 on .* 2 dim.*, got 0"),
]


@pytest.mark.parametrize(("unit_of", "dim", "error", "text"), BAD_TABLES)
def test_a_member_that_fits_no_parameter_is_refused_when_it_is_made(
    unit_of: Any, dim: int, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"member '0.weight': {text}"):
        Member("0.weight", dim, unit_of, ranked=True)


def test_units_of_a_table_are_those_of_its_layer() -> None:
    rows = Member("0.weight", 0, torch.arange(3), ranked=True)
    shifted = Member("0.bias", 0, torch.arange(3) + 1, ranked=False)
    text = r"groups of 0 \(3 neurons\): '0.bias': expected units below 3 in its unit_of, got 3"
    for members, buffers in (((rows, shifted), ()), ((rows,), (shifted,))):
        with pytest.raises(ValueError, match=text):
            GroupLayer("0", "neurons", 3, members, buffers)
    with pytest.raises(TypeError, match=r"units of 0: expected an int >= 0, got float 3\.0"):
        GroupLayer("0", "neurons", 3.0, (rows,))
    with pytest.raises(TypeError, match=r"groups of 0 .* expected members, got .*0.weight"):
        GroupLayer("0", "neurons", 3, ("0.weight",))


def test_a_member_without_units_is_refused() -> None:
    rows = Member("0.weight", 0, torch.arange(3), ranked=True)
    none = Member("2.weight", 1, torch.full((3,), NO_UNIT), ranked=True, consumes=True)
    layer = GroupLayer("0", "neurons", 3, (rows, none))
    with pytest.raises(ValueError, match=r"'2.weight': expected units in its unit_of, got -1 ever"):
        check_groups(named_weights(mlp()), Groups((layer,)))


def test_groups_are_frozen() -> None:
    groups = find_groups(mlp())
    for item in (groups, groups.layers[0], groups.layers[0].members[0], groups[0]):
        with pytest.raises(AttributeError):
            item.name = "another"


def stacked_layer() -> GroupLayer:
    """Three weights of two units each, stacked; the second dimension in turns, one index is free."""
    turns = torch.tensor([[0, 1, 0, NO_UNIT, 1], [2, 3, 2, NO_UNIT, 3], [4, 5, 4, NO_UNIT, 5]])
    up = Member("up", 1, turns, ranked=True)
    down = Member("down", 2, torch.arange(6).view(3, 2), ranked=True, consumes=True)
    return GroupLayer("", "neurons", 6, (up, down))


def test_members_of_stacked_weights_against_loops() -> None:
    layer = stacked_layer()
    up, down = torch.randn(3, 5, 4), torch.randn(3, 4, 2)
    values = torch.arange(6.0) + 1
    for member, weight in zip(layer.members, (up, down), strict=True):
        laid = member.spread(values, weight, fill=False)
        sums = member.sum_per_unit(weight, 6, of=torch.Tensor.abs_)
        counts, sizes = member.count_per_unit(weight > 0, 6), member.size_per_unit(weight, 6)
        for unit in range(6):
            own = laid == values[unit]
            assert sums[unit] == pytest.approx(float(weight[own].abs().sum()))
            assert counts[unit] == int((weight[own] > 0).sum())
            assert sizes[unit] == int(own.sum())
    assert bool((layer.members[0].spread(values, up, fill=False)[:, 3] == 0).all())
    assert layer.parts.tolist() == [[0, 1], [2, 3], [4, 5]]
    regathered = as_groups(list(Groups((layer,)))).layers[0]
    for one, other in zip(layer.members, regathered.members, strict=True):
        assert one.dims == other.dims
        assert torch.equal(one.unit_of, other.unit_of)


def test_stacked_weights_are_cut_in_rows_and_only_evenly() -> None:
    layer = stacked_layer()
    model = nn.Module()
    model.up = nn.Parameter(torch.randn(3, 5, 4))
    model.down = nn.Parameter(torch.randn(3, 4, 2))
    up, down = model.up.detach(), model.down.detach()
    with pytest.raises(ValueError, match=r"'up': expected as many units left of each"):
        cut(model, [Removal(layer, torch.tensor([True, False, False, False, False, False]))])
    cut(model, [Removal(layer, torch.tensor([True, False, False, True, True, False]))])
    assert torch.equal(
        model.up, torch.stack([up[0][[1, 3, 4]], up[1][[0, 2, 3]], up[2][[1, 3, 4]]])
    )
    assert torch.equal(model.down, torch.stack([down[0][:, 1:], down[1][:, :1], down[2][:, 1:]]))
    with pytest.raises(ValueError, match="expected size 3 along dim 0 and size 5 along dim 1"):
        check_groups({"up": torch.zeros(2, 5, 4), "down": down}, Groups((layer,)))
