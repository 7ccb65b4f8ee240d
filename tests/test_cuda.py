"""What only a CUDA device can show: equal masks, no waiting, and what a fused scaler step does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import linear, mlp, same, tokens, weights_of
from torch import Tensor, nn

import torch_rsst
from torch_rsst import (
    RSST,
    Refill,
    RegularizedPruner,
    apply_mask,
    extract_mask,
    find_groups,
    regroup,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.fixture
def twins(tiny_transformer: Any) -> tuple[nn.Module, nn.Module]:
    """The same weights, many of them tied in magnitude, on the CPU and on the device."""
    model = tiny_transformer(depth=3, dim=32, num_heads=4, hidden=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 16).round() / 16)
    return model, copy.deepcopy(model).to(DEVICE)


@pytest.mark.parametrize(
    ("method", "kwargs"), [(RSST, {"mode": "decoupled"}), (Refill, {})], ids=["RSST", "Refill"]
)
@pytest.mark.parametrize("amount", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["layer", "type", "global"])
@pytest.mark.filterwarnings("ignore::torch_rsst.utils.errors.RoundWarning")  # 0.9 empties layers
def test_masks_equal_those_of_the_cpu(twins, method, kwargs, amount, scope):
    chosen = []
    for model in twins:
        rounds = method(
            model,
            find_groups(model),
            steps_per_round=1,
            rounds=2,
            amount=amount,
            regroup_amount=0.5,
            scope=scope,
            **kwargs,
        )
        for rnd in rounds:
            rnd.pruner.step()
            chosen.append((rnd.current_mask, rnd.refill_mask))
            assert all(mask.device == model.head.weight.device for mask in rnd.refill_mask.values())
    half = len(chosen) // 2
    for cpu, device in zip(chosen[:half], chosen[half:], strict=True):
        for expected, found in zip(cpu, map(on_cpu, device), strict=True):
            assert expected.keys() == found.keys()
            assert all(same(found[name], mask) for name, mask in expected.items())


def waits(work: Callable[[], object]) -> int:
    """How often a call waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught)


def test_waits_are_seen():
    assert waits(lambda: torch.ones(3, device=DEVICE).sum().item()) == 1


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "float64"])
@pytest.mark.parametrize("values", ["random", "ties"])
def test_a_call_waits_for_the_device_at_most_four_times(kind, values):
    layers = nn.ModuleList(nn.Linear(600, 500, bias=False) for _ in range(4)).to(DEVICE)
    for layer in layers:
        if values == "ties":
            nn.init.ones_(layer.weight)
        if kind == "transposed":
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    if kind == "float64":
        layers.double()
    parameters = [(layer, "weight") for layer in layers]
    for amount in (0.2, 0.5, 1000, 0):
        call = partial(torch_rsst.global_unstructured, parameters, torch_rsst.GlobalL1)
        assert waits(partial(call, amount=amount)) <= 4


def attached(mode: str, by_hooks: bool, **kwargs: Any) -> tuple[Any, Any, RegularizedPruner]:
    model = mlp().to(DEVICE)
    apply_mask(model, {"0.weight": torch.arange(32).reshape(8, 4) % 3 > 0})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = RegularizedPruner(
        model,
        regroup(model, find_groups(model)),
        total_steps=4,
        mode=mode,
        optimizer=None if by_hooks else optimizer,
        **kwargs,
    )
    return model, optimizer, pruner


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("by_hooks", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_penalty_step_does_not_wait_for_the_device(mode, by_hooks, block):
    model, optimizer, pruner = attached(mode, by_hooks, block_loss_grad=block)
    x = tokens(0, 5, 4).to(DEVICE)
    for step in range(2):  # the first loads kernels
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if by_hooks:
                pruner.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert pruner.steps == 2
    pruner.remove()


def test_the_penalty_follows_a_model_to_the_device():
    model = linear()
    goes = torch.arange(12).reshape(3, 4) % 2 > 0
    pruner = RegularizedPruner(
        model, {"weight": ~goes}, total_steps=1, schedule="linear", mode="decoupled"
    )
    before = model.weight.detach().clone()
    model.to(DEVICE)
    pruner.step()
    assert same(model.weight.cpu(), torch.where(goes, before * 0.5, before))
    pruner.detach()


FUSED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("unscale", [False, True])
def test_the_multiplier_is_one_under_a_fused_scaler_step(mode, unscale):
    runs = []
    for penalty in (True, False):
        model = mlp().to(DEVICE)
        before, optimizer = weights_of(model), FUSED["sgd"](model.parameters())
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
        refill = regroup(model, find_groups(model))
        settings: Any = {"total_steps": 1, "schedule": "linear", "mode": mode}
        pruner = (
            RegularizedPruner(model, refill, optimizer=optimizer, **settings) if penalty else None
        )
        scaler.scale(model(tokens(0, 5, 4).to(DEVICE)).square().mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        runs.append(weights_of(model))
        if pruner is not None:
            assert pruner.steps == 1
            pruner.detach()
    after, plain = runs
    for name, stays in refill.items():
        base = before[name] if mode == "coupled" else plain[name]
        torch.testing.assert_close(
            (plain[name] - after[name]) / (0.5 * base), (~stays).float(), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_skipped_on_the_device_does_not_shrink(mode, name):
    model = mlp().to(DEVICE)
    optimizer = FUSED[name](model.parameters())
    scaler = torch.amp.GradScaler(DEVICE)
    refill = regroup(model, find_groups(model))
    pruner = RegularizedPruner(model, refill, total_steps=2, mode=mode, optimizer=optimizer)
    before = weights_of(model)
    for factor, steps in ((torch.inf, 1), (1.0, 2)):
        optimizer.zero_grad()
        loss = model(tokens(0, 5, 4).to(DEVICE)).square().mean()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert pruner.steps == steps
        unchanged = [same(w, before[n]) for n, w in weights_of(model).items()]
        assert all(unchanged) if steps == 1 else not any(unchanged)
    pruner.detach()


@pytest.mark.parametrize("method", [RSST, Refill])
def test_rounds_train_and_resume_on_the_device(twins, tiny_transformer, method):
    _, model = twins
    groups = find_groups(model)

    def rounds_of(model: nn.Module) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(model.parameters())
        rounds = method(
            model,
            groups,
            optimizer=optimizer,
            steps_per_round=2,
            rounds=2,
            regroup_amount=0.5,
            rewind="init",
        )
        return rounds, optimizer

    rounds, optimizer = rounds_of(model)
    for _ in rounds:
        for step in range(2):
            optimizer.zero_grad()
            model(tokens(step, 2, 5, 32).to(DEVICE)).square().mean().backward()
            optimizer.step()
    saved = rounds.state_dict()
    for part in ("current_mask", "refill_mask"):  # as after torch.load(map_location="cpu")
        saved["round"][part] = on_cpu(saved["round"][part])
    again = tiny_transformer(depth=3, dim=32, num_heads=4, hidden=64).to(DEVICE)
    resumed, _ = rounds_of(again)
    resumed.load_state_dict(saved)
    again.load_state_dict(model.state_dict())
    for each in (rounds, resumed):
        each.finalize()
    first, second = extract_mask(model), extract_mask(again)
    assert all(same(second[name], mask) for name, mask in first.items())
    assert resumed.report().gone("heads") == rounds.report().gone("heads") == 6


def test_variance_and_reconstruction_agree_with_the_cpu(twins):
    batches = [tokens(i, 8, 5, 32) for i in range(2)]
    for model in twins:
        on_device = [batch.to(next(model.parameters()).device) for batch in batches]
        groups = find_groups(model)
        arguments = {"importance": "variance", "batches": on_device}
        refill = regroup(model, groups, amount=0.5, **arguments)
        torch_rsst.reconstruct(model, groups, refill, batches=on_device)
    first, second = (on_cpu(weights_of(model)) for model in twins)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-2, atol=1e-3)
