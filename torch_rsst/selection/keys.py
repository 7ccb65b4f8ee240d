"""Scores as integer keys that have the order of the scores, one block of entries at a time.

The bits of a float, read as an integer, are ordered as the floats are, once those of negative floats
are flipped. Integers can be counted exactly, digit by digit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from torch_rsst.distributed.dtensor import Layout
from torch_rsst.utils.bool_ops import compare, count

Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class KeyType:
    """How scores become keys.

    Attributes:
        real: the floating-point dtype that holds all scores.
        integer: the dtype of the keys, as wide as ``real``.
        absolute: whether |score| is ranked.
    """

    real: torch.dtype
    integer: torch.dtype
    absolute: bool

    @classmethod
    def of(cls, scores: Iterable[Tensor], *, absolute: bool) -> KeyType:
        """32 bits for floats of at most 32 bits, 64 bits for all other scores."""
        if {t.dtype for t in scores} <= {torch.float32, torch.float16, torch.bfloat16}:
            return cls(torch.float32, torch.int32, absolute)
        return cls(torch.float64, torch.int64, absolute)

    @property
    def lowest(self) -> int:
        """Lower than the key of every score."""
        return torch.iinfo(self.integer).min

    @property
    def highest(self) -> int:
        """Higher than the key of every number."""
        return torch.iinfo(self.integer).max

    @cached_property
    def infinity(self) -> int:
        """The highest key of a number; those of NaN are higher."""
        return int(torch.tensor(torch.inf, dtype=self.real, device="cpu").view(self.integer))

    def write(self, scores: Tensor, keys: Tensor, values: Tensor) -> None:
        """Set ``keys`` to the keys of ``scores``, by way of ``values``, the same memory as floats."""
        if not self.absolute:
            values.copy_(scores).add_(0.0)  # −0 + 0 is 0
            values.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # NaN: no sign
            keys ^= (keys >> (8 * keys.element_size() - 1)).bitwise_and_(self.highest)
        elif scores.dtype == self.real:
            torch.abs(scores, out=values)
        else:
            values.copy_(scores).abs_()


class Views(NamedTuple):
    """Tensors for the work on one block, of its shape. ``values`` are ``keys``, read as floats."""

    keys: Tensor
    values: Tensor
    competes: Tensor
    flags: Tensor
    more_flags: Tensor


class Buffers(threading.local):
    """Memory for one block, which each thread uses again for its next block.

    To allocate it for every block takes longer than the arithmetic.
    """

    def __init__(self, size: int, key_type: KeyType) -> None:
        self.size, self.key_type = size, key_type
        self._memory: dict[torch.device, list[Tensor]] = {}
        self._views: dict[tuple[torch.device, torch.Size], Views] = {}

    def views(self, block: Tensor) -> Views:
        """Views of the memory on the device of a block, of its shape."""
        device, shape = block.device, block.shape
        if (device, shape) not in self._views:
            # What is made in inference mode, views included, could not be changed outside it.
            with torch.inference_mode(False):
                if device not in self._memory:
                    dtypes = [self.key_type.integer] + [torch.bool] * 3
                    made = [torch.empty(self.size, dtype=t, device=device) for t in dtypes]
                    self._memory[device] = made
                keys, *flags = (t[: block.numel()].view(shape) for t in self._memory[device])
                self._views[device, shape] = Views(keys, keys.view(self.key_type.real), *flags)
        return self._views[device, shape]


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive entries of one tensor of scores.

    What its methods return is overwritten when the thread goes on to its next block.

    Attributes:
        tensor: the position of the tensor among those that are ranked together.
        scores: the entries, in the order of flat indices.
        among: nonzero (or True) where an entry competes; None: everywhere.
        offset: how many entries the tensors before this one have, on all ranks.
        start: the flat index of the first entry.
        buffers: memory to work in.
        layout: where the tensor lies in the whole of a sharded one; None if it is not sharded.
        counts: whether this rank counts the entries; replicas are counted once.
    """

    tensor: int
    scores: Tensor
    among: Tensor | None
    offset: int
    start: int
    buffers: Buffers
    layout: Layout | None
    counts: bool

    def pieces(self) -> Iterator[Block]:
        """Blocks that fit into the buffers, which together are this one."""
        size, start = self.buffers.size, self.start
        masks = repeat(None) if self.among is None else split(self.among, size)
        for scores, among in zip(split(self.scores, size), masks, strict=False):
            yield replace(self, scores=scores, among=among, start=start)
            start += scores.numel()

    def keys(self) -> Tensor:
        """The keys of all entries."""
        keys, values, *_ = self.buffers.views(self.scores)
        self.buffers.key_type.write(self.scores, keys, values)
        return keys

    def competes(self) -> Tensor | None:
        """Which entries compete, as bool; None: all."""
        if self.among is None:
            return None
        return compare(self.among, "!=", 0, out=self.buffers.views(self.scores).competes)

    def competing_keys(self) -> Tensor:
        """The keys, with the highest for entries that do not compete."""
        keys, competes = self.keys(), self.competes()
        if competes is None:
            return keys
        return keys.masked_fill_(competes.logical_not_(), self.buffers.key_type.highest)

    def number_competing(self) -> int | Tensor:
        """How many entries compete."""
        competes = self.competes()
        return self.scores.numel() if competes is None else count(competes)

    def number_nan(self) -> int | Tensor:
        """How many of the entries that compete are NaN."""
        views, competes = self.buffers.views(self.scores), self.competes()
        flags = compare(self.keys(), ">", self.buffers.key_type.infinity, out=views.flags)
        return count(flags if competes is None else flags.logical_and_(competes))

    def sample(self, stride: int) -> Tensor:
        """The keys of every ``stride``-th entry, if it competes."""
        every = slice(-(self.offset + self.start) % stride, None, stride)
        among = None if self.among is None else self.among.reshape(-1)[every]
        few = replace(self, scores=self.scores.reshape(-1)[every], among=among)
        keys, competes = few.keys(), few.competes()
        return keys.clone() if competes is None else keys[competes]

    def place(self, index: Index) -> Index:
        """Where the ``index``-th entry stands among those of all tensors: the order of equal scores.

        It grows with the index, but not by ones where a rank holds a part of the columns of a matrix.
        """
        flat = self.start + index
        return self.offset + (flat if self.layout is None else self.layout.place(flat))

    def places(self) -> Tensor:
        """The places of all entries."""
        indices = torch.arange(self.scores.numel(), device=self.scores.device)
        return self.place(indices.view(self.scores.shape))

    def places_of(self, key: int) -> Tensor:
        """The places of the entries that compete and have this key; for the others, the highest int64."""
        places = self.places()
        return places.masked_fill_(self.competing_keys() != key, torch.iinfo(places.dtype).max)


def split(tensor: Tensor, size: int) -> list[Tensor]:
    """Views of at most ``size`` entries, in the order of flat indices, cut by the shape alone.

    Example:
        >>> [tuple(part.shape) for part in split(torch.zeros(4, 3), 7)]
        [(2, 3), (2, 3)]
    """
    if tensor.numel() == 0:
        return []
    if tensor.numel() <= size:
        return [tensor]
    if len(tensor) == 1:
        return split(tensor[0], size)
    # Parts of the same size, so that threads have as much to do as each other.
    parts = tensor.chunk(min(len(tensor), -(-tensor.numel() // size)))
    return [piece for part in parts for piece in split(part, size)]
