"""Runs for importance from data: one batch at a time, without a trace, however the model is wrapped."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from activation_oracle import NAMES, loss_fn, measured
from ranks import on_ranks
from tiny_models import mlp, tokens
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst import RSST, find_groups, measure_importance, regroup
from torch_rsst.groups.groups import Groups
from torch_rsst.importance import (
    DataImportance,
    weighted_sum,
)

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]

FSDP_ON_CPU = dist.is_available() and hasattr(torch.cpu.Stream, "record_event")

# Streaming


def test_one_batch_is_held_at_a_time():
    model, groups = mlp(), find_groups(mlp())
    refs: list[Any] = []
    outputs: list[Any] = []
    alive: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number in range(12):
            alive.append(sum(ref() is not None for ref in (*refs, *outputs)))
            batch = tokens(number, 5, 4)
            refs.append(weakref.ref(batch))
            yield batch
            del batch

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(batch)
        outputs.append(weakref.ref(output))
        return output

    measured(model, groups, "taylor", batches, forward=forward)
    assert len(alive) == 12
    assert max(alive) <= 1  # the batch that the loop has not let go of yet


# No trace


def restless() -> nn.Sequential:
    """Part of it in training mode, gradients there, one hook of the user's, masks."""
    model = nn.Sequential(mlp(4, 6), nn.Dropout(0.5), nn.Linear(2, 4), nn.BatchNorm1d(4), mlp(4, 8))
    model[0].eval()
    model(tokens(0, 5, 4)).sum().backward()
    model[0][2].register_forward_pre_hook(lambda *_: None)
    torch_rsst.apply_mask(model, {"0.0.weight": torch.rand(6, 4) < 0.5})
    return model


def disturb(model: nn.Module, batch: Tensor) -> Tensor:
    """Draws random numbers of all kinds, and changes modes."""
    random.random()
    torch.rand(3)
    if numpy is not None:
        numpy.random.rand()
    model[1].train()
    return model(batch)


class Stop(BaseException):
    pass


def states() -> list[Any]:
    of_numpy = None if numpy is None else numpy.random.get_state()[1].tolist()
    return [random.getstate(), of_numpy, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["nowhere", "batches", "forward", "loss", "entries"])
def test_everything_is_put_back_whatever_happens(name, where, fingerprint):
    model = restless()
    groups = find_groups(model)
    stock.l1_unstructured(model[4][2], "weight", 0.5)  # after it, stock modules cannot be copied
    current = {"0.0.weight": torch.rand(6, 4) < 0.5, "2.weight": torch.rand(4, 2) < 0.5}

    def batches() -> Iterator[Tensor]:
        torch.rand(1)
        yield tokens(0, 5, 4)
        if where == "batches":
            raise Stop
        yield tokens(1, 5, 4)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        output = disturb(model, batch)
        if where == "forward":
            raise Stop
        return output

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        if where == "loss":
            raise Stop
        return output.sum()

    class Failing(DataImportance):
        needs_gradient = name == "taylor"

        def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
            raise Stop

    importance = Failing() if where == "entries" else name
    before, own = fingerprint(model), states()
    expected = where != "nowhere" and (where != "loss" or name == "taylor")
    arguments = {"batches": batches, "forward": forward, "loss_fn": loss, "current_mask": current}
    if expected:
        with pytest.raises(Stop):
            measure_importance(model, groups, importance, **arguments)
    else:
        measure_importance(model, groups, importance, **arguments)
    assert fingerprint(model) == before
    assert states() == own
    assert torch.overrides._get_current_function_mode() is None
    assert torch.is_grad_enabled()


def test_a_graph_that_waits_for_backward_is_not_broken():
    model = mlp()
    groups = find_groups(model)
    loss = model(tokens(0, 5, 4)).square().sum()
    current = {"0.weight": torch.zeros(8, 4, dtype=torch.bool)}
    measured(model, groups, "taylor", [tokens(1, 5, 4)], current_mask=current)
    loss.backward()
    fresh = mlp()
    fresh(tokens(0, 5, 4)).square().sum().backward()
    assert torch.equal(model[0].weight.grad, fresh[0].weight.grad)


def test_the_gradients_of_a_penalty_are_not_disturbed():
    model = mlp()
    groups = find_groups(model)
    refill = {"0.weight": torch.zeros(8, 4, dtype=torch.bool)}
    pruner = torch_rsst.RegularizedPruner(model, refill, total_steps=1)
    measured(model, groups, "taylor", [tokens(1, 5, 4)])
    assert (pruner.steps, model[0].weight.grad) == (0, None)
    (0.0 * model[0].weight.sum()).backward()
    torch.testing.assert_close(model[0].weight.grad, pruner.strength * model[0].weight.detach())
    pruner.detach()


def test_the_model_runs_in_eval_mode_unless_the_forward_says_otherwise():
    model = nn.Sequential(mlp(4, 6), nn.Dropout(0.5)).train()
    modes = []
    groups = find_groups(model)
    for forward in (None, lambda m, b: m.train()(b)):
        handle = model[1].register_forward_pre_hook(lambda m, _: modes.append(m.training))
        measured(model, groups, "l1", [tokens(0, 5, 4)], forward=forward)
        handle.remove()
    assert modes == [False, True]
    assert model[1].training


# Autocast, compiled and replicated models


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    model, batches = mlp(), [tokens(i, 5, 4) for i in range(2)]
    groups = find_groups(model)
    expected = measured(model, groups, name, batches)
    with torch.autocast("cpu", torch.bfloat16):
        model(batches[0])  # weights that autocast keeps converted
        got = measured(model, groups, name, batches)
        model(batches[0]).float().sum().backward()
    assert all(torch.allclose(got[k], s, rtol=0.05) for k, s in expected.items())
    assert not all(torch.equal(got[k], s) for k, s in expected.items())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_autocast_keeps_converted_are_not_mixed_up(name):
    model, batches = mlp(), [tokens(0, 5, 4)]
    groups = find_groups(model)
    current = {"0.weight": torch.rand(8, 4) < 0.5}
    other = mlp()
    torch_rsst.apply_mask(other, current)
    with torch.autocast("cpu", torch.bfloat16):
        expected = measured(other, groups, name, batches)
        before = model(batches[0])
        got = measured(model, groups, name, batches, current_mask=current)
        assert all(torch.equal(got[k], s) for k, s in expected.items())
        after = model(batches[0])
        assert torch.equal(before, after)
        after.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_models(name):
    model = mlp().bfloat16()
    batches = [tokens(0, 50, 4).bfloat16()]
    expected = measured(mlp(), find_groups(mlp()), name, [tokens(0, 50, 4)])
    got = measured(model, find_groups(mlp()), name, batches)
    assert all(torch.allclose(got[k], s, rtol=0.05) for k, s in expected.items())


def test_compiled_models(fingerprint):
    plain = nn.Sequential(mlp(4, 6), nn.Linear(2, 4), mlp(4, 8))
    groups, batches = find_groups(plain), [tokens(i, 5, 4) for i in range(2)]
    outside, inside, in_place = (copy.deepcopy(plain) for _ in range(3))
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    inside[2] = torch.compile(inside[2], backend=backend)
    in_place.compile(backend=backend)
    for model in (torch.compile(outside, backend=backend), inside, in_place):
        model(batches[0])  # compiled before there are hooks
        before = len(compiled)
        for name in NAMES:
            expected = measured(plain, groups, name, batches)
            got = measured(model, groups, name, batches)
            assert all(torch.equal(got[k], s) for k, s in expected.items())
        model(batches[0])
        assert len(compiled) == before > 0  # nothing was compiled anew


def replicated(rank: int) -> Any:
    model = DistributedDataParallel(mlp().double())
    groups = find_groups(model.module)

    def batches(failing: int | None = None) -> Iterator[Tensor]:
        if rank == failing:
            raise ValueError("no such file")
        for number in range(1 + rank):  # ranks may have different numbers of them
            yield tokens(10 * rank + number, 5, 4).double()

    names = (*NAMES, weighted_sum({"taylor": 1.0, "l2": 2.0}))
    scores = [regroup_scores(model, groups, name, batches) for name in names]
    failures = []
    rounds = RSST(model, groups, steps_per_round=1, rounds=1, importance="l2", batches=batches)
    broken = RSST(
        model, groups, steps_per_round=1, importance="l2", batches=lambda: batches(failing=1)
    )
    for fails in (
        lambda: regroup(model, groups, importance="l1", batches=lambda: batches(failing=1)),
        lambda: next(broken),
    ):
        try:
            fails()
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    refill = next(rounds).refill_mask
    return (
        scores,
        {name: mask.tolist() for name, mask in refill.items()},
        failures,
    )


CURRENT = {
    "0.weight": torch.arange(32).reshape(8, 4) % 5 != 0,
    "2.weight": torch.arange(16).reshape(2, 8) % 3 != 0,
}


def sharded(rank: int) -> list[list[float]]:
    """Under masks other than the model's own; a training step afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, groups = mlp().double(), find_groups(mlp())
    torch_rsst.apply_mask(model, {"0.weight": torch.arange(32).reshape(8, 4) % 3 != 0})
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    scores = []
    for name in NAMES:
        (found,) = measured(
            model, groups, name, [tokens(rank, 5, 4).double()], current_mask=CURRENT
        ).values()
        scores.append(found.tolist())
    assert all(p.grad is None for p in model.parameters())
    loss_fn(model(tokens(0, 5, 4).double()), None).backward()
    gradient = model[2].weight.grad.full_tensor()
    return [*scores, gradient.flatten().tolist()]


@pytest.mark.skipif(not FSDP_ON_CPU, reason="this torch runs FSDP2 on GPUs only")
def test_sharded_models_add_up_the_batches_of_all_ranks():
    first, second = on_ranks(2, sharded)
    assert first == second
    model, batches = mlp().double(), [tokens(rank, 5, 4).double() for rank in range(2)]
    for name, got in zip(NAMES, first, strict=False):
        found = measured(model, find_groups(model), name, batches, current_mask=CURRENT)
        assert got == pytest.approx(next(iter(found.values())).tolist(), rel=1e-12)
    torch_rsst.apply_mask(model, {"0.weight": torch.arange(32).reshape(8, 4) % 3 != 0})
    loss_fn(model(batches[0]), None).backward()
    assert first[-1] == pytest.approx(model[2].weight.grad.flatten().tolist(), rel=1e-12)


def regroup_scores(model: nn.Module, groups: Groups, name: Any, batches: Any) -> list[float]:
    (scores,) = measured(model, groups, name, batches).values()
    return scores.tolist()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_ranks_add_up_their_batches_and_all_raise_where_one_fails():
    first, second = on_ranks(2, replicated)
    assert first[:2] == second[:2]
    model = mlp().double()
    batches = [tokens(number, 5, 4).double() for number in (0, 10, 11)]
    for name, got in zip(NAMES, first[0], strict=False):
        expected = regroup_scores(model, find_groups(model), name, batches)
        assert got == pytest.approx(expected, rel=1e-12)
    assert second[2] == ["ValueError: no such file"] * 2
    for failure in first[2]:
        assert failure.startswith("RuntimeError: replicas: ")
        assert "an error on rank(s) [1]: ValueError: no such file" in failure
