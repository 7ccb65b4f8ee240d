"""Variance: what is lost by removing a unit, and what "auto" stands for."""

from __future__ import annotations

import pytest
import torch
from activation_oracle import literal, measured
from channel_nets import NETS, behind_stem, images
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import mlp, tokens
from torch import nn

from torch_rsst import RSST, find_groups, measure_importance, plan, regroup
from torch_rsst.groups.groups import Groups
from torch_rsst.importance import (
    IMPORTANCES,
    Variance,
    choose_importance,
    importance_names,
    magnitude,
    rank_average,
    resolve_importance,
    weighted_sum,
)
from torch_rsst.masking.names import named_weights


@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3))
@settings(max_examples=20)
def test_the_score_is_the_squared_change_of_the_outputs_when_one_feature_is_removed(seed, sizes):
    """Exact for a neuron: E‖w·a‖² without its mean restored, E‖w·(a − mean)‖² with it."""
    model = mlp(seed=seed).double()
    groups, batches = find_groups(model), [tokens(i, n, 4).double() for i, n in enumerate(sizes)]
    with torch.no_grad():
        hidden = model[:2](torch.cat(batches))
    weight = model[2].weight.detach()
    for reconstruct, values in ((False, hidden), (True, hidden - hidden.mean(0))):
        importance = Variance(reconstruct=reconstruct)
        (scores,) = measured(model, groups, importance, batches).values()
        for unit in range(8):
            change = values[:, unit, None] * weight[:, unit]
            assert float(scores[unit]) == pytest.approx(
                float(change.square().sum(1).mean()), abs=1e-14
            )


@pytest.mark.parametrize("name", ["plain", "norm", "residual", "flattened", "transposed"])
def test_channels_are_measured_at_the_inputs_of_their_consumers(name):
    torch.manual_seed(0)
    net = behind_stem(NETS[name]()).double()
    groups = find_groups(net, ["channels"], on_unsupported="ignore")
    layer = groups.layers[0]
    (scores,) = measured(net, Groups((layer,)), Variance(reconstruct=True), [images()]).values()
    expected = torch.zeros(layer.units, dtype=torch.float64)
    weights = named_weights(net)
    for member in (m for m in layer.members if m.consumes):
        module = net.get_submodule(member.parameter.removesuffix(".weight"))
        seen = []
        handle = module.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        with torch.no_grad():
            net.eval()(images())
        handle.remove()
        axis = -1 if isinstance(module, nn.Linear) else 1
        values = torch.cat([x.movedim(axis, 0).flatten(1) for x in seen], 1)
        rows = weights[member.parameter].movedim(member.dim, 0).flatten(1)
        lost = values.var(1, correction=0) * rows.square().sum(1)
        expected.index_add_(0, member.unit_of, lost)
    torch.testing.assert_close(scores, expected)


def test_masked_weights_of_a_consumer_do_not_count():
    model, groups = literal()
    current = {"2.weight": torch.tensor([[True, False, True]])}
    batches = [torch.tensor([[1.0], [2.0]])]
    found = measure_importance(model, groups, "variance", batches=batches, current_mask=current)
    assert found(groups.layers[0], {}, {}).tolist() == pytest.approx([250.0, 0.0, 0.0])


def test_a_large_mean_does_not_hide_a_small_variance():
    model, groups = literal()
    batches = [torch.tensor([[1000.0], [1000.0 + 2**-10]])]
    (scores,) = measured(model, groups, Variance(reconstruct=True), batches).values()
    assert scores.tolist() == pytest.approx([2**-22 * 100, 2**-20, 0.0], rel=1e-3)


def test_a_constant_unit_is_worth_nothing_once_its_mean_is_restored():
    model, groups = literal()
    batches = [torch.full((7, 1), 3.3)]
    (scores,) = measured(model, groups, Variance(reconstruct=True), batches).values()
    assert scores.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)
    assert bool((scores >= 0).all())


def two_layers() -> nn.Sequential:
    """The second MLP's scores are much larger than the first one's."""
    model = nn.Sequential(mlp(4, 4), nn.Linear(2, 4), mlp(4, 4, seed=3))
    with torch.no_grad():
        model[2][2].weight.mul_(1000.0)
    return model


@pytest.mark.parametrize("scope", ["type", "global"])
def test_scores_of_different_layers_are_compared_relative_to_their_sum(scope):
    model, batches = two_layers(), [tokens(0, 50, 4)]
    groups = Groups(tuple(la for la in find_groups(model).layers if la.name in ("0", "2")))
    refill = regroup(model, groups, amount=0.5, scope=scope, importance="variance", batches=batches)
    scores = list(measured(model, groups, "variance", batches).values())
    relative = torch.cat([s / s.sum() for s in scores])
    sizes = torch.cat([torch.full((4,), 4.0 + 2.0), torch.full((4,), 4.0 + 2.0)])
    keys = relative / sizes if scope == "global" else relative
    kept = torch.cat([refill["0.0.weight"].all(1), refill["2.0.weight"].all(1)])
    assert kept.sum() == 4
    assert keys[kept].min() > keys[~kept].max()
    by_size = torch.cat(scores)
    assert not by_size[kept].min() > by_size[~kept].max()  # else this test would show nothing


def test_scores_within_a_layer_are_reported_as_they_are():
    model, batches = mlp(), [tokens(0, 5, 4)]
    groups, optimizer = find_groups(model), torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"steps_per_round": 1, "rounds": 1, "importance": "variance", "batches": batches}
    rsst = RSST(model, groups, optimizer=optimizer, amount=0, **arguments)
    (scores,) = measured(model, groups, "variance", batches).values()
    next(rsst)
    found = [rsst.report().explain("", unit).history[0].score for unit in range(8)]
    assert found == pytest.approx(scores.tolist())


# "auto", and what follows


def test_auto_is_variance_with_batches_and_magnitude_without():
    assert choose_importance("auto", data=False) == "magnitude"
    assert choose_importance("auto", data=True) == "variance"
    assert resolve_importance("auto") is magnitude
    model, groups, batches = mlp(), find_groups(mlp()), [tokens(0, 5, 4)]
    for given_batches, name in ((None, "magnitude"), (batches, "variance")):
        auto = regroup(model, groups, importance="auto", batches=given_batches)
        named = regroup(model, groups, importance=name, batches=given_batches)
        assert all(torch.equal(auto[key], named[key]) for key in named)


def test_auto_takes_no_data_but_batches():
    text = "forward: expected none: importance 'magnitude' looks at no data, got some"
    with pytest.raises(ValueError, match=text):
        regroup(mlp(), find_groups(mlp()), importance="auto", forward=lambda m, b: m(b))


def test_a_reconstruction_that_follows_decides_what_variance_means():
    following = choose_importance("variance", data=True, reconstruct=True)
    assert following == Variance(reconstruct=True)
    own = Variance(reconstruct=False)
    assert choose_importance(own, data=True, reconstruct=True) is own
    assert choose_importance("taylor", data=True, reconstruct=True) == resolve_importance("taylor")
    mixed = weighted_sum({"auto": 1.0, "magnitude": 2.0})
    assert choose_importance(mixed, data=True, reconstruct=True).parts == (
        Variance(reconstruct=True),
        "magnitude",
    )
    ranks = rank_average(mixed, "remain")
    assert choose_importance(ranks, data=False).parts[0].parts == ("magnitude", "magnitude")


def test_a_registered_importance_is_accepted_wherever_names_are(monkeypatch):
    def squares(layer, weights, masks):
        return magnitude(layer, {k: w.square() for k, w in weights.items()}, masks)

    monkeypatch.setitem(IMPORTANCES, "squares", squares)
    assert "squares" in importance_names()
    model, groups = mlp(hidden=16), find_groups(mlp(hidden=16))
    named = regroup(model, groups, importance="squares")
    called = regroup(model, groups, importance=squares)
    assert all(torch.equal(named[key], mask) for key, mask in called.items())
    planned = plan(model, groups, budget={"params": 0.5}, importance="squares")
    assert planned.arguments["importance"] == "squares"
    RSST(model, groups, steps_per_round=1, importance=rank_average("squares", "remain"))
    with pytest.raises(ValueError, match=r"one of 'auto', 'magnitude', .*'squares', got 'square'"):
        regroup(model, groups, importance="square")
