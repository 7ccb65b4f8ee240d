"""The exact k lowest scores across many tensors, without concatenating or sorting them.

The algorithm:

1. Every score is read as an integer, its *key*. Keys have the order of the scores
   (:mod:`torch_rsst.selection.keys`).
2. The *threshold* is the k-th smallest key. A histogram of the keys' highest bits tells in which bin it
   lies, a histogram of the next bits of the keys in this bin follows, and so on until all bits are
   known (:mod:`torch_rsst.selection.radix_select`).
3. Entries with a lower key go, those with a higher key stay. Of the entries whose key equals the
   threshold the first go, in order of (tensor, flat index). The last of them is found as in step 2,
   its position in place of its key.
4. Tensors are compared with the threshold when the result is asked for.

Every pass works on one block of entries at a time and makes their keys anew, so that no memory grows
with the tensors. The operations are the same on every device. A device is waited for at most four times:
for the number of entries that compete, the number of NaN, the threshold, and the last of equal entries.

On the CPU a pass takes long, so that one replaces those of step 2: it collects the entries near the threshold,
where a sample tells that it should lie, and steps 2 and 3 look at these alone
(:mod:`torch_rsst.selection.bracket`). NumPy compares and counts there, and blocks are shared out between
threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor

from torch_rsst.distributed.dtensor import Layout, Ranks, local, placed_like, sharded_like
from torch_rsst.selection.bracket import narrowed
from torch_rsst.selection.keys import Block, Buffers, KeyType, split
from torch_rsst.selection.radix_select import Search
from torch_rsst.utils.bool_ops import compare, numpy_reads
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.threads import Workers, one_thread

# Entries of a block: on the CPU so few that they stay in the processor's cache.
_BLOCK = 1 << 19
_BLOCK_ELSEWHERE = 1 << 22


def lowest(
    scores: Sequence[Tensor],
    k: int,
    *,
    among: Sequence[Tensor | None] | None = None,
    absolute: bool = False,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Mark the ``k`` lowest scores over all tensors together.

    Example:
        >>> lowest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], k=1)
        [tensor([False,  True]), tensor([False, False])]

    Equal scores go in order of (tensor, flat index), so the result depends neither on the device
    nor on how the same numbers are split into tensors. −0 equals 0; ±inf rank as themselves.

    Args:
        scores: tensors of any shape and real dtype.
        k: how many entries to mark over all tensors together.
        among: tensors of the same shapes; only True or nonzero entries compete. None: all do.
        absolute: compare |score|.
        names: what to call the tensors in an error.

    Returns:
        bool tensors of the shapes of ``scores``, k entries True.

    Raises:
        ValueError: for NaN in a competing entry, ``k`` larger than the number of these, or ``among`` of
            other shapes.
    """
    return Ranking(scores, among=among, absolute=absolute, names=names).cut(k).goes()


class Ranking:
    """Scores that compete, with the arguments of :func:`lowest`.

    Example:
        >>> ranking = Ranking([torch.tensor([3.0, -1.0, 2.0])], absolute=True)
        >>> ranking.cut(ranking.available - 1).stays()
        [tensor([ True, False, False])]

    Where several ranks hold parts of the scores, counts are added up over them, a few kilobytes at a
    time whatever the size of the scores: the cut is then the same on all.
    """

    def __init__(
        self,
        scores: Sequence[Tensor],
        *,
        among: Sequence[Tensor | None] | None = None,
        absolute: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        among = [None] * len(scores) if among is None else list(among)
        _check_shapes(scores, among)
        ranks, parts = Ranks.of(scores), [local(t.detach()).resolve_neg() for t in scores]
        self._wholes, self._names, self._all_reduce = list(scores), names, ranks.add_up
        self._entries = sum(t.numel() for t in scores)
        self._device = parts[0].device if parts else torch.device("cpu")
        self._key_type = KeyType.of(scores, absolute=absolute)
        self._numpy = all(map(numpy_reads, parts))
        self._workers = Workers(sum(part.numel() for part in parts) if self._numpy else 0)
        longest = max((part.numel() for part in parts), default=0)
        buffers = Buffers(min(_BLOCK if self._numpy else _BLOCK_ELSEWHERE, longest), self._key_type)
        self._size = buffers.size
        self._blocks: list[Block] = []
        offsets = accumulate((t.numel() for t in scores), initial=0)
        for tensor, (whole, part, mask, offset) in enumerate(
            zip(scores, parts, among, offsets, strict=False)
        ):
            own = None if mask is None else local(placed_like(mask, whole))
            layout, counts = Layout.of(whole), ranks.counts(whole)
            every = Block(tensor, part, own, offset, 0, buffers, layout, counts)
            self._blocks += every.pieces()
        self._counted = [block for block in self._blocks if block.counts]

    @cached_property
    def available(self) -> int:
        """How many entries compete."""

        def competing(worker: int, workers: int) -> list[int | Tensor]:
            return [block.number_competing() for block in self._counted[worker::workers]]

        return self._total(chain(*self._workers.run(competing)))

    @one_thread()
    def cut(self, k: int) -> Cut:
        """Find where the ``k`` lowest end.

        Raises:
            ValueError: as :func:`lowest` does.
        """
        if not 0 <= k <= self.available:
            refuse(ValueError, "k", f"0 to {self.available} candidates", k, "Lower the amount.")
        search, nan = self._few(k) if self._numpy and k else self._all(k)
        if nan:
            self._refuse_nan()
        key, place = self._key_type.lowest, self._entries
        if k:
            key, place = search.run(place, device=self._device, all_reduce=self._all_reduce)
        return Cut(self._blocks, self._wholes, self._size, self._workers, key, place)

    def _few(self, k: int) -> tuple[Search, int]:
        """A search among few entries, and how many of all entries are NaN: a single pass, on the CPU."""
        return narrowed(
            self._counted,
            k,
            available=self.available,
            entries=self._entries,
            key_type=self._key_type,
            workers=self._workers,
            all_reduce=self._all_reduce,
        )

    def _all(self, k: int) -> tuple[Search, int]:
        """A search among all entries, and how many of them are NaN."""
        nan = self._total(block.number_nan() for block in self._counted)
        return Search(self._counted, k, self._key_type.lowest, self._key_type.highest), nan

    def _refuse_nan(self) -> None:
        """Raise for the first tensor in which NaN competes."""
        for tensor in range(len(self._wholes)):
            own = (block.number_nan() for block in self._counted if block.tensor == tensor)
            if count := self._total(own):
                name = f"scores of {self._names[tensor]}" if self._names else f"scores[{tensor}]"
                remedy = "A NaN has no rank; look for the step at which training diverged."
                got = f"{count} NaN among the entries to rank"
                refuse(ValueError, name, "numbers", got, remedy)

    def _total(self, counts: Iterable[int | Tensor]) -> int:
        """The sum of counts, over all ranks."""
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for some in counts:
            total += some.to(self._device) if isinstance(some, Tensor) else some
        return int(self._all_reduce(total))


@dataclass(frozen=True, eq=False)
class Cut:
    """The last entry that goes: others go if their key is lower, or the same and their place lower.

    Nothing is marked before it is asked for. The scores and what says which of them compete must not
    change until then.
    """

    blocks: Sequence[Block]
    wholes: Sequence[Tensor]
    size: int
    workers: Workers
    key: int
    place: int

    def goes(self) -> list[Tensor]:
        """A bool tensor for each tensor of scores, True for the entries that go."""
        return self._marked(goes=True)

    def stays(self) -> list[Tensor]:
        """The same for the entries that compete and do not go."""
        return self._marked(goes=False)

    def write_stays(self, outs: Sequence[Tensor]) -> None:
        """Set ``outs``, of whatever dtype, to the same. They may be what says which entries compete."""
        self._mark([local(out) for out in outs], goes=False)

    def _marked(self, *, goes: bool) -> list[Tensor]:
        # Threads could not write to what is made in inference mode.
        with torch.inference_mode(False):
            marks = [
                torch.empty_like(t, dtype=torch.bool, memory_format=torch.contiguous_format)
                for t in map(local, self.wholes)
            ]
        self._mark(marks, goes=goes)
        return [sharded_like(m, whole) for m, whole in zip(marks, self.wholes, strict=True)]

    def _mark(self, outs: Sequence[Tensor], *, goes: bool) -> None:
        pieces = [piece for out in outs for piece in split(out, self.size)]

        def mark(worker: int, workers: int) -> None:
            shares = self.blocks[worker::workers], pieces[worker::workers]
            for block, piece in zip(*shares, strict=True):
                keys, competes = block.keys(), block.competes()
                marks = block.buffers.views(keys).flags
                compare(keys, "<=" if goes else ">", self._bound(block, keys), out=marks)
                if competes is not None:
                    marks &= competes
                _write(marks, piece)

        self.workers.run(mark)

    def _bound(self, block: Block, keys: Tensor) -> int | Tensor:
        """The highest key that goes; entry by entry in a block that the cut runs through."""
        if block.place(keys.numel() - 1) <= self.place:
            return self.key
        if block.place(0) > self.place:
            return self.key - 1
        return self.key - (block.places() > self.place).to(keys.dtype)


def _check_shapes(scores: Sequence[Tensor], among: Sequence[Tensor | None]) -> None:
    expected = [tuple(t.shape) for t in scores]
    got = [
        shape if mask is None else tuple(mask.shape)
        for shape, mask in zip(expected, among, strict=False)
    ]
    if len(among) != len(scores) or got != expected:
        remedy = "Pass a mask of the same shape for each tensor, or None."
        refuse(ValueError, "among", str(expected), str(got), remedy)


def _write(marks: Tensor, out: Tensor) -> None:
    # From bytes to floats takes a sixth of the time that it takes from bools.
    out.copy_(marks if out.dtype == torch.bool else marks.view(torch.uint8))
