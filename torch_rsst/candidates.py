"""Which entries the k-th lowest is searched among: the few near it, or all.

A sample tells between which two keys it should lie. One pass counts the entries below these and
collects those between. Where the sample was wrong, or too many lie between (they are equal, say),
all entries stay in the search: slower, as exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torch_rsst.digit_search import Reduce, kth_lowest
from torch_rsst.order_keys import Column, Kind
from torch_rsst.workers import Workers

# None of these has a say in the result.
_SAMPLE = 1 << 19  # entries that a guess is made from, at most
_FEW = 1 / 64  # share of all entries that may be sampled, and half of what may be collected
_LEAST = 1 << 15  # as few may be in any case

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Candidates:
    """Entries to search the k-th lowest among.

    Attributes:
        keys: gives all keys, as often as it is called.
        places: gives the places of the entries with a key; what else it gives lies above all.
        below: how many entries lie below all candidates.
        low: the key of the k-th is not lower.
        high: nor is it higher.
    """

    keys: Callable[[], Iterable[Tensor]]
    places: Callable[[int], Iterable[Tensor]]
    below: int
    low: int
    high: int


def everything(columns: Sequence[Column], low: int, high: int) -> Candidates:
    """All entries of some columns, of which the k-th lowest has a key from ``low`` to ``high``."""

    def keys() -> Iterator[Tensor]:
        for column in columns:
            yield from (keys for _, keys in column.blocks())

    def places(key: int) -> Iterator[Tensor]:
        for column in columns:
            for start, keys in column.blocks():
                places = column.places(start, keys.numel())
                yield places.masked_fill_(keys != key, torch.iinfo(places.dtype).max)

    return Candidates(keys, places, below=0, low=low, high=high)


def narrowed(
    columns: Sequence[Column],
    rank: int,
    entries: int,
    kind: Kind,
    *,
    workers: Workers,
    reduce: Reduce,
) -> tuple[Candidates, list[int]]:
    """The entries near the one at ``rank``, and the highest key of every column. On the CPU only.

    Args:
        columns: what this process holds.
        rank: which one is looked for, counting what does not compete, which lies lowest.
        entries: how many there are on all ranks.
        kind: of the columns' keys.
        workers: share the passes.
        reduce: adds counts up over ranks.
    """
    low, high = _guess(columns, rank, entries, kind, workers=workers, reduce=reduce)
    own = sum(column.scores.numel() for column in columns)
    # Twice the few, since threads do not find the same number.
    room = 2 * max(2 * _LEAST, int(_FEW * own)) // workers.count
    surveys = workers.run(partial(_survey, columns, kind, low, high, room))
    highest = [max(tops) for tops in zip(*(survey.highest for survey in surveys), strict=True)]
    counts = torch.tensor(
        [[survey.below, survey.inside, survey.overfull] for survey in surveys], device=_CPU
    )
    below, inside, overfull = reduce(counts.sum(0)).tolist()
    if not below < rank <= below + inside:
        return everything(columns, kind.lowest, kind.highest), highest
    if overfull:
        return everything(columns, low, high), highest
    keys = torch.cat([survey.keys for survey in surveys])
    places = torch.cat([survey.places for survey in surveys])
    return Candidates(lambda: [keys], lambda key: [places[keys == key]], below, low, high), highest


def _guess(
    columns: Sequence[Column],
    rank: int,
    entries: int,
    kind: Kind,
    *,
    workers: Workers,
    reduce: Reduce,
) -> tuple[int, int]:
    """Two keys that the one at ``rank`` lies between, unless the sample misleads."""
    stride = entries // max(_LEAST, min(_SAMPLE, int(_FEW * entries)))
    if stride < 2:
        return kind.floor, kind.highest
    while math.gcd(stride, 30) > 1:  # out of step with rows and channels
        stride += 1
    samples = workers.run(partial(_sample, columns, kind, stride))
    size = int(reduce(torch.tensor(sum(sample.numel() for sample in samples), device=_CPU)))
    share = rank / entries
    # Four standard deviations of the rank in a random sample.
    middle, slack = size * share, 4 * math.sqrt(size * share * (1 - share)) + 4
    first, last = int(middle - slack), int(middle + slack) + 1
    search = partial(kth_lowest, lambda: samples, device=_CPU, reduce=reduce)
    low, high = kind.lowest, kind.highest
    return (
        max(search(first, low=low, high=high).value, kind.floor) if first > 0 else kind.floor,
        search(last, low=low, high=high).value if last <= size else kind.highest,
    )


def _sample(columns: Sequence[Column], kind: Kind, stride: int, turn: int, turns: int) -> Tensor:
    parts = [torch.empty(0, dtype=kind.integer, device=_CPU)]
    for position, column in enumerate(columns):
        blocks = column.blocks((turn + position) % turns, turns, stride=stride)
        parts += [keys.clone() for _, keys in blocks]
    return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class _Survey:
    """What one pass tells, given two keys.

    Attributes:
        below: how many keys lie below both.
        inside: how many lie between.
        overfull: whether these are too many to collect.
        keys: those between, unless overfull.
        places: their places.
        highest: the highest key of each column.
    """

    below: int
    inside: int
    overfull: bool
    keys: Tensor
    places: Tensor
    highest: list[int]


def _survey(
    columns: Sequence[Column], kind: Kind, low: int, high: int, room: int, turn: int, turns: int
) -> _Survey:
    found = [torch.empty(0, dtype=kind.integer, device=_CPU)]
    places = [torch.empty(0, dtype=torch.int64, device=_CPU)]
    highest = []
    below = inside = 0
    for position, column in enumerate(columns):
        top = kind.lowest
        for start, keys in column.blocks((turn + position) % turns, turns):
            top = max(top, int(keys.amax()))
            # A comparison into bools takes several times as long as one into integers.
            under, between = column.scratch.spare(keys.numel())
            torch.lt(keys, low, out=under)
            torch.le(keys, high, out=between)
            between -= under
            below += int(under.sum(dtype=torch.int32))
            inside += int(between.sum(dtype=torch.int32))
            if inside <= room:
                near = _near(under.view(torch.uint8)[: keys.numel()].copy_(between))
                near = near[between[near] != 0]
                found.append(keys[near])
                places.append(column.place(start + near))
        highest.append(top)
    return _Survey(below, inside, inside > room, torch.cat(found), torch.cat(places), highest)


def _near(marks: Tensor) -> Tensor:
    """The indices of the few ones among zeros, and of some zeros beside them.

    Eight bytes are looked at together, which takes a fourth of the time.
    """
    if marks.numel() % 8:
        return marks.nonzero()[:, 0]
    words = marks.view(torch.int64).nonzero()
    return (8 * words + torch.arange(8, device=_CPU)).view(-1)
