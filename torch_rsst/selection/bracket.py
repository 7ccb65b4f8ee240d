"""The entries near the k-th smallest one, collected in a single pass. For the CPU, where passes take long.

Two keys that the k-th smallest key probably lies between are read off a sample. One pass then counts the
entries below these and collects those between, among which the k-th is searched. Where the sample was
misleading, or too many entries lie between (equal ones, say), this is noticed, and all are searched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torch_rsst.selection.keys import Block, KeyType
from torch_rsst.selection.radix_select import AllReduce, Search, kth_smallest
from torch_rsst.utils.bool_ops import compare, count, positions
from torch_rsst.utils.threads import Workers

# These have no influence on the result.
_SAMPLE = 1 << 17  # entries that are sampled, about
_COLLECTED = 1 / 32  # share of all entries that is collected at most, or _SAMPLE if that is more

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Collected:
    """Copies of keys, and the places of their entries."""

    keys: Tensor
    places: Tensor

    def competing_keys(self) -> Tensor:
        """The keys."""
        return self.keys

    def places_of(self, key: int) -> Tensor:
        """The places of the entries with this key."""
        return self.places[self.keys == key]


def narrowed(
    blocks: Sequence[Block],
    k: int,
    *,
    available: int,
    entries: int,
    key_type: KeyType,
    workers: Workers,
    all_reduce: AllReduce,
) -> tuple[Search, int]:
    """Among which entries to search the k-th smallest, as few as can be; how many entries are NaN.

    Args:
        blocks: the entries of this rank.
        k: counted from 1.
        available: how many entries of all ranks compete.
        entries: how many entries all ranks have.
        key_type: of all blocks.
        workers: the threads.
        all_reduce: adds counts up over ranks.
    """
    everything = Search(blocks, k, key_type.lowest, key_type.highest)
    low, high = everything.low, everything.high
    if (stride := _stride(entries)) > 1:
        samples = workers.run(partial(_sample, blocks, key_type.integer, stride))
        size = int(all_reduce(torch.tensor(sum(len(sample) for sample in samples), device=_CPU)))
        find = partial(kth_smallest, lambda: samples, low=low, high=high, device=_CPU)
        first, last = _bracket(size, k / available)
        low = find(first, all_reduce=all_reduce).value if first > 0 else low
        high = find(last, all_reduce=all_reduce).value if last <= size else high
    own = sum(block.scores.numel() for block in blocks)
    limit = max(_SAMPLE, int(_COLLECTED * own)) // workers.count
    work = partial(_collect, blocks, key_type.integer, low, high, limit)
    counts, keys, places = zip(*workers.run(work), strict=True)
    below, inside, incomplete, nan = all_reduce(torch.stack(counts).sum(0)).tolist()
    if not below < k <= below + inside:
        return everything, nan
    if incomplete:
        return Search(blocks, k, low, high), nan
    return Search([Collected(torch.cat(keys), torch.cat(places))], k - below, low, high), nan


def _stride(entries: int) -> int:
    """The stride at which entries make a sample of about the size; less than 2: no sample."""
    stride = entries // _SAMPLE
    while stride > 1 and math.gcd(stride, 30) > 1:  # out of step with rows and channels
        stride += 1
    return stride


def _bracket(size: int, share: float) -> tuple[int, int]:
    """Two ranks in a sample that the entry at this share of all entries lies between, almost surely."""
    # Four standard deviations of its rank in a random sample.
    middle, slack = size * share, 4 * math.sqrt(size * share * (1 - share)) + 4
    return int(middle - slack), int(middle + slack) + 1


def _sample(
    blocks: Sequence[Block], dtype: torch.dtype, stride: int, worker: int, workers: int
) -> Tensor:
    """The keys of every ``stride``-th entry."""
    samples = [block.sample(stride) for block in blocks[worker::workers]]
    return torch.cat([torch.empty(0, dtype=dtype, device=_CPU), *samples])


def _collect(
    blocks: Sequence[Block],
    dtype: torch.dtype,
    low: int,
    high: int,
    limit: int,
    worker: int,
    workers: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """How many keys are below ``low``, how many not above ``high``, and so on; keys and places of these."""
    found = [torch.empty(0, dtype=dtype, device=_CPU)]
    places = [torch.empty(0, dtype=torch.int64, device=_CPU)]
    below, inside, nan = 0, 0, 0
    for block in blocks[worker::workers]:
        keys, competes = block.keys(), block.competes()
        if int(keys.amax()) > block.buffers.key_type.infinity:  # hardly ever
            nan += int(block.number_nan())
        _, _, _, not_above, near = block.buffers.views(block.scores)
        compare(keys, "<=", high, out=not_above)
        if competes is not None:
            not_above &= competes
        compare(keys, ">=", low, out=near)
        indices = positions(near.logical_and_(not_above))
        below += int(count(not_above)) - len(indices)
        inside += len(indices)
        if inside <= limit:
            found.append(keys.take(indices))
            places.append(block.place(indices))
    counts = torch.tensor([below, inside, inside > limit, nan], dtype=torch.int64, device=_CPU)
    return counts, torch.cat(found), torch.cat(places)
