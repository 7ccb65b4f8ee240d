"""What is counted of one parameter, in one pass over it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_rsst.distributed.dtensor import Ranks, local
from torch_rsst.masking.entry_blocks import Scratch, acting, add_along, zero_where_masked

Dims = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class EntryCounts:
    """Counts over all entries of a parameter, and along some of its dimensions.

    Attributes:
        elements: how many entries there are.
        zeros: how many are masked or exactly 0.
        masked: how many are masked.
        penalized: how many are alive and 0 in the refill mask.
        penalized_squares: the sum of squares of these.
        kept_squares: the sum of squares of the other alive ones.
        nonzero_along: per dimension, or several, how many entries of each index are not 0; of a sharded
            parameter those of this rank.
        staying_along: the same of entries that are 1 in the refill mask; empty without one.
    """

    elements: int
    zeros: int
    masked: int
    penalized: int
    penalized_squares: float
    kept_squares: float
    nonzero_along: dict[Dims, Tensor]
    staying_along: dict[Dims, Tensor]


def count_entries(
    weight: Tensor, mask: Tensor | None, refill: Tensor | None, dims: Iterable[Dims]
) -> EntryCounts:
    """Count a parameter's entries as they act; of a sharded one over all ranks.

    Args:
        weight: the parameter.
        mask: nonzero where it is alive; None: everywhere.
        refill: bool, what should be alive; None: everything.
        dims: to count along.
    """
    weight_ = _flat_if_scalar(weight)
    mask_, refill_ = (None if t is None else _flat_if_scalar(t) for t in (mask, refill))
    device = weight_.device
    nonzero, staying = (
        {
            each: torch.zeros([weight_.shape[d] for d in each], dtype=torch.float64, device=device)
            for each in which
        }
        for which in ({(0,), *dims}, () if refill_ is None else set(dims))
    )
    wide, chosen, part = (Scratch(weight_, torch.float64) for _ in range(3))
    alive, penalized, penalized_squares, kept_squares = torch.zeros(
        4, dtype=torch.float64, device=device
    )
    for index, block in acting(weight_, mask_):
        flags = block.bool()
        for along, totals in nonzero.items():
            add_along(flags, along, index, totals)
        values = wide.copy(block)
        own = None if mask_ is None else mask_[index]
        alive += block.numel() if own is None else _count(own)
        if refill_ is None:
            kept_squares += _squares(values)
            continue
        wanted = refill_[index]
        for along, totals in staying.items():
            add_along(wanted, along, index, totals)
        penalized += _count(~wanted if own is None else own.bool() > wanted)
        for flags, squares in ((wanted, kept_squares), (~wanted, penalized_squares)):
            zero_where_masked(values, chosen.copy(flags), out=part.shaped(block))
            squares += _squares(part.shaped(block))
    counts = torch.stack([nonzero[(0,)].sum(), alive, penalized, penalized_squares, kept_squares])
    ranks, elements = Ranks.of([weight]), weight.numel()
    found = ranks.add_up(counts if ranks.counts(weight) else torch.zeros_like(counts)).tolist()
    return EntryCounts(
        elements=elements,
        zeros=elements - int(found[0]),
        masked=elements - int(found[1]),
        penalized=int(found[2]),
        penalized_squares=found[3],
        kept_squares=found[4],
        nonzero_along=nonzero,
        staying_along=staying,
    )


def _flat_if_scalar(tensor: Tensor) -> Tensor:
    """The part that this rank holds, of one dimension at least."""
    part = local(tensor).detach()
    return part if part.ndim else part.reshape(1)


def _count(mask: Tensor) -> Tensor:
    """How many entries of a mask are alive; of few enough for float32 to count them."""
    return mask.sum(dtype=torch.int32 if mask.dtype == torch.bool else torch.float32)


def _squares(values: Tensor) -> Tensor:
    flat = values.view(-1)
    return flat.dot(flat)


def summed(counts: Iterable[EntryCounts]) -> dict[str, Any]:
    """What reports of several parameters together have in common."""
    each = list(counts)
    return {
        "elements": sum(c.elements for c in each),
        "zeros": sum(c.zeros for c in each),
        "penalized": sum(c.penalized for c in each),
        "penalized_norm": math.sqrt(sum(c.penalized_squares for c in each)),
        "kept_norm": math.sqrt(sum(c.kept_squares for c in each)),
    }
