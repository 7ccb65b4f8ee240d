"""Regroup: groups, scores and a budget become the refill mask."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_rsst
from torch_rsst import Group, GroupLayer, Groups, Member, find_groups, head_layer, regroup
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.names import named_weights
from torch_rsst.regrouping.regrouping import RegroupPlan, decide, score_layers
from torch_rsst.testing import mask_sets, models_with_groups
from torch_rsst.utils.amounts import units_to_keep

Fingerprint = Callable[[nn.Module], list[Any]]
EXAMPLE_1 = [0.8, 0.1, 0.5, 0.7, 0.05, 0.6, 0.9, 0.4, 0.02, 0.3]


def vector(*values: float) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(values))
    return module


def linear(weight: Any) -> nn.Linear:
    weight = torch.as_tensor(weight).float()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


@pytest.mark.parametrize("make", [lambda: vector(*EXAMPLE_1), lambda: linear([EXAMPLE_1])])
def test_example_1(make: Callable[[], nn.Module]) -> None:
    model = make()
    torch_rsst.GlobalL1.apply(model, "weight", amount=3)
    current = extract_mask(model)
    refill = regroup(model, (), ungrouped="element", amount=0.3)
    assert current["weight"].int().flatten().tolist() == [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]
    assert refill["weight"].int().flatten().tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 0, 0]
    penalized = torch_rsst.penalty_mask(current, refill)["weight"]
    assert penalized.flatten().nonzero().flatten().tolist() == [7, 9]


def example_2() -> tuple[nn.Linear, Groups]:
    layer = nn.Linear(1, 192, bias=False)
    alive = torch.zeros(192, 1)
    for head, count in enumerate((50, 60, 30)):
        alive[64 * head : 64 * head + count] = 1
    torch_rsst.apply_mask(layer, {"weight": alive})
    return layer, Groups((head_layer("weight", rows=192, num_heads=3, projections=1),))


@pytest.mark.parametrize("amount", [0.3, 1, None])
@pytest.mark.parametrize("scope", ["layer", "size", "type", "global"])
def test_example_2(amount: float | None, scope: str) -> None:
    layer, groups = example_2()
    refill = regroup(layer, groups, amount=amount, importance="remain", scope=scope)
    assert refill["weight"].reshape(3, 64).sum(1).tolist() == [64, 64, 0]
    penalized = torch_rsst.penalty_mask(extract_mask(layer), refill)["weight"]
    assert penalized.nonzero()[:, 0].tolist() == list(range(128, 158))


@pytest.mark.parametrize(
    ("weight", "options", "kept"),
    [
        ([[1], [2], [3], [4]], {"amount": 0.5}, [0, 0, 1, 1]),
        ([[1], [1], [1], [1]], {"amount": 0.5}, [0, 0, 1, 1]),
        ([[4], [-3], [2], [-1]], {"amount": 2}, [1, 1, 0, 0]),
        ([[1], [2], [3], [4]], {"amount": 4}, [0, 0, 0, 1]),
        ([[1], [2], [3], [4]], {"amount": 4, "min_keep": 0}, [0, 0, 0, 0]),
        ([[1], [2], [3], [4]], {"amount": 0.5, "fillback_rate": 0.5}, [0, 1, 1, 1]),
        ([[1], [2], [3], [4]], {"amount": 3, "round_to": 2}, [0, 0, 1, 1]),
        ([[1], [2], [3], [4]], {"amount": None}, [1, 1, 1, 1]),
        ([[1], [2], [3], [4]], {"amount": 0, "importance": "remain"}, [1, 1, 1, 1]),
    ],
)
def test_four_units_literally(weight: Any, options: dict[str, Any], kept: list[int]) -> None:
    groups = head_layer("weight", rows=4, num_heads=4, projections=1)
    refill = regroup(linear(weight), groups, **options)
    assert refill["weight"].int().flatten().tolist() == kept


def test_dead_units_go_first_whatever_a_callable_says() -> None:
    layer = linear([[9], [1], [1], [9]])
    torch_rsst.apply_mask(layer, {"weight": torch.tensor([[0], [1], [1], [1]])})
    groups = head_layer("weight", rows=4, num_heads=4, projections=1)
    refill = regroup(
        layer, groups, amount=2, importance=lambda *_: torch.tensor([99.0, -1.0, -2.0, -3.0])
    )
    assert refill["weight"].int().flatten().tolist() == [0, 1, 1, 0]


def test_the_amount_is_a_target_and_counts_the_dead() -> None:
    layer = linear([[9], [8], [7], [6]])
    torch_rsst.apply_mask(layer, {"weight": torch.tensor([[0], [0], [1], [1]])})
    groups = head_layer("weight", rows=4, num_heads=4, projections=1)
    assert regroup(layer, groups, amount=0.5)["weight"].int().flatten().tolist() == [0, 0, 1, 1]
    assert regroup(layer, groups, amount=0.25)["weight"].int().flatten().tolist() == [0, 1, 1, 1]


def channels_of_both_dims() -> Groups:
    rows = Member("weight", 0, torch.tensor([0, 1, -1]), ranked=True)
    columns = Member("weight", 1, torch.tensor([0, 1]), ranked=True)
    return Groups(
        (GroupLayer("out", "channels", 2, (rows,)), GroupLayer("in", "channels", 2, (columns,)))
    )


def test_zero_wins_where_channels_overlap() -> None:
    layer = linear([[1, 9], [8, 9], [1, 1]])
    torch_rsst.apply_mask(layer, {"weight": torch.tensor([[1, 1], [0, 1], [1, 0]])})
    refill = regroup(layer, channels_of_both_dims(), amount=1)
    # Row 1 scores 9 and row 0 scores 10: row 1 goes. Column 0 scores 2 and goes too.
    assert refill["weight"].int().tolist() == [[0, 1], [0, 0], [0, 1]]


def test_entries_in_no_group_keep_their_mask_or_lose_the_smallest() -> None:
    model = nn.Sequential(linear([[4, 1], [3, 2]]), linear([[5, 6], [7, 8]]))
    current = {
        "0.weight": torch.tensor([[1, 1], [0, 1]]),
        "1.weight": torch.tensor([[1, 1], [1, 1]]),
    }
    half = Member("0.weight", 0, torch.tensor([0, -1]), ranked=True)
    groups = GroupLayer("0", "channels", 1, (half,))
    kept = regroup(model, groups, amount=0, current_mask=current)
    assert {k: v.int().tolist() for k, v in kept.items()} == {
        "0.weight": [[1, 1], [0, 1]],
        "1.weight": [[1, 1], [1, 1]],
    }
    element = regroup(model, groups, amount=0.75, current_mask=current, ungrouped="element")
    # Unit 0 is protected by min_keep; its row is all ones. Of the row without a group one entry
    # is alive: round(0.75) is 1 of it; of the layer without groups round(3.0).
    assert {k: v.int().tolist() for k, v in element.items()} == {
        "0.weight": [[1, 1], [0, 0]],
        "1.weight": [[0, 0], [0, 1]],
    }


def test_unmasked_parameters_in_no_group_are_left_out() -> None:
    model = nn.Sequential(linear([[1, 2]]), linear([[3]]))
    groups = head_layer("0.weight", rows=1, num_heads=1, projections=1)
    assert set(regroup(model, groups, ungrouped="element", amount=0.5)) == {"0.weight"}


def test_followers_are_kept_and_dropped_with_their_unit() -> None:
    mlp = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        mlp[0].weight.copy_(torch.tensor([[1.0], [3.0], [2.0]]))
        mlp[0].bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
        mlp[2].weight.fill_(1.0)
    refill = regroup(mlp, find_groups(mlp), amount=1)
    assert refill["0.bias"].tolist() == [False, True, True]
    assert "2.bias" not in refill


def test_units_of_different_size_compete_per_ranked_entry_under_global() -> None:
    model = nn.Sequential(linear(torch.full((4, 8), 0.5)), linear(torch.full((2, 4), 0.9)))
    groups = Groups(
        (
            head_layer("0.weight", rows=4, num_heads=2, projections=1),
            GroupLayer("1", "neurons", 2, (Member("1.weight", 0, torch.arange(2), ranked=True),)),
        )
    )
    by_global = regroup(model, groups, amount=2, scope="global", min_keep=0)
    assert [int(m.sum()) for m in by_global.values()] == [0, 8]
    by_type = regroup(model, groups, amount=1, scope="type", min_keep=0)
    assert [int(m.sum()) for m in by_type.values()] == [16, 4]


def unraveled(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for side in reversed(shape):
        flat, at = divmod(flat, side)
        index.append(at)
    return tuple(reversed(index))


def by_loops(
    weights: dict[str, Tensor],
    groups: Groups,
    current: dict[str, Tensor],
    amount: float | None,
    importance: str,
    scope: str,
    fillback: float,
    min_keep: int,
) -> dict[str, list[Any]]:
    """The slow oracle: python loops over units and entries."""

    def entries(group: Group, ranked: bool) -> list[tuple[str, tuple[int, ...]]]:
        found = []
        for slab in group.members:
            if slab.ranked or not ranked:
                shape = weights[slab.parameter].shape
                for flat in range(weights[slab.parameter].numel()):
                    index = unraveled(flat, shape)
                    if index[slab.dim] in slab.index:
                        found.append((slab.parameter, index))
        return found

    def lives(entry: tuple[str, tuple[int, ...]]) -> bool:
        name, index = entry
        return name not in current or bool(current[name][index])

    sizes: dict[Any, set[int]] = {}
    for group in groups:
        sizes.setdefault((group.layer, group.kind), set()).add(len(entries(group, ranked=True)))
    scopes: dict[Any, list[Group]] = {}
    for group in groups:
        layer = (group.layer, group.kind)
        size = (group.kind, min(sizes[layer]), max(sizes[layer]))
        label = {"layer": layer, "size": size, "type": group.kind, "global": ""}[scope]
        scopes.setdefault(label, []).append(group)

    gone: set[tuple[str, tuple[int, ...]]] = set()
    for members in scopes.values():
        order, alive_of_size = [], {}
        left: dict[str, int] = {}
        for position, group in enumerate(members):
            ranked = entries(group, ranked=True)
            alive = [e for e in ranked if lives(e)]
            exact = [Fraction(float(weights[name][index])) for name, index in alive]
            score = (
                Fraction(len(alive)) if importance == "remain" else sum(map(abs, exact), Fraction())
            )
            alive_of_size[len(ranked)] = alive_of_size.get(len(ranked), 0) + len(alive)
            value = score / len(ranked) if scope == "global" else score
            order.append((bool(alive), value, position, group))
            key = f"{group.layer} {group.kind}"
            left[key] = left.get(key, 0) + 1
        keep = units_to_keep(amount, len(members), alive_of_size, fillback)
        for _, _, _, group in sorted(order, key=lambda item: item[:3]):
            key = f"{group.layer} {group.kind}"
            if sum(left.values()) > keep and left[key] > min_keep:
                left[key] -= 1
                gone.update(entries(group, ranked=False))
    owned = {entry for group in groups for entry in entries(group, ranked=False)}
    names = {slab.parameter for group in groups for slab in group.members} | set(current)
    refill = {}
    for name in names:
        weight = weights[name]
        values = []
        for flat in range(weight.numel()):
            index = unraveled(flat, weight.shape)
            entry = (name, index)
            values.append(entry not in gone if entry in owned else lives(entry))
        refill[name] = values
    return refill


@pytest.mark.parametrize("scope", ["layer", "size", "type", "global"])
@pytest.mark.parametrize("importance", ["remain", "magnitude"])
@given(
    drawn=models_with_groups(),
    amount=st.one_of(st.none(), st.floats(0, 1), st.integers(0, 1)),
    fillback=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    min_keep=st.integers(0, 2),
)
def test_regroup_against_loops(
    scope: str,
    importance: str,
    drawn: tuple[nn.Module, Groups],
    amount: float | None,
    fillback: float,
    min_keep: int,
) -> None:
    model, groups = drawn
    # Binary fractions, so that float64 sums are exact and ties are ties in any order of adding.
    with torch.no_grad():
        for weight in named_weights(model).values():
            weight.copy_(weight.mul(64).round().div(64))
    refill = regroup(
        model,
        groups,
        amount=amount,
        importance=importance,
        scope=scope,
        fillback_rate=fillback,
        min_keep=min_keep,
    )
    expected = by_loops(
        named_weights(model),
        groups,
        extract_mask(model),
        amount,
        importance,
        scope,
        fillback,
        min_keep,
    )
    assert {name: mask.flatten().tolist() for name, mask in refill.items()} == expected


@given(models_with_groups(), st.data())
def test_regroup_is_pure(
    fingerprint: Fingerprint, drawn: tuple[nn.Module, Groups], data: st.DataObject
) -> None:
    model, groups = drawn
    current = data.draw(mask_sets(model))
    copies = {name: mask.clone() for name, mask in current.items()}
    before = fingerprint(model)
    refill = regroup(model, groups, amount=0.5, current_mask=current)
    for mask in refill.values():
        mask.fill_(False)
    assert fingerprint(model) == before
    assert all(torch.equal(current[name], copies[name]) for name in copies)


@given(models_with_groups(), st.data())
def test_the_refill_mask_covers_members_and_given_masks(
    drawn: tuple[nn.Module, Groups], data: st.DataObject
) -> None:
    model, groups = drawn
    current = data.draw(mask_sets(model))
    refill = regroup(model, groups, current_mask=current)
    members = {member.parameter for layer in groups.layers for member in layer.members}
    assert refill.keys() == members | current.keys()
    weights = named_weights(model)
    for name, mask in refill.items():
        assert mask.dtype == torch.bool
        assert mask.shape == weights[name].shape
        assert mask.device == weights[name].device


@given(models_with_groups(), st.floats(0, 1))
def test_any_way_to_hand_groups_over(drawn: tuple[nn.Module, Groups], amount: float) -> None:
    model, groups = drawn
    expected = regroup(model, groups, amount=amount)
    for other in (list(groups), (unit for unit in groups), list(groups.layers)):
        found = regroup(model, other, amount=amount)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_chosen_units_compete_with_each_other_alone() -> None:
    layer = linear([[1], [2], [3], [4]])
    groups = Groups((head_layer("weight", rows=4, num_heads=4, projections=1),))
    refill = regroup(layer, [groups[0], groups[3]], amount=0.5)
    assert refill["weight"].int().flatten().tolist() == [0, 1, 1, 1]
    refill = regroup(layer, [groups[2]], amount=1.0, min_keep=0)
    assert refill["weight"].int().flatten().tolist() == [1, 1, 0, 1]


def test_scores_come_from_the_latent_not_from_a_stale_product() -> None:
    layer = linear([[1], [2]])
    torch_rsst.apply_mask(layer, {"weight": torch.ones(2, 1)})
    with torch.no_grad():
        layer.weight_orig.copy_(torch.tensor([[2.0], [1.0]]))
    groups = head_layer("weight", rows=2, num_heads=2, projections=1)
    assert regroup(layer, groups, amount=1)["weight"].flatten().tolist() == [True, False]


def test_a_given_current_mask_replaces_the_models() -> None:
    layer = linear([[1], [2]])
    torch_rsst.apply_mask(layer, {"weight": torch.tensor([[1], [0]])})
    groups = head_layer("weight", rows=2, num_heads=2, projections=1)
    assert regroup(layer, groups, amount=1)["weight"].flatten().tolist() == [True, False]
    refill = regroup(layer, groups, amount=1, current_mask={})
    assert refill["weight"].flatten().tolist() == [False, True]


def test_nan_counts_where_it_is_alive() -> None:
    layer = linear([[1], [float("nan")]])
    groups = head_layer("weight", rows=2, num_heads=2, projections=1)
    with pytest.raises(
        ValueError, match=r"importance of weight \(2 heads\).*NaN for unit\(s\) \[1\]"
    ):
        regroup(layer, groups)
    current = {"weight": torch.tensor([[1], [0]])}
    refill = regroup(layer, groups, current_mask=current)
    assert refill["weight"].flatten().tolist() == [True, False]


def test_budgets_say_requested_and_realized(tiny_transformer: Any) -> None:
    model = tiny_transformer()
    groups = find_groups(model)
    plan = RegroupPlan(min_keep=2, round_to=5)
    budgets = decide(named_weights(model), groups, {}, 0.75, plan).budgets
    assert [(b.scope, b.kind, b.units, b.requested, b.realized) for b in budgets] == [
        ("blocks.0.attn", "heads", 4, 1, 4),
        ("blocks.0.mlp", "neurons", 24, 6, 10),
        ("blocks.1.attn", "heads", 4, 1, 4),
        ("blocks.1.mlp", "neurons", 24, 6, 10),
    ]
    for scope, count in (("size", 2), ("type", 2), ("global", 1)):
        budgets = decide(named_weights(model), groups, {}, 0.75, RegroupPlan(scope=scope)).budgets
        assert len(budgets) == count
        assert sum(b.units for b in budgets) == 56


@pytest.mark.parametrize("scope", ["layer", "size", "type", "global"])
@pytest.mark.parametrize("amount", [0.5, None])
def test_a_transformer_in_every_scope(tiny_transformer: Any, scope: str, amount: Any) -> None:
    model = tiny_transformer()
    groups = find_groups(model)
    if amount is None:
        parameters = [
            (model.get_submodule(m.parameter.rpartition(".")[0]), "weight")
            for layer in groups.layers
            for m in layer.ranked
        ]
        torch_rsst.global_unstructured(parameters, torch_rsst.GlobalL1, amount=0.5)
    torch_rsst.apply_mask(model, regroup(model, groups, amount=amount, scope=scope))
    report = torch_rsst.sparsity_report(model, groups)
    gone = report.gone("heads") + report.gone("neurons")
    assert gone == pytest.approx(28, abs=2)
    assert all(layer.gone < layer.units for layer in report.layers)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"scope": "layr"}, ValueError, "scope: .*Did you mean 'layer'"),
        ({"ungrouped": "drop"}, ValueError, "ungrouped: expected one of 'keep', 'element'"),
        ({"importance": "l3"}, ValueError, "importance: expected one of"),
        ({"importance": 3}, TypeError, "importance: expected a name or a callable"),
        ({"amount": 1.5}, ValueError, "amount: expected"),
        ({"amount": "half"}, TypeError, "amount: expected"),
        ({"amount": 5}, ValueError, "at most 4, as many heads of weight as there are, got 5"),
        ({"fillback_rate": 2}, ValueError, "fillback_rate: expected a fraction"),
        ({"fillback_rate": None}, TypeError, "fillback_rate: expected a fraction"),
        ({"min_keep": -1}, ValueError, "min_keep: expected an int >= 0"),
        ({"min_keep": 1.0}, TypeError, "min_keep: expected an int >= 0"),
        ({"round_to": 0}, ValueError, "round_to: expected an int >= 1"),
        ({"current_mask": {"weigth": torch.ones(4, 1)}}, KeyError, "'weigth'.*It has 'weight'"),
        (
            {"current_mask": {"weight": torch.ones(4)}},
            ValueError,
            r"shape \(4, 1\), got shape \(4,",
        ),
        ({"current_mask": {"weight": torch.full((4, 1), 0.5)}}, ValueError, "zeros and ones"),
        ({"current_mask": [1]}, TypeError, "a mask set, got list"),
        (
            {"amount": None, "ungrouped": "element", "current_mask": {"bias": torch.ones(4)}},
            ValueError,
            "ungrouped='element': expected an amount to drop",
        ),
        ({"importance": lambda *_: torch.ones(3)}, ValueError, r"shape \(4,\), got shape \(3,\)"),
    ],
)
def test_bad_arguments(
    options: dict[str, Any], error: type[Exception], text: str, fingerprint: Fingerprint
) -> None:
    model = nn.Linear(1, 4)
    before = fingerprint(model)
    groups = head_layer("weight", rows=4, num_heads=4, projections=1)
    with pytest.raises(error, match=text):
        regroup(model, groups, **options)
    assert fingerprint(model) == before


def test_groups_of_another_model() -> None:
    with pytest.raises(KeyError, match=r"'qkv.weight': expected a parameter of the model"):
        regroup(nn.Linear(1, 4), head_layer("qkv.weight", rows=12, num_heads=4))
    with pytest.raises(TypeError, match="model: expected a module"):
        regroup("model", ())


def test_ungrouped_elements_are_ranked_by_magnitude() -> None:
    layer, alive = linear([[-9.0, 1.0, -8.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
    refill = torch_rsst.regroup(
        layer, (), ungrouped="element", amount=0.5, current_mask={"weight": alive}
    )
    assert refill["weight"].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("weight", "amount", "text"),
    [
        (
            [1.0, 2.0],
            None,
            "ungrouped='element': expected an amount to drop, got amount=None. Pass amount, or "
            "ungrouped='keep'.",
        ),
        (
            [1.0, 2.0],
            3,
            "amount: expected at most 2, as many alive entries of 'weight' in no group as there are, "
            "got 3. Lower it, or pass a fraction.",
        ),
        (
            [1.0, math.nan],
            1,
            "scores of 'weight': expected numbers, got 1 NaN among the entries to rank. A NaN has no "
            "rank; look for the step at which training diverged.",
        ),
    ],
)
def test_errors_of_ungrouped_elements_say_it_all(
    weight: list[float], amount: int | None, text: str
) -> None:
    layer, alive = linear([weight]), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=re.escape(text)):
        torch_rsst.regroup(
            layer, (), ungrouped="element", amount=amount, current_mask={"weight": alive}
        )


def test_a_single_free_entry_is_ranked_and_none_is_no_matter() -> None:
    layer = linear([[1.0, 2.0]])
    member = Member("weight", 1, torch.tensor([0, -1]), ranked=True)
    groups = Groups((GroupLayer("", "neurons", 1, (member,)),))
    refill = torch_rsst.regroup(
        layer,
        groups,
        ungrouped="element",
        amount=1.0,
        min_keep=1,
        current_mask={"weight": torch.ones(1, 2, dtype=torch.bool)},
    )
    assert refill["weight"].tolist() == [[True, False]]


def test_an_entry_owned_through_either_dimension_is_no_free_entry() -> None:
    layer = nn.Linear(2, 2, bias=False)
    rows = Member("weight", 0, torch.tensor([0, -1]), ranked=True)
    columns = Member("weight", 1, torch.tensor([0, -1]), ranked=True)
    groups = Groups(
        (GroupLayer("a", "neurons", 1, (rows,)), GroupLayer("b", "neurons", 1, (columns,)))
    )
    alive = torch.tensor([[True, False], [False, False]])
    refill = torch_rsst.regroup(layer, groups, amount=0, current_mask={"weight": alive})
    assert refill["weight"].tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("scope", "label"),
    [
        ("layer", ("the layer", "neurons")),
        ("size", ("all of 2 weights", "neurons")),
        ("type", ("all", "neurons")),
        ("global", ("all", "units")),
    ],
)
def test_budgets_are_labeled_by_their_scope(scope: Any, label: tuple[str, str]) -> None:
    layer = nn.Linear(2, 2, bias=False)
    member = Member("weight", 0, torch.tensor([0, 1]), ranked=True)
    groups = Groups((GroupLayer("the layer", "neurons", 2, (member,)),))
    decision = decide(named_weights(layer), groups, {}, 0.5, RegroupPlan(scope=scope))
    assert [(b.scope, b.kind) for b in decision.budgets] == [label]


def test_layers_whose_units_have_as_many_weights_compete_under_size() -> None:
    model = nn.Sequential(*(nn.Linear(width, 4, bias=False) for width in (2, 2, 3)))
    rows = torch.arange(4)
    groups = Groups(
        tuple(
            GroupLayer(f"{i}", "neurons", 4, (Member(f"{i}.weight", 0, rows, ranked=True),))
            for i in range(3)
        )
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [9.0]]).expand(4, 2))
        model[1].weight.copy_(torch.tensor([[7.0], [4.0], [8.0], [6.0]]).expand(4, 2))
        model[2].weight.copy_(torch.tensor([[0.1], [0.4], [0.2], [0.3]]).expand(4, 3))
    refill = regroup(model, groups, amount=0.5, scope="size")
    kept = [refill[f"{i}.weight"].any(1).nonzero().flatten().tolist() for i in range(3)]
    assert kept == [[3], [0, 2, 3], [1, 3]]
    budgets = decide(named_weights(model), groups, {}, 0.5, RegroupPlan(scope="size")).budgets
    assert [(b.scope, b.units) for b in budgets] == [
        ("all of 2 weights", 8),
        ("all of 3 weights", 4),
    ]


def test_the_rules_of_a_plan_name_score_scope_and_competitors():
    shapes = [(4, 8), (8, 4), (4, 8), (8, 4), (4, 6), (6, 2)]  # hidden layers of 8, 8 and 6 neurons
    layers = [nn.Linear(*shape) for shape in shapes]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU())))
    groups = Groups([each for each in find_groups(model).layers if each.name in ("0", "4", "8")])
    weights = named_weights(model)
    for scope, competitors in {
        "layer": ((0,), (1,), (2,)),
        "size": ((0, 1), (0, 1), (2,)),
        "type": ((0, 1, 2),) * 3,
    }.items():
        rules = RegroupPlan("activation_l2", scope).rules(groups, weights)
        assert (rules.importance, rules.scope) == ("activation_l2", scope)
        assert rules.competitors == competitors


# Scopes and data that regroup() chooses by itself


def convolutions() -> nn.Sequential:
    """The first one reads the images and stays whole."""
    convolutions = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 3)
    return nn.Sequential(*(part for each in convolutions for part in (each, nn.ReLU())))


@pytest.mark.parametrize(
    ("importance", "model", "scope"),
    [
        ("obs", nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), "size"),
        ("variance", nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), "layer"),
        ("magnitude", nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), "layer"),
        (lambda unit, weights: weights.norm(), convolutions(), "layer"),
        ("obs", convolutions(), "layer"),
    ],
)
def test_auto_is_size_for_obs_without_channels(
    importance: Any, model: nn.Module, scope: str
) -> None:
    example = torch.zeros(2, *((4,) if isinstance(model[0], nn.Linear) else (3, 9, 9)))
    groups = find_groups(model, example_inputs=example)
    assert {layer.kind for layer in groups.layers} <= {"neurons", "channels"}
    assert RegroupPlan(importance, "auto").choose_scope(groups).scope == scope
    kept = RegroupPlan(importance, "type")
    assert kept.choose_scope(groups) is kept


def test_regroup_measures_what_it_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    groups, rows = find_groups(model), torch.randn(64, 4)
    current = {"0.weight": torch.rand(8, 4) < 0.7}

    def chosen(**data: Any) -> list[bool]:
        refill = regroup(model, groups, amount=0.5, current_mask=current, **data)
        return refill["0.weight"].all(dim=1).tolist()

    by_variance = chosen(importance="variance", batches=[rows])
    assert chosen(importance="auto", batches=[rows]) == by_variance
    packed = {"batches": [{"rows": rows}], "forward": lambda model, batch: model(batch["rows"])}
    assert chosen(importance="variance", **packed) == by_variance

    torch_rsst.apply_mask(model, current)
    wanted = torch.randn(64, 3)

    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.mse_loss(output, wanted)

    data: Any = {"batches": [rows], "loss_fn": loss_fn}
    scores = torch_rsst.measure_importance(model, groups, "taylor", **data)
    assert chosen(importance="taylor", **data) == chosen(importance=scores)


def test_a_unit_that_still_trains_is_not_dead_where_the_ranking_leaves_it_nothing() -> None:
    """Of units without an entry in the ranked mask, those that are masked for good go first."""
    layer = linear([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    groups = Groups((GroupLayer("", "neurons", 3, (Member("weight", 0, torch.arange(3), True),)),))
    ranked = {"weight": torch.tensor([[True, True], [False, False], [False, False]])}
    trained = {"weight": torch.tensor([[True, True], [False, False], [True, True]])}
    plan = RegroupPlan("magnitude")
    (scored,) = score_layers(named_weights(layer), groups, ranked, plan, trained)
    assert scored.dead.tolist() == [False, True, False]
    (alone,) = score_layers(named_weights(layer), groups, ranked, plan)
    assert alone.dead.tolist() == [False, True, True]
