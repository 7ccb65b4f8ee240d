"""Tensors of which every rank holds a part: the local part, where it lies in the whole, sums over ranks.

``DTensor`` is known here only: what lies above works on local parts, whose counts and scores are
added up over the ranks. A plain tensor is its own and only part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_rsst.utils.errors import refuse

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: object) -> bool:
    """Whether it is a ``DTensor``, of which each rank holds a part or a replica."""
    if type(tensor) in _PLAIN:
        return False  # a call asks this hundreds of times
    # By what it has, not by its class: importing that takes long, and torch.compile reads this.
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, sharing memory; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Any = tensor.to_local()  # type: ignore[attr-defined] # DTensor is
        return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


def sharded_like(part: Tensor, whole: Tensor) -> Tensor:
    """Local parts of all ranks as one tensor, distributed as ``whole`` is."""
    if not is_sharded(whole):
        return part
    placed: Any = whole
    made: Tensor = type(placed).from_local(
        part.contiguous(),
        placed.device_mesh,
        placed.placements,
        run_check=False,
        shape=placed.shape,
        stride=placed.stride(),
    )
    return made


def placed_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """A tensor on the device of ``whole`` and distributed as it is.

    A plain one must be the same on all ranks; one that is distributed otherwise is gathered first.
    """
    if is_sharded(tensor):
        if _placement(tensor) == _placement(whole):
            return tensor
        tensor = gathered(tensor)
    layout = Layout.of(whole)
    if layout is None:
        return tensor.to(whole.device)
    for dim, (start, size) in enumerate(zip(layout.start, layout.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return sharded_like(tensor.to(whole.device).contiguous(), whole)


def redistributed_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """The same values distributed as ``whole`` is, partial sums added up; all ranks must call it."""
    if not is_sharded(tensor) or _placement(tensor) == _placement(whole):
        return tensor
    placed: Any = tensor
    moved: Tensor = placed.redistribute(whole.device_mesh, whole.placements)  # type: ignore[attr-defined]
    return moved


def _placement(tensor: Tensor) -> tuple[Any, Any] | None:
    placed: Any = tensor
    return (placed.device_mesh, placed.placements) if is_sharded(tensor) else None


def total(entries: Tensor) -> Tensor:
    """The sum over all entries of all ranks, as a plain tensor; of flags: how many are True."""
    ranks, own = Ranks.of([entries]), local(entries).sum()
    return ranks.add_up(own if ranks.counts(entries) else torch.zeros_like(own))


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank holds a part. Communicates all of it, flags as bytes."""
    flags = tensor.dtype == torch.bool
    whole: Any = sharded_like(local(tensor).to(torch.uint8), tensor) if flags else tensor
    full: Tensor = whole.full_tensor()
    return full != 0 if flags else full


@dataclass(frozen=True)
class Layout:
    """Where a local part lies in the whole.

    Attributes:
        shape: of the whole.
        start: where the part begins, per dimension.
        size: how long it is, per dimension.
        counts: whether this rank is the one that counts the part; replicas are counted once.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    counts: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout | None:
        """The layout of a sharded tensor, None for a plain one."""
        if not is_sharded(tensor):
            return None
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        placed: Any = tensor
        mesh, placements = placed.device_mesh, placed.placements
        if any(placement.is_partial() for placement in placements):
            remedy = "Redistribute it first."
            refuse(ValueError, "parameter", "shards or replicas", "a partial sum", remedy)
        size, start = compute_local_shape_and_global_offset(placed.shape, mesh, placements)
        replicas = [mesh.get_local_rank(d) for d, p in enumerate(placements) if p.is_replicate()]
        return cls(tuple(placed.shape), tuple(start), tuple(size), not any(replicas))

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """What a step along each dimension adds to the flat index in the whole."""
        strides = [1]
        for length in reversed(self.shape[1:]):
            strides.append(strides[-1] * length)
        return tuple(reversed(strides))

    def place(self, index: Any) -> Any:
        """The flat index in the whole of a flat index (int or tensor) in the part."""
        place = 0
        for stride, start, size in zip(
            reversed(self.strides), reversed(self.start), reversed(self.size), strict=True
        ):
            place = place + (index % size + start) * stride
            index = index // size
        return place


@dataclass(frozen=True)
class Ranks:
    """The ranks that share tensors; a single process where ``mesh`` is None."""

    mesh: Any = None

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Ranks:
        """The ranks that share these tensors.

        Raises:
            ValueError: for tensors of different device meshes.
        """
        meshes: list[Any] = []
        for tensor in tensors:
            mesh = getattr(tensor, "device_mesh", None) if is_sharded(tensor) else None
            if mesh is not None and mesh not in meshes:
                meshes.append(mesh)
        if len(meshes) > 1:
            remedy = "Rank the parameters of each mesh in a call of its own."
            refuse(ValueError, "parameters", "one device mesh", f"{meshes}", remedy)
        return cls(meshes[0] if meshes else None)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks; all must call it in the same order."""
        if self.mesh is None:
            return values
        total = values.to(self.mesh.device_type, copy=True).contiguous()
        for dim in range(self.mesh.ndim):
            dist.all_reduce(total, group=self.mesh.get_group(dim))
        return total.to(values.device)

    def counts(self, tensor: Tensor) -> bool:
        """Whether this rank counts its part; replicas, as plain tensors are, count once."""
        if self.mesh is None:
            return True
        layout = Layout.of(tensor)
        return layout.counts if layout is not None else not any(self.mesh.get_coordinate())
