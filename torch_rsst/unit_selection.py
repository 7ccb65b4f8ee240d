"""Scores and a budget → which units are kept. Pure, on small CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_rsst.budget import Amount, units_to_keep
from torch_rsst.selection import lowest


@dataclass(frozen=True, eq=False)
class ScoredLayer:
    """What selection needs to know of one layer's units, a value each.

    Attributes:
        scores: float64; dead units score 0.
        alive: alive ranked entries.
        sizes: ranked entries.
    """

    scores: Tensor
    alive: Tensor
    sizes: Tensor

    @property
    def sort_keys(self) -> Tensor:
        """Scores with the dead ones below whatever a callable gives the living."""
        return self.scores.masked_fill(self.alive == 0, -torch.inf)


@dataclass(frozen=True)
class ScopeBudget:
    """The units that one scope was asked to keep and those it keeps.

    They differ where ``min_keep`` or ``round_to`` had a say.
    """

    scope: str
    kind: str
    units: int
    requested: int
    realized: int

    def __str__(self) -> str:
        asked = f"{self.requested} of {self.units} {self.kind} were to stay, {self.realized} do"
        return f"{self.scope or 'the model'}: {asked}"


def keep_units(
    layers: Sequence[ScoredLayer],
    *,
    amount: Amount | None,
    fillback_rate: float = 0.0,
    min_keep: int = 1,
    round_to: int | None = None,
    per_entry: bool = False,
) -> tuple[list[Tensor], int]:
    """Choose the units of one scope that stay.

    Args:
        layers: the layers whose units compete.
        amount: fraction or number of all their units to drop; None for the density budget.
        fillback_rate: the share of the dropped that is given back.
        min_keep: units per layer that stay whatever the budget.
        round_to: raise each layer's kept units to a multiple of this, where it has that many.
        per_entry: compare scores per ranked entry, for units of different sizes.

    Returns:
        a bool tensor per layer, True for units kept, and how many the budget alone would keep.
    """
    requested = units_to_keep(
        amount, sum(layer.scores.numel() for layer in layers), _alive_of_size(layers), fillback_rate
    )
    keys = [layer.sort_keys / layer.sizes if per_entry else layer.sort_keys for layer in layers]
    protected = [_best(key, min_keep) for key in keys]
    droppable = [~mask for mask in protected]
    total = sum(key.numel() for key in keys)
    drop = min(total - requested, sum(int(mask.sum()) for mask in droppable))
    dropped = lowest(keys, drop, among=droppable)
    kept = [~mask for mask in dropped]
    if round_to is not None:
        counts = [-(-int(keep.sum()) // round_to) * round_to for keep in kept]
        kept = [keep | _best(key, n) for keep, key, n in zip(kept, keys, counts, strict=True)]
    return kept, requested


def _alive_of_size(layers: Sequence[ScoredLayer]) -> dict[int, int]:
    totals: dict[int, int] = {}
    for layer in layers:
        # A unit without ranked entries is dead: it adds nothing to the density.
        for size in set(layer.sizes.tolist()) - {0}:
            totals[int(size)] = totals.get(int(size), 0) + int(
                layer.alive[layer.sizes == size].sum()
            )
    return totals


def _best(keys: Tensor, count: int) -> Tensor:
    """The ``count`` highest, where :func:`lowest` would drop them last."""
    goes = lowest([keys], max(keys.numel() - count, 0))[0]
    return ~goes
