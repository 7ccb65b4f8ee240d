"""Scores as integers in the order of the scores, block by block, without a copy of a tensor.

Floats that are read as integers keep their order, once the negative ones are flipped. Entries that
do not compete get a key below all others: so a pass counts them, but picks nothing out.
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
    def exponents(self) -> int:
        """How many exponents the floats tell apart."""
        return 2**8 if self.real == torch.float32 else 2**11

    @property
    def infinity(self) -> int:
        """The highest key of a number; those of NaN are higher."""
        return int(torch.tensor(torch.inf, dtype=self.real, device="cpu").view(self.integer))

    def magnitude(self, key: int | Tensor) -> float | None:
        """The float to compare magnitudes with instead of their keys, which takes half the time.

        None where that is not the same: for signed scores, for more keys than one, and below the
        smallest normal float, as PyTorch can be told to take denormals for 0.
        """
        if not self.absolute or isinstance(key, Tensor):
            return None
        value = float(torch.tensor(key, dtype=self.integer, device="cpu").view(self.real))
        return value if value >= torch.finfo(self.real).tiny else None


class Scratch(threading.local):
    """Memory for one block and thread, used over and over.

    Fetching it anew would cost more than the arithmetic.
    """

    def __init__(self, size: int, kind: Kind, device: torch.device) -> None:
        self.size, self.kind, self.device = size, kind, device

    @cached_property
    def _memory(self) -> tuple[Tensor, Tensor, Tensor]:
        """Made when it is first asked for: not all ways of ranking need it."""
        # What is made in inference mode could not be changed outside it.
        with torch.inference_mode(False):
            keys, first, second = (
                torch.empty(self.size, dtype=self.kind.integer, device=self.device)
                for _ in range(3)
            )
        return keys, first, second

    def keys_of(self, scores: Tensor, among: Tensor | None) -> Tensor:
        """The keys of flat scores, in memory that the next call overwrites."""
        keys = self._memory[0][: scores.numel()]
        values = keys.view(self.kind.real)
        if self.kind.absolute:
            if scores.dtype == values.dtype:
                torch.abs(scores, out=values)
            else:
                values.copy_(scores).abs_()
            return keys if among is None else self._below_all(keys, among)
        values.copy_(scores).add_(0.0)  # −0 + 0 is 0
        values.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # NaN: no sign
        flip = self.spare(scores.numel())[0]
        torch.bitwise_right_shift(keys, 8 * keys.element_size() - 1, out=flip)
        keys ^= flip.bitwise_and_(self.kind.highest)
        return keys if among is None else keys.masked_fill_(among == 0, self.kind.lowest)

    def _below_all(self, keys: Tensor, among: Tensor) -> Tensor:
        """Make keys negative, in place, where an entry does not compete."""
        if among.dtype == torch.bool:
            keys |= self._memory[2][: among.numel()].copy_(among).sub_(1)
            return keys
        kind, dead = self.kind, self._memory[2][: among.numel()]
        torch.eq(among, 0, out=dead.view(kind.real))
        # The bits of 1.0, moved up by as many as its exponent has, are the sign bit alone.
        return keys.add_(dead, alpha=kind.exponents)

    def competing(self, among: Tensor) -> Tensor:
        """1 or True where an entry competes, else 0; overwritten as the keys are."""
        if among.dtype == torch.bool:
            return among
        # A comparison into bools takes several times as long.
        return torch.ne(among, 0, out=self._memory[2][: among.numel()].view(self.kind.real))

    def spare(self, count: int) -> tuple[Tensor, Tensor]:
        """Two integer vectors, free until the next keys are asked for."""
        return self._memory[1][:count], self._memory[2][:count]


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
        count = torch.zeros((), dtype=torch.int64, device=self.scores.device)
        if not self.counts:
            return count
        if self.among is None:
            return count + (0 if turn else self.scores.numel())
        for part in islice(_parts(self.among, self.scratch.size), turn, None, turns):
            count += self.scratch.competing(part).sum().to(torch.int64)  # exact: a block is short
        return count

    def blocks(
        self, turn: int = 0, turns: int = 1, *, stride: int = 1, uncounted: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Flat index of a block's first entry and the keys of its every ``stride``-th entry.

        The keys are overwritten when the thread asks for the next block.

        Args:
            turn: which share of the blocks is wanted, from 0.
            turns: how many shares there are.
            stride: of the entries in the order of places.
            uncounted: also what another rank counts.
        """
        if not (self.counts or uncounted):
            return
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
                yield start, self.scratch.keys_of(scores[every], among)
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
    together = max(1, size // (rows.numel() // len(rows)))
    for part in torch.split(rows, together):
        yield from torch.split(part.reshape(-1), size)
