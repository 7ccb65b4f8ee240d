"""A penalty in units of its outcome: what is left of P, however many steps it takes."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import gradient_step, linear, tokens, zero_gradient_step
from torch import Tensor, nn

from torch_rsst import InertPenaltyWarning, RegularizedPruner
from torch_rsst.penalty.penalty_arguments import SHRINK_TO, Penalty, scaled
from torch_rsst.schedules import SCHEDULES

GOES = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


def pruner_of(model: nn.Module, goes: Tensor = GOES, **kwargs: Any) -> RegularizedPruner:
    return RegularizedPruner(model, {"weight": ~goes}, **{"total_steps": 4, **kwargs})


def product(schedule: Any, steps: int) -> float:
    """Π (1 − λ), factor by factor."""
    left = 1.0
    for k in range(1, steps + 1):
        left *= 1.0 - min(1.0, schedule(k / steps))
    return left


# The scale


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 300),
    shrink_to=st.floats(1e-6, 0.99),
    shrink_by=st.floats(0.05, 1.0),
)
def test_the_product_of_all_factors_is_what_was_asked(name, steps, shrink_to, shrink_by):
    penalty = Penalty(name, shrink_to=shrink_to, shrink_by=shrink_by)
    if math.floor(shrink_by * steps) < 1:
        with pytest.raises(ValueError, match="shrink_to: expected at least 1, as none of"):
            penalty.schedule_of(steps)
        return
    schedule = penalty.schedule_of(steps)
    assert product(schedule, steps) == pytest.approx(shrink_to, rel=1e-6)
    for k in range(1, steps + 1):
        assert 0.0 <= schedule(k / steps) <= 1.0
        assert schedule(k / steps) == 0.0 or k / steps <= shrink_by


@pytest.mark.parametrize("steps", [100, 30_000])
def test_the_same_setting_means_the_same_for_few_and_for_many_steps(steps):
    model = linear().double()
    pruner = pruner_of(model, shrink_to=0.01, total_steps=steps)
    for _ in range(steps):
        pruner.step()
    assert pruner.penalized_norm() / pruner.start_norm == pytest.approx(0.01, rel=1e-9)
    pruner.remove()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(("shrink_to", "shrink_by"), [(0.01, 1.0), (1e-300, 0.7), (0.9, 0.4)])
def test_many_steps_are_summed_up_without_looking_at_each(name, shrink_to, shrink_by):
    shape, seen, steps = SCHEDULES[name](1.0), [], 200_000

    def schedule(t: float) -> float:
        seen.append(t)
        return shape(t)

    scale = scaled(schedule, shrink_to, shrink_by, steps).scale
    assert len(seen) < steps / 3
    assert all(0.0 < t <= shrink_by for t in seen)
    last = max(k for k in range(1, steps + 1) if k / steps <= shrink_by)
    every = (math.log1p(-scale * shape(k / steps)) for k in range(1, last + 1))
    assert math.fsum(every) == pytest.approx(math.log(shrink_to), rel=1e-6)


def test_nothing_is_left_of_many_steps_where_nothing_is_asked_to_be():
    schedule = Penalty("linear", shrink_to=0.0, shrink_by=0.5).schedule_of(10**6)
    assert schedule(0.5) == 1.0
    assert schedule(0.499999) < 1.0


def test_the_scale_of_few_steps_is_the_one_that_looks_at_each():
    times = [k / 30_000 for k in range(1, 30_001)]
    for name in SCHEDULES:
        schedule = SCHEDULES[name](1.0)
        shape = torch.tensor([schedule(t) for t in times], dtype=torch.float64)
        scale = scaled(schedule, 0.01, 1.0, 30_000).scale
        above, below = (
            math.fsum(torch.log1p(-each * shape).tolist())
            for each in (scale, math.nextafter(scale, 0.0))
        )
        assert above <= math.log(0.01) < below


@pytest.mark.parametrize("steps", [10**7, 10**19])
def test_a_round_of_any_number_of_steps_can_be_made(steps):
    schedule = Penalty("linear", shrink_to=0.01).schedule_of(steps)
    assert schedule(1.0) == pytest.approx(2 * math.log(100) / steps, rel=1e-5)


def test_nothing_is_left_where_nothing_is_asked_to_be():
    model = linear()
    pruner = pruner_of(model, shrink_to=0.0)
    for _ in range(4):
        pruner.step()
    assert pruner.penalized_norm() == 0.0
    pruner.remove()


def test_no_step_before_shrink_by_is_an_error_that_says_what_is_possible():
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - all of the text is compared
        pruner_of(linear(), shrink_to=0.01, shrink_by=0.2)
    assert str(caught.value) == (
        "shrink_to: expected at least 1, as none of 4 steps ends before shrink_by=0.2, got 0.01. Raise "
        "shrink_by to 0.25 or more, or train more steps."
    )


def test_a_scaled_schedule_can_be_pickled():
    schedule = scaled(SCHEDULES["linear"](1.0), 0.01, 1.0, 10)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


# What it goes with


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.AdamW, None], ids=["SGD", "AdamW", "none"]
)
def test_it_is_decoupled_whatever_the_optimizer(make):
    model = linear()
    optimizer = None if make is None else make(model.parameters(), lr=0.1)
    pruner = pruner_of(model, shrink_to=0.01, optimizer=optimizer)
    assert pruner.mode == "decoupled"
    pruner.detach()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"strength": 0.5, "shrink_to": 0.01},
            "shrink_to: expected one argument for the strength, got strength=0.5 as well. Pass strength "
            "or shrink_to, not both.",
        ),
        (
            {"schedule": lambda t: t, "shrink_to": 0.01},
            "shrink_to: expected a named schedule, which it scales, got a callable, which returns λ "
            "itself. Leave shrink_to out, or pass schedule='linear', for example.",
        ),
        (
            {"mode": "coupled", "shrink_to": 0.01},
            "shrink_to: expected mode='auto' or 'decoupled', got 'coupled', whose effect depends on lr. "
            "Pass strength for a coupled penalty.",
        ),
        (
            {"shrink_to": 1.5},
            "shrink_to: expected a fraction in [0, 1], got 1.5. Pass 0.1 for a tenth.",
        ),
        (
            {"shrink_to": 0.1, "shrink_by": -1.0},
            "shrink_by: expected a fraction in [0, 1], got -1.0. Pass 0.1 for a tenth.",
        ),
    ],
)
def test_what_excludes_it_is_an_error(kwargs, text):
    for make in (lambda: Penalty(**kwargs), lambda: pruner_of(linear(), **kwargs)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - all of the text is compared
            make()
        assert str(caught.value) == text


@pytest.mark.parametrize(
    ("kwargs", "strength", "shrink_to"),
    [
        ({}, None, 0.01),
        ({"strength": 0.3}, 0.3, None),
        ({"schedule": math.sqrt}, None, None),
        ({"mode": "coupled"}, 0.5, None),
        ({"shrink_to": None}, 0.5, None),
        ({"shrink_to": 0.2}, None, 0.2),
    ],
)
def test_what_turns_the_default_off(kwargs, strength, shrink_to):
    penalty = Penalty(**kwargs)
    assert (penalty.strength, penalty.shrink_to) == (strength, shrink_to)
    assert type(penalty.shrink_to) in (float, type(None))  # a state holds plain numbers
    assert Penalty(**vars(penalty)) == penalty


def test_a_default_is_the_number_that_it_shows():
    assert SHRINK_TO == 0.01
    assert repr(SHRINK_TO) == "0.01"


# Half precision


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("steps", [100, 3000, 30_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_factors_add_up_in_half_precision(dtype, steps, units):
    model = nn.Linear(64, 64, bias=False).to(dtype)
    goes = torch.rand(64, 1 if units else 64, generator=torch.Generator().manual_seed(0)) < 0.5
    pruner = pruner_of(model, goes.expand(64, 64), shrink_to=0.01, total_steps=steps)
    outside = model.weight.detach().clone()
    for _ in range(steps):
        pruner.step()
    assert pruner.penalized_norm() / pruner.start_norm == pytest.approx(0.01, rel=0.1)
    assert torch.equal(model.weight[~goes.expand(64, 64)], outside[~goes.expand(64, 64)])
    pruner.remove()


def test_a_pending_factor_is_part_of_the_state():
    def build() -> tuple[nn.Module, RegularizedPruner]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3, bias=False).bfloat16()
        return model, pruner_of(model, shrink_to=0.01, total_steps=1000)

    model, pruner = build()
    for _ in range(333):
        pruner.step()
    state, weights = copy.deepcopy(pruner.state_dict()), copy.deepcopy(model.state_dict())
    assert 0.9 < state["pending"]["weight"] < 1.0
    again, resumed = build()
    resumed.load_state_dict(state)
    again.load_state_dict(weights)
    for each in (pruner, resumed):
        for _ in range(300):
            each.step()
    assert torch.equal(model.weight, again.weight)
    assert pruner.state_dict() == resumed.state_dict()
    pruner.reset()
    assert pruner.state_dict()["pending"] == {}


# When P was small


def test_the_step_at_which_p_fell_below_a_hundredth_is_known():
    model = linear().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pruner_of(
        model,
        schedule="linear",
        strength=1.0,
        mode="decoupled",
        total_steps=50,
        optimizer=optimizer,
    )
    left, expected = 1.0, None
    for k in range(1, 51):
        left *= 1 - k / 50
        expected = k if expected is None and left < 0.01 else expected
        zero_gradient_step(model, optimizer)
        assert pruner.fell_below == expected
    assert expected == 20
    assert pruner.state_dict()["fell_below"] == 20
    pruner.remove()


def test_long_trainings_are_looked_at_every_hundredth_part():
    model = linear()
    pruner = pruner_of(model, schedule=lambda t: 0.5, mode="decoupled", total_steps=1000)
    for _ in range(1000):
        pruner.step()
    assert pruner.fell_below == 10  # 2⁻⁷ was reached at step 7
    pruner.remove()


def test_p_that_has_not_shrunk_has_not_fallen():
    pruner = pruner_of(linear(), schedule="linear", strength=0.1, total_steps=4)
    pruner.step()
    assert pruner.fell_below is None
    pruner.load_state_dict({**pruner.state_dict(), "fell_below": 1})
    assert pruner.fell_below == 1
    pruner.detach()


# Steps that nobody counts


FORGOTTEN = (
    r"changed before each of the last 3 backward passes, and no step was counted: .* step 1 of 9"
)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_training_whose_steps_are_not_counted_warns(mode):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = pruner_of(model, mode=mode, strength=0.5, total_steps=9)

    def train() -> None:
        for number in range(9):
            gradient_step(model, optimizer, number)

    with pytest.warns(InertPenaltyWarning, match=FORGOTTEN) as caught:
        train()
    assert len(caught) == 1
    pruner.detach()


def test_accumulating_gradients_is_not_forgetting():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = pruner_of(model, strength=0.5, total_steps=9, accumulation_steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for number in range(8):
                model(tokens(number, 5, 4)).square().mean().backward()
            optimizer.step()
            pruner.step()
    assert pruner.steps == 3
    pruner.detach()


def test_counted_steps_do_not_warn():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = pruner_of(model, shrink_to=0.01, total_steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(9):
            gradient_step(model, optimizer, number)
            pruner.step()
    pruner.detach()
