"""However a step is driven, the penalty acts once: its measured multiplier is exactly 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import mlp, same, tokens, weights_of
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_rsst import RegularizedPruner

STRENGTH = 0.375
SCALE = 1024.0
BETA = 0.9  # Adam's first moment holds (1 − β) · gradient after one step


def penalized(model: nn.Module) -> dict[str, Tensor]:
    """Every other entry of both weights."""
    return {
        name: (torch.arange(w.numel()) % 2 == 0).reshape(w.shape)
        for name, w in weights_of(model).items()
        if name.endswith("weight")
    }


def attach(model: nn.Module, **kwargs: Any) -> RegularizedPruner:
    refill = {name: ~goes for name, goes in penalized(model).items()}
    settings = {"total_steps": 1, "schedule": "linear", "strength": STRENGTH}
    return RegularizedPruner(model, refill, **settings, **kwargs)


def loss_of(model: nn.Module, number: int) -> Tensor:
    return model(tokens(number, 5, 4).to(next(model.parameters()).dtype)).square().mean()


# How a step can be driven


def in_one_batch(model: nn.Module, optimizer: Optimizer) -> None:
    loss_of(model, 0).backward()
    optimizer.step()


def in_four_batches(model: nn.Module, optimizer: Optimizer) -> None:
    for number in range(4):
        (loss_of(model, number) / 4).backward()
    optimizer.step()


def scaler_of() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE)


def scaled(model: nn.Module, optimizer: Optimizer) -> None:
    scaler = scaler_of()
    for number in range(2):
        scaler.scale(loss_of(model, number) / 2).backward()
    scaler.step(optimizer)
    scaler.update()


def scaled_and_unscaled(model: nn.Module, optimizer: Optimizer) -> None:
    scaler = scaler_of()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def scaled_and_clipped(model: nn.Module, optimizer: Optimizer) -> None:
    scaler = scaler_of()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm > 0.01
    scaler.step(optimizer)


def clipped(model: nn.Module, optimizer: Optimizer) -> None:
    loss_of(model, 0).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.01) > 0.01
    optimizer.step()


def zeroed_in_place(model: nn.Module, optimizer: Optimizer) -> None:
    loss_of(model, 1).backward()
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, 0).backward()
    optimizer.step()


def without_a_gradient_in_one_layer(model: nn.Module, optimizer: Optimizer) -> None:
    model[2](tokens(0, 5, 8).double()).square().mean().backward()
    assert model[0].weight.grad is None
    optimizer.step()


def without_any_gradient(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.step()


def closure_of(model: nn.Module, optimizer: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    return closure


def closure(model: nn.Module, optimizer: Optimizer) -> None:
    assert optimizer.step(closure_of(model, optimizer)) == loss_of(mlp().double(), 0)


def closure_as_keyword(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.step(closure=closure_of(model, optimizer))


DRIVES = [
    in_one_batch,
    in_four_batches,
    scaled,
    scaled_and_unscaled,
    scaled_and_clipped,
    clipped,
    zeroed_in_place,
    without_a_gradient_in_one_layer,
    without_any_gradient,
    closure,
    closure_as_keyword,
]


# What can carry it


def optimizer_of(model: nn.Module, name: str) -> Optimizer:
    parameters = list(model.parameters())
    adam = {"lr": 0.01, "betas": (BETA, 0.99)}
    return {
        "sgd": lambda: torch.optim.SGD(parameters, lr=1.0, foreach=False),
        "sgd-foreach": lambda: torch.optim.SGD(parameters, lr=1.0, foreach=True),
        "sgd-fused": lambda: torch.optim.SGD(parameters, lr=1.0, fused=True),
        "sgd-groups": lambda: torch.optim.SGD(
            [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.1}], lr=1.0
        ),
        "adam": lambda: torch.optim.Adam(parameters, foreach=False, **adam),
        "adamw-foreach": lambda: torch.optim.AdamW(parameters, foreach=True, **adam),
        "adamw-fused": lambda: torch.optim.AdamW(parameters, fused=True, **adam),
    }[name]()


OPTIMIZERS = [
    "sgd",
    "sgd-foreach",
    "sgd-fused",
    "sgd-groups",
    "adam",
    "adamw-foreach",
    "adamw-fused",
]


def gradient_used(optimizer: Optimizer, parameter: Tensor, before: Tensor) -> Tensor:
    """What the optimizer took for the gradient, weight decay included, read from its traces."""
    if isinstance(optimizer, torch.optim.SGD):
        return before - parameter.detach()  # lr is 1
    moment = optimizer.state[parameter].get("exp_avg", torch.zeros(()).double())
    return moment / (1 - BETA)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("drive", DRIVES, ids=lambda drive: drive.__name__)
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_the_multiplier_is_one(drive, name, mode):
    runs = []
    for penalty in (True, False):
        model = mlp().double()
        before, optimizer = weights_of(model), optimizer_of(model, name)
        pruner = attach(model, optimizer=optimizer, mode=mode) if penalty else None
        drive(model, optimizer)
        used = {
            n: gradient_used(optimizer, p, before[n]).clone() for n, p in model.named_parameters()
        }
        runs.append((used, weights_of(model), pruner))
    (used, after, pruner), (plain_used, plain_after, _) = runs
    for n, goes in penalized(mlp()).items():
        if mode == "coupled":
            # SGD decays what has a gradient; where the loss gave none, the penalty does.
            decays = drive is without_any_gradient and (name, n) == ("sgd-groups", "2.weight")
            decay = 0.1 * before[n] if decays else 0.0
            multiplier = (used[n] - plain_used[n] - decay) / (STRENGTH * before[n])
        else:
            multiplier = (plain_after[n] - after[n]) / (STRENGTH * plain_after[n])
        torch.testing.assert_close(multiplier, goes.double(), rtol=0, atol=1e-6)
    assert pruner.steps == 1
    pruner.detach()


# Without an optimizer


@pytest.mark.parametrize("scale", [SCALE, lambda: SCALE], ids=["number", "callable"])
@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("block", [False, True])
def test_hooks_share_the_penalty_among_batches_and_scale_it(scale, batches, mode, block):
    runs = []
    for penalty in (True, False):
        model = mlp().double()
        before, optimizer = weights_of(model), torch.optim.SGD(model.parameters(), lr=1.0)
        kwargs = {"accumulation_steps": batches, "grad_scale": scale, "block_loss_grad": block}
        pruner = attach(model, mode=mode, **kwargs) if penalty else None
        for number in range(batches):
            (loss_of(model, number) * SCALE / batches).backward()
        for n, parameter in model.named_parameters():
            parameter.grad /= SCALE
            if block and not penalty and n in penalized(model):
                parameter.grad[penalized(model)[n]] = 0.0
        optimizer.step()
        if pruner is not None:
            pruner.step()
            assert pruner.steps == 1
            pruner.detach()
        runs.append(weights_of(model))
    after, plain = runs
    for n, goes in penalized(mlp()).items():
        base = before[n] if mode == "coupled" else plain[n]
        multiplier = (plain[n] - after[n]) / (STRENGTH * base)
        torch.testing.assert_close(multiplier, goes.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("by_hooks", [True, False])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_autograd_grad_is_not_polluted(by_hooks, mode):
    model, plain = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = attach(model, mode=mode, optimizer=None if by_hooks else optimizer)
    found = torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    expected = torch.autograd.grad(loss_of(plain, 0), list(plain.parameters()))
    assert all(map(same, found, expected))
    assert all(p.grad is None for p in model.parameters())
    pruner.detach()


# Steps that a scaler skips


@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adamw-foreach", "adamw-fused"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_skipped_for_inf_does_not_shrink(name, mode):
    # A fused step is skipped on the device: the call is made, and counts.
    reached = int(name.endswith("fused"))
    model, scaler = mlp().double(), scaler_of()
    optimizer = optimizer_of(model, name)
    pruner = attach(model, mode=mode, optimizer=optimizer)
    before = weights_of(model)
    scaler.scale(loss_of(model, 0) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(same(w, before[n]) for n, w in weights_of(model).items())
    assert pruner.steps == reached
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    assert pruner.steps == reached + 1
    assert not any(same(w, before[n]) for n, w in weights_of(model).items())
    pruner.detach()


# Optimizers that evaluate more than once a step


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_every_evaluation_of_lbfgs_carries_the_penalty(line_search):
    def run(penalty: str) -> tuple[dict[str, Tensor], int]:
        model = mlp().double()
        optimizer = torch.optim.LBFGS(
            model.parameters(), lr=0.1, max_iter=5, line_search_fn=line_search
        )
        pruner = attach(model, mode="coupled", optimizer=optimizer) if penalty == "ours" else None
        evaluations = 0

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            explicit = sum(
                model.get_parameter(n)[goes].square().sum() for n, goes in penalized(model).items()
            )
            (loss + (penalty == "explicit") * STRENGTH / 2 * explicit).backward()
            return loss

        optimizer.step(closure)
        if pruner is not None:
            assert pruner.steps == 1
            pruner.detach()
        return weights_of(model), evaluations

    (ours, n_ours), (explicit, n_explicit), (none, _) = map(run, ("ours", "explicit", "none"))
    assert n_ours == n_explicit > 2
    for name, weight in ours.items():
        torch.testing.assert_close(weight, explicit[name], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(weight, none[name], rtol=1e-4)


def test_lbfgs_shrinks_once_a_step_when_decoupled():
    runs = []
    for penalty in (True, False):
        model = mlp().double()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
        pruner = attach(model, optimizer=optimizer) if penalty else None
        optimizer.step(closure_of(model, optimizer))
        runs.append(weights_of(model))
        if pruner is not None:
            pruner.detach()
    after, plain = runs
    for name, goes in penalized(mlp()).items():
        factor = 1 - STRENGTH * goes.double()
        torch.testing.assert_close(after[name], plain[name] * factor, rtol=1e-12, atol=0)
