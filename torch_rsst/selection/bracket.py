"""Which entries the k-th lowest is searched among: the few near it, or all.

A sample tells between which two keys it should lie. One pass counts the entries below these and
collects those between. Where the sample was wrong, or too many lie between (they are equal, say),
all entries are searched: slower, as exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torch_rsst.selection.keys import Column, Kind
from torch_rsst.selection.radix_select import Reduce, kth_lowest
from torch_rsst.utils.bool_ops import compare, count, positions
from torch_rsst.utils.threads import Workers

# None of these has a say in the result.
_SAMPLE = 1 << 18  # entries that a guess is made from, at most
_FEW = 1 / 64  # share of all entries that may be sampled, and half of what may be collected
_LEAST = 1 << 15  # as few may be in any case

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Candidates:
    """Entries to search the k-th lowest among.

    What is known of them are int64 tensors, added up over ranks, which nobody has waited for.

    Attributes:
        keys: gives all keys, as often as it is called.
        places: gives the places of the entries with a key; what else it gives lies above all.
        low: the key of the k-th is not lower.
        high: nor is it higher.
        below: how many entries lie below all candidates.
        inside: how many lie between ``low`` and ``high``.
        overfull: on how many ranks these were too many to collect, so that some are missing.
        has_nan: more than 0 for each column in which NaN competes; empty if that is known already.
    """

    keys: Callable[[], Iterable[Tensor]]
    places: Callable[[Tensor], Iterable[Tensor]]
    low: int
    high: int
    below: Tensor
    inside: Tensor
    overfull: Tensor
    has_nan: Tensor

    def search(self, rank: int, entries: int, *, device: torch.device, reduce: Reduce) -> Findings:
        """Find the entry at a rank, and wait once.

        Args:
            rank: which one is looked for, counting what does not compete, which lies lowest.
            entries: how many there are on all ranks.
            device: where counts are added up.
            reduce: adds counts up over ranks.
        """
        find = partial(kth_lowest, device=device, reduce=reduce)
        found = find(self.keys, rank - self.below, low=self.low, high=self.high)
        place = torch.full((), entries, device=device)
        # Elsewhere than on the CPU, to look whether others are equal would be to wait.
        if device.type != "cpu" or found.rank < found.equal:
            ties = partial(self.places, found.value)
            place = find(ties, found.rank, low=0, high=entries).value
        return self._findings(found.value, place, rank)

    def _findings(self, key: Tensor, place: Tensor, rank: int) -> Findings:
        """What is known, when it has been waited for."""
        known = torch.stack([key, place, self.below, self.inside, self.overfull])
        first, last, below, inside, overfull, *has_nan = torch.cat([known, self.has_nan]).tolist()
        return Findings(first, last, below < rank <= below + inside, overfull == 0, has_nan)


@dataclass(frozen=True)
class Findings:
    """What a search has found.

    Attributes:
        key: of the entry that was looked for.
        place: where it stands.
        between: whether it does lie between the two keys that were guessed.
        complete: whether all between these were there to be searched.
        has_nan: more than 0 for each column in which NaN competes.
    """

    key: int
    place: int
    between: bool
    complete: bool
    has_nan: list[int]


def everything(
    columns: Sequence[Column], low: int, high: int, *, has_nan: Tensor | None = None
) -> Candidates:
    """All entries of some columns, of which the k-th lowest has a key from ``low`` to ``high``."""
    device = columns[0].scores.device

    def keys() -> Iterator[Tensor]:
        for column in columns:
            yield from (keys for _, keys in column.blocks())

    def places(key: Tensor) -> Iterator[Tensor]:
        for column in columns:
            for start, keys in column.blocks():
                places = column.places(start, keys.numel())
                others = keys != key.to(keys.device)
                yield places.masked_fill_(others, torch.iinfo(places.dtype).max)

    none, all_of_them = (
        torch.full((), number, dtype=torch.int64, device=device)
        for number in (0, torch.iinfo(torch.int64).max)
    )
    known = has_nan if has_nan is not None else none.new_empty(0)
    return Candidates(keys, places, low, high, none, all_of_them, none, known)


def nan_of_each(columns: Sequence[Column], *, device: torch.device) -> Tensor:
    """Whether NaN competes in each column here; to be added up over ranks."""
    flags = [column.has_nan().to(device, torch.int64) for column in columns]
    return torch.stack(flags) if flags else torch.zeros(0, dtype=torch.int64, device=device)


def narrowed(
    columns: Sequence[Column],
    rank: int,
    entries: int,
    kind: Kind,
    *,
    workers: Workers,
    reduce: Reduce,
) -> Candidates:
    """The entries near the one at ``rank``. On the CPU only.

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
    most = 2 * max(2 * _LEAST, int(_FEW * own)) // workers.count
    surveys = workers.run(partial(_survey, columns, kind, low, high, most))
    has_nan = [any(each) for each in zip(*(s.has_nan for s in surveys), strict=True)]
    found = [
        sum(each) for each in zip(*((s.below, s.inside, s.overfull) for s in surveys), strict=True)
    ]
    counts = torch.tensor([*found, *has_nan], dtype=torch.int64, device=_CPU)
    below, inside, overfull, *_ = counts = reduce(counts)
    keys = torch.cat([survey.keys for survey in surveys])
    places = torch.cat([survey.places for survey in surveys])
    return Candidates(
        lambda: [keys],
        lambda key: [places[keys == key]],
        low,
        high,
        below=below,
        inside=inside,
        overfull=overfull,
        has_nan=counts[3:],
    )


def stride_of(entries: int, sample: int) -> int:
    """The stride at which entries make a sample of about that size; less than 2: no sample."""
    stride = entries // sample
    while stride > 1 and math.gcd(stride, 30) > 1:  # out of step with rows and channels
        stride += 1
    return stride


def bracket(
    kth: Callable[[int], int], size: int, rank: int, entries: int, kind: Kind
) -> tuple[int, int]:
    """Two keys that the one at ``rank`` lies between, unless the sample misleads.

    Args:
        kth: the k-th lowest of the sample, k counting from 1.
        size: of the sample; 0 where there is none.
        rank: which one is looked for.
        entries: how many there are.
        kind: of the keys.
    """
    share = rank / entries
    # Four standard deviations of the rank in a random sample.
    middle, slack = size * share, 4 * math.sqrt(size * share * (1 - share)) + 4
    first, last = int(middle - slack), int(middle + slack) + 1
    return (
        max(kth(first), kind.floor) if first > 0 else kind.floor,
        kth(last) if last <= size else kind.highest,
    )


def _guess(
    columns: Sequence[Column],
    rank: int,
    entries: int,
    kind: Kind,
    *,
    workers: Workers,
    reduce: Reduce,
) -> tuple[int, int]:
    stride = stride_of(entries, max(_LEAST, min(_SAMPLE, int(_FEW * entries))))
    if stride < 2:
        return kind.floor, kind.highest
    samples = workers.run(partial(_sample, columns, kind, stride))
    size = int(reduce(torch.tensor(sum(sample.numel() for sample in samples), device=_CPU)))

    def kth(k: int) -> int:
        low, high = kind.lowest, kind.highest
        found = kth_lowest(lambda: samples, k, low=low, high=high, device=_CPU, reduce=reduce)
        return int(found.value)

    return bracket(kth, size, rank, entries, kind)


def _sample(columns: Sequence[Column], kind: Kind, stride: int, turn: int, turns: int) -> Tensor:
    parts = [torch.empty(0, dtype=kind.integer, device=_CPU)]
    for position, column in enumerate(columns):
        blocks = column.blocks(stride=stride, turn=(turn + position) % turns, turns=turns)
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
        has_nan: whether NaN competes in each column.
    """

    below: int
    inside: int
    overfull: bool
    keys: Tensor
    places: Tensor
    has_nan: list[bool]


def _survey(
    columns: Sequence[Column], kind: Kind, low: int, high: int, most: int, turn: int, turns: int
) -> _Survey:
    found = [torch.empty(0, dtype=kind.integer, device=_CPU)]
    places = [torch.empty(0, dtype=torch.int64, device=_CPU)]
    has_nan = [False] * len(columns)
    below, inside, infinity = 0, 0, kind.infinity
    for position, column in enumerate(columns):
        blocks = column.pairs(turn=(turn + position) % turns, turns=turns) if column.counts else ()
        for start, keys, among in blocks:
            above, near = column.scratch.workspace(keys.numel()).flags
            compare(keys, ">=", low, out=above)
            if among is not None:
                above &= column.scratch.competing(among)
            below += keys.numel() - int(count(above))
            if int(keys.amax()) > infinity:  # hardly ever
                has_nan[position] |= bool(((keys > infinity) & above).any())
            compare(keys, "<=", high, out=near)
            indices = positions(near.logical_and_(above))
            inside += len(indices)
            if inside <= most:
                found.append(keys[indices])
                places.append(column.place(start + indices))
    return _Survey(below, inside, inside > most, torch.cat(found), torch.cat(places), has_nan)
