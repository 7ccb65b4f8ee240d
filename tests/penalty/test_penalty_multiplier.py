"""However a step is driven, the penalty acts once: its measured multiplier is exactly 1."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from multipliers import STRENGTH, Record, attach, check_multiplier, loss_of, penalized
from tiny_models import mlp, same, tokens, weights_of
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

SCALE = 1024.0
BETA = 0.9  # Adam's first moment holds (1 − β) · gradient after one step


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


def a_closure(model: nn.Module, optimizer: Optimizer) -> None:
    assert optimizer.step(closure_of(model, optimizer)) == loss_of(mlp().double(), 0)


def a_closure_as_keyword(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.step(closure=closure_of(model, optimizer))


def compiled(model: nn.Module, optimizer: Optimizer) -> None:
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    loss_of(model, 0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what it cannot trace
        step()


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
    a_closure,
    a_closure_as_keyword,
]


# What can carry it


class NestedSGD(torch.optim.SGD):
    """A step within a step: PyTorch runs the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class TwiceNestedAdam(torch.optim.Adam):
    """Evaluates the closure itself, and updates twice in one step: the second time by nothing."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        for group in self.param_groups:
            group["lr"], lr = 0.0, group["lr"]
            moments = [s["exp_avg"].clone() for s in self.state.values() if s]
            super().step()
            for s, moment in zip(filter(None, self.state.values()), moments, strict=True):
                s["exp_avg"].copy_(moment)
            group["lr"] = lr
        return loss


def optimizer_of(model: nn.Module, name: str) -> Optimizer:
    parameters = list(model.parameters())
    adam = {"lr": 0.01, "betas": (BETA, 0.99)}
    # PyTorch hooks a class when its first instance is made.
    torch.optim.SGD(parameters, lr=1.0), torch.optim.Adam(parameters)
    return {
        "sgd-nested": lambda: NestedSGD(parameters, lr=1.0),
        "adam-nested": lambda: TwiceNestedAdam(parameters, foreach=False, **adam),
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
    "sgd-nested",
    "adam-nested",
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
def test_the_multiplier_is_one(drive, name, mode, record_property):
    measure(drive, name, mode, record_property)


@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="torch.compile cannot run")
@pytest.mark.parametrize("name", ["sgd", "sgd-nested", "adamw-foreach"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_the_multiplier_of_a_compiled_step_is_one(name, mode, record_property):
    measure(compiled, name, mode, record_property)


def measure(drive: Any, name: str, mode: str, record: Record) -> None:
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
    measured = {}
    for n in penalized(mlp()):
        if mode == "coupled":
            # SGD decays what has a gradient; where the loss gave none, the penalty does.
            decays = drive is without_any_gradient and (name, n) == ("sgd-groups", "2.weight")
            decay = 0.1 * before[n] if decays else 0.0
            measured[n] = (used[n] - plain_used[n] - decay) / (STRENGTH * before[n])
        else:
            measured[n] = (plain_after[n] - after[n]) / (STRENGTH * plain_after[n])
    check_multiplier(record, f"{drive.__name__}, {name}", mode, measured)
    assert pruner.steps == 1
    pruner.detach()


@pytest.mark.parametrize("name", ["sgd", "sgd-nested"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_that_raised_does_not_change_the_multiplier_of_the_next(name, mode, record_property):
    model = mlp().double()
    optimizer = optimizer_of(model, name)
    pruner = attach(model, optimizer=optimizer, mode=mode)

    def fail() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    assert pruner.steps == 0
    before = weights_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = weights_of(model)
    measured = {n: (before[n] - after[n]) / (STRENGTH * before[n]) for n in penalized(mlp())}
    check_multiplier(record_property, f"after a step that raised, {name}", mode, measured)
    assert pruner.steps == 1
    pruner.detach()


# Without an optimizer


@pytest.mark.parametrize("scale", [SCALE, lambda: SCALE], ids=["number", "callable"])
@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("block", [False, True])
def test_hooks_share_the_penalty_among_batches_and_scale_it(
    scale, batches, mode, block, record_property
):
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
    measured = {
        n: (plain[n] - after[n]) / (STRENGTH * (before if mode == "coupled" else plain)[n])
        for n in penalized(mlp())
    }
    case = f"no optimizer, {batches} batches, {'blocked, ' * block}scaled"
    check_multiplier(record_property, case, mode, measured)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_hooks_under_checkpointing(reentrant, shared, mode, record_property):
    """Reentrant checkpointing brings a shared layer's gradient in parts: attach the optimizer."""
    by_optimizer = reentrant and shared
    runs = []
    for penalty in (True, False):
        model = mlp().double()
        before, optimizer = weights_of(model), torch.optim.SGD(model.parameters(), lr=1.0)
        given = {"optimizer": optimizer if by_optimizer else None, "mode": mode}
        pruner = attach(model, **given) if penalty else None
        x = tokens(0, 5, 4).double().requires_grad_()
        for _ in range(1 + shared):
            y = checkpoint(model, x, use_reentrant=reentrant)
            x = torch.cat([y, y], dim=1)
        y.square().mean().backward()
        optimizer.step()
        if pruner is not None:
            if not by_optimizer:
                pruner.step()
            pruner.detach()
        runs.append(weights_of(model))
    after, plain = runs
    measured = {
        n: (plain[n] - after[n]) / (STRENGTH * (before if mode == "coupled" else plain)[n])
        for n in penalized(mlp())
    }
    case = f"checkpointing, {'' if reentrant else 'not '}reentrant, {'shared' * shared or 'once'}, "
    case += "sgd" if by_optimizer else "no optimizer"
    check_multiplier(record_property, case, mode, measured)


def test_the_penalty_is_no_part_of_the_graph():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = attach(model, optimizer=optimizer, block_loss_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # create_graph makes a reference cycle
        loss_of(model, 0).backward(create_graph=True)
    gradients = [model[i].weight.grad for i in (0, 2)]
    graphs = [gradient.grad_fn for gradient in gradients]
    optimizer.step()
    assert None not in graphs
    assert [gradient.grad_fn for gradient in gradients] == graphs
    pruner.detach()


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
