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
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from torch_rsst.distributed.dtensor import Layout
from torch_rsst.utils.bool_ops import count, nonzero

Index = TypeVar("Index", int, Tensor)
Piece: TypeAlias = tuple[int, Tensor, Tensor | None]


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


@dataclass(frozen=True, eq=False)
class Workspace:
    """Memory for the work on a block, as long as that is.

    Attributes:
        keys: the integers to compare.
        values: the floats in the same place.
        spare: more integers.
        competing: where entries compete.
        flags: two more bool vectors.
    """

    keys: Tensor
    values: Tensor
    spare: Tensor
    competing: Tensor
    flags: tuple[Tensor, Tensor]


class Scratch(threading.local):
    """Memory for one block and thread, used over and over.

    Fetching it anew would cost more than the arithmetic.
    """

    def __init__(self, size: int, kind: Kind, device: torch.device) -> None:
        self.size, self.kind, self.device = size, kind, device
        self._workspaces: dict[int, Workspace] = {}  # few: most blocks are of the same size

    def workspace(self, size: int) -> Workspace:
        """The memory, cut to a size."""
        if size not in self._workspaces:
            # What is made in inference mode, views included, could not be changed outside it.
            with torch.inference_mode(False):
                keys, spare, competing, *flags = (memory[:size] for memory in self._memory)
                values = keys.view(self.kind.real)
            self._workspaces[size] = Workspace(keys, values, spare, competing, (flags[0], flags[1]))
        return self._workspaces[size]

    @cached_property
    def _memory(self) -> list[Tensor]:
        """Made when it is first asked for: not all ways of ranking need it."""
        dtypes = [self.kind.integer] * 2 + [torch.bool] * 3
        return [torch.empty(self.size, dtype=dtype, device=self.device) for dtype in dtypes]

    def keys_of(self, scores: Tensor) -> Tensor:
        """The keys of flat scores, in memory that the next call overwrites."""
        workspace = self.workspace(scores.numel())
        keys, values = workspace.keys, workspace.values
        if self.kind.absolute:
            if scores.dtype == values.dtype:
                torch.abs(scores, out=values)
            else:
                values.copy_(scores).abs_()
            return keys
        values.copy_(scores).add_(0.0)  # −0 + 0 is 0
        values.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # NaN: no sign
        torch.bitwise_right_shift(keys, 8 * keys.element_size() - 1, out=workspace.spare)
        keys ^= workspace.spare.bitwise_and_(self.kind.highest)
        return keys

    def below_all(self, keys: Tensor, among: Tensor) -> Tensor:
        """Give entries that do not compete the lowest key, in place."""
        bits = self.workspace(keys.numel()).spare
        # Arithmetic takes a tenth of the time of masked_fill_.
        bits.copy_(self.competing(among).view(torch.uint8)).neg_()  # −1 is all bits
        keys &= bits
        return keys.bitwise_or_(bits.bitwise_not_().bitwise_and_(self.kind.lowest))

    def competing(self, among: Tensor) -> Tensor:
        """Where entries compete, in memory that the next call overwrites."""
        return nonzero(among, out=self.workspace(among.numel()).competing)


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
        for _, _, among in islice(self._pieces(), turn, None, turns):
            assert among is not None
            found += count(self.scratch.competing(among))
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
            stride: only every stride-th entry, in the order of places.
            turn: which share of the blocks is wanted, from 0.
            turns: how many shares there are.
        """
        for start, scores, among in islice(self._pieces(stride), turn, None, turns):
            yield start, self.scratch.keys_of(scores), among

    @cached_property
    def _in_place(self) -> bool:
        """Whether entries can be looked at where they are."""
        return all(t.is_contiguous() for t in (self.scores, self.among) if t is not None)

    @cached_property
    def _views(self) -> list[Piece]:
        return list(self._cut(self.scratch.size))

    def _pieces(self, stride: int = 1) -> Iterable[Piece]:
        """Flat index of the first entry, scores and mask: block by block, every ``stride``-th entry."""
        if stride == 1:
            return self._views if self._in_place else self._cut(self.scratch.size)
        # What lies between needs no workspace.
        return self._sampled(stride, self.scratch.size * (stride if self._in_place else 1))

    def _sampled(self, stride: int, size: int) -> Iterator[Piece]:
        for start, scores, among in self._cut(size):
            every = slice(-(self.offset + start) % stride, None, stride)
            yield start, scores[every], None if among is None else among[every]

    def _cut(self, size: int) -> Iterator[Piece]:
        start = 0
        masks = repeat(None) if self.among is None else _parts(self.among, size)
        for scores, among in zip(_parts(self.scores, size), masks, strict=False):
            yield start, scores, among
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
