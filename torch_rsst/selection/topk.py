"""The exact k lowest scores across many tensors, without concatenating or sorting them.

Scores are read as integers, of which the k-th lowest is found by counting. That gives a cut, by
which the entries of each tensor are marked when they are asked for. Memory beyond what is asked for
is some blocks of scores and the few that lie near the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_rsst.distributed.dtensor import Layout, Ranks, local, placed_like, sharded_like
from torch_rsst.selection.bracket import Candidates, everything, nan_of_each, narrowed
from torch_rsst.selection.keys import Column, Kind, Scratch
from torch_rsst.selection.radix_select import Reduce, alone
from torch_rsst.utils.bool_ops import compare
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.threads import Workers, one_thread

if TYPE_CHECKING:
    from torch_rsst.selection.fused import Fused

# Entries looked at together: a small part of all, on the CPU few enough for the processor's cache. They
# have no say in the result.
_BLOCK = 1 << 19
_LEAST = 1 << 18
_LEAST_ELSEWHERE = 1 << 22
_A_THREADS = (
    1 << 23
)  # entries for which a thread is worth it: each waits for the interpreter at times


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
        self._kind = Kind.of(scores, absolute=absolute)
        ranks, parts = Ranks.of(scores), [local(t.detach()).resolve_neg() for t in scores]
        own = sum(t.numel() for t in parts)
        longest = max((t.numel() for t in parts), default=0)
        sizes = {"cpu": min(longest, _BLOCK, max(_LEAST, own // 64))}
        elsewhere = min(longest, max(_LEAST_ELSEWHERE, own // 32))
        scratch = {
            t.device: Scratch(sizes.get(t.device.type, elsewhere), self._kind, t.device)
            for t in parts
        }
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
        self._entries = sum(t.numel() for t in scores)
        self._on_cpu = all(device.type == "cpu" for device in scratch)
        self._device = next(iter(scratch), torch.device("cpu"))
        self._names, self._reduce = names, ranks.add_up if ranks.mesh is not None else alone
        self._fused = fused_passes(self._columns, self._reduce)
        self._workers = Workers(own // _A_THREADS if self._on_cpu else 1)

    @cached_property
    def available(self) -> int:
        """How many entries compete."""
        if self._fused is not None:
            (available,) = self._fused.fetched(self._reduce(self._fused.count(self._entries)))
            return available

        def competing(turn: int, turns: int) -> list[Tensor]:
            return [
                column.competing((turn + position) % turns, turns)
                for position, column in enumerate(self._columns)
            ]

        count = torch.zeros(1, dtype=torch.int64, device=self._device)
        for some in chain(*self._workers.run(competing)):
            count += some.to(self._device)
        return int(self._reduce(count))

    @one_thread()
    def cut(self, k: int) -> Cut:
        """Find where the ``k`` lowest end.

        Raises:
            ValueError: as :func:`lowest` does.
        """
        available, entries = self.available, self._entries
        if not 0 <= k <= available:
            refuse(ValueError, "k", f"0 to {available} candidates", k, "Lower the amount.")
        cut = partial(Cut, self._columns, self._wholes, workers=self._workers, fused=self._fused)
        if k == 0:
            flags = self._reduce(nan_of_each(self._columns, device=self._device))
            self._check_numbers(flags.tolist())
            return cut(key=self._kind.floor - 1, place=entries)
        rank = entries - available + k  # what does not compete lies below what does
        candidates = self._near(rank, entries)
        found = candidates.search(rank, entries, device=self._device, reduce=self._reduce)
        self._check_numbers(found.has_nan)
        if not (found.between and found.complete):
            low, high = self._kind.lowest, self._kind.highest
            if found.between:
                low, high = candidates.low, candidates.high
            candidates = everything(self._columns, low, high)
            found = candidates.search(rank, entries, device=self._device, reduce=self._reduce)
        return cut(key=found.key, place=found.place)

    def _near(self, rank: int, entries: int) -> Candidates:
        """What is likely to be among the entries near a rank, by the fastest way there is."""
        if self._fused is not None:
            near = self._fused.near(rank, entries, self._reduce)
            if near is not None:
                return near
        elif self._on_cpu:
            return narrowed(
                self._columns,
                rank,
                entries,
                self._kind,
                workers=self._workers,
                reduce=self._reduce,
            )
        # Block by block, collecting would wait once per block.
        has_nan = self._reduce(nan_of_each(self._columns, device=self._device))
        return everything(self._columns, self._kind.lowest, self._kind.highest, has_nan=has_nan)

    def _check_numbers(self, has_nan: Sequence[int]) -> None:
        """Raise for the first column in which NaN competes."""
        infinity = self._kind.infinity
        for position, found in enumerate(has_nan):
            if found:
                blocks = self._columns[position].blocks()
                own = sum(int((keys > infinity).sum()) for _, keys in blocks)
                count = int(self._reduce(torch.tensor(own, device=self._device)))
                names = self._names
                name = f"scores of {names[position]}" if names else f"scores[{position}]"
                remedy = "A NaN has no rank; look for the step at which training diverged."
                got = f"{count} NaN among the entries to rank"
                refuse(ValueError, name, "numbers", got, remedy)


@dataclass(frozen=True, eq=False)
class Cut:
    """The last entry that goes. Others go if their key is lower, or the same and their place lower.

    Nothing is marked before it is asked for. The scores and what says which of them compete must not
    change until then.
    """

    columns: Sequence[Column]
    wholes: Sequence[Tensor]
    workers: Workers
    fused: Fused | None
    key: int
    place: int

    def writes_at_once(self, outs: Sequence[Tensor]) -> bool:
        """Whether :meth:`write_stays` is one operation."""
        return self.fused is not None and self.fused.marks_at_once([local(out) for out in outs])

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
                torch.empty_like(c.scores, dtype=torch.bool, memory_format=torch.contiguous_format)
                for c in self.columns
            ]
        self._mark(marks, goes=goes)
        return [sharded_like(m, whole) for m, whole in zip(marks, self.wholes, strict=True)]

    def _mark(self, outs: Sequence[Tensor], *, goes: bool) -> None:
        flat = [
            out
            if out.is_contiguous()
            else torch.empty_like(out, memory_format=torch.contiguous_format)
            for out in outs
        ]
        if self.fused is not None:
            self.fused.mark(flat, self.key, self.place, goes=goes)
        else:
            self.workers.run(partial(self._mark_blocks, [out.view(-1) for out in flat], goes))
        for out, marks in zip(outs, flat, strict=True):
            if marks is not out:
                out.copy_(marks)

    def _mark_blocks(self, outs: Sequence[Tensor], goes: bool, turn: int, turns: int) -> None:
        for position, (column, out) in enumerate(zip(self.columns, outs, strict=True)):
            blocks = column.pairs(turn=(turn + position) % turns, turns=turns)
            for start, keys, among in blocks:
                marks, _ = column.scratch.workspace(keys.numel()).flags
                bound = self._bound(column, start, keys)
                compare(keys, "<=" if goes else ">", bound, out=marks)
                if among is not None:
                    marks &= column.scratch.competing(among)
                _write(marks, out[start : start + keys.numel()])

    def _bound(self, column: Column, start: int, keys: Tensor) -> int | Tensor:
        """The highest key that goes; entry by entry in a block that the cut runs through."""
        if column.place(start + keys.numel() - 1) <= self.place:
            return self.key
        if column.place(start) > self.place:
            return self.key - 1
        above = column.places(start, keys.numel()) > self.place
        return self.key - above.to(keys.dtype)


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


def fused_passes(columns: Sequence[Column], reduce: Reduce) -> Fused | None:
    """Kernels that pass over all columns at once, where PyTorch has Triton and they suit every rank."""
    if not columns or any(column.scores.device.type != "cuda" for column in columns):
        return None  # without importing Triton, which takes long
    try:
        from torch_rsst.selection import fused
    except ImportError:
        fused = None  # type: ignore[assignment]
    suitable = fused is not None and fused.suits(columns)
    # One way on all ranks: in another they would wait for other sums.
    unsuited = int(reduce(torch.tensor(int(not suitable), device="cpu")))
    if fused is not None:
        fused.tell_of_obstacles()
    return None if unsuited else fused.Fused(columns)
