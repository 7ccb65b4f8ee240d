"""The exact k lowest scores across many tensors, without concatenating or sorting them.

Scores are read as integers, of which the k-th lowest is found by counting. That gives a cut, by
which the entries of each tensor are marked when they are asked for. Memory beyond what is asked for
is some blocks of scores and the few that lie near the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain

import torch
from torch import Tensor

from torch_rsst.candidates import everything, narrowed
from torch_rsst.digit_search import kth_lowest
from torch_rsst.errors import message
from torch_rsst.order_keys import Column, Kind, Scratch
from torch_rsst.shards import Layout, Ranks, local, placed_like, sharded_like
from torch_rsst.workers import Workers, one_thread

# Entries looked at together: a small part of all, and few enough for the processor's cache. They have
# no say in the result.
_BLOCK = 1 << 19
_LEAST = 1 << 17


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
        ValueError: for NaN in a competing entry, or ``k`` larger than the number of these.
    """
    cut = Ranking(scores, among=among, absolute=absolute, names=names).cut(k)
    return [cut.goes(position) for position in range(len(scores))]


class Ranking:
    """Scores that compete, with the arguments of :func:`lowest`.

    Example:
        >>> ranking = Ranking([torch.tensor([3.0, -1.0, 2.0])], absolute=True)
        >>> ranking.cut(ranking.available - 1).stays(0)
        tensor([ True, False, False])

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
        among = [None] * len(scores) if among is None else among
        self._kind = Kind.of(scores, absolute=absolute)
        ranks, parts = Ranks.of(scores), [local(t.detach()) for t in scores]
        own = sum(t.numel() for t in parts)
        size = min(_BLOCK, max(_LEAST, own // 64), max((t.numel() for t in parts), default=0))
        scratch = {t.device: Scratch(size, self._kind, t.device) for t in parts}
        starts = accumulate((t.numel() for t in scores), initial=0)
        self._wholes = list(scores)
        self._columns = [
            Column(
                part,
                None if mask is None else local(placed_like(mask, whole)),
                offset=start,
                scratch=scratch[part.device],
                layout=Layout.of(whole),
                counts=ranks.counts(whole),
            )
            for whole, part, mask, start in zip(scores, parts, among, starts, strict=False)
        ]
        self._own_entries = sum(c.scores.numel() for c in self._columns if c.counts)
        self._on_cpu = all(device.type == "cpu" for device in scratch)
        self._device = next(iter(scratch), torch.device("cpu"))
        self._names, self._reduce = names, ranks.add_up
        self._workers = Workers(own // (2 * _LEAST) if self._on_cpu else 1)

    @property
    def available(self) -> int:
        """How many entries compete."""
        return self._totals[0]

    @cached_property
    def _totals(self) -> tuple[int, int]:
        """How many entries compete, and how many there are."""
        counts = torch.tensor([0, self._own_entries], device=self._device)

        def competing(turn: int, turns: int) -> list[Tensor]:
            return [
                column.competing((turn + position) % turns, turns)
                for position, column in enumerate(self._columns)
            ]

        for count in chain(*self._workers.run(competing)):
            counts[0] += count.to(self._device)
        available, entries = self._reduce(counts).tolist()
        return available, entries

    @one_thread()
    def cut(self, k: int) -> Cut:
        """Find where the ``k`` lowest end.

        Raises:
            ValueError: as :func:`lowest` does.
        """
        available, entries = self._totals
        if not 0 <= k <= available:
            remedy = "Lower the amount."
            raise ValueError(
                message("k", expected=f"0 to {available} candidates", got=k, remedy=remedy)
            )
        kind = self._kind
        rank = entries - available + k  # what does not compete lies below what does
        if k and self._on_cpu:
            candidates, highest = narrowed(
                self._columns, rank, entries, kind, workers=self._workers, reduce=self._reduce
            )
        else:  # on another device, collecting would wait once per block
            candidates = everything(self._columns, kind.lowest, kind.highest)
            tops = [column.highest_key().to(self._device) for column in self._columns]
            highest = torch.stack(tops).tolist() if tops else []
        self._check_numbers(highest)
        if k == 0:
            return Cut(
                self._columns,
                self._wholes,
                key=kind.floor - 1,
                place=entries,
                workers=self._workers,
            )
        search = partial(kth_lowest, device=self._device, reduce=self._reduce)
        low, high = candidates.low, candidates.high
        found = search(candidates.keys, rank - candidates.below, low=low, high=high)
        place = entries
        if found.rank < found.equal:
            ties = partial(candidates.places, found.value)
            place = search(ties, found.rank, low=0, high=entries).value
        return Cut(self._columns, self._wholes, key=found.value, place=place, workers=self._workers)

    def _check_numbers(self, highest: Sequence[int]) -> None:
        """Raise for the first column whose highest key is that of a NaN."""
        infinity = self._kind.infinity
        has_nan = torch.tensor([int(top > infinity) for top in highest], device=self._device)
        for position, ranks in enumerate(self._reduce(has_nan).tolist()):
            if ranks:
                blocks = self._columns[position].blocks()
                own = sum(int((keys > infinity).sum()) for _, keys in blocks)
                count = int(self._reduce(torch.tensor(own, device=self._device)))
                names = self._names
                name = f"scores of {names[position]}" if names else f"scores[{position}]"
                remedy = "A NaN has no rank; look for the step at which training diverged."
                got = f"{count} NaN among the entries to rank"
                raise ValueError(message(name, expected="numbers", got=got, remedy=remedy))


@dataclass(frozen=True, eq=False)
class Cut:
    """The last entry that goes. Others go if their key is lower, or the same and their place lower.

    Nothing is marked before it is asked for, by position, in any order. The scores and ``among`` of
    a tensor must not change until then.
    """

    columns: Sequence[Column]
    wholes: Sequence[Tensor]
    key: int
    place: int
    workers: Workers

    def goes(self, position: int) -> Tensor:
        """A bool tensor, True for the entries that go."""
        column = self.columns[position]

        def write(keys: Tensor, bound: int | Tensor, out: Tensor) -> None:
            torch.le(keys, bound, out=out)
            if column.among is not None:
                out &= keys >= column.scratch.kind.floor

        marks = self._mark(column, _bools(column.scores), write)
        return sharded_like(marks, self.wholes[position])

    def stays(self, position: int) -> Tensor:
        """A bool tensor, True for the entries that compete and do not go."""
        marks = self.write_stays(position, _bools(self.columns[position].scores))
        return sharded_like(marks, self.wholes[position])

    def write_stays(self, position: int, out: Tensor) -> Tensor:
        """Set ``out``, of whatever dtype, to the same. It may be ``among`` itself, or a local part."""
        column = self.columns[position]
        kind = column.scratch.kind

        def write(keys: Tensor, bound: int | Tensor, out: Tensor) -> None:
            if out.dtype == kind.real and (value := kind.magnitude(bound)) is not None:
                torch.gt(keys.view(kind.real), value, out=out)  # half the time of what follows
            else:
                out.copy_(torch.gt(keys, bound, out=column.scratch.spare(keys.numel())[0]))

        return self._mark(column, local(out), write)

    def _mark(
        self, column: Column, out: Tensor, write: Callable[[Tensor, int | Tensor, Tensor], None]
    ) -> Tensor:
        flat = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())

        def work(turn: int, turns: int) -> None:
            for start, keys in column.blocks(turn, turns, uncounted=True):
                bound = self._bound(column, start, keys)
                write(keys, bound, flat[start : start + keys.numel()])

        if column.scores.numel() <= column.scratch.size:
            with one_thread():  # a single block
                work(0, 1)
        else:
            self.workers.run(work)
        return out if out.is_contiguous() else out.copy_(flat.view(out.shape))

    def _bound(self, column: Column, start: int, keys: Tensor) -> int | Tensor:
        """The highest key that goes; entry by entry in a block that the cut runs through."""
        if column.place(start + keys.numel() - 1) <= self.place:
            return self.key
        if column.place(start) > self.place:
            return self.key - 1
        above = column.places(start, keys.numel()) > self.place
        return self.key - above.to(keys.dtype)


def _bools(like: Tensor) -> Tensor:
    # Threads could not write to what is made in inference mode.
    with torch.inference_mode(False):
        return torch.empty(like.shape, dtype=torch.bool, device=like.device)
