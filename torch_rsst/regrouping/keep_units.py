"""Scores and a budget → which units are kept. Pure, on small CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_rsst.utils.amounts import Amount, units_to_keep

REASONS = ("score", "fillback_rate", "min_keep", "round_to", "dead")
"""What can decide that a unit stays or goes, in the order of their numbers."""
_SCORE, _FILLBACK, _MIN_KEEP, _ROUND_TO, _DEAD = range(len(REASONS))


@dataclass(frozen=True, eq=False)
class ScoredLayer:
    """What selection needs to know of one layer's units, a value each.

    Attributes:
        scores: float64; dead units score 0.
        alive: alive ranked entries.
        sizes: ranked entries.
        dead: units that the model does not use any more; by default those without alive ranked entries.
        multiple: what the number of units that stay is raised to a multiple of.
    """

    scores: Tensor
    alive: Tensor
    sizes: Tensor
    dead: Tensor | None = None
    multiple: int = 1

    def normalized(self) -> ScoredLayer:
        """With scores that sum to 1, unless all are 0."""
        total = self.scores.sum()
        return replace(self, scores=self.scores / torch.where(total > 0, total, 1.0))

    def stacked(self, parts: Tensor, multiple: int = 1) -> tuple[ScoredLayer, Tensor]:
        """Units of stacked weights by their rank among those of the same weight.

        Those of one rank stand or fall together, so that as many are left of each weight: they count as one
        unit, of all their entries.

        Args:
            parts: the units of each weight, shape (parts, units of each).
            multiple: of the ranks.

        Returns:
            the ranks as units, the lowest first, and a tensor of the shape of ``parts`` with the units of each.
        """
        order = parts.gather(1, torch.sort(self.sort_keys[parts], stable=True).indices)
        dead = self.sort_keys.isneginf()[order].all(0)
        # Where dead units are many and a callable scores below 0, sums need not rise by themselves.
        scores = self.scores[order].sum(0).cummax(0).values
        alive, sizes = self.alive[order].sum(0), self.sizes[order].sum(0)
        return ScoredLayer(scores, alive, sizes, dead, multiple), order

    @property
    def sort_keys(self) -> Tensor:
        """Scores with the dead ones below whatever a callable gives the living."""
        dead = self.alive == 0 if self.dead is None else self.dead
        return self.scores.masked_fill(dead, -torch.inf)


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


@dataclass(frozen=True, eq=False)
class Selection:
    """Which units of one scope stay, and what that came from; a tensor per layer.

    Attributes:
        kept: True for units that stay.
        requested: how many the budget alone would keep.
        keys: scores as they were compared; -inf for dead units.
        budgeted: what stayed before ``round_to`` had its say.
        without_fillback: how many the budget would keep if nothing were given back.
    """

    kept: tuple[Tensor, ...]
    requested: int
    keys: tuple[Tensor, ...]
    budgeted: tuple[Tensor, ...]
    without_fillback: int

    def reasons(self) -> tuple[Tensor, ...]:
        """What decided about each unit: uint8, positions in :data:`REASONS`.

        A unit stays by its score where it ranks within the budget and above all that go. What stays
        otherwise is held by ``min_keep`` or ``round_to``; what goes although it ranks within the
        budget gives way to a unit that ``min_keep`` holds in another layer.
        """
        rank, kept, budgeted = map(torch.cat, (ranks(self.keys), self.kept, self.budgeted))
        best_to_go = int(rank[~budgeted].min()) if not bool(budgeted.all()) else rank.numel() + 1
        held = budgeted & ((rank > self.requested) | (rank > best_to_go))
        reason = torch.full_like(rank, _SCORE, dtype=torch.uint8)
        reason[budgeted & (rank > self.without_fillback)] = _FILLBACK
        reason[held | (~kept & (rank <= self.requested))] = _MIN_KEEP
        reason[kept & ~budgeted] = _ROUND_TO
        reason[~kept & (torch.cat(self.keys) == -torch.inf)] = _DEAD
        return torch.split(reason, [key.numel() for key in self.keys])


def ranks(keys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The rank of each unit among those of all layers: 1 goes last. Of equals the earliest goes first.

    >>> ranks([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])])
    (tensor([1, 4]), tensor([3, 2]))
    """
    order = torch.sort(_joined(keys), stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), 0, -1)
    return torch.split(rank, [key.numel() for key in keys])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def keep_units(
    layers: Sequence[ScoredLayer],
    *,
    amount: Amount | None,
    fillback_rate: float = 0.0,
    min_keep: int = 1,
    round_to: int | None = None,
    per_entry: bool = False,
    of: str = "units",
) -> Selection:
    """Choose the units of one scope that stay.

    Args:
        layers: the layers whose units compete.
        amount: fraction or number of all their units to drop; None for the density budget.
        fillback_rate: the share of the dropped that is given back.
        min_keep: units per layer that stay whatever the budget.
        round_to: raise each layer's kept units to a multiple of this, where it has that many.
        per_entry: compare scores per ranked entry, for units of different sizes.
        of: what the units are called in an error.
    """
    units, alive_of_size = sum(layer.scores.numel() for layer in layers), _alive_of_size(layers)
    requested = units_to_keep(amount, units, alive_of_size, fillback_rate, of=of)
    keys = [layer.sort_keys / layer.sizes if per_entry else layer.sort_keys for layer in layers]
    protected = [_best(key, min_keep) for key in keys]
    droppable = [~mask for mask in protected]
    drop = min(units - requested, sum(int(mask.sum()) for mask in droppable))
    kept = budgeted = [~mask for mask in _lowest(keys, drop, droppable)]
    steps = [math.lcm(round_to or 1, layer.multiple) for layer in layers]
    if max(steps, default=1) > 1:
        counts = [-(-int(k.sum()) // step) * step for k, step in zip(kept, steps, strict=True)]
        kept = [keep | _best(key, n) for keep, key, n in zip(kept, keys, counts, strict=True)]
    without = units_to_keep(amount, units, alive_of_size, 0.0) if fillback_rate else requested
    return Selection(tuple(kept), requested, tuple(keys), tuple(budgeted), without)


def _alive_of_size(layers: Sequence[ScoredLayer]) -> dict[int, int]:
    totals: dict[int, int] = {}
    for layer in layers:
        # A unit without ranked entries is dead: it adds nothing to the density.
        for size in set(layer.sizes.tolist()) - {0}:
            totals[int(size)] = totals.get(int(size), 0) + int(
                layer.alive[layer.sizes == size].sum()
            )
    return totals


def _best(key: Tensor, count: int) -> Tensor:
    """The ``count`` highest, where :func:`_lowest` would take them last."""
    every = [torch.ones_like(key, dtype=torch.bool)]
    return ~_lowest([key], max(key.numel() - count, 0), every)[0]


def _lowest(keys: Sequence[Tensor], count: int, among: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The ``count`` lowest of some units. Of equals the earliest.

    Units are so few that sorting them is the fastest.
    """
    candidates = _joined(among)
    order = torch.sort(_joined(keys), stable=True).indices
    marks = torch.zeros_like(candidates)
    marks[order[candidates[order]][:count]] = True
    return torch.split(marks, [key.numel() for key in keys])
