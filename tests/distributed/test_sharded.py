"""Parameters in parts on several ranks: every mask is, bit for bit, the one of a single process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import tokens
from torch import Tensor, nn

import torch_rsst
from torch_rsst.distributed.dtensor import is_sharded

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without distributed"
)

FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp = pytest.mark.skipif(not FSDP_ON_CPU, reason="this torch runs FSDP2 on GPUs only")

# Odd sizes: the ranks hold parts of different size, and the last one of some weight holds none.
WIDTH, HIDDEN = 6, 7


class Model(nn.Module):
    """An MLP of uneven width, with ties among its weights and a norm that nobody shards."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            self.up.weight.mul_(8).round_().div_(8)  # many equal scores
            self.head.weight.mul_(4).round_().div_(4)

    @property
    def up(self) -> nn.Module:
        return self.mlp[0]

    @property
    def down(self) -> nn.Module:
        return self.mlp[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mlp(x))


def _fully(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.up, model.down):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()})


def _parameters(model: Any) -> list[tuple[nn.Module, str]]:
    return [(model.up, "weight"), (model.down, "weight"), (model.head, "weight")]


def _whole(masks: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: (mask.full_tensor() if is_sharded(mask) else mask).tolist()  # type: ignore[operator]
        for name, mask in masks.items()
    }


def _prune(model: nn.Module, amount: float | int = 0.3) -> None:
    torch_rsst.global_unstructured(_parameters(model), torch_rsst.GlobalL1, amount=amount)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        model(tokens(number, 4, WIDTH)).square().mean().backward()
        optimizer.step()


def _rounds_of_pruning(model: nn.Module) -> list[Any]:
    """Masks and outputs over three prunings with training between."""
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for amount in (0.3, 5, 0.2):
        _prune(model, amount)
        _train(model, optimizer)
        seen.append(_whole(torch_rsst.extract_mask(model)))
    return seen


def _regrouped(model: nn.Module, groups: torch_rsst.Groups) -> list[Any]:
    """Regroup, penalize in both modes, cut, give back, report, remove."""
    seen: list[Any] = []
    _prune(model, 0.4)
    for mode in ("coupled", "decoupled"):
        refill = torch_rsst.regroup(model, groups, amount=0.5)
        seen.append(_whole(refill))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_rsst.RegularizedPruner(
            model, refill, total_steps=2, optimizer=optimizer, mode=mode, schedule="linear"
        ) as pruner:
            seen.append(round(pruner.start_norm, 5))
            _train(model, optimizer)
            seen.append(round(pruner.penalized_norm(), 5))
    torch_rsst.apply_mask(model, refill)
    report = torch_rsst.sparsity_report(model, groups)
    seen += [report.gone("neurons"), report.zeros]
    seen.append(_whole(torch_rsst.extract_mask(model)))
    torch_rsst.fillback(model.up, "weight", 0.5)
    seen.append(_whole(torch_rsst.extract_mask(model)))
    before = _whole(torch_rsst.extract_mask(model))
    try:
        with torch_rsst.dense_weights(model):
            seen.append("dense")
    except ValueError as error:
        assert "got one that is distributed over several ranks" in str(error)  # noqa: PT017
        seen.append("dense")
    assert _whole(torch_rsst.extract_mask(model)) == before
    handle = torch_rsst.freeze_masked(model)
    _train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    handle.remove()
    torch_rsst.remove_all(model, freeze_zeros=False)
    seen.append([name for name, _ in model.named_parameters()])
    for parameter in model.parameters():
        full = parameter.full_tensor() if is_sharded(parameter) else parameter
        seen.append([round(value, 4) for value in full.detach().flatten().tolist()])
    return seen


def _all_cases(rank: int) -> dict[str, tuple[Any, Any]]:
    """Case → what the sharded and the plain model give."""
    results: dict[str, tuple[Any, Any]] = {}
    # PyTorch's tensor parallelism itself takes widths that the ranks divide only.
    shardings = [("tensor", _tensor_parallel, 8), ("fully", _fully, HIDDEN)]
    for name, shard, hidden in shardings[: 1 + FSDP_ON_CPU]:
        groups = torch_rsst.find_groups(Model(hidden))
        for case, run in [
            ("pruned", _rounds_of_pruning),
            ("regrouped", lambda model, groups=groups: _regrouped(model, groups)),
        ]:
            results[f"{name} {case}"] = run(shard(Model(hidden))), run(Model(hidden))
    if not FSDP_ON_CPU:
        return results
    groups = torch_rsst.find_groups(Model())
    before = Model()
    _prune(before)
    plain = copy.deepcopy(before)
    results["fully after pruning"] = _rounds_of_pruning(_fully(before)), _rounds_of_pruning(plain)
    results["rounds"] = _rounds(_fully(Model()), groups), _rounds(Model(), groups)
    return results


def _rounds(model: nn.Module, groups: torch_rsst.Groups) -> list[Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rsst = torch_rsst.RSST(
        model, groups, optimizer=optimizer, steps_per_round=4, rounds=2, regroup_amount=0.5
    )
    seen = []
    for rnd in rsst:
        seen += [_whole(rnd.current_mask), _whole(rnd.refill_mask)]
        _train(model, optimizer, 4)
    rsst.finalize()
    return [*seen, _whole(torch_rsst.extract_mask(model)), rsst.report().gone("neurons")]


def _both_ways(rank: int) -> list[Any]:
    """Tensor parallel within fully sharded: the parameter of a forward pass lies on another mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    seen = []
    for sharded in (True, False):
        mlp = Model(8).mlp
        if sharded:
            parallelize_module(mlp, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            fully_shard(mlp, mesh=mesh["dp"])
        for amount in (0.3, 0.2):
            refs = [(mlp[0], "weight"), (mlp[2], "weight")]
            torch_rsst.global_unstructured(refs, torch_rsst.GlobalL1, amount=amount)
            _train(mlp, torch.optim.SGD(mlp.parameters(), lr=0.1))
        output = mlp(tokens(9, 4, WIDTH)).flatten().tolist()
        seen.append((_whole(torch_rsst.extract_mask(mlp)), [round(v, 4) for v in output]))
    return seen


@needs_fsdp
def test_two_ways_of_sharding_at_once() -> None:
    for sharded, plain in on_ranks(4, _both_ways):
        assert sharded == plain


def _hybrid(model: nn.Module) -> nn.Module:
    """Replicas of shards: each parameter is in two parts, and each part on two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for module in (model.up, model.down):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _prune_among(group: Any, model: nn.Module) -> None:
    torch_rsst.global_unstructured(
        _parameters(model), torch_rsst.GlobalL1, process_group=group, amount=0.3
    )


def _sharded_in_a_group(rank: int) -> list[Any]:
    """The masks under each way of sharding, and the error where one replica of a shard is spoiled."""
    plain = Model()
    _prune_among(dist.group.WORLD, plain)
    seen = [_whole(torch_rsst.extract_mask(plain))]
    for shard in (_fully, _hybrid):
        model = shard(Model())
        for _ in range(2):
            _prune_among(dist.group.WORLD, model)
            _train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model = shard(Model())
        _prune_among(dist.group.WORLD, model)
        seen.append(_whole(torch_rsst.extract_mask(model)))
    model = _hybrid(Model())
    if rank == 3:
        with torch.no_grad():
            model.up.weight.to_local()[0] = 1e-6
    try:
        _prune_among(dist.group.WORLD, model)
    except RuntimeError as error:
        seen.append((str(error).partition(". ")[0], list(torch_rsst.extract_mask(model))))
    return seen


@needs_fsdp
def test_a_group_compares_only_ranks_that_hold_the_same_shard() -> None:
    for plain, fully, hybrid, (error, masks) in on_ranks(4, _sharded_in_a_group):
        assert fully == plain
        assert hybrid == plain
        assert error == (
            "replicas: expected the same masks on every rank, got others on rank(s) [3] than on lower "
            "ranks for \"'weight' of FSDPLinear, number 0\""
        )
        assert masks == []


CASES = [
    "tensor pruned",
    "tensor regrouped",
    *(
        pytest.param(case, marks=needs_fsdp)
        for case in ("fully pruned", "fully regrouped", "fully after pruning", "rounds")
    ),
]


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, tuple[Any, Any]]]:
    return on_ranks(request.param, _all_cases)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_gets_what_one_process_gets(
    outcomes: list[dict[str, tuple[Any, Any]]], case: str
) -> None:
    for results in outcomes:
        sharded, plain = results[case]
        assert sharded == plain


def _communicated(rank: int) -> list[int]:
    """Bytes that one call adds up over ranks, for a small and a larger model."""
    sums: list[int] = []
    plain = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sums[-1] += tensor.numel() * tensor.element_size()
        return plain(tensor, *args, **kwargs)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for size in (512, 2048):
        layer = nn.Linear(size, size)
        fully_shard(layer, mesh=mesh)
        sums.append(0)
        dist.all_reduce = counting
        try:
            torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=0.2)
        finally:
            dist.all_reduce = plain
    return sums


def test_what_is_communicated_does_not_grow_with_the_model() -> None:
    for small, large in on_ranks(2, _communicated):
        assert 0 < large < 1_000_000
        assert large < 2 * small + 200_000


def _failing(rank: int) -> list[str]:
    errors = []
    model: Any = _fully(Model())
    acts: list[Callable[[], object]] = [
        lambda: _prune(model, 10_000),
        lambda: torch_rsst.apply_mask(model, {"mlp.0.weight": torch.ones(2, 2)}),
        lambda: torch_rsst.l1_unstructured(model.up, "weight", 1),
        lambda: torch_rsst.find_groups(model),
    ]
    with torch.no_grad():
        if rank == 1:
            model.down.weight.to_local().view(-1)[0] = float("nan")
    acts.append(lambda: _prune(model))
    before = [name for name, _ in model.named_parameters()]
    for act in acts:
        try:
            act()
        except ValueError as error:
            errors.append(str(error))
        assert [name for name, _ in model.named_parameters()] == before
    return errors


def test_an_error_reaches_every_rank_and_changes_nothing() -> None:
    first, second = on_ranks(2, _failing)
    assert first == second
    assert "expected at most" in first[0]
    assert "the parameter's shape (7, 6)" in first[1]
    assert "Use global_unstructured with GlobalL1" in first[2]
    assert "Find the groups before sharding" in first[3]
    assert "1 NaN among the entries to rank" in first[4]


def _penalized_partial_sums(rank: int) -> list[Tensor]:
    """What a coupled penalty of 0.25 leaves of a norm's weights, whose gradients are partial sums."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    left = []
    for by_hooks in (False, True):
        model = nn.Sequential(nn.LayerNorm(6))
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": SequenceParallel()})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        pruner = torch_rsst.RegularizedPruner(
            model,
            {"0.weight": torch.arange(6) > 1},
            total_steps=1,
            schedule=lambda t: 0.25,
            mode="coupled",
            block_loss_grad=True,
            optimizer=None if by_hooks else optimizer,
        )
        model(torch.randn(2, 3, 6)).sum().backward()
        before = model[0].weight.full_tensor().detach().clone()
        optimizer.step()
        left.append((model[0].weight.full_tensor().detach() / before)[:2])
        pruner.remove()
    return left


@needs_fsdp
def test_a_penalty_on_partial_sums_acts_once() -> None:
    for left in on_ranks(2, _penalized_partial_sums):
        for share in left:
            assert share.tolist() == [0.75, 0.75]
