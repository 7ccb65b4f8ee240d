"""RegularizedPruner: what it penalizes, by how much, when, and how it attaches and detaches."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import gradient_step, linear, mlp, same, tokens, weights_of, zero_gradient_step
from torch import Tensor, nn

import torch_rsst
from torch_rsst import (
    InertPenaltyWarning,
    RegularizedPruner,
    apply_mask,
    schedules,
)

SHAPE = (3, 4)
GOES = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
MASKED = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)


def sgd(model: nn.Module, **kwargs: object) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **kwargs)  # type: ignore[arg-type]


def pruner_of(model: nn.Module, goes: Tensor = GOES, **kwargs: object) -> RegularizedPruner:
    settings = {"total_steps": 4, "schedule": "linear", "strength": 0.5, **kwargs}
    return RegularizedPruner(model, {"weight": ~goes}, **settings)  # type: ignore[arg-type]


masks = st.lists(st.booleans(), min_size=12, max_size=12).map(
    lambda bits: torch.tensor(bits).reshape(SHAPE)
)


# The penalty against its oracles


@given(goes=masks, masked=masks, strength=st.floats(0.0, 2.0), by_hooks=st.booleans())
def test_coupled_penalty_is_the_gradient_of_the_explicit_penalty(goes, masked, strength, by_hooks):
    model, oracle = linear().double(), linear().double()
    optimizer, x = sgd(model), tokens(0, 5, 4).double()
    for layer in (model, oracle):
        apply_mask(layer, {"weight": ~masked})
    pruner = pruner_of(
        model, goes, strength=strength, total_steps=1, optimizer=None if by_hooks else optimizer
    )
    model(x).square().mean().backward()
    optimizer.step()
    w = oracle.weight_orig
    explicit = strength / 2 * w[goes & ~masked].square().sum()
    (oracle(x).square().mean() + explicit).backward()
    torch.testing.assert_close(model.weight_orig.grad, w.grad, rtol=1e-12, atol=1e-15)
    assert same(model.bias.grad, oracle.bias.grad)
    pruner.detach()


@given(goes=masks, masked=masks, strength=st.floats(0.0, 2.0), by_hand=st.booleans())
def test_decoupled_penalty_multiplies_each_entry_of_p(goes, masked, strength, by_hand):
    model, plain = linear(), linear()
    for layer in (model, plain):
        apply_mask(layer, {"weight": ~masked})
    optimizer = sgd(model)
    pruner = pruner_of(
        model,
        goes,
        strength=strength,
        total_steps=1,
        mode="decoupled",
        optimizer=None if by_hand else optimizer,
    )
    gradient_step(model, optimizer, 0)
    gradient_step(plain, sgd(plain), 0)
    if by_hand:
        pruner.step()
    for i in range(3):
        for j in range(4):
            before, after = plain.weight_orig[i, j].detach(), model.weight_orig[i, j].detach()
            if goes[i, j] and not masked[i, j]:
                rounding = torch.finfo(torch.float32).eps * before.abs()
                assert (after - before * (1 - min(1, strength))).abs() <= rounding
                assert strength < 1 or after == 0
            else:
                assert same(after, before)
    pruner.detach()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@given(goes=masks, masked=masks)
def test_entries_outside_p_stay_as_without_a_regularizer(mode, goes, masked):
    model, plain = linear(), linear()
    for layer in (model, plain):
        apply_mask(layer, {"weight": ~masked})
    optimizer, plain_optimizer = sgd(model, momentum=0.9), sgd(plain, momentum=0.9)
    pruner = pruner_of(model, goes, mode=mode, optimizer=optimizer)
    for step in range(4):
        # Gradients that do not depend on the weights: only the penalty can tell the two apart.
        for layer in (model, plain):
            for number, parameter in enumerate(layer.parameters()):
                parameter.grad = tokens(10 * step + number, *parameter.shape)
        optimizer.step()
        plain_optimizer.step()
    penalized = goes & ~masked
    assert same(model.weight_orig[~penalized], plain.weight_orig[~penalized])
    assert same(model.bias, plain.bias)
    assert bool((model.weight_orig != plain.weight_orig)[penalized].all())
    pruner.detach()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("by_hooks", [False, True])
def test_masked_latents_never_change(mode, by_hooks):
    model = linear()
    apply_mask(model, {"weight": ~MASKED})
    before = model.weight_orig.detach().clone()
    optimizer = sgd(model)
    pruner = pruner_of(
        model, ~torch.zeros_like(GOES), mode=mode, optimizer=None if by_hooks else optimizer
    )
    for number in range(4):
        gradient_step(model, optimizer, number)
        if by_hooks:
            pruner.step()
    assert same(model.weight_orig[MASKED], before[MASKED])
    assert not bool((model.weight_orig == before)[~MASKED].any())


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_nan_and_inf_outside_p_do_not_spread(mode):
    model = linear()
    with torch.no_grad():
        model.weight[0, 0], model.weight[1, 0] = torch.nan, torch.inf
    optimizer = sgd(model)
    with pruner_of(model, mode=mode, optimizer=optimizer) as pruner:
        zero_gradient_step(model, optimizer)
        assert math.isfinite(pruner.penalized_norm())
    assert bool(model.weight.grad.isfinite().all())
    assert bool(model.weight[GOES].isfinite().all())
    assert model.weight[1, 0] == torch.inf


def test_a_parameter_without_a_mask_counts_as_wholly_alive():
    model = linear()
    optimizer = sgd(model)
    before = model.weight.detach().clone()
    with pruner_of(model, mode="decoupled", total_steps=1, optimizer=optimizer):
        zero_gradient_step(model, optimizer)
    assert same(model.weight, torch.where(GOES, before * 0.5, before))


def test_an_explicit_current_mask_wins_over_the_model_s():
    model = linear()
    apply_mask(model, {"weight": ~MASKED})
    pruner = pruner_of(model, current_mask={"weight": torch.ones_like(GOES)})
    assert pruner.start_norm == pytest.approx(
        float(model.weight_orig.detach()[GOES].norm()), rel=1e-6
    )


def test_p_is_fixed_at_the_start():
    model = linear()
    optimizer = sgd(model)
    pruner = pruner_of(model, mode="decoupled", total_steps=1, optimizer=optimizer)
    before = model.weight.detach().clone()
    apply_mask(model, {"weight": ~GOES})
    zero_gradient_step(model, optimizer)
    assert same(model.weight_orig, torch.where(GOES, before * 0.5, before))
    pruner.detach()


@pytest.mark.parametrize("by_hooks", [False, True])
def test_block_loss_grad_leaves_the_penalty_alone_on_p(by_hooks):
    model, plain = linear().double(), linear().double()
    optimizer, x = sgd(model), tokens(0, 5, 4).double()
    pruner = pruner_of(
        model, total_steps=1, block_loss_grad=True, optimizer=None if by_hooks else optimizer
    )
    before = model.weight.detach().clone()
    for _ in range(2):  # what the first backward pass put there is blocked as well
        model(x).square().mean().backward()
        plain(x).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.grad[GOES], 0.5 * before[GOES], rtol=1e-12, atol=0)
    assert same(model.weight.grad[~GOES], plain.weight.grad[~GOES])
    pruner.detach()


@pytest.mark.parametrize("by_hooks", [False, True])
def test_block_loss_grad_decoupled_zeroes_the_gradient_on_p(by_hooks):
    model = linear()
    optimizer = sgd(model)
    pruner = pruner_of(
        model, mode="decoupled", block_loss_grad=True, optimizer=None if by_hooks else optimizer
    )
    gradient_step(model, optimizer, 0)
    assert bool((model.weight.grad[GOES] == 0).all())
    assert bool((model.weight.grad[~GOES] != 0).all())
    pruner.detach()


def test_block_loss_grad_makes_no_gradient_where_there_was_none():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = model.weight.detach().clone()
    pruner = pruner_of(
        model, mode="decoupled", block_loss_grad=True, total_steps=1, optimizer=optimizer
    )
    optimizer.step()
    assert model.weight.grad is None
    assert same(model.weight[~GOES], before[~GOES])
    pruner.detach()


def test_add_penalty_serves_gradients_of_autograd_grad():
    model = linear().double()
    pruner = pruner_of(model, total_steps=1)
    loss = model(tokens(0, 5, 4).double()).square().mean()
    model.weight.grad = torch.autograd.grad(loss, model.weight)[0]
    loss_grad = model.weight.grad.clone()
    pruner.add_penalty()
    penalty = torch.where(GOES, 0.5 * model.weight.detach(), torch.zeros(()).double())
    torch.testing.assert_close(model.weight.grad, loss_grad + penalty, rtol=1e-12, atol=0)


# The strength over time


@pytest.mark.parametrize("name", [*schedules.SCHEDULES, *schedules.ALIASES])
def test_strength_follows_the_schedule_and_stays_at_its_end(name):
    model = linear().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = pruner_of(model, schedule=name, strength=0.8, total_steps=5, optimizer=optimizer)
    for k in range(1, 9):
        expected = schedules.resolve_schedule(name, 0.8)(min(1.0, k / 5))
        assert pruner.strength == pytest.approx(expected, rel=1e-12)
        before = model.weight.detach().clone()
        zero_gradient_step(model, optimizer)
        shrunk = 1 - model.weight.detach()[GOES] / before[GOES]
        torch.testing.assert_close(shrunk, torch.full_like(shrunk, expected), rtol=1e-6, atol=1e-12)
    assert pruner.steps == 8


def test_a_callable_schedule_returns_the_strength_itself():
    pruner = pruner_of(linear(), schedule=lambda t: 7 * t, strength=0.1)
    assert pruner.strength == 7 / 4


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "coupled"),
        (lambda p: torch.optim.AdamW(p), "decoupled"),
        (lambda p: torch.optim.Adam(p), "decoupled"),
        (lambda p: torch.optim.LBFGS(p), "decoupled"),
        (None, "coupled"),
    ],
)
def test_auto_mode_depends_on_the_optimizer(make, mode):
    model = linear()
    optimizer = None if make is None else make(model.parameters())
    assert pruner_of(model, optimizer=optimizer).mode == mode


def test_auto_mode_is_decided_anew_when_an_optimizer_is_attached():
    model = linear()
    pruner = pruner_of(model)
    assert pruner.mode == "coupled"
    pruner.attach(torch.optim.AdamW(model.parameters()))
    assert pruner.mode == "decoupled"


# Attach and detach


def test_a_second_pruner_on_one_model_is_an_error_and_harmless():
    model = linear()
    optimizer = sgd(model)
    first = pruner_of(model, optimizer=optimizer)
    with pytest.raises(RuntimeError, match=r"model: expected one RegularizedPruner, got a second"):
        pruner_of(model, optimizer=optimizer)
    zero_gradient_step(model, optimizer)
    assert first.steps == 1
    first.remove()
    second = pruner_of(model, optimizer=optimizer)
    assert (first.attached, second.attached) == (False, True)


def test_wrappers_do_not_hide_that_a_model_has_one_already():
    model = linear()
    first = pruner_of(model)
    with pytest.raises(RuntimeError, match="one RegularizedPruner"):
        pruner_of(nn.DataParallel(model))
    first.detach()


def test_attaching_a_second_optimizer_is_an_error():
    model = linear()
    pruner = pruner_of(model, optimizer=sgd(model))
    with pytest.raises(RuntimeError, match=r"attach: expected one optimizer, once, got a second"):
        pruner.attach(sgd(model))


def test_attaching_to_a_removed_pruner_is_an_error():
    model = linear()
    pruner = pruner_of(model)
    pruner.remove()
    with pytest.raises(RuntimeError, match=r"got a removed regularizer\. Make a new"):
        pruner.attach(sgd(model))


def test_attach_replaces_the_gradient_hooks():
    model = linear()
    pruner, optimizer = pruner_of(model), sgd(model)
    pruner.attach(optimizer)
    model(tokens(0, 5, 4)).square().mean().backward()
    assert pruner.steps == 0
    without = model.weight.grad.clone()
    optimizer.step()
    assert not same(model.weight.grad[GOES], without[GOES])
    assert pruner.steps == 1


def test_step_by_hand_beside_an_optimizer_is_an_error():
    model = linear()
    pruner = pruner_of(model, optimizer=sgd(model))
    with pytest.raises(RuntimeError, match=r"step: expected no optimizer, got an attached"):
        pruner.step()


@pytest.mark.parametrize("by_hooks", [False, True])
def test_remove_ends_the_penalty_and_may_be_repeated(by_hooks):
    model, plain = linear(), linear()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer=None if by_hooks else optimizer)
    pruner.remove()
    pruner.remove()
    gradient_step(model, optimizer, 0)
    gradient_step(plain, sgd(plain), 0)
    assert same(model.weight, plain.weight)
    assert not model.weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_the_context_manager_removes():
    model = linear()
    with pruner_of(model) as pruner:
        assert pruner.attached
    assert not pruner.attached
    pruner_of(model).remove()


def test_the_context_manager_removes_on_an_error_and_does_not_cover_it():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = pruner_of(model, optimizer=optimizer)

    def fail() -> None:
        with pruner:
            zero_gradient_step(model, optimizer)  # inert, but that is not the news now
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert not pruner.attached


def test_a_failed_construction_leaves_no_hook_and_no_claim():
    model = mlp()
    model[2].weight.requires_grad_(False)
    goes = {f"{i}.weight": torch.zeros_like(model[i].weight, dtype=torch.bool) for i in (0, 2)}
    with pytest.raises(ValueError, match=r"that require gradients, got frozen '2\.weight'"):
        RegularizedPruner(model, goes, total_steps=1)
    assert not model[0].weight._post_accumulate_grad_hooks
    RegularizedPruner(model, goes, total_steps=1, mode="decoupled").remove()


def test_a_frozen_parameter_is_penalized_through_its_optimizer():
    model = linear()
    model.weight.requires_grad_(False)
    before = model.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pruner_of(model, total_steps=1, optimizer=optimizer):
        optimizer.step()
    assert same(model.weight, torch.where(GOES, before * 0.5, before))


def test_a_forgotten_pruner_whose_model_went_too_blocks_nothing():
    model = linear()
    optimizer = sgd(model)
    pruner_of(model, optimizer=optimizer)
    del optimizer
    gc.collect()
    assert RegularizedPruner.attached_to(model) is None
    pruner_of(model).remove()


def test_deepcopy_of_the_pruner_is_refused_and_of_its_model_is_not():
    model = linear()
    pruner = pruner_of(model)
    with pytest.raises(TypeError, match="to stay with its model, got a copy or a pickle"):
        copy.deepcopy(pruner)
    clone, plain = copy.deepcopy(model), linear()
    for layer in (clone, plain):
        layer(tokens(0, 5, 4)).square().mean().backward()
    assert same(clone.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_penalty_follows_a_model_that_changes_dtype(dtype):
    model = linear()
    pruner = pruner_of(model, total_steps=1)
    model.to(dtype).to("cpu")
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner.attach(optimizer)
    zero_gradient_step(model, optimizer)
    assert model.weight.dtype == dtype
    assert same(model.weight, torch.where(GOES, before * 0.5, before))


# State


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("saved_at", [0, 3, 7])
def test_a_state_continues_exactly(make, saved_at):
    def parts():
        model = linear()
        optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
        return model, optimizer, pruner_of(model, optimizer=optimizer, total_steps=5)

    model, optimizer, pruner = parts()
    for number in range(saved_at):
        gradient_step(model, optimizer, number)
    states = copy.deepcopy([x.state_dict() for x in (model, optimizer, pruner)])
    again = parts()
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for number in range(saved_at, 8):
        gradient_step(model, optimizer, number)
        gradient_step(again[0], again[1], number)
    assert same(model.weight, again[0].weight)
    assert (again[2].steps, again[2].start_norm) == (8, pruner.start_norm)


def test_the_state_is_plain_numbers():
    pruner = pruner_of(linear())
    assert pruner.state_dict() == {
        "steps": 0,
        "optimizer_steps": [0],
        "total_steps": 4,
        "start_norm": pruner.penalized_norm(),
        "fell_below": None,
        "pending": {},
    }


def test_the_state_of_other_total_steps_is_refused():
    state = pruner_of(linear(), total_steps=9).state_dict()
    with pytest.raises(
        ValueError, match=r"state of RegularizedPruner: expected total_steps=4, got 9\. Build"
    ):
        pruner_of(linear()).load_state_dict(state)


# Errors, before anything is attached


@pytest.mark.parametrize(
    ("refill", "kwargs", "error", "text"),
    [
        ({"wieght": ~GOES}, {}, KeyError, "refill mask of 'wieght': expected a parameter"),
        ({"weight": ~GOES.T}, {}, ValueError, r"shape \(3, 4\), got shape \(4, 3\)"),
        ({"weight": GOES * 0.5}, {}, ValueError, "zeros and ones, got other values"),
        (None, {"total_steps": 0}, ValueError, "total_steps: expected an int >= 1, got 0"),
        (None, {"total_steps": 1.5}, TypeError, "total_steps: expected an int >= 1, got float"),
        (None, {"accumulation_steps": 0}, ValueError, "accumulation_steps: expected an int >= 1"),
        (None, {"mode": "couple"}, ValueError, "Did you mean 'coupled'"),
        (None, {"grad_scale": math.inf}, ValueError, "grad_scale: expected a number > 0, got inf"),
        (None, {"grad_scale": 0.0}, ValueError, "grad_scale: expected a number > 0, got 0.0"),
        (None, {"grad_scale": "2"}, TypeError, "grad_scale: expected a number > 0, got str"),
        (
            None,
            {"schedule": lambda t: 1e39},
            ValueError,
            "schedule at t=1: expected a number >= 0, got 1e\\+39",
        ),
        (None, {"schedule": "liner"}, ValueError, "Did you mean 'linear'"),
        (None, {"strength": -1.0}, ValueError, "strength: expected a number >= 0, got"),
        (
            None,
            {"current_mask": {"weight": GOES.T}},
            ValueError,
            r"refill mask of 'weight': expected the current mask's shape \(4, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_named(refill, kwargs, error, text):
    model = linear()
    refill = {"weight": ~GOES} if refill is None else refill
    with pytest.raises(error, match=text):
        RegularizedPruner(model, refill, **{"total_steps": 4, **kwargs})
    assert not model.weight._post_accumulate_grad_hooks
    pruner_of(model).remove()


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e39, 0.0, -1.0, True, None])
def test_a_scale_that_a_callable_returns_is_checked_too(scale: object) -> None:
    model = linear()
    pruner = pruner_of(model, mode="coupled", grad_scale=lambda: scale)
    with pytest.raises(
        (TypeError, ValueError),
        match=r"what grad_scale returned: expected a number > 0, got .*\. Pass scaler\.get_scale, for example\.$",
    ):
        model(torch.ones(1, 4)).sum().backward()
    pruner.detach()


def test_a_scale_may_be_a_tensor_and_is_not_asked_for_in_decoupled_mode() -> None:
    model, other = linear(), linear()
    coupled = pruner_of(model, mode="coupled", grad_scale=lambda: torch.tensor(2.0))
    decoupled = pruner_of(other, mode="decoupled", grad_scale=lambda: None)
    for each in (model, other):
        each(torch.ones(1, 4)).sum().backward()
    added = model.weight.grad - other.weight.grad
    torch.testing.assert_close(added[GOES], 2.0 * 0.125 * model.weight.detach()[GOES])
    assert not added[~GOES].any()
    coupled.detach()
    decoupled.detach()


@pytest.mark.parametrize("scale", [2, 2.0, Fraction(2), np.float32(2)])
def test_scales_are_numbers_of_any_kind(scale: Any) -> None:
    model = linear()
    pruner = pruner_of(model, mode="coupled", grad_scale=scale)
    model(torch.ones(1, 4)).sum().backward()
    assert bool(model.weight.grad.isfinite().all())
    pruner.detach()


def test_a_scheduler_is_no_optimizer() -> None:
    model = linear()
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(TypeError, match=r"got StepLR\. Pass its \.optimizer"):
        pruner_of(model, optimizer=scheduler)


def test_an_optimizer_that_lacks_a_penalized_parameter_is_an_error():
    model = linear()
    optimizer = torch.optim.SGD([model.bias], lr=0.1)
    with pytest.raises(
        ValueError, match=r"every penalized parameter in its groups, got none of 'w"
    ):
        pruner_of(model, optimizer=optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    pruner_of(model, torch.zeros_like(GOES), optimizer=optimizer).remove()


# The warning of a penalty that did not act


def test_a_forgotten_step_warns_with_the_numbers():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = pruner_of(model, mode="decoupled")
    gradient_step(model, optimizer, 0)
    norm = f"{pruner.start_norm:.4g}"
    with pytest.warns(
        InertPenaltyWarning, match=rf"from {norm} to {norm} in 0 of 4 steps.*step\(\)"
    ):
        pruner.remove()


def test_zero_strength_warns():
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    pruner = pruner_of(model, strength=0.0, optimizer=optimizer)
    gradient_step(model, optimizer, 0)
    with pytest.warns(
        InertPenaltyWarning, match=r"in 1 of 4 steps \(mode 'decoupled', last strength 0"
    ):
        pruner.remove()


def test_a_norm_that_is_no_number_any_more_warns():
    model = linear()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer=optimizer)
    gradient_step(model, optimizer, 0)
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    with pytest.warns(InertPenaltyWarning, match="to nan in 1 of 4"):
        pruner.remove()


@pytest.mark.parametrize("case", ["empty P", "P is zero", "no step", "it acted", "detached"])
def test_no_warning_where_there_is_no_reason(case):
    model = linear()
    if case == "P is zero":
        with torch.no_grad():
            model.weight.zero_()
    frozen = case in ("empty P", "P is zero", "detached")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0 if frozen else 0.1)
    goes = torch.zeros_like(GOES) if case == "empty P" else GOES
    pruner = pruner_of(model, goes, optimizer=optimizer)
    if case != "no step":
        zero_gradient_step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.detach() if case == "detached" else pruner.remove()
    assert not pruner.attached


def test_reset_measures_the_norm_anew():
    model = linear()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer=optimizer)
    zero_gradient_step(model, optimizer)
    first = weights_of(model)["weight"]
    with torch.no_grad():
        model.weight.mul_(3)
    pruner.reset()
    assert pruner.steps == 0
    assert pruner.start_norm == pytest.approx(3 * float(first[GOES].norm()), rel=1e-6)
    pruner.detach()


@pytest.mark.parametrize(
    ("schedule", "error"),
    [(lambda t: math.nan, ValueError), (lambda t: -1.0, ValueError), (lambda t: None, TypeError)],
)
def test_a_schedule_that_would_destroy_weights_is_refused(schedule, error):
    layer = linear()
    with pytest.raises(error, match=r"schedule at t=.*: expected a number"):
        RegularizedPruner(layer, {"weight": ~GOES}, total_steps=1, schedule=schedule)
    assert RegularizedPruner.attached_to(layer) is None


def test_a_removed_regularizer_does_not_act():
    layer = linear()
    pruner = RegularizedPruner(layer, {"weight": ~GOES}, total_steps=1, mode="decoupled")
    pruner.detach()
    for call in (pruner.step, pruner.add_penalty):
        with pytest.raises(RuntimeError, match="expected an attached regularizer, got a removed"):
            call()


def test_adding_a_penalty_to_gradients_in_decoupled_mode_is_refused():
    layer = linear()
    pruner = RegularizedPruner(layer, {"weight": ~GOES}, total_steps=1, mode="decoupled")
    with pytest.raises(RuntimeError, match="add_penalty: mode: expected 'coupled'"):
        pruner.add_penalty()
    pruner.detach()


def test_a_lost_regularizer_is_found_by_its_model():
    layer = linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    RegularizedPruner(layer, {"weight": ~GOES}, total_steps=1, optimizer=optimizer)
    with pytest.raises(RuntimeError, match=r"attached_to\(model\)\.remove"):
        RegularizedPruner(layer, {"weight": ~GOES}, total_steps=1, optimizer=optimizer)
    RegularizedPruner.attached_to(layer).remove()
    assert RegularizedPruner.attached_to(layer) is None


# Overlapping models


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_parameter_is_penalized_through_one_module_only(inner_first):
    model = nn.Sequential(linear(), linear(3, 3))
    gone = torch.zeros(3, 4, dtype=torch.bool)
    refills = [(model[0], {"weight": gone}), (model, {"0.weight": gone})]
    (one, refill), (other, clash) = refills if inner_first else refills[::-1]
    first = RegularizedPruner(one, refill, total_steps=1)
    name = next(iter(clash))
    with pytest.raises(
        RuntimeError,
        match=rf"model: expected parameters that no other RegularizedPruner penalizes, got "
        rf"'{name}', penalized through another module\. Remove that one, or penalize everything "
        rf"with one\.$",
    ):
        RegularizedPruner(other, clash, total_steps=1)
    assert RegularizedPruner.attached_to(other) is None
    assert RegularizedPruner.attached_to(one) is first
    first.remove()
    RegularizedPruner(other, clash, total_steps=1).remove()


def test_two_modules_of_one_model_may_each_have_their_own():
    model = mlp().double()
    before = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruners = [
        RegularizedPruner(
            model[i],
            {"weight": torch.zeros_like(model[i].weight, dtype=torch.bool)},
            total_steps=1,
            strength=0.25,
            optimizer=optimizer,
        )
        for i in (0, 2)
    ]
    zero_gradient_step(model, optimizer)
    assert [pruner.steps for pruner in pruners] == [1, 1]
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(weights_of(model)[name], (1 - 0.25) * before[name])
    assert RegularizedPruner.attached_to(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pruner in pruners:
            pruner.remove()


# Sparse gradients


def embedding() -> tuple[nn.ModuleDict, dict[str, Tensor]]:
    """A layer with a sparse gradient behind a dense one."""
    model = nn.ModuleDict({"dense": linear(2, 2), "table": nn.Embedding(4, 2, sparse=True)})
    refill = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in weights_of(model).items()}
    return model, refill


SPARSE = (
    r"^gradient of 'table\.weight': expected a dense tensor, got a sparse one\. Make the layer with "
    r"sparse=False, or use mode='decoupled' and do not block\.$"
)


def sparse_loss(model: nn.ModuleDict) -> Tensor:
    return model["dense"](model["table"](torch.tensor([1, 3]))).square().mean()


@pytest.mark.parametrize(
    ("mode", "block"), [("coupled", False), ("coupled", True), ("decoupled", True)]
)
def test_a_sparse_gradient_is_refused_before_any_is_changed(mode, block):
    model, refill = embedding()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = RegularizedPruner(
        model, refill, total_steps=1, optimizer=optimizer, mode=mode, block_loss_grad=block
    )
    sparse_loss(model).backward()
    before, gradient = weights_of(model), model["dense"].weight.grad.clone()
    with pytest.raises(RuntimeError, match=SPARSE):
        optimizer.step()
    assert all(same(w, before[n]) for n, w in weights_of(model).items())
    assert same(model["dense"].weight.grad, gradient)
    assert pruner.steps == 0
    pruner.detach()


def test_a_sparse_gradient_is_refused_in_the_backward_pass_without_an_optimizer():
    model, refill = embedding()
    pruner = RegularizedPruner(model, refill, total_steps=1)
    with pytest.raises(RuntimeError, match=SPARSE):
        sparse_loss(model).backward()
    pruner.detach()


def test_a_sparse_gradient_does_not_matter_to_a_decoupled_penalty():
    model, refill = embedding()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = weights_of(model)
    pruner = RegularizedPruner(
        model, refill, total_steps=1, optimizer=optimizer, mode="decoupled", strength=0.5
    )
    sparse_loss(model).backward()
    optimizer.step()
    assert all(same(w, before[n] * 0.5) for n, w in weights_of(model).items())
    pruner.remove()


# What the errors say, to the letter


def said_by(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_errors_of_the_arguments_say_it_all():
    layer = linear()
    assert said_by(ValueError, lambda: pruner_of(layer, mode="couple")) == (
        "mode: expected one of 'auto', 'coupled', 'decoupled', got 'couple'. "
        "Did you mean 'coupled'?"
    )
    given = {"wieght": ~GOES}
    assert said_by(KeyError, lambda: RegularizedPruner(layer, given, total_steps=1)) == (
        "refill mask of 'wieght': expected a parameter of the model, got no such name. "
        "It has 'weight', 'bias'."
    )
    given = {"weight": ~GOES.T}
    assert said_by(ValueError, lambda: RegularizedPruner(layer, given, total_steps=1)) == (
        "refill mask of 'weight': expected the parameter's shape (3, 4), got shape (4, 3). "
        "Make the masks with regroup(model, …)."
    )
    layer.weight.requires_grad_(False)
    assert said_by(ValueError, lambda: pruner_of(layer)) == (
        "model: expected penalized parameters that require gradients, got frozen 'weight'. "
        "No backward pass reaches them: pass the optimizer, or unfreeze them."
    )


def test_errors_of_attaching_say_it_all():
    layer = linear()
    pruner, optimizer = pruner_of(layer), sgd(layer)
    assert said_by(RuntimeError, lambda: pruner_of(layer)) == (
        "model: expected one RegularizedPruner, got a second one. "
        "Remove the first: RegularizedPruner.attached_to(model).remove()."
    )
    outer = nn.Sequential(layer)
    refill = {"0.weight": ~GOES, "0.bias": torch.ones(3, dtype=torch.bool)}
    assert said_by(RuntimeError, lambda: RegularizedPruner(outer, refill, total_steps=1)) == (
        "model: expected parameters that no other RegularizedPruner penalizes, "
        "got '0.weight', penalized through another module. "
        "Remove that one, or penalize everything with one."
    )
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        assert said_by(TypeError, lambda copied=copied: copied(pruner)) == (
            "RegularizedPruner: expected to stay with its model, got a copy or a pickle. Copy the model, then "
            "build a new RegularizedPruner for the copy; of rounds, save state_dict()."
        )
    pruner.attach(optimizer)
    assert said_by(RuntimeError, lambda: pruner.attach(optimizer)) == (
        "attach: expected one optimizer, once, got a second one. "
        "It acts already: drop this call (several go into one list)."
    )
    assert said_by(RuntimeError, pruner.step) == (
        "step: expected no optimizer, got an attached optimizer. "
        "optimizer.step() counts by itself; drop this call."
    )
    assert said_by(RuntimeError, pruner.add_penalty) == (
        "add_penalty: expected no optimizer, got an attached optimizer. "
        "optimizer.step() adds the penalty; drop this call."
    )
    pruner.remove()
    for call, name in ((pruner.step, "step"), (pruner.add_penalty, "add_penalty")):
        assert said_by(RuntimeError, call) == (
            f"{name}: expected an attached regularizer, got a removed one. "
            f"Make a new RegularizedPruner."
        )
    removed = pruner_of(layer)
    removed.detach()
    assert said_by(RuntimeError, lambda: removed.attach(optimizer)) == (
        "attach: expected one optimizer, once, got a removed regularizer. "
        "Make a new RegularizedPruner."
    )
    by_hand = pruner_of(layer, mode="decoupled")
    assert said_by(RuntimeError, by_hand.add_penalty) == (
        "add_penalty: mode: expected 'coupled', got 'decoupled', which shrinks weights and leaves "
        "gradients alone. Call pruner.step() after the update instead, or pass mode='coupled'."
    )


def test_another_optimizer_takes_over_before_the_first_step_and_not_after_it():
    layer = linear()
    first = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruner = pruner_of(layer, optimizer=first, mode="decoupled")
    second = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruner.attach(second, replace=True)
    before = layer.weight.detach().clone()
    zero_gradient_step(layer, first)  # no longer counted, and shrinks nothing
    assert pruner.steps == 0
    assert torch.equal(layer.weight, before)
    for _ in range(2):
        zero_gradient_step(layer, second)
    assert pruner.steps == 2
    assert layer.weight[GOES].norm() < before[GOES].norm()
    assert said_by(RuntimeError, lambda: pruner.attach(first, replace=True)) == (
        "attach: expected the optimizer before the first step, got another one after 2 steps with the first. "
        "Attach it when the round opens; several go into one list."
    )
    zero_gradient_step(layer, second)
    assert pruner.steps == 3


def test_masks_that_are_out_of_place_are_told_by_the_name_of_the_call():
    layer = linear()
    torch_rsst.apply_mask(layer, {"weight": ~GOES})
    with torch_rsst.dense_weights(layer):
        text = said_by(RuntimeError, lambda: pruner_of(layer))
    assert text.startswith("RegularizedPruner: expected a model whose masks are in place, got")


def test_errors_of_a_state_say_it_all():
    pruner = pruner_of(linear())
    state = pruner.state_dict()
    assert said_by(ValueError, lambda: pruner.load_state_dict({**state, "total_steps": 9})) == (
        "state of RegularizedPruner: expected total_steps=4, got 9. "
        "Build the regularizer with the same arguments as the saved one."
    )
    for key in state.keys() - {"fell_below", "pending"}:  # which older states lack
        partial = {k: v for k, v in state.items() if k != key}
        assert said_by(ValueError, lambda p=partial: pruner.load_state_dict(p)) == (
            f"state of RegularizedPruner: expected a complete state, got none for '{key}'. "
            f"Pass what state_dict() has returned."
        )


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": "7"},
        {"optimizer_steps": [0, "7"]},
        {"start_norm": "7"},
        {"pending": {"weight": "7"}},
        {"fell_below": "7"},
    ],
)
def test_a_state_of_other_things_than_numbers_is_refused_before_it_is_loaded(damage):
    pruner = pruner_of(linear())
    state = pruner.state_dict()
    assert said_by(ValueError, lambda: pruner.load_state_dict({**state, **damage})) == (
        "state of RegularizedPruner: expected numbers, got '7'. The file is damaged: load another one."
    )
    assert pruner.state_dict() == state


def test_a_state_of_an_earlier_version_lacks_what_was_pending():
    pruner = pruner_of(linear())
    state = pruner.state_dict()
    old = {key: value for key, value in state.items() if key not in ("fell_below", "pending")}
    pruner.load_state_dict({**old, "start_norm": 2.0})
    assert pruner.state_dict() == {**state, "start_norm": 2.0}


@pytest.mark.parametrize(("steps", "strength"), [(0, "0.125"), (1, "0.125"), (2, "0.25")])
def test_the_warning_says_it_all(steps, strength):
    layer = linear()
    pruner = pruner_of(layer)
    layer(tokens(0, 5, 4)).square().mean().backward()
    for _ in range(steps):
        pruner.step()
    norm = f"{pruner.start_norm:.4g}"
    with pytest.warns(InertPenaltyWarning) as caught:
        pruner.remove()
    assert [str(w.message) for w in caught] == [
        f"The penalty did not act: the norm of the penalized weights went from {norm} to {norm} in "
        f"{steps} of 4 steps (mode 'coupled', last strength {strength}). Pass the optimizer or call "
        f"pruner.step(), or raise the strength or lower shrink_to, or use mode='decoupled'."
    ]


def test_the_warning_points_to_the_caller():
    layer = linear()
    pruner = pruner_of(layer)
    layer(tokens(0, 5, 4)).square().mean().backward()
    with pytest.warns(InertPenaltyWarning) as caught:
        pruner.remove()
    assert caught[0].filename == __file__


def test_the_warning_advises_nothing_that_is_done_already():
    layer = linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    pruner = pruner_of(layer, mode="coupled", optimizer=optimizer)
    gradient_step(layer, optimizer, 0)
    with pytest.warns(
        InertPenaltyWarning,
        match=r"\)\. Raise the strength or lower shrink_to, or use mode='decoupled'\.$",
    ):
        pruner.remove()
    by_hand = pruner_of(layer, mode="decoupled")
    by_hand.step()
    with torch.no_grad():
        layer.weight.mul_(2.0)
    text = (
        r"Pass the optimizer or call pruner\.step\(\), or raise the strength or lower shrink_to\.$"
    )
    with pytest.warns(InertPenaltyWarning, match=text):
        by_hand.remove()
    by_hand = pruner_of(layer, mode="decoupled")
    by_hand.step()
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    with pytest.warns(
        InertPenaltyWarning, match=r"\. Look for the step at which training diverged\.$"
    ):
        by_hand.remove()


@pytest.mark.parametrize("units", [True, False], ids=["units", "holes"])
@pytest.mark.parametrize("strength", [0.3, 0.999, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_decoupled_factor_leaves_the_rest_bit_for_bit(units, strength, dtype):
    layer = nn.Linear(4, 2).to(dtype)
    apply_mask(layer, {"weight": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])})
    goes = torch.zeros(2, 4, dtype=torch.bool)
    (goes[:, 1] if units else goes[1]).fill_(True)
    pruner = pruner_of(layer, goes, mode="decoupled", total_steps=1, schedule=lambda t: strength)
    if units:
        with torch.no_grad():
            layer.weight_orig[1, 0], layer.weight_orig[0, 0] = torch.inf, -0.0
    before = layer.weight_orig.detach().clone()
    pruner.step()
    after, in_p = layer.weight_orig.detach(), goes & (layer.weight_mask != 0)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(after.view(integers)[~in_p], before.view(integers)[~in_p])
    wide = torch.promote_types(dtype, torch.float32)
    expected = (before * torch.full_like(before, 1.0 - strength, dtype=wide)).to(dtype)
    # Where single entries are masked, as right as the last bit of the weight before.
    slack = 0.0 if units else torch.finfo(dtype).eps
    assert ((after - expected).abs() <= slack * before.abs())[in_p].all()
    pruner.detach()


@pytest.mark.parametrize("units", [True, False], ids=["units", "holes"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_latent_that_stops_being_a_number_spoils_no_gradient(units, value):
    layer = nn.Linear(4, 2)
    apply_mask(layer, {"weight": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])})
    goes = torch.zeros(2, 4, dtype=torch.bool)
    (goes[:, 1] if units else goes[1]).fill_(True)  # of the row, one entry is masked
    pruner = pruner_of(layer, goes, mode="coupled")
    with torch.no_grad():
        layer.weight_orig[1, 0] = value
    layer(torch.ones(3, 4)).square().mean().backward()
    assert layer.weight_orig.grad.isfinite().all()
    assert layer.weight_orig.grad[1, 0] == 0
    pruner.detach()


# Smaller things that hold


def test_what_failed_to_attach_claims_nothing_while_its_error_is_kept():
    layer = linear()
    with pytest.raises(ValueError, match="every penalized parameter") as caught:
        pruner_of(layer, optimizer=torch.optim.SGD([layer.bias], lr=0.1))
    assert RegularizedPruner.attached_to(layer) is None
    pruner_of(layer).remove()
    assert caught.value.__traceback__ is not None  # it holds the regularizer alive


def test_the_warning_does_not_depend_on_the_size_of_the_weights_and_comes_once():
    layer = linear()
    with torch.no_grad():
        layer.weight.mul_(1e-4)
    pruner = pruner_of(layer)
    pruner.step()
    with pytest.warns(InertPenaltyWarning):
        pruner.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.remove()


def test_a_schedule_is_asked_for_times_up_to_1_only():
    asked = []

    def schedule(t: float) -> float:
        asked.append(t)
        return t

    layer = linear()
    pruner = pruner_of(layer, schedule=schedule, total_steps=2, mode="decoupled")
    for _ in range(4):
        pruner.step()
    assert set(asked) == {0.5, 1.0}
    pruner.remove()


def test_the_defaults():
    layer = linear()
    pruner = RegularizedPruner(layer, {"weight": ~GOES}, total_steps=10)
    assert pruner.mode == "coupled"
    assert pruner.strength == pytest.approx(0.5 * (math.exp(1e-4) - 1) / (math.e - 1), rel=1e-9)
    assert (pruner.accumulation_steps, pruner.grad_scale, pruner.block_loss_grad) == (
        1,
        None,
        False,
    )
    assert (pruner.steps, pruner.total_steps) == (0, 10)


def test_an_empty_refill_mask_penalizes_nothing_and_still_counts():
    layer = linear()
    pruner = RegularizedPruner(layer, {}, total_steps=2)
    assert (pruner.attached, pruner.penalized_norm()) == (False, 0.0)
    pruner.step()
    assert pruner.steps == 1
    pruner.remove()


def test_attached_to_tells_models_apart():
    first, second = linear(), linear(seed=1)
    pruners = [pruner_of(first), pruner_of(second)]
    for model, pruner in zip((first, second), pruners, strict=True):
        assert RegularizedPruner.attached_to(model) is pruner
        assert RegularizedPruner.attached_to(nn.DataParallel(model)) is pruner
        assert pruner.attached
    pruners[0].detach()
    assert RegularizedPruner.attached_to(first) is None
    assert RegularizedPruner.attached_to(second) is pruners[1]
    pruners[1].detach()


def test_an_error_while_attaching_leaves_the_gradient_hooks():
    layer = linear()
    pruner = pruner_of(layer, total_steps=1)
    with pytest.raises(ValueError, match="every penalized parameter"):
        pruner.attach(torch.optim.SGD([layer.bias], lr=0.1))
    layer(tokens(0, 5, 4)).square().mean().backward()
    with_penalty = layer.weight.grad.clone()
    pruner.detach()
    layer.zero_grad()
    layer(tokens(0, 5, 4)).square().mean().backward()
    expected = layer.weight.grad + torch.where(GOES, 0.5 * layer.weight.detach(), 0.0)
    torch.testing.assert_close(with_penalty, expected)


def test_the_norm_is_taken_in_float64():
    layer = linear(1, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1e-30, 3e-30, 4e-30, 1e30]]))
    goes = torch.tensor([[False, True, True, False]])
    pruner = RegularizedPruner(layer, {"weight": ~goes}, total_steps=1)
    assert pruner.penalized_norm() == pytest.approx(5e-30, rel=1e-6)
    assert pruner.start_norm == pruner.penalized_norm()
    pruner.detach()


@pytest.mark.parametrize("whole_units", [True, False])
def test_the_default_scale_of_a_grad_scaler_is_no_infinite_penalty(whole_units):
    """65,536 is not a float16, in which P is kept for weights in float16."""
    model, plain = linear(), linear()
    goes = torch.zeros(SHAPE, dtype=torch.bool)
    goes[0] = True
    goes[1, 2] = not whole_units
    for layer in (model, plain):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu")
        pruner = None
        if layer is model:
            pruner = RegularizedPruner(
                layer, {"weight": ~goes}, total_steps=1, optimizer=optimizer, mode="coupled"
            )
        scaler.scale(layer(tokens(0, 5, 4)).square().mean()).backward()
        scaler.step(optimizer)
        if pruner is not None:
            pruner.detach()
    expected = plain.weight - 0.1 * 0.5 * linear().weight * goes
    torch.testing.assert_close(model.weight, expected)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_an_infinite_latent_beside_whole_units_stays_alone(mode):
    """0 · ∞ would make its gradient NaN, and clipping by the norm then all weights."""
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    apply_mask(model, {"weight": torch.tensor([[False], [True], [True]]).expand(SHAPE).clone()})
    optimizer = sgd(model)
    keep = torch.tensor([[True], [False], [True]]).expand(SHAPE).clone()
    pruner = RegularizedPruner(model, {"weight": keep}, total_steps=1, mode=mode)
    model.weight_orig.square().nan_to_num(posinf=0.0).sum().backward()
    model.weight_orig.grad.nan_to_num_(0.0)
    pruner.add_penalty() if mode == "coupled" else pruner.step()
    assert model.weight_orig.grad.isfinite().all()
    assert model.weight_orig[0, 0] == torch.inf
    optimizer.zero_grad()
    pruner.detach()


# Averages of the model


def followed(mode: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, RegularizedPruner]:
    """A model, another one that follows it, and what trains and penalizes it."""
    model, average = linear(), linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = pruner_of(model, optimizer=optimizer, mode=mode)
    pruner.follow([average])
    return model, average, optimizer, pruner


def test_a_follower_shrinks_by_the_factors_of_a_decoupled_penalty():
    model, average, optimizer, pruner = followed("decoupled")
    with torch.no_grad():
        average.weight.mul_(3.0)
    for _ in range(3):
        zero_gradient_step(model, optimizer)
    torch.testing.assert_close(average.weight, 3.0 * model.weight)
    pruner.remove()


def test_a_follower_shrinks_as_the_norm_does_under_a_coupled_penalty():
    model, average, optimizer, pruner = followed("coupled")
    kept = average.weight.detach()[~GOES].clone()
    for number in range(3):
        norms = [module.weight.detach()[GOES].norm() for module in (model, average)]
        gradient_step(model, optimizer, number)  # loss and penalty act in one step
        now = model.weight.detach()[GOES].norm()
        expected = norms[1] * min(1.0, now / norms[0])
        torch.testing.assert_close(average.weight.detach()[GOES].norm(), expected)
    assert torch.equal(average.weight.detach()[~GOES], kept)
    pruner.detach()


def test_a_follower_stays_where_the_loss_outgrows_a_coupled_penalty_or_nothing_is_left():
    model, average, optimizer, pruner = followed("coupled")
    before = average.weight.detach().clone()
    model.weight.grad = -10.0 * model.weight.detach()  # which the penalty cannot outweigh
    optimizer.step()
    assert model.weight[GOES].norm() > before[GOES].norm()
    assert torch.equal(average.weight, before)
    with torch.no_grad():
        model.weight[GOES] = 0.0
    zero_gradient_step(model, optimizer)
    assert torch.equal(average.weight, before)
    pruner.detach()
