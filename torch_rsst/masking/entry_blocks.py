"""Weights as they act, in blocks that fit the processor's cache.

A pass over a model that goes from block to block needs no copy of a parameter, and reads memory once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Index: TypeAlias = tuple[slice, ...]

# Entries of a block: few enough that float32 counts them exactly.
_BLOCK = 1 << 18
_BLOCK_ELSEWHERE = 1 << 22  # a device waits for each operation to be launched


def blocks(shape: Sequence[int], size: int) -> Iterator[Index]:
    """Indices of parts of a tensor, of ``size`` entries at most, which together are all of it.

    >>> list(blocks((3, 2), 4))
    [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 3, None), slice(0, 2, None))]
    """
    if not shape:
        yield ()
        return
    if 0 in shape:
        return
    first, *rest = shape
    inner = math.prod(rest)
    steps = max(1, size // max(1, inner))
    within = list(blocks(rest, size)) if inner > size else [tuple(slice(0, n) for n in rest)]
    for start in range(0, first, steps):
        for index in within:
            yield (slice(start, min(first, start + steps)), *index)


def block_indices(tensor: Tensor) -> Iterator[Index]:
    """Indices of the blocks of a tensor."""
    return blocks(tensor.shape, _BLOCK if tensor.device.type == "cpu" else _BLOCK_ELSEWHERE)


class Scratch:
    """Memory for one block, used over and over: fetching it anew costs more than the arithmetic."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        longest = max((_entries(index) for index in block_indices(like)), default=0)
        self._memory = torch.empty(longest, dtype=dtype, device=like.device)

    def copy(self, block: Tensor) -> Tensor:
        """A block in this memory and its dtype."""
        return self.shaped(block).copy_(as_bytes(block))

    def shaped(self, block: Tensor) -> Tensor:
        """The memory in the shape of a block."""
        return self._memory[: block.numel()].view(block.shape)


def as_bytes(mask: Tensor) -> Tensor:
    """A bool tensor as bytes, sharing memory: to copy these to floats takes a third of the time."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _entries(index: Index) -> int:
    return math.prod(each.stop - each.start for each in index)


def acting(
    weight: Tensor, mask: Tensor | None, *, double: bool = False
) -> Iterator[tuple[Index, Tensor]]:
    """Blocks of a weight with 0 where it is masked, whatever stands there.

    Args:
        weight: of floats.
        mask: nonzero where it is alive; None: everywhere.
        double: give float64, in memory that may be written to until the next block.

    Returns:
        indices and blocks, of float32 if not otherwise said and if the weight is not of float64.
    """
    weight, alive = weight.detach(), None if mask is None else mask.detach().to(weight.device)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    values, flags, wide = (Scratch(weight, d) for d in (dtype, dtype, torch.float64))
    for index in block_indices(weight):
        block = weight[index]
        if block.dtype != dtype:
            block = values.copy(block)
        if alive is not None:
            own = alive[index]
            own = own if own.dtype == dtype else flags.copy(own)
            block = zero_where_masked(block, own, out=values.shaped(block))
        yield index, wide.copy(block) if double else block


def zero_where_masked(block: Tensor, alive: Tensor, *, out: Tensor) -> Tensor:
    """Set ``out`` to a block with 0 where ``alive``, of the same dtype, is 0; return it.

    No inf or NaN leaks out, as from a product; it takes as long, a quarter of ``torch.where``.
    """
    torch.ops.aten.threshold_backward.grad_input(block, alive, 0, grad_input=out)
    return out


def add_along(block: Tensor, dims: Sequence[int], index: Index, totals: Tensor) -> None:
    """Add the sums of a block over all dimensions but some to their place in a tensor of these.

    Flags and masks are counted: in integers, and in float32, which is exact for so few.
    """
    others = [d for d in range(block.ndim) if d not in dims]
    dtypes = {torch.bool: torch.int32, torch.float64: torch.float64}
    dtype = dtypes.get(block.dtype, torch.float32)
    place = tuple(index[d] for d in dims)
    totals[place] += block.sum(others, dtype=dtype) if others else block
