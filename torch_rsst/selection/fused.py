"""Passes over all tensors of a CUDA device at once.

Operation by operation and tensor by tensor, a few million entries take a device less time than Python
needs to ask for them. Here a pass is one launch of a kernel for all tensors of a dtype, and what a call
has to wait for comes in two copies. The results are those of :mod:`torch_rsst.selection.bracket`.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from torch_rsst.selection import kernels
from torch_rsst.selection.bracket import Candidates, Findings, bracket, stride_of
from torch_rsst.selection.keys import Column, Kind, Scratch
from torch_rsst.selection.radix_select import Reduce, alone, kth_lowest
from torch_rsst.utils.errors import RSSTWarning

# None of these has a say in the result.
_SAMPLE = 1 << 16  # entries that a guess is made from, about
_FEW = 1 / 32  # share of all entries that may be collected
_LEAST = 1 << 18  # as few may be in any case
_BLOCK = 2048  # entries that a program looks at together
_PROGRAMS = 1024  # at most for a tensor
_WARPS = 8

_RANKED = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_MARKS = {**_RANKED, torch.float64: tl.float64, torch.bool: tl.int8, torch.uint8: tl.int8}


def suits(columns: Sequence[Column]) -> bool:
    """Whether all scores lie on one CUDA device, one entry after the other, in at most 32 bits."""
    devices = {column.scores.device for column in columns}
    if len(devices) > 1 or not all(map(_holds_scores, columns)):
        return False
    (device,) = devices
    return device.type == "cuda" and not _obstacle(device)


def _holds_scores(column: Column) -> bool:
    marked = column.among is None or _holds_marks(column.among)
    return column.scores.dtype in _RANKED and column.scores.is_contiguous() and marked


def _holds_marks(tensor: Tensor) -> bool:
    return tensor.dtype in _MARKS and tensor.is_contiguous()


_obstacles: dict[torch.device, str] = {}  # why kernels do not run, empty where they do
_told: set[torch.device] = set()


def _obstacle(device: torch.device) -> str:
    """Why kernels cannot be relied on here; tried once on each device, against sorting."""
    if device not in _obstacles:
        try:
            right = _agrees_with_sorting(device)
            _obstacles[device] = "" if right else "its kernels give other results than sorting"
        except torch.OutOfMemoryError:  # says nothing of kernels: they are tried again
            return "there is no memory to try them"
        except Exception as error:  # whatever a compiler or a driver says
            _obstacles[device] = f"Triton cannot build kernels ({type(error).__name__}: {error})"
    return _obstacles[device]


def tell_of_obstacles() -> None:
    """Warn, once for each device on which kernels do not run. Apart, as other ranks may wait."""
    for device, obstacle in _obstacles.items():
        if obstacle and device not in _told:
            _told.add(device)
            warnings.warn(
                f"Ranking on {device} goes tensor by tensor, which takes longer: {obstacle}. Triton "
                f"needs a C compiler.",
                RSSTWarning,
                stacklevel=2,
            )


def _agrees_with_sorting(device: torch.device) -> bool:
    values = (torch.arange(5 * _BLOCK, device=device) * 7919 % 10007 - 5000).float()
    among = (torch.arange(len(values), device=device) % 3 > 0).float()
    kind = Kind(torch.float32, torch.int32, absolute=True)
    scratch, part = Scratch(1, kind, device), len(values) // 3
    fused = Fused(
        [
            Column(values[:part], among[:part], 0, scratch),
            Column(values[part:], among[part:], part, scratch),
        ]
    )
    (available,) = fused.fetched(fused.count(len(values)))
    k = available // 4
    rank = len(values) - available + k
    near = fused.near(rank, len(values), alone)
    assert near is not None, "the values differ"
    found = near.search(rank, len(values), device=device, reduce=alone)
    marks = torch.empty_like(among)
    fused.mark([marks[:part], marks[part:]], found.key, found.place, goes=True)
    keys = torch.where(among > 0, values.abs(), torch.inf)
    expected = torch.zeros_like(marks)
    expected[torch.sort(keys, stable=True).indices[:k]] = 1.0
    return available == int(among.sum()) and torch.equal(marks, expected)


class _Group:
    """Tensors with scores of one dtype and marks of one dtype: a launch each pass."""

    def __init__(self, columns: Mapping[int, Column]) -> None:
        self.columns = columns
        first = next(iter(columns.values()))
        self._device, self._kind = first.scores.device, first.scratch.kind
        self._types = {
            "score": _RANKED[first.scores.dtype],
            "among": None if first.among is None else _MARKS[first.among.dtype],
            "absolute": self._kind.absolute,
        }
        sizes = [column.scores.numel() for column in columns.values()]
        self._grid = (len(sizes), max(1, min(_PROGRAMS, -(-max(sizes) // _BLOCK))))
        self._rows = {
            kernels.SCORES: [column.scores.data_ptr() for column in columns.values()],
            kernels.AMONG: [
                0 if column.among is None else column.among.data_ptr()
                for column in columns.values()
            ],
            kernels.ENTRIES: sizes,
            kernels.POSITION: list(columns),
        }

    def launch(
        self, kernel: Any, *arguments: Any, rows: Mapping[int, list[int]], **types: Any
    ) -> None:
        """Run a kernel on all tiles, with these rows in the table beside those that all need."""
        given = {**self._rows, **rows}
        unused = [0] * len(self.columns)
        lines = [given.get(row, unused) for row in range(kernels.ROWS)]
        table = torch.tensor(lines, device="cpu").to(self._device, non_blocking=True)
        with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
            kernel[self._grid](
                table, *arguments, **self._types, **types, block=_BLOCK, num_warps=_WARPS
            )


def _grouped(columns: Mapping[int, Column]) -> list[_Group]:
    groups: dict[Any, dict[int, Column]] = {}
    for position, column in columns.items():
        key = column.scores.dtype, None if column.among is None else column.among.dtype
        groups.setdefault(key, {})[position] = column
    return [_Group(group) for group in groups.values()]


class _Collected(Candidates):
    """Few enough to be sorted, for which a device needs fewer operations than to count digits."""

    def search(self, rank: int, entries: int, *, device: torch.device, reduce: Reduce) -> Findings:
        if reduce is not alone:
            return super().search(rank, entries, device=device, reduce=reduce)
        (keys,) = self.keys()
        ascending = keys.sort().values
        at = (rank - 1 - self.below).clamp(0, keys.numel() - 1)  # beyond, the guess was wrong
        key = ascending.take(at)
        (places,) = self.places(key)
        place = places.sort().values.take(at - torch.searchsorted(ascending, key))
        return self._findings(key, place, rank)


class Fused:
    """All tensors that are ranked together, where :func:`suits` says so."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._kind = columns[0].scratch.kind
        self._device = columns[0].scores.device
        self._all = _grouped(dict(enumerate(columns)))
        here = {p: column for p, column in enumerate(columns) if column.counts}
        self._counted = self._all if len(here) == len(columns) else _grouped(here)
        self._own = sum(column.scores.numel() for column in here.values())
        self._sample = torch.empty(0, dtype=self._kind.integer, device=self._device)

    def count(self, entries: int) -> Tensor:
        """How many entries compete here; a sample is taken in the same pass.

        Args:
            entries: how many there are on all ranks.
        """
        count = torch.zeros(1, dtype=torch.int64, device=self._device)
        stride = max(1, stride_of(entries, _SAMPLE))
        slots = 0
        launches = []
        for group in self._counted:
            phases, firsts = [], []
            for column in group.columns.values():
                phases.append(-column.offset % stride)
                firsts.append(slots)
                slots += len(range(phases[-1], column.scores.numel(), stride))
            launches.append((group, {kernels.PHASE: phases, kernels.SLOT: firsts}))
        sample = self._sample.new_empty(slots)
        for group, rows in launches:
            group.launch(kernels.count_and_sample, count, sample, stride, rows=rows)
        self._sample = sample.sort().values
        return count

    def fetched(self, counts: Tensor) -> list[int]:
        """Counts as numbers. The sample comes to the CPU in the same copy."""
        bits = counts.view(self._kind.integer)
        both = torch.cat([bits, self._sample]).cpu()
        self._sample = both[bits.numel() :]
        numbers: list[int] = both[: bits.numel()].view(counts.dtype).tolist()
        return numbers

    def near(self, rank: int, entries: int, reduce: Reduce) -> Candidates | None:
        """The entries near the one at ``rank``; None where too many are to collect them.

        Args:
            rank: which one is looked for, counting what does not compete, which lies lowest.
            entries: how many there are on all ranks.
            reduce: adds counts up over ranks.
        """
        sample, kind = self._sample, self._kind
        size = int(reduce(torch.tensor(sample.numel(), device="cpu")))
        low, high = bracket(self._kth(reduce), size, rank, entries, kind)
        likely = int(reduce(((sample >= low) & (sample <= high)).sum())) / size
        if likely * entries > max(_FEW * entries, _LEAST):
            return None
        workspace = _LEAST + int(2 * likely * self._own)
        counts = torch.zeros(3 + len(self._columns), dtype=torch.int64, device=self._device)
        keys = torch.full((workspace,), kind.highest, dtype=kind.integer, device=self._device)
        tensor_of, index_of = torch.zeros_like(keys), torch.zeros_like(keys, dtype=torch.int64)
        for group in self._counted:
            collected = counts, keys, tensor_of, index_of
            offsets = [0 if c.layout is not None else c.offset for c in group.columns.values()]
            rows = {kernels.OFFSET: offsets}
            group.launch(kernels.survey, *collected, low, high, workspace, rows=rows)
        counts[-1] = counts[1] > workspace
        counts = reduce(counts)

        def places(key: Tensor) -> list[Tensor]:
            places = index_of
            for position, column in enumerate(self._columns):
                if column.layout is not None:
                    places = torch.where(tensor_of == position, column.place(index_of), places)
            return [places.masked_fill(keys != key, torch.iinfo(places.dtype).max)]

        return _Collected(
            lambda: [keys],
            places,
            low,
            high,
            below=counts[0],
            inside=counts[1],
            overfull=counts[-1],
            has_nan=counts[2:-1],
        )

    def _kth(self, reduce: Reduce) -> Callable[[int], int]:
        """The k-th lowest of the sample, which is sorted, or of the samples of all ranks."""
        sample, kind = self._sample, self._kind
        if reduce is alone:
            return lambda k: int(sample[k - 1])
        search = partial(kth_lowest, lambda: [sample], low=kind.lowest, high=kind.highest)
        return lambda k: int(search(k, device=sample.device, reduce=reduce).value)

    def marks_at_once(self, outs: Sequence[Tensor]) -> bool:
        """Whether :meth:`mark` is a single kernel for these."""
        return len(self._all) == 1 and _takes(outs, self._device)

    def mark(self, outs: Sequence[Tensor], key: int, place: int, *, goes: bool) -> None:
        """Set ``outs`` to where entries go, or stay; each may be what says which of them compete."""
        for group in self._all:
            own = [outs[position] for position in group.columns]
            marks = own
            if not _takes(own, self._device):
                marks = [
                    torch.empty(out.shape, dtype=torch.bool, device=self._device) for out in own
                ]
            rows = {
                kernels.OUT: [mark.data_ptr() for mark in marks],
                kernels.LAST: [_last_up_to(place, column) for column in group.columns.values()],
            }
            group.launch(kernels.mark, key, rows=rows, out=_MARKS[marks[0].dtype], goes=goes)
            torch.autograd.graph.increment_version(marks)  # as PyTorch's own writers do
            for out, mark in zip(own, marks, strict=True):
                if mark is not out:
                    out.copy_(mark)


def _takes(outs: Sequence[Tensor], device: torch.device) -> bool:
    """Whether a kernel can write to all of these."""
    dtypes = {out.dtype for out in outs}
    return len(dtypes) == 1 and all(_holds_marks(o) and o.device == device for o in outs)


def _last_up_to(place: int, column: Column) -> int:
    """The last index in a column whose place is no later; −1 or any index beyond the last will do."""
    if column.layout is None:
        return max(-1, place - column.offset)
    return bisect_right(range(column.scores.numel()), place, key=column.place) - 1
