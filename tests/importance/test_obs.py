"""OBS: greedy removal with refitted consumers, against least squares on the recorded inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from activation_oracle import measured
from channel_nets import NETS, behind_stem, images
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import mlp, tokens
from torch import Tensor, nn

import torch_rsst
from torch_rsst import find_groups, measure_importance, regroup
from torch_rsst.groups.groups import GroupLayer, Groups
from torch_rsst.groups.surgery import module_at
from torch_rsst.importance import OBS, obs

DAMPING = 1e-3


def seen_by(model: nn.Module, layer: GroupLayer, batches: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """(inputs without their mean, weight, unit of each feature) of each consumer."""
    found = []
    for member in (m for m in layer.members if m.consumes):
        module = module_at(model, member.parameter.rpartition(".")[0])
        axis = -1 if isinstance(module, nn.Linear) else 1
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model.eval()(batch)
        handle.remove()
        rows = torch.cat([x.movedim(axis, -1).flatten(0, -2) for x in seen]).double()
        owned = (member.unit_of >= 0).nonzero().flatten()
        weight = module.weight.detach().movedim(member.dim, -1).flatten(0, -2).double()
        rows = (rows - rows.mean(0))[:, owned] / len(rows) ** 0.5
        found.append((rows, weight[:, owned], member.unit_of[owned]))
    return found


def error_without(consumers: list[tuple[Tensor, ...]], gone: list[int]) -> float:
    """What is left of the outputs' squared error when the weights of all other units are fitted anew."""
    total = 0.0
    for rows, weight, unit in consumers:
        damped = (DAMPING * rows.square().sum() / rows.shape[1]).sqrt()
        system = torch.cat([rows, damped * torch.eye(rows.shape[1]).double()])
        wanted = system @ weight.T
        stays = ~torch.isin(unit, torch.tensor(gone, dtype=torch.int64))
        fitted = torch.linalg.lstsq(system[:, stays], wanted).solution
        total += float((system[:, stays] @ fitted - wanted).square().sum())
    return total


def check_against_oracle(model: nn.Module, layer: GroupLayer, batches: list[Tensor]) -> None:
    """A unit's score is the error it adds, if it is the one that adds least after those below it."""
    (scores,) = measured(model, Groups((layer,)), OBS(damping=DAMPING), batches).values()
    consumers = seen_by(model, layer, batches)
    gone: list[int] = []
    before, last = 0.0, 0.0
    for unit in scores.argsort(stable=True).tolist():
        others = [error_without(consumers, [*gone, u]) for u in range(layer.units) if u not in gone]
        gone.append(unit)
        after = error_without(consumers, gone)
        scale = max(others)
        assert after <= min(others) + 1e-9 * scale
        last = max(last, after - before)
        assert float(scores[unit]) == pytest.approx(last, rel=1e-6, abs=1e-9 * scale)
        before = after


@given(seed=st.integers(0, 99))
@settings(max_examples=15)
def test_neurons_are_removed_in_the_order_that_least_squares_gives(seed):
    model = mlp(seed=seed).double()
    batches = [tokens(seed + i, 20, 4).double() for i in range(2)]
    check_against_oracle(model, find_groups(model).layers[0], batches)


def test_heads_are_removed_with_all_their_features(tiny_transformer):
    model = tiny_transformer().double()
    heads = next(layer for layer in find_groups(model).layers if layer.kind == "heads")
    check_against_oracle(model, heads, [tokens(i, 4, 5, 16).double() for i in range(2)])


@pytest.mark.parametrize("name", ["plain", "norm", "residual", "flattened", "transposed"])
def test_channels_are_removed_in_the_order_that_least_squares_gives(name):
    torch.manual_seed(0)
    net = behind_stem(NETS[name]()).double()
    groups = find_groups(net, ["channels"], on_unsupported="ignore")
    check_against_oracle(net, groups.layers[0], [images()])


def test_of_two_units_with_the_same_outputs_one_is_worth_nothing():
    model, batches = mlp(seed=1).double(), [tokens(0, 50, 4).double()]
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[2], model[0].bias[2]
    groups = find_groups(model)
    (scores,) = measured(model, groups, OBS(damping=1e-9), batches).values()
    low, high = scores[2:4].sort().values.tolist()
    assert low < 1e-6 * high
    (alone,) = measured(model, groups, torch_rsst.importance.Variance(True), batches).values()
    assert float(alone[2:4].min()) > 1e-3 * float(alone.max())


def test_many_units_are_removed_in_nearly_the_best_order(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 150), nn.GELU(), nn.Linear(150, 16)).double()
    groups, batches = find_groups(model), [torch.randn(400, 16).double()]
    consumers = seen_by(model, groups.layers[0], batches)

    def error_of_half() -> float:
        (scores,) = measured(model, groups, OBS(damping=DAMPING), batches).values()
        return error_without(consumers, scores.argsort()[:75].tolist())

    some_at_once = error_of_half()
    monkeypatch.setattr(obs, "_CANDIDATES", 150)
    one_by_one = error_of_half()
    random = error_without(consumers, torch.randperm(150)[:75].tolist())
    assert some_at_once <= 1.02 * one_by_one
    assert one_by_one < 0.8 * random


def test_masked_units_and_masked_weights_are_worth_nothing():
    model, batches = mlp(seed=2), [tokens(0, 50, 4)]
    groups = find_groups(model)
    current = {
        "0.weight": torch.ones(8, 4).bool(),
        "2.weight": torch.ones_like(model[2].weight).bool(),
    }
    current["0.weight"][1] = False
    current["2.weight"][:, 5] = False
    found = measure_importance(model, groups, "obs", batches=batches, current_mask=current)
    scores = found(groups.layers[0], {}, {})
    assert float(scores[5]) <= 1e-12 * float(scores.max())
    assert float(scores[[0, 2, 3, 4, 6, 7]].min()) > 1e-6 * float(scores.max())


def test_half_of_the_units_leave_a_smaller_error_than_by_variance_once_consumers_are_refitted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    with torch.no_grad():  # groups of neurons that are nearly alike
        model[0].weight.copy_(model[0].weight[:16].repeat(4, 1) + 0.05 * torch.randn(64, 16))
    groups, batches = find_groups(model), [torch.randn(200, 16) for _ in range(2)]
    wanted = [model(batch).detach() for batch in batches]
    errors: dict[str, float] = {}
    for name in ("obs", "variance"):
        cut = copy.deepcopy(model)
        refill = regroup(cut, groups, amount=0.5, importance=name, batches=batches)
        torch_rsst.reconstruct(cut, groups, refill, batches=batches)
        pairs = zip(batches, wanted, strict=True)
        errors[name] = sum(float((cut(x).detach() - y).square().sum()) for x, y in pairs)
    assert errors["obs"] < errors["variance"]


@pytest.mark.parametrize("batch", [tokens(0, 1, 4), torch.zeros(3, 4), torch.ones(5, 4)])
def test_units_whose_outputs_do_not_vary_rank_by_the_weights_that_read_them(batch):
    model = mlp(seed=4)
    with torch.no_grad():  # the last are read least
        model[2].weight.copy_(torch.arange(8, 0, -1).float().expand_as(model[2].weight))
    (scores,) = measured(model, find_groups(model), "obs", [batch]).values()
    assert scores.argsort().tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_is_checked(damping):
    with pytest.raises(ValueError, match="damping"):
        OBS(damping=damping)


@pytest.mark.parametrize(("batches", "name"), [([tokens(0, 5, 4)], "obs"), (None, "magnitude")])
def test_auto_is_obs_in_rounds_with_batches_and_magnitude_without(batches, name):
    model = mlp()
    groups, optimizer = find_groups(model), torch.optim.SGD(model.parameters(), lr=0.1)
    named = regroup(model, groups, importance=name, scope="auto", batches=batches)
    rounds = torch_rsst.RSST(
        model, groups, optimizer=optimizer, steps_per_round=1, rounds=1, amount=0, batches=batches
    )
    opened = next(rounds)
    assert all(torch.equal(opened.refill_mask[key], named[key]) for key in named)


def test_units_of_all_layers_compete_by_default_where_obs_scores_them(tiny_transformer):
    model, batches = tiny_transformer(), [torch.randn(2, 5, 16)]
    groups = find_groups(model)
    scopes = {
        (importance, given): torch_rsst.RSST(
            model, groups, steps_per_round=1, importance=importance, batches=given and batches
        ).regrouping.scope
        for importance, given in [("auto", True), ("auto", None), ("obs", True), ("variance", True)]
    }
    assert scopes == {
        ("auto", True): "size",
        ("auto", None): "layer",
        ("obs", True): "size",
        ("variance", True): "layer",
    }
    scores = torch_rsst.measure_importance(model, groups, "obs", batches=batches)
    across = regroup(model, groups, importance=scores, scope="auto")
    by_size = regroup(model, groups, importance="obs", scope="size", batches=batches)
    assert all(torch.equal(across[name], by_size[name]) for name in by_size)


def test_channels_compete_within_their_layer_by_default():
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
    images = torch.randn(2, 1, 9, 9)
    rounds = torch_rsst.RSST(
        model, find_groups(model, example_inputs=images), steps_per_round=1, batches=[images]
    )
    assert rounds.regrouping.scope == "layer"
