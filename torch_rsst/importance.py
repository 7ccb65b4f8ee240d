"""Importance: a layer of units → one score per unit. The lowest go first.

An importance is any callable ``(layer, weights, alive) → scores``; the two shipped here are
written as users would write theirs. Scores accumulate in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from torch_rsst.errors import message, unknown_choice
from torch_rsst.groups import GroupLayer
from torch_rsst.masks import alive_in

Importance: TypeAlias = Callable[[GroupLayer, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""``(layer, weights, masks) → scores``: weights by dense name, bool masks (missing: all alive),
one score per unit of the layer."""


def remain(layer: GroupLayer, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
    """The number of alive ranked entries of each unit.

    Example:
        >>> layer = torch_rsst.head_layer("weight", rows=4, num_heads=2, projections=1)
        >>> weights = {"weight": torch.ones(4, 1)}
        >>> masks = {"weight": torch.tensor([[True], [True], [True], [False]])}
        >>> remain(layer, weights, masks)
        tensor([2., 1.], dtype=torch.float64)
    """
    score = torch.zeros(layer.units, dtype=torch.float64)
    for member in layer.ranked:
        score += member.sum_per_unit(alive_in(weights, masks, member.parameter), layer.units)
    return score


def magnitude(
    layer: GroupLayer, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Tensor:
    """The sum of |w| over the alive ranked entries of each unit.

    Example:
        >>> layer = torch_rsst.head_layer("weight", rows=2, num_heads=2, projections=1)
        >>> magnitude(layer, {"weight": torch.tensor([[3.0], [-5.0]])}, {})
        tensor([3., 5.], dtype=torch.float64)
    """
    score = torch.zeros(layer.units, dtype=torch.float64)
    for member in layer.ranked:
        weight = weights[member.parameter]
        if member.parameter in masks:
            dead = ~alive_in(weights, masks, member.parameter)
            weight = weight.masked_fill(dead, 0.0)
        score += member.sum_per_unit(weight.abs(), layer.units)
    return score


IMPORTANCES: dict[str, Importance] = {"remain": remain, "magnitude": magnitude}
"""Name → importance. Add one with one line."""


def resolve_importance(importance: str | Importance) -> Importance:
    """The importance of a name; a callable is returned as it is.

    Raises:
        ValueError: for an unknown name.
        TypeError: for neither a name nor a callable.
    """
    if isinstance(importance, str):
        if importance not in IMPORTANCES:
            raise ValueError(unknown_choice("importance", importance, IMPORTANCES))
        return IMPORTANCES[importance]
    if not callable(importance):
        remedy = "A callable takes (layer, weights, masks) and returns one score per unit."
        got = repr(importance)
        raise TypeError(
            message("importance", expected="a name or a callable", got=got, remedy=remedy)
        )
    return importance


def score_units(
    importance: Importance,
    layer: GroupLayer,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    alive: Tensor,
) -> Tensor:
    """The checked scores of one layer, float64 on the CPU; dead units score exactly 0.

    Args:
        importance: the callable.
        layer: whose units are scored.
        weights: by dense name.
        masks: bool, by dense name; missing: all alive.
        alive: the number of alive ranked entries of each unit.

    Raises:
        ValueError: for scores of another shape, or NaN for a unit that is alive.
    """
    scores = torch.as_tensor(importance(layer, weights, masks)).detach().cpu().double()
    subject = f"importance of {layer}"
    if scores.shape != (layer.units,):
        remedy = "Return one score per unit of the layer."
        raise ValueError(
            message(
                subject,
                expected=f"shape ({layer.units},)",
                got=f"shape {tuple(scores.shape)}",
                remedy=remedy,
            )
        )
    scores = scores.masked_fill(alive == 0, 0.0)
    if bool(scores.isnan().any()):
        remedy = "A NaN has no rank; look for the step at which training diverged."
        got = f"NaN for unit(s) {scores.isnan().nonzero().flatten().tolist()[:5]}"
        raise ValueError(message(subject, expected="numbers", got=got, remedy=remedy))
    return scores
