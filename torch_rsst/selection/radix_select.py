"""The k-th smallest of many integers that come in blocks, from histograms of their digits.

The integers are neither joined nor sorted. A histogram of the highest bits tells in which bin the k-th
smallest integer lies; a histogram of the next bits of the integers in this bin follows, until all bits
are known. Where several ranks hold integers, their histograms are added up: some kilobytes each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Adds an int64 tensor up over all ranks; every rank makes the same calls in the same order."""

_DIGIT_BITS = 11  # three digits make 32 bits, six make 64


class Found(NamedTuple):
    """The k-th smallest integer, its position among the integers equal to it, and how many these are."""

    value: int
    rank: int
    equal: int


class Entries(Protocol):
    """Entries with a key each, by which they are ordered, and a place each, which orders equal keys."""

    def competing_keys(self) -> Tensor:
        """The keys."""

    def places_of(self, key: int) -> Tensor:
        """The places of the entries with this key; anything else it holds is the highest int64."""


def kth_smallest(
    blocks: Callable[[], Iterable[Tensor]],
    k: int,
    *,
    low: int,
    high: int,
    device: torch.device,
    all_reduce: AllReduce,
) -> Found:
    """The k-th smallest of integers that come in blocks.

    Example:
        >>> kth_smallest(lambda: [torch.tensor([7, 3]), torch.tensor([5, 3, 3])], 2, low=0, high=9,
        ...              device=torch.device("cpu"), all_reduce=lambda counts: counts)
        Found(value=3, rank=2, equal=3)

    Args:
        blocks: gives the integers, as often as it is called: once for each digit.
        k: counted from 1, at most how many integers there are on all ranks together.
        low: no more than the k-th.
        high: no less than it. The nearer the two, the fewer digits there are to count.
        device: where counts are added up. It is waited for once, at the end.
        all_reduce: adds counts up over ranks.
    """
    shift = max((high - low).bit_length() - _DIGIT_BITS, 0)
    digits = (high >> shift) - (low >> shift) + 1
    # Filled, not copied to the device, which would wait for it.
    first, rank = (torch.full((), number, device=device) for number in (low >> shift, k))
    while True:
        counts = torch.zeros(digits + 2, dtype=torch.int64, device=device)
        for integers in blocks():
            counts += _histogram(integers.flatten() >> shift, first, digits).to(device)
        counts = all_reduce(counts)
        up_to = counts.cumsum(0)
        chosen = torch.searchsorted(up_to, rank)
        equal = counts.take(chosen)  # indexing by a tensor without dimensions would wait for it
        value = first + chosen - 1
        if shift == 0:
            return Found(*torch.stack([value, rank - up_to.take(chosen) + equal, equal]).tolist())
        step = min(shift, _DIGIT_BITS)
        shift, first, digits = shift - step, value << step, 1 << step


def _histogram(bins: Tensor, first: Tensor, digits: int) -> Tensor:
    """How many values lie below ``first``, are ``first``, are ``first + 1``, …, lie above the last digit."""
    first = first.to(bins.device, bins.dtype)
    bins.clamp_(first - 1, first + digits).sub_(first - 1)
    if bins.device.type == "cuda":  # where bincount would wait for the highest value
        return torch.histc(bins.to(torch.int32), digits + 2, min=0, max=digits + 2)
    return torch.bincount(bins, minlength=digits + 2)


@dataclass(frozen=True)
class Search:
    """Which entry is looked for, and among which.

    Attributes:
        blocks: the entries of this rank.
        k: the k-th entry of all ranks is looked for, counted from 1.
        low: its key is not lower.
        high: nor is it higher. The nearer the two, the fewer digits there are to count.
    """

    blocks: Sequence[Entries]
    k: int
    low: int
    high: int

    def run(self, entries: int, *, device: torch.device, all_reduce: AllReduce) -> tuple[int, int]:
        """Its key and its place, or ``entries`` if it is the last one with this key.

        Args:
            entries: more than every place.
            device: where counts are added up. It is waited for once, twice if keys are equal.
            all_reduce: adds counts up over ranks.
        """
        find = partial(kth_smallest, device=device, all_reduce=all_reduce)
        key, rank, equal = find(
            lambda: (block.competing_keys() for block in self.blocks),
            self.k,
            low=self.low,
            high=self.high,
        )
        if rank == equal:
            return key, entries
        places = find(
            lambda: (block.places_of(key) for block in self.blocks), rank, low=0, high=entries
        )
        return key, places.value
