"""Replicas of one model on several ranks: they must agree on every mask, or all raise.

Ranks may hold shards: then those that hold the same shard of a parameter are its replicas.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import Layout, local
from torch_rsst.utils.errors import ReplicaWarning, listing, message, refuse

T = TypeVar("T")
Digests: TypeAlias = dict[str, tuple[str, str]]
"""Name of a mask → the shard that a rank holds of it, and the digest of that shard."""


def replica_group(model: object) -> dist.ProcessGroup | None:
    """The ranks that hold replicas of a model, None unless it is a ``DistributedDataParallel``."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group: dist.ProcessGroup = model.process_group
        return group
    return None


def check_process_group(group: object) -> None:
    """Raise unless this is None or a process group of torch, such as a mesh or a name."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        remedy = (
            "Pass torch.distributed.group.WORLD once the group is initialized, a group from "
            "torch.distributed.new_group on its own ranks, or mesh.get_group()."
        )
        expected = "None or a torch.distributed.ProcessGroup"
        refuse(TypeError, "process_group", expected, repr(group), remedy)


def agreed(
    group: dist.ProcessGroup | None,
    make: Callable[[], T],
    masks_of: Callable[[T], Iterable[tuple[str, Tensor]]],
) -> T:
    """What ``make`` returns, once every rank of ``group`` has made the same masks; else all raise.

    A collective call: ranks exchange a digest of every mask, or their error. A mask that is sharded is
    compared among the ranks that hold the same shard of it. Without a group it is ``make()``.

    Raises:
        RuntimeError: where masks differ, or where ``make`` failed on another rank.
        TypeError: for no process group.
    """
    if group is None:
        return make()
    check_process_group(group)
    digests: Digests = {}
    error: Exception | None = None
    try:
        made = make()
        digests = {name: _digest(mask) for name, mask in masks_of(made)}
    except Exception as raised:  # sent to the other ranks, which would wait for this one
        error = raised
    failure = f"{type(error).__name__}: {error}" if error is not None else ""
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (digests, failure), group=group)
    if error is not None:
        raise error
    problem = _failure([answer[1] for answer in answers])
    problem = problem or _difference([answer[0] for answer in answers])
    if problem:
        remedy = (
            "Make the call with the same arguments on all, on equal weights: broadcast parameters and "
            "buffers from one rank first."
        )
        refuse(RuntimeError, "replicas", "the same masks on every rank", problem, remedy)
    return made


def agreed_on_first(
    group: dist.ProcessGroup | None,
    make: Callable[[], T],
    masks_of: Callable[[T], Iterable[tuple[str, Tensor]]],
) -> T:
    """What ``make`` returns, with the masks that the first rank of ``group`` has made; or all raise.

    For masks that are drawn at random, and not sharded; they are overwritten in place.

    Raises:
        RuntimeError: where masks differ in shape, or where ``make`` failed on another rank.
    """
    made = agreed(
        group, make, lambda m: ((name, torch.ones_like(mask)) for name, mask in masks_of(m))
    )
    for _, mask in masks_of(made):
        from_first(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, group)
    return made


def warn_of_draws(subject: str, group: dist.ProcessGroup | None) -> None:
    """Warn the caller's caller where several ranks draw masks at random, each its own."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if group is None and ranks > 1:
        text = message(
            f"{subject} with random choices on {ranks} ranks",
            expected="process_group=",
            got="none: ranks with other seeds choose other masks",
            remedy="Pass process_group=torch.distributed.group.WORLD, or the group of ranks that hold "
            "replicas: the first one chooses for all.",
        )
        warnings.warn(text, ReplicaWarning, stacklevel=3)


def summed(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Add up a tensor over the ranks of a group, in place; None leaves it as it is."""
    if group is not None:
        moved = tensor.to(_device(group))
        dist.all_reduce(moved, group=group)
        tensor.copy_(moved)


def from_first(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Give all ranks of a group the values of the first one, in place; None leaves it as it is."""
    if group is not None:
        moved = tensor.to(_device(group))
        dist.broadcast(moved, dist.get_global_rank(group, 0), group=group)
        tensor.copy_(moved)


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must be to be sent."""
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def _failure(failures: list[str]) -> str:
    errors = {rank: error for rank, error in enumerate(failures) if error}
    return f"an error on rank(s) {list(errors)}: {next(iter(errors.values()))}" if errors else ""


def _difference(digests: list[Digests]) -> str:
    """Which ranks differ from the first rank that has the same masks, or the same shard of them."""
    first: dict[tuple[str, str], str] = {}
    odd, names = set(), set()
    for rank, own in enumerate(digests):
        names |= own.keys() ^ digests[0].keys()
        differs = own.keys() != digests[0].keys()
        for name, (shard, digest) in own.items():
            if first.setdefault((name, shard), digest) != digest:
                names.add(name)
                differs = True
        if differs:
            odd.add(rank)
    if not odd:
        return ""
    return f"others on rank(s) {sorted(odd)} than on lower ranks for {listing(sorted(names))}"


def _digest(mask: Tensor) -> tuple[str, str]:
    """Which part of the whole mask this rank holds, and a digest of its values."""
    layout = Layout.of(mask)
    data = local(mask.detach()).to("cpu", torch.bool).contiguous().numpy().tobytes()
    shard = "" if layout is None else f"{layout.start} {layout.size}"
    return shard, hashlib.sha256(repr(tuple(mask.shape)).encode() + data).hexdigest()
