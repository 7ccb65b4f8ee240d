"""Scores as integers in the order of the scores, block by block, without a copy of a tensor.

Floats that are read as integers keep their order, once the negative ones are flipped. Entries that
do not compete get a key below all others where a pass is to count them, but pick nothing out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, repeat
from typing import TypeVar

import torch
from torch import Tensor

from torch_rsst.flags import count, nonzero
from torch_rsst.shards import Layout

Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class Kind:
    """How scores become integers.

    Attributes:
        real: the floats that hold the scores.
        integer: the integers of the same width.
        absolute: whether |score| is ranked.
    """

    real: torch.dtype
    integer: torch.dtype
    absolute: bool

    @classmethod
    def of(cls, scores: Iterable[Tensor], *, absolute: bool) -> Kind:
        """The narrowest kind that holds some scores."""
        dtypes = {t.dtype for t in scores}
        if dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
            return cls(torch.float32, torch.int32, absolute)
        return cls(torch.float64, torch.int64, absolute)

    @property
    def lowest(self) -> int:
        """The lowest integer."""
        return torch.iinfo(self.integer).min

    @property
    def highest(self) -> int:
        """The highest integer."""
        return torch.iinfo(self.integer).max

    @property
    def floor(self) -> int:
        """Keys of what competes are not lower, all others are."""
        return 0 if self.absolute else self.lowest + 1

    @property
    def infinity(self) -> int:
        """The highest key of a number; those of NaN are higher."""
        return int(torch.tensor(torch.inf, dtype=self.real, device="cpu").view(self.integer))


class Scratch(threading.local):
    """Memory for one block and thread, used over and over.

    Fetching it anew would cost more than the arithmetic.
    """

    def __init__(self, size: int, kind: Kind, device: torch.device) -> None:
        self.size, self.kind, self.device = size, kind, device

    @cached_property
    def _integers(self) -> tuple[Tensor, Tensor]:
        """Made when they are first asked for: not all ways of ranking need them."""
        return self._empty(self.kind.integer), self._empty(self.kind.integer)

    @cached_property
    def _flags(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._empty(torch.bool), self._empty(torch.bool), self._empty(torch.bool)

    def _empty(self, dtype: torch.dtype) -> Tensor:
        # What is made in inference mode could not be changed outside it.
        with torch.inference_mode(False):
            return torch.empty(self.size, dtype=dtype, device=self.device)

    def keys_of(self, scores: Tensor) -> Tensor:
        """The keys of flat scores, in memory that the next call overwrites."""
        keys, flip = (memory[: scores.numel()] for memory in self._integers)
        values = keys.view(self.kind.real)
        if self.kind.absolute:
            if scores.dtype == values.dtype:
                torch.abs(scores, out=values)
            else:
                values.copy_(scores).abs_()
            return keys
        values.copy_(scores).add_(0.0)  # −0 + 0 is 0
        values.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # NaN: no sign
        torch.bitwise_right_shift(keys, 8 * keys.element_size() - 1, out=flip)
        keys ^= flip.bitwise_and_(self.kind.highest)
        return keys

    def below_all(self, keys: Tensor, among: Tensor) -> Tensor:
        """Give entries that do not compete the lowest key, in place."""
        bits = self._integers[1][: keys.numel()]
        # Arithmetic takes a tenth of the time of masked_fill_.
        bits.copy_(self.competing(among).view(torch.uint8)).neg_()  # −1 is all bits
        keys &= bits
        return keys.bitwise_or_(bits.bitwise_not_().bitwise_and_(self.kind.lowest))

    def competing(self, among: Tensor) -> Tensor:
        """Where entries compete, in memory that the next call overwrites."""
        return nonzero(among, out=self._flags[0][: among.numel()])

    def flags(self, count: int) -> tuple[Tensor, Tensor]:
        """Two bool vectors that nothing else is written to."""
        return self._flags[1][:count], self._flags[2][:count]


@dataclass(frozen=True, eq=False)
class Column:
    """One of the tensors that are ranked together.

    Attributes:
        scores: what is ranked.
        among: nonzero (or True) where an entry competes; None: everywhere.
        offset: how many entries the tensors before this one have, on all ranks.
        scratch: memory on the tensor's device.
        layout: where the scores lie in the whole tensor, None if they are all of it.
        counts: whether this rank counts them; replicas are counted once.
    """

    scores: Tensor
    among: Tensor | None
    offset: int
    scratch: Scratch
    layout: Layout | None = None
    counts: bool = True

    def competing(self, turn: int = 0, turns: int = 1) -> Tensor:
        """How many entries compete."""
        found = torch.zeros((), dtype=torch.int64, device=self.scores.device)
        if not self.counts:
            return found
        if self.among is None:
            return found + (0 if turn else self.scores.numel())
        for part in islice(_parts(self.among, self.scratch.size), turn, None, turns):
            found += count(self.scratch.competing(part))
        return found

    def blocks(
        self, *, stride: int = 1, turn: int = 0, turns: int = 1
    ) -> Iterator[tuple[int, Tensor]]:
        """As :meth:`pairs`, the keys of what does not compete being the lowest; none, unless counted."""
        if self.counts:
            for start, keys, among in self.pairs(stride=stride, turn=turn, turns=turns):
                yield start, keys if among is None else self.scratch.below_all(keys, among)

    def pairs(
        self, *, stride: int = 1, turn: int = 0, turns: int = 1
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Block by block: the flat index of its first entry, the keys, and which entries compete.

        The keys are overwritten when the thread asks for the next block.

        Args:
            stride: only every so manieth entry, in the order of places.
            turn: which share of the blocks is wanted, from 0.
            turns: how many shares there are.
        """
        start = 0
        size = self.scratch.size
        if all(t.is_contiguous() for t in (self.scores, self.among) if t is not None):
            size *= stride  # looked at in place: what lies between needs no room
        parts = _parts(self.scores, size)
        masks = repeat(None) if self.among is None else _parts(self.among, size)
        for number, (scores, mask) in enumerate(zip(parts, masks, strict=False)):
            if number % turns == turn:
                every = slice(-(self.offset + start) % stride, None, stride)
                among = None if mask is None else mask[every]
                yield start, self.scratch.keys_of(scores[every]), among
            start += scores.numel()

    def has_nan(self) -> Tensor:
        """Whether NaN is among what competes."""
        found = torch.zeros((), dtype=torch.bool, device=self.scores.device)
        for _, keys in self.blocks():
            found |= keys.amax() > self.scratch.kind.infinity
        return found

    def places(self, start: int, count: int) -> Tensor:
        """The places of ``count`` entries from flat index ``start`` on."""
        return self.place(torch.arange(start, start + count, device=self.scores.device))

    def place(self, index: Index) -> Index:
        """Where entries stand among those of all tensors, which is how equal scores are ordered.

        It grows with the flat index. It need not do so by ones: a rank that holds a slice of a
        tensor gives the place that an entry has in the whole.
        """
        return self.offset + (index if self.layout is None else self.layout.place(index))


def _parts(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Flat parts in the order of flat indices, cut by the shape alone.

    What is not contiguous is copied, but only a part of it at a time.
    """
    if tensor.numel() == 0:
        return
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    # As few as there can be, and as equal, so that threads have as much to do as each other.
    few = -(-rows.numel() // size)
    together = max(1, min(-(-len(rows) // few), size * len(rows) // rows.numel()))
    for part in torch.split(rows, together):
        yield from torch.split(part.reshape(-1), size)
