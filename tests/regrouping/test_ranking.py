"""Global L1 over the groups: which entries are ranked, which go, and what follows them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import mlp
from torch import Tensor, nn

from torch_rsst import Groups, find_groups
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.regrouping.ranking import rank, ranked_names


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.other = mlp(), mlp(seed=5)
        self.other[0].weight = self.mlp[0].weight


def test_ranked_are_the_ranked_members_in_parameter_order(tiny_transformer):
    model = tiny_transformer(depth=1)
    names = ranked_names(model, find_groups(model), None)
    assert names == [
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    ]
    order = [name for name, _ in model.named_parameters()]
    assert names == sorted(names, key=order.index)


def test_parameters_may_be_names_or_pairs_and_keep_their_order():
    model = mlp()
    pairs = [(model[2], "weight"), "0.bias", (model[0], "weight")]
    assert ranked_names(model, Groups(), pairs) == ["2.weight", "0.bias", "0.weight"]


def test_a_tied_parameter_is_known_by_its_first_name_from_both_places():
    model = Tied()
    assert ranked_names(model, Groups(), [(model.other[0], "weight")]) == ["mlp.0.weight"]


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        (["0.wieght"], KeyError, r"parameters: '0\.wieght': expected a parameter of the model"),
        ([(mlp()[0], "weight")], KeyError, "'weight of another model'"),
        ([(nn.ReLU(), "weight")], ValueError, "expected one of the module's parameters, got none"),
        (["0.weight", "0.weight"], ValueError, r"'0\.weight': expected once, got it twice"),
        ([], ValueError, "groups: expected at least one, got none"),
    ],
)
def test_wrong_parameters_are_named(parameters, error, text):
    model = mlp()
    with pytest.raises(error, match=text):
        ranked_names(model, find_groups(model), parameters)


def test_one_parameter_as_name_and_as_pair_is_listed_twice():
    model = mlp()
    with pytest.raises(ValueError, match="got it twice"):
        ranked_names(model, Groups(), ["0.weight", (model[0], "weight")])


def test_no_groups_and_no_parameters_is_an_error():
    with pytest.raises(ValueError, match=r"got none\. Pass the result of find_groups"):
        ranked_names(mlp(), Groups(), None)


# Against an oracle that sorts Python tuples and walks units one by one


UNITS = GroupLayer(
    "layer",
    "neurons",
    3,
    (
        Member("a", 0, torch.tensor([0, 1, 2]), ranked=True),
        Member("bias", 0, torch.tensor([0, 1, 2]), ranked=False),
        Member("b", 1, torch.tensor([0, 1, -1, 2]), ranked=True),
    ),
)
SHAPES = {"a": (3, 2), "bias": (3,), "b": (2, 4), "free": (2,)}


def slow_rank(
    weights: dict[str, Tensor], alive: dict[str, Tensor], ranked: list[str], amount: float | int
) -> dict[str, list[bool]]:
    flat = {n: w.flatten().tolist() for n, w in weights.items()}
    lives = {n: alive[n].flatten().tolist() if n in alive else [True] * len(flat[n]) for n in flat}
    entries = [
        (abs(flat[n][i]), position, i, n)
        for position, n in enumerate(ranked)
        for i in range(len(flat[n]))
        if lives[n][i]
    ]
    count = amount if isinstance(amount, int) else round(amount * len(entries))
    for _, _, i, n in sorted(entries)[:count]:
        lives[n][i] = False
    for unit in range(3):
        a = lives["a"][2 * unit : 2 * unit + 2]
        column = [0, 1, 3][unit]
        if not any([*a, lives["b"][column], lives["b"][4 + column]]):
            lives["bias"][unit] = False
    return {n: lives[n] for n in {*ranked, *alive, "a", "b", "bias"} if n in lives}


def bools(name: str) -> st.SearchStrategy[Tensor]:
    n = torch.zeros(SHAPES[name]).numel()
    return st.lists(st.booleans(), min_size=n, max_size=n).map(
        lambda bits: torch.tensor(bits).reshape(SHAPES[name])
    )


def values(name: str) -> st.SearchStrategy[Tensor]:
    n = torch.zeros(SHAPES[name]).numel()
    few = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -2.0])  # ties are the rule
    return st.lists(few, min_size=n, max_size=n).map(
        lambda numbers: torch.tensor(numbers).reshape(SHAPES[name])
    )


@given(
    weights=st.fixed_dictionaries({name: values(name) for name in SHAPES}),
    alive=st.fixed_dictionaries({}, optional={name: bools(name) for name in SHAPES}),
    ranked=st.sampled_from([["a", "b"], ["b", "a"], ["a", "b", "free"]]),
    amount=st.floats(0.0, 1.0),
)
def test_rank_agrees_with_sorting_every_entry(weights, alive, ranked, amount):
    found = rank(weights, alive, Groups((UNITS,)), ranked, amount)
    expected = slow_rank(weights, alive, ranked, amount)
    assert {n: m.flatten().tolist() for n, m in found.items()} == expected


def test_rank_changes_none_of_its_arguments():
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    alive = {"a": torch.ones(3, 2, dtype=torch.bool)}
    rank(weights, alive, Groups((UNITS,)), ["a", "b"], 0.9)
    assert alive["a"].all()
    assert all(bool((w == 1).all()) for w in weights.values())


def test_a_bias_dies_with_the_last_ranked_entry_of_its_unit_and_not_before():
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    weights["a"][1], weights["b"][:, 1] = 0.1, 0.2
    groups = Groups((UNITS,))
    assert rank(weights, {}, groups, ["a", "b"], 3)["bias"].tolist() == [True, True, True]
    assert rank(weights, {}, groups, ["a", "b"], 4)["bias"].tolist() == [True, False, True]


def test_zero_biases_are_not_ranked():
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    weights["bias"].zero_()
    assert rank(weights, {}, Groups((UNITS,)), ["a", "b"], 3)["bias"].all()


def test_more_than_is_alive_is_an_error():
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="amount: expected at most 14, as many alive entries"):
        rank(weights, {}, Groups((UNITS,)), ["a", "b"], 15)


def test_nan_is_named_where_it_is_alive_and_ignored_where_it_is_masked():
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    weights["a"][0, 0] = torch.nan
    groups = Groups((UNITS,))
    with pytest.raises(ValueError, match="scores of 'a': expected numbers, got 1 NaN"):
        rank(weights, {}, groups, ["b", "a"], 1)
    alive = {"a": ~weights["a"].isnan()}
    assert not rank(weights, alive, groups, ["b", "a"], 1)["a"][0, 0]


@pytest.mark.parametrize("parameters", [5, "weight", [5], [("weight",)], [(5, "weight")]])
def test_what_lists_no_parameters_is_refused(parameters):
    model = mlp()
    with pytest.raises(TypeError, match=r"expected .*\(module, name\) pair"):
        ranked_names(model, find_groups(model), parameters)
