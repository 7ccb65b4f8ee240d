"""The k-th lowest of many integers, by counting their digits.

The integers come in blocks and are neither joined nor sorted. All that is known of them is a few
thousand counts: where other ranks hold integers too, adding their counts is all there is to share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Adds an int64 tensor up over all ranks; every rank makes the same calls in the same order."""

_DIGIT_BITS = 11  # three digits make 32 bits, six make 64


class Found(NamedTuple):
    """An integer; how many equal ones there are up to the k-th in order, and how many in all.

    Each an int64 tensor of no dimension, on the device of the search, which has not been waited for.
    """

    value: Tensor
    rank: Tensor
    equal: Tensor


def alone(counts: Tensor) -> Tensor:
    """The sum over a single process."""
    return counts


def kth_lowest(
    blocks: Callable[[], Iterable[Tensor]],
    k: int | Tensor,
    *,
    low: int,
    high: int,
    device: torch.device,
    reduce: Reduce = alone,
) -> Found:
    """The k-th lowest, k counting from 1, of integers that come in blocks.

    Example:
        >>> kth_lowest(lambda: [torch.tensor([7, 3]), torch.tensor([5, 3, 3])], 2, low=0, high=9,
        ...            device=torch.device("cpu"))
        Found(value=tensor(3), rank=tensor(2), equal=tensor(3))

    Args:
        blocks: gives the integers, as often as it is called: once per digit.
        k: at most how many integers there are, on all ranks together.
        low: no more than the k-th.
        high: no less than it. The nearer the two, the fewer digits there are to count.
        device: where counts are added up.
        reduce: adds counts up over ranks.
    """
    shift = max((high - low).bit_length() - _DIGIT_BITS, 0)
    digits = (high >> shift) - (low >> shift) + 1
    # Filled, not copied to the device, which would wait for it.
    first = torch.full((), low >> shift, device=device)
    rank = torch.full((), k, device=device) if isinstance(k, int) else k
    while True:
        counts = torch.zeros(digits + 2, dtype=torch.int64, device=device)
        for integers in blocks():
            counts += _count(integers >> shift, first, digits).to(device)
        counts = reduce(counts)
        up_to = counts.cumsum(0)
        # Where there are fewer than k integers, what is found means nothing, but must be there.
        chosen = torch.searchsorted(up_to, rank).clamp_(max=digits + 1)
        equal = counts.take(chosen)  # indexing by a tensor without dimensions would wait for it
        value = first + chosen - 1
        if shift == 0:
            return Found(value, rank - up_to.take(chosen) + equal, equal)
        step = min(shift, _DIGIT_BITS)
        shift, first, digits = shift - step, value << step, 1 << step


def _count(bins: Tensor, first: Tensor, digits: int) -> Tensor:
    """How many values lie below ``first``, are it, and so on, and lie above the last digit."""
    first = first.to(bins.device, bins.dtype)
    bins.clamp_(first - 1, first + digits).sub_(first - 1)
    if bins.device.type == "cuda":  # where bincount would wait for the highest value
        return torch.histc(bins.to(torch.int32), digits + 2, min=0, max=digits + 2)
    return torch.bincount(bins, minlength=digits + 2)
