"""Replicas of one model on several ranks: they must agree on every mask, or all raise."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_rsst.utils.errors import listing, refuse

T = TypeVar("T")


def replica_group(model: object) -> dist.ProcessGroup | None:
    """The ranks that hold replicas of a model, None unless it is a ``DistributedDataParallel``."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group: dist.ProcessGroup = model.process_group
        return group
    return None


def agreed(
    group: dist.ProcessGroup | None,
    make: Callable[[], T],
    masks_of: Callable[[T], Iterable[tuple[str, Tensor]]],
) -> T:
    """What ``make`` returns, once every rank of ``group`` has made the same masks; else all raise.

    A collective call in which each rank tells a digest of every mask, or its error. Without a group
    it is ``make()``.

    Raises:
        RuntimeError: where masks differ, or where ``make`` failed on another rank.
    """
    if group is None:
        return make()
    digests: dict[str, str] = {}
    error: Exception | None = None
    try:
        made = make()
        digests = {name: _digest(mask) for name, mask in masks_of(made)}
    except Exception as raised:  # told to the others, who would wait for this rank, then raised
        error = raised
    failure = f"{type(error).__name__}: {error}" if error is not None else ""
    told = [
        (each[0], each[1]) for each in map(json.loads, _tell(json.dumps([digests, failure]), group))
    ]
    if error is not None:
        raise error
    problem = _failure(told) or _difference([each for each, _ in told])
    if problem:
        remedy = (
            "Make the call with the same arguments on all, on equal weights: broadcast parameters and "
            "buffers from one rank first."
        )
        refuse(RuntimeError, "replicas", "the same masks on every rank", problem, remedy)
    return made


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


def _tell(text: str, group: dist.ProcessGroup) -> list[str]:
    """The texts of all ranks; by tensors, because PyTorch gathers objects through NumPy."""
    device = _device(group)
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([data.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(each) for each in sizes)
    padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [
        bytes(part[: int(each)].tolist()).decode() for part, each in zip(parts, sizes, strict=True)
    ]


def _failure(told: list[tuple[dict[str, str], str]]) -> str:
    errors = {rank: error for rank, (_, error) in enumerate(told) if error}
    return f"an error on rank(s) {list(errors)}: {next(iter(errors.values()))}" if errors else ""


def _difference(digests: list[dict[str, str]]) -> str:
    first = digests[0]
    odd = [rank for rank, other in enumerate(digests) if other != first]
    names = {name for other in digests for name, _ in other.items() ^ first.items()}
    return f"others on rank(s) {odd} than on rank 0 for {listing(sorted(names))}" if odd else ""


def _digest(mask: Tensor) -> str:
    flat = mask.detach().to("cpu", torch.bool).contiguous()
    data = ctypes.string_at(flat.data_ptr(), flat.numel()) if flat.numel() else b""
    return hashlib.sha256(repr(tuple(mask.shape)).encode() + data).hexdigest()
