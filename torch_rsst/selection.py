"""The exact k lowest scores across many tensors, without concatenating or sorting them.

A radix search on the bits of the scores: floats, read as integers, keep their order, so the k-th
lowest is found 16 bits at a time by counting. Memory beyond the result is one block of scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_rsst.errors import message

_BLOCK = 1 << 22  # entries looked at together: bounds the memory, not the result
_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS


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
        among: bool tensors of the same shapes; only True entries compete. None: all do.
        absolute: compare |score|.
        names: what to call the tensors in an error.

    Returns:
        bool tensors of the shapes of ``scores``, k entries True.

    Raises:
        ValueError: for NaN in a competing entry, or ``k`` larger than the number of these.
    """
    among = [None] * len(scores) if among is None else among
    wide = any(t.dtype not in (torch.float32, torch.float16, torch.bfloat16) for t in scores)
    columns = [
        _Column(t, m, absolute=absolute, wide=wide) for t, m in zip(scores, among, strict=True)
    ]
    available = _count_candidates(columns, names)
    if not 0 <= k <= available:
        remedy = "Lower the amount."
        raise ValueError(
            message("k", expected=f"0 to {available} candidates", got=k, remedy=remedy)
        )
    if k == 0:
        return [torch.zeros_like(t, dtype=torch.bool) for t in scores]
    threshold, ties = _kth_lowest(columns, k, bits=64 if wide else 32)
    return _mark(columns, threshold, ties)


class _Column:
    """One tensor's competing entries as integers in the order of their scores, block by block."""

    def __init__(self, scores: Tensor, among: Tensor | None, *, absolute: bool, wide: bool) -> None:
        self.scores, self.among, self.absolute = scores.detach(), among, absolute
        self.float, self.int = (
            (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
        )

    def blocks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Pairs of scores and the bool mask of competitors, flat, at most ``_BLOCK`` long."""
        flat = self.scores.reshape(-1)
        among = None if self.among is None else self.among.reshape(-1)
        for start in range(0, flat.numel(), _BLOCK):
            block = slice(start, start + _BLOCK)
            yield flat[block], None if among is None else among[block]

    def order_keys(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for block, among in self.blocks():
            yield self._order_key(block), among

    def _order_key(self, block: Tensor) -> Tensor:
        values = block.to(self.float)
        values = values.abs() if self.absolute else values + 0.0  # −0 + 0 is 0
        bits = values.view(self.int)
        # Negative floats grow with their magnitude bits: flip these.
        flip = torch.iinfo(self.int).max
        return torch.where(bits < 0, bits ^ flip, bits)


def _count_candidates(columns: Sequence[_Column], names: Sequence[str] | None) -> int:
    available = 0
    for position, column in enumerate(columns):
        for block, among in column.blocks():
            nan = block.isnan() if among is None else block.isnan() & among
            if bool(nan.any()):
                name = f"scores of {names[position]!r}" if names else f"scores[{position}]"
                remedy = "A NaN has no rank; look for the step at which training diverged."
                got = f"{int(nan.sum())} NaN among the entries to rank"
                raise ValueError(message(name, expected="numbers", got=got, remedy=remedy))
            available += block.numel() if among is None else int(among.sum())
    return available


def _kth_lowest(columns: Sequence[_Column], k: int, *, bits: int) -> tuple[int, int]:
    """The key of the k-th lowest entry, and how many entries with that very key are among the k."""
    prefix = 0
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        top = shift == bits - _DIGIT_BITS
        counts = _histogram(columns, shift, None if top else prefix)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, torch.tensor(k, device=below.device)))
        k -= int(below[digit - 1]) if digit else 0
        # The top digit is signed; _histogram counts it shifted by half its range.
        prefix = digit - _DIGITS // 2 if top else (prefix << _DIGIT_BITS) | digit
    return prefix, k


def _histogram(columns: Sequence[_Column], shift: int, prefix: int | None) -> Tensor:
    """Count the 16-bit digits at ``shift`` of all keys that start with ``prefix``."""
    total = torch.zeros(_DIGITS, dtype=torch.int64)
    for column in columns:
        for keys, among in column.order_keys():
            if prefix is None:
                digits = (keys >> shift) + _DIGITS // 2
            else:
                digits = (keys >> shift) & (_DIGITS - 1)
                same = (keys >> (shift + _DIGIT_BITS)) == prefix
                among = same if among is None else among & same
            if among is not None:
                digits = digits[among]
            total += torch.bincount(digits, minlength=_DIGITS).to(total.device)
    return total


def _mark(columns: Sequence[_Column], threshold: int, ties: int) -> list[Tensor]:
    """Everything below the threshold, and the first ``ties`` entries that equal it."""
    marked = []
    for column in columns:
        parts = []
        for keys, among in column.order_keys():
            below, equal = keys < threshold, keys == threshold
            if among is not None:
                below, equal = below & among, equal & among
            if ties:
                running = equal.cumsum(0)
                below |= equal & (running <= ties)
                ties -= min(ties, int(running[-1]))
            parts.append(below)
        flat = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
        marked.append(flat.to(column.scores.device).reshape(column.scores.shape))
    return marked
