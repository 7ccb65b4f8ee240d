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


def test_what_another_model_s_parameters_have_in_the_same_optimizer_stays():
    model, other = mlp(), mlp(seed=3)
    both = nn.ModuleList([model, other])
    optimizer = torch.optim.AdamW(both.parameters(), lr=0.01)
    for part in both:
        gradient_step(part, optimizer, 0)
    rnd = next(rounds_of(model, optimizer))
    assert not any(parameter in optimizer.state for parameter in model.parameters())
    assert all(parameter in optimizer.state for parameter in other.parameters())
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


def test_the_choices_are_plain_data():
    assert OptimizerRewind.of("reset", []).states == ()
