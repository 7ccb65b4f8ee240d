"""The penalty under DistributedDataParallel: its multiplier is 1 on every rank, however steps are driven."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from multipliers import STRENGTH, attach, check_multiplier, loss_of, penalized
from ranks import on_ranks
from tiny_models import mlp, same, tokens, weights_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without distributed"
)
WORLD = 2
BATCHES = 4


def in_one_batch(model: DistributedDataParallel, rank: int) -> None:
    loss_of(model, rank).backward()


def in_four_batches(model: DistributedDataParallel, rank: int) -> None:
    for number in range(BATCHES):
        (loss_of(model, 10 * rank + number) / BATCHES).backward()


def in_four_batches_without_sync(model: DistributedDataParallel, rank: int) -> None:
    for number in range(BATCHES):
        with model.no_sync() if number < BATCHES - 1 else nullcontext():
            (loss_of(model, 10 * rank + number) / BATCHES).backward()


DRIVES: dict[str, tuple[Callable[[DistributedDataParallel, int], None], int]] = {
    "in_one_batch": (in_one_batch, 1),
    "in_four_batches": (in_four_batches, BATCHES),
    "in_four_batches_without_sync": (in_four_batches_without_sync, BATCHES),
}
CARRIERS = ["one optimizer", "two optimizers", "no optimizer"]
MODES = ["coupled", "decoupled"]
VIEWS = [False, True]


def wrapped(as_view: bool) -> DistributedDataParallel:
    return DistributedDataParallel(mlp().double(), gradient_as_bucket_view=as_view)


def optimizers_of(model: nn.Module, carrier: str) -> list[torch.optim.SGD]:
    parts = [model.parameters()]
    if carrier == "two optimizers":
        parts = [model.module[0].parameters(), model.module[2].parameters()]
    return [torch.optim.SGD(part, lr=1.0) for part in parts]


def train(
    rank: int, drive: str, carrier: str, mode: str | None, as_view: bool
) -> dict[str, Tensor]:
    """The weights after one step; without a penalty where there is no mode."""
    model = wrapped(as_view)
    optimizers = optimizers_of(model, carrier)
    run, batches = DRIVES[drive]
    given: dict[str, Any] = {"optimizer": optimizers}
    if carrier == "no optimizer":
        given = {"accumulation_steps": batches}
    pruner = None if mode is None else attach(model, mode=mode, **given)
    run(model, rank)
    for optimizer in optimizers:
        optimizer.step()
    if pruner is not None:
        if carrier == "no optimizer":
            pruner.step()
        assert pruner.steps == 1
        pruner.detach()
    return weights_of(model.module)


def train_in_all_ways(rank: int) -> dict[Any, dict[str, Tensor]]:
    return {
        (drive, carrier, mode, as_view): train(rank, drive, carrier, mode, as_view)
        for drive in DRIVES
        for carrier in CARRIERS
        for mode in (*MODES, None)
        for as_view in VIEWS
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, dict[str, Tensor]]]:
    """What every way of training gives on each rank: the processes start once."""
    return on_ranks(WORLD, train_in_all_ways)


@pytest.mark.parametrize("as_view", VIEWS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("drive", DRIVES)
def test_the_multiplier_is_one_on_every_rank(ranks, drive, carrier, mode, as_view, record_property):
    start = weights_of(mlp().double())
    for found in ranks:
        after, plain = (found[drive, carrier, m, as_view] for m in (mode, None))
        measured = {
            n: (plain[n] - after[n]) / (STRENGTH * (start if mode == "coupled" else plain)[n])
            for n in penalized(mlp())
        }
        case = f"DDP, {drive}, {carrier}{', views' * as_view}"
        check_multiplier(record_property, case, mode, measured)


def test_the_ranks_stay_equal(ranks):
    first, second = ranks
    assert len(first) == len(DRIVES) * len(CARRIERS) * 3 * len(VIEWS)
    for way, weights in first.items():
        assert all(same(weight, second[way][n]) for n, weight in weights.items())


def test_the_ranks_have_seen_each_other_s_gradients(ranks):
    """Otherwise these tests would measure nothing that has to do with DDP."""
    model = mlp().double()
    (
        sum(model(tokens(rank, 5, 4).double()).square().mean() for rank in range(WORLD)) / WORLD
    ).backward()
    start = weights_of(mlp().double())
    found = ranks[0]["in_one_batch", "one optimizer", None, False]
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(found[n], start[n] - parameter.grad, rtol=1e-12, atol=1e-15)
