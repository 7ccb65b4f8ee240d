"""Rewinding throws a training away; what optimizers remember of it goes too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, mlp, same, weights_of
from torch import nn

from torch_rsst import RSST, Refill, find_groups
from torch_rsst.rounds.optimizer_rewind import OptimizerRewind

STEPS = 2


def trained(steps: int = 4) -> tuple[nn.Module, Any]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps):
        gradient_step(model, optimizer, 50 + step)
    return model, optimizer


def rounds_of(model: nn.Module, optimizer: Any, method: Any = RSST, **kwargs: Any) -> Any:
    settings = {"steps_per_round": STEPS, "rounds": 2, "rewind": "init", **kwargs}
    return method(model, find_groups(model), optimizer=optimizer, **settings)


@pytest.mark.parametrize("method", [RSST, Refill])
@pytest.mark.parametrize("inside", [False, True])
def test_the_first_step_after_rewinding_is_that_of_a_new_optimizer(method, inside):
    model, optimizer = trained()
    rounds = rounds_of(model, None if inside else optimizer, method, regroup_amount=0.25)
    for rnd in rounds:
        if inside:
            rnd.attach(optimizer)
        twin = copy.deepcopy(model)
        gradient_step(model, optimizer, 0)
        gradient_step(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), 0)
        kept = rnd.refill_mask["0.weight"] & rnd.current_mask["0.weight"]
        assert same(weights_of(model)["0.weight"][kept], weights_of(twin)["0.weight"][kept])
        gradient_step(model, optimizer, 1)


def moments(optimizer: Any) -> list[Any]:
    return [state["exp_avg"].clone() for state in optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize("choice", ["init", "states"])
def test_moments_can_be_rewound_too_and_learning_rates_stay(choice):
    model, optimizer = trained()
    expected, saved = moments(optimizer), optimizer.state_dict()
    asked = "init" if choice == "init" else copy.deepcopy(saved)
    rounds = rounds_of(model, optimizer, rewind_optimizer=asked)
    for rnd in rounds:
        assert all(map(same, moments(optimizer), expected))
        optimizer.param_groups[0]["lr"] = 0.003
        for step in range(STEPS):
            gradient_step(model, optimizer, 10 * rnd.index + step)
        assert optimizer.param_groups[0]["lr"] == 0.003
    assert len(saved["state"]) == 4


def test_moments_can_be_kept():
    model, optimizer = trained()
    expected = moments(optimizer)
    rnd = next(rounds_of(model, optimizer, rewind_optimizer="keep"))
    assert all(map(same, moments(optimizer), expected))
    rnd.pruner.detach()


def test_without_rewinding_moments_stay():
    model, optimizer = trained()
    expected = moments(optimizer)
    rnd = next(rounds_of(model, optimizer, rewind=None))
    assert all(map(same, moments(optimizer), expected))
    rnd.pruner.detach()


@pytest.mark.parametrize("choice", ["reset", "init"])
def test_what_another_model_s_parameters_have_in_the_same_optimizer_stays(choice):
    model, other = mlp(), mlp(seed=3)
    both = nn.ModuleList([model, other])
    optimizer = torch.optim.AdamW(both.parameters(), lr=0.01)
    rounds = rounds_of(model, optimizer, rewind_optimizer=choice)
    for part in both:
        gradient_step(part, optimizer, 0)
    expected = [optimizer.state[parameter]["exp_avg"].clone() for parameter in other.parameters()]
    rnd = next(rounds)
    assert not any(parameter in optimizer.state for parameter in model.parameters())
    for parameter, moment in zip(other.parameters(), expected, strict=True):
        assert same(optimizer.state[parameter]["exp_avg"], moment)
    rnd.pruner.detach()


def test_the_saved_moments_travel_with_the_state():
    model, optimizer = trained()
    expected = moments(optimizer)
    rounds = rounds_of(model, optimizer, rewind_optimizer="init")
    next(rounds)
    state = copy.deepcopy(rounds.state_dict())
    rounds.round.pruner.detach()
    fresh, fresh_optimizer = trained(steps=1)
    again = rounds_of(fresh, fresh_optimizer, rewind_optimizer="init")
    again.load_state_dict(state)
    for step in range(next(again).start_step, STEPS):
        gradient_step(fresh, fresh_optimizer, step)
    rnd = next(again)
    assert all(map(same, moments(fresh_optimizer), expected))
    rnd.pruner.detach()


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ("rest", ValueError, "rewind_optimizer: expected one of 'reset', 'init', 'keep'"),
        (
            3,
            TypeError,
            "rewind_optimizer: expected a choice or a state dict of the optimizer, got int",
        ),
        ({"state": {}}, ValueError, "rewind_optimizer: expected a complete state"),
        ([], ValueError, "rewind_optimizer: expected at least one state dict, got an empty list"),
        (
            torch.optim.SGD([torch.ones(1)], lr=1.0).state_dict(),
            ValueError,
            r"rewind_optimizer: .* hold \[\[4\]\] parameters, got \[\[1\]\]",
        ),
    ],
)
def test_what_is_no_state_of_the_optimizer_is_named_at_once(asked, error, text):
    model, optimizer = trained()
    with pytest.raises(error, match=text):
        rounds_of(model, optimizer, rewind_optimizer=asked)


def test_moments_at_construction_need_an_optimizer():
    model, _ = trained()
    with pytest.raises(
        ValueError, match="rewind_optimizer='init': expected an optimizer, got none"
    ):
        rounds_of(model, None, rewind_optimizer="init")


def test_an_optimizer_that_does_not_fit_is_refused_before_it_is_attached():
    model, optimizer = trained()
    rnd = next(rounds_of(model, None, rewind_optimizer=optimizer.state_dict()))
    with pytest.raises(ValueError, match="rewind_optimizer"):
        rnd.attach([torch.optim.AdamW([p]) for p in model.parameters()])
    assert rnd.pruner.mode == "decoupled"
    assert not optimizer._optimizer_step_pre_hooks
    rnd.pruner.detach()


# Parameters that change their place in the optimizer


def alike(**kwargs: Any) -> tuple[Any, nn.Module, Any, dict[str, Any]]:
    """Rounds after the first, for two layers of one shape: their moments could be taken for one another."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.GELU(), nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(2):
        gradient_step(model, optimizer, number)
    names = ("0.weight", "2.weight")
    pairs = zip(names, model.parameters(), strict=True)
    first = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in pairs}
    rounds = rounds_of(model, optimizer, Refill, **{"rewind_optimizer": "init", **kwargs})
    next(rounds)
    gradient_step(model, optimizer, 5)
    gradient_step(model, optimizer, 6)
    return rounds, model, optimizer, first


def check_momentum(model: nn.Module, optimizer: Any, first: dict[str, Any]) -> None:
    found = dict(zip(("0.weight", "2.weight"), model.parameters(), strict=True))
    assert {n: same(first[n], optimizer.state[p]["momentum_buffer"]) for n, p in found.items()} == {
        "0.weight": True,
        "2.weight": True,
    }


@pytest.mark.parametrize("back", [True, False], ids=["a group of its own", "no group"])
def test_moments_are_put_back_by_parameter_wherever_it_is_in_the_optimizer(back):
    rounds, model, optimizer, first = alike()
    moved = optimizer.param_groups[0]["params"].pop(0)
    if back:
        optimizer.add_param_group({"params": [moved], "lr": 0.01})
    next(rounds).pruner.detach()
    check_momentum(model, optimizer, first)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01][: 1 + back]


def test_the_parameters_of_saved_moments_are_known_after_a_resume():
    rounds, model, _, first = alike()
    state = copy.deepcopy(rounds.state_dict())
    rounds.round.pruner.detach()
    groups = [{"params": [parameter]} for parameter in reversed(list(model.parameters()))]
    again_optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    again = rounds_of(model, again_optimizer, Refill, rewind_optimizer="init")
    again.load_state_dict(state)
    next(again)
    next(again).pruner.detach()
    check_momentum(model, again_optimizer, first)


def test_a_parameter_that_another_optimizer_has_now_is_named_and_nothing_is_changed(fingerprint):
    model = mlp()
    weights = list(model.parameters())
    optimizers = [torch.optim.SGD(weights[:2], lr=0.1), torch.optim.SGD(weights[2:], lr=0.1)]
    rounds = rounds_of(model, optimizers, Refill, rewind_optimizer="init", steps_per_round=1)
    next(rounds)
    for each in optimizers:
        gradient_step(model, each, 0)
    optimizers[0].add_param_group({"params": [optimizers[1].param_groups[0]["params"].pop(0)]})
    before = fingerprint(model)
    text = (
        r"rewind_optimizer: expected every parameter in the optimizer whose moments of it are put back, got "
        r"another with '2\.weight'\. Put it back there"
    )
    with pytest.raises(ValueError, match=text):
        next(rounds)
    assert fingerprint(model) == before
    optimizers[1].param_groups[0]["params"].insert(0, optimizers[0].param_groups.pop()["params"][0])
    assert next(rounds).index == 1
    rounds.round.pruner.detach()


def test_moments_of_a_parameter_in_no_group_are_named_at_once():
    model, optimizer = trained()
    optimizer.param_groups[0]["params"].pop(0)
    text = r"rewind_optimizer='init': expected moments of .* got those of '0\.weight' in none\. Add it to a group"
    with pytest.raises(ValueError, match=text):
        rounds_of(model, optimizer, rewind_optimizer="init")


def test_a_parameter_that_joins_later_starts_without_moments():
    model, optimizer = trained()
    rounds = rounds_of(model, optimizer, Refill, rewind_optimizer="init", steps_per_round=1)
    next(rounds)
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": model[3].parameters()})
    gradient_step(model, optimizer, 0)
    expected = [optimizer.state[p] for p in model[3].parameters()]
    assert all(expected)
    next(rounds).pruner.detach()
    assert not any(p in optimizer.state for p in model[3].parameters())


def test_damaged_names_of_saved_moments_are_refused():
    rounds, _, _, _ = alike()
    state = rounds.state_dict()
    rounds.round.pruner.detach()
    state["optimizer_names"][0].pop()
    text = r"state of rounds: optimizer_names: expected names of \[2\] parameters, got \[1\]"
    with pytest.raises(ValueError, match=text):
        rounds.load_state_dict(state)


def test_the_choices_are_plain_data():
    assert OptimizerRewind.of("reset", mlp(), []).states == ()
