"""Replicas on several ranks agree on every mask, or all of them raise and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torch_rsst

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without distributed"
)
WORLD = 2


def _wrapped() -> DistributedDataParallel:
    return DistributedDataParallel(mlp())


def _corrupt(model: nn.Module, rank: int) -> None:
    """What a bit flip or a missed broadcast does to one rank."""
    if rank == 1:
        with torch.no_grad():
            next(model.parameters()).view(-1)[3] = 1e-6


def _poison(model: nn.Module, rank: int) -> None:
    if rank == 1:
        with torch.no_grad():
            next(model.parameters()).view(-1)[3] = float("nan")


def _outcome(model: nn.Module, act: Callable[[], object]) -> tuple[str, bool, list[int]]:
    """The error, whether the model is as it was, and the masks as numbers."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        act()
        error = ""
    except (RuntimeError, ValueError, KeyError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    after = model.state_dict()
    same = before.keys() == after.keys() and all(
        before[key].allclose(after[key], 0.0, 0.0, equal_nan=True) for key in before
    )
    return error, same, [int(m.sum()) for m in torch_rsst.extract_mask(model).values()]


def _prune(model: DistributedDataParallel) -> Callable[[], None]:
    refs = [(model.module[0], "weight"), (model.module[2], "weight")]
    return lambda: torch_rsst.global_unstructured(
        refs, torch_rsst.GlobalL1, process_group=dist.group.WORLD, amount=0.3
    )


def _rounds(model: DistributedDataParallel) -> Callable[[], object]:
    groups = torch_rsst.find_groups(model.module)
    return lambda: next(
        iter(torch_rsst.Refill(model, groups, steps_per_round=1, rounds=2, amount=0.5))
    )


def _apply(model: DistributedDataParallel, rank: int, wrong: str) -> Callable[[], None]:
    masks = {"0.weight": torch.ones(8, 4, dtype=torch.bool)}
    if rank == 1:
        if wrong == "name":
            masks = {"nobody": masks["0.weight"]}
        elif wrong == "value":
            masks["0.weight"][0, 0] = False
    return lambda: torch_rsst.apply_mask(model, masks)


def _all_cases(rank: int) -> dict[str, Any]:
    """One start of processes for all cases: starting them is what takes time."""
    results: dict[str, Any] = {}
    for name, spoil in [("equal", lambda m, r: None), ("corrupt", _corrupt), ("nan", _poison)]:
        for call, make in [("global", _prune), ("rounds", _rounds)]:
            model = _wrapped()
            act = make(model)
            spoil(model, rank)
            results[f"{call} {name}"] = _outcome(model, act)
    for wrong in ("nothing", "name", "value"):
        model = _wrapped()
        results[f"apply {wrong}"] = _outcome(model, _apply(model, rank, wrong))
    results["trained"] = _train(rank)
    return results


def _train(rank: int) -> list[float]:
    """Pruned after wrapping a model without buffers: the ranks see other data and stay equal."""
    model = _wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    groups = torch_rsst.find_groups(model.module)
    refill = torch_rsst.Refill(
        model, groups, optimizer=optimizer, steps_per_round=3, rounds=2, regroup_amount=0.5
    )
    generator = torch.Generator().manual_seed(rank)
    for rnd in refill:
        for _ in range(rnd.start_step, 3):
            optimizer.zero_grad()
            model(torch.randn(5, 4, generator=generator)).square().mean().backward()
            optimizer.step()
    refill.finalize()
    return [*map(float, torch.cat([t.reshape(-1) for t in model.state_dict().values()]))]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    return on_ranks(WORLD, _all_cases)


@pytest.mark.parametrize("case", ["global equal", "rounds equal", "apply nothing"])
def test_equal_replicas_get_equal_masks(outcomes: list[dict[str, Any]], case: str) -> None:
    (error, _, masks), other = outcomes[0][case], outcomes[1][case]
    assert error == ""
    assert masks
    assert masks == other[2]


@pytest.mark.parametrize("case", ["global corrupt", "rounds corrupt", "apply value"])
def test_a_corrupted_rank_raises_on_every_rank(outcomes: list[dict[str, Any]], case: str) -> None:
    for outcome in outcomes:
        error, unchanged, masks = outcome[case]
        assert error.startswith(
            "RuntimeError: replicas: expected the same masks on every rank, got others on rank(s) "
            "[1] than on lower ranks for "
        )
        assert error.endswith("broadcast parameters and buffers from one rank first.")
        assert unchanged
        assert masks == []


@pytest.mark.parametrize(
    ("case", "own"),
    [
        ("global nan", "ValueError: scores of "),
        ("rounds nan", "ValueError: scores of "),
        ("apply name", "MissingNameError: "),
    ],
)
def test_an_error_on_one_rank_leaves_none_waiting(
    outcomes: list[dict[str, Any]], case: str, own: str
) -> None:
    assert outcomes[1][case][0].startswith(own)
    assert outcomes[0][case][0].startswith(
        f"RuntimeError: replicas: expected the same masks on every rank, got an error on rank(s) [1]: {own}"
    )
    assert all(outcome[case][1] for outcome in outcomes)


def test_masks_set_after_wrapping_train_to_equal_replicas(outcomes: list[dict[str, Any]]) -> None:
    assert outcomes[0]["trained"] == outcomes[1]["trained"]
    assert outcomes[0]["trained"].count(0.0) > 0
