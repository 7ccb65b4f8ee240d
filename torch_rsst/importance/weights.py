"""Importances that look at weights alone: functions, as users would write theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from torch_rsst.groups.groups import GroupLayer
from torch_rsst.masking.mask_sets import mask_of
from torch_rsst.utils.errors import refuse

Importance: TypeAlias = Callable[[GroupLayer, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""``(layer, weights, masks) → scores``: weights by dense name, bool masks (missing: all alive),
one score per unit of the layer. The units with the lowest scores are removed first."""


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
        weight, mask = weights[member.parameter], mask_of(weights, masks, member.parameter)
        if mask is None:
            score += member.size_per_unit(weight, layer.units)
        else:
            score += member.count_per_unit(mask, layer.units)
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
        weight, mask = weights[member.parameter], mask_of(weights, masks, member.parameter)
        score += member.sum_per_unit(weight, layer.units, mask=mask, of=Tensor.abs_)
    return score


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
        expected, got = f"shape ({layer.units},)", f"shape {tuple(scores.shape)}"
        refuse(ValueError, subject, expected, got, remedy)
    scores = scores.masked_fill(alive == 0, 0.0)
    if bool(scores.isnan().any()):
        remedy = "A NaN has no rank; look for the step at which training diverged."
        got = f"NaN for unit(s) {scores.isnan().nonzero().flatten().tolist()[:5]}"
        refuse(ValueError, subject, "numbers", got, remedy)
    return scores
