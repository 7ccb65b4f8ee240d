"""Replicas on several ranks agree on every mask, or all of them raise and change nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torch_rsst
from torch_rsst.distributed.replicas import _digest
from torch_rsst.testing import assert_mask_invariants

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


def _rounds(model: nn.Module, **group: Any) -> Callable[[], object]:
    groups = torch_rsst.find_groups(getattr(model, "module", model))
    options: dict[str, Any] = {"steps_per_round": 1, "rounds": 2, "amount": 0.5, **group}
    return lambda: next(iter(torch_rsst.Refill(model, groups, **options)))


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
    unwrapped = _wrapped().module
    act = _rounds(unwrapped, process_group=dist.group.WORLD)
    _corrupt(unwrapped, rank)
    results["unwrapped corrupt"] = _outcome(unwrapped, act)
    results["trained"] = _train(rank)
    results |= _stock_shaped(rank)
    return results


STOCK_SHAPED: dict[str, Callable[..., object]] = {
    "identity": torch_rsst.identity,
    "random_unstructured": partial(torch_rsst.random_unstructured, amount=0.5),
    "random_structured": partial(torch_rsst.random_structured, amount=0.5, dim=0),
    "l1_unstructured": partial(torch_rsst.l1_unstructured, amount=0.5),
    "ln_structured": partial(torch_rsst.ln_structured, amount=0.5, n=2, dim=0),
    "custom_from_mask": partial(torch_rsst.custom_from_mask, mask=torch.eye(8, 4)),
    "head_structured": partial(
        torch_rsst.head_structured, amount=0.5, num_heads=4, projections=1, importance="magnitude"
    ),
    "fillback": partial(torch_rsst.fillback, rate=0.5),
    "global_unstructured": lambda module, name, **group: torch_rsst.global_unstructured(
        [(module, name), (module, "bias")], torch_rsst.RandomUnstructured, amount=0.5, **group
    ),
}
RANDOM = ("random_unstructured", "random_structured", "global_unstructured")


def _stock_shaped(rank: int) -> dict[str, Any]:
    """Every stock-shaped call: alike, where ranks differ, where one fails; random ones without a group."""
    results: dict[str, Any] = {}

    def run(call: str, spoil: Callable[[nn.Module, int], None], **group: Any) -> tuple[Any, ...]:
        model = mlp()
        if call == "fillback":
            torch_rsst.custom_from_mask(model[0], "weight", torch.eye(8, 4))
        spoil(model, rank)
        torch.manual_seed(rank)  # as with a seed for the data of each rank
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", torch_rsst.RSSTWarning)
            outcome = _outcome(model, lambda: STOCK_SHAPED[call](model[0], "weight", **group))
        masks = {name: m.tolist() for name, m in torch_rsst.extract_mask(model).items()}
        if not outcome[0]:
            assert_mask_invariants(model)
        return *outcome, masks, [(w.category, str(w.message), w.filename) for w in caught]

    for call in STOCK_SHAPED:
        for name, spoil in [("alike", _nothing), ("corrupt", _roll), ("fails", _obstruct)]:
            results[f"{call} {name}"] = run(call, spoil, process_group=dist.group.WORLD)
        results[f"{call} alone"] = run(call, _nothing)
    return results


def _nothing(model: nn.Module, rank: int) -> None:
    """Ranks alike."""


def _roll(model: nn.Module, rank: int) -> None:
    if rank == 1:
        with torch.no_grad():
            model[0].weight.copy_(model[0].weight.roll(2, 0))


def _obstruct(model: nn.Module, rank: int) -> None:
    """A rank whose parameter cannot be masked, as a name is in use, or given back, as it is dense."""
    if rank == 1:
        torch_rsst.remove_all(model, freeze_zeros=False)
        model[0].weight_mask = torch.ones(1)


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


@pytest.mark.parametrize(
    "case", ["global corrupt", "rounds corrupt", "unwrapped corrupt", "apply value"]
)
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


def test_masks_that_differ_between_ranks_are_named(outcomes: list[dict[str, Any]]) -> None:
    assert "than on lower ranks for '0.weight'. " in outcomes[0]["apply value"][0]


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


@pytest.mark.parametrize("call", RANDOM)
def test_a_random_choice_of_the_first_rank_is_taken_on_all(
    outcomes: list[dict[str, Any]], call: str
) -> None:
    (error, _, _, masks, warned), other = outcomes[0][f"{call} alike"], outcomes[1][f"{call} alike"]
    assert error == other[0] == ""
    assert masks == other[3]
    assert masks == outcomes[0][f"{call} alone"][3]  # the first rank draws what it draws by itself
    assert masks != outcomes[1][f"{call} alone"][3]
    assert warned == other[4] == []


@pytest.mark.parametrize("call", RANDOM)
def test_random_masks_without_a_group_warn_on_several_ranks(
    outcomes: list[dict[str, Any]], call: str
) -> None:
    for outcome in outcomes:
        [(category, text, filename)] = outcome[f"{call} alone"][4]
        assert category is torch_rsst.ReplicaWarning
        assert text == (
            f"{call} with random choices on 2 ranks: expected process_group=, got none: ranks with other "
            "seeds choose other masks. Pass process_group=torch.distributed.group.WORLD, or the group "
            "of ranks that hold replicas: the first one chooses for all."
        )
        assert filename == __file__


@pytest.mark.parametrize("call", [call for call in STOCK_SHAPED if call not in RANDOM])
def test_what_is_not_random_does_not_warn_and_must_agree(
    outcomes: list[dict[str, Any]], call: str
) -> None:
    for outcome in outcomes:
        error, _, _, masks, warned = outcome[f"{call} alike"]
        assert error == ""
        assert masks == outcomes[0][f"{call} alone"][3]
        assert warned == outcome[f"{call} alone"][4] == []


@pytest.mark.parametrize("call", ["l1_unstructured", "ln_structured", "head_structured"])
def test_a_stock_shaped_call_on_replicas_that_differ_raises_on_every_rank(
    outcomes: list[dict[str, Any]], call: str
) -> None:
    for outcome in outcomes:
        error, unchanged, masks, _, _ = outcome[f"{call} corrupt"]
        assert error.startswith(
            "RuntimeError: replicas: expected the same masks on every rank, got others on rank(s) "
            "[1] than on lower ranks for "
        )
        assert unchanged
        assert masks == []


@pytest.mark.parametrize("call", STOCK_SHAPED)
def test_a_stock_shaped_call_that_fails_on_one_rank_leaves_none_waiting(
    outcomes: list[dict[str, Any]], call: str
) -> None:
    assert outcomes[1][f"{call} fails"][0]
    assert "an error on rank(s) [1]: " in outcomes[0][f"{call} fails"][0]
    assert all(outcome[f"{call} fails"][1] for outcome in outcomes)


@pytest.mark.parametrize("group", ["world", 0, object()], ids=["a name", "a number", "no member"])
def test_what_is_no_process_group_is_named_before_anything_is_touched(group, fingerprint) -> None:
    model = mlp()
    groups, before = torch_rsst.find_groups(model), fingerprint(model)
    calls: list[Callable[[], object]] = [
        lambda: torch_rsst.RSST(model, groups, steps_per_round=1, process_group=group),
        lambda: torch_rsst.Refill(model, groups, steps_per_round=1, process_group=group),
        lambda: torch_rsst.l1_unstructured(model[0], "weight", 0.5, process_group=group),
        lambda: torch_rsst.random_unstructured(model[0], "weight", 0.5, process_group=group),
        lambda: torch_rsst.global_unstructured(
            [(model[0], "weight")], torch_rsst.GlobalL1, amount=0.5, process_group=group
        ),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"process_group: expected None or a .*mesh\.get_group"):
            call()
        assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_masks_that_numpy_cannot_read_are_compared_by_what_is_alive(dtype: torch.dtype) -> None:
    alive = torch.eye(2, 3, dtype=torch.bool)
    assert _digest(alive.to(dtype)) == _digest(alive) != _digest(~alive)
    assert _digest(alive.t().to(dtype)) == _digest(alive.t().contiguous()) != _digest(alive)
