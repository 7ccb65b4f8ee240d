"""Which units of a masked model can be cut, read from its weights and masks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_rsst.groups import GroupLayer, Member
from torch_rsst.masks import alive_in


@dataclass(frozen=True, eq=False)
class DeadUnits:
    """Bool tensors over the units of a layer.

    Attributes:
        silent: nothing of the unit can be heard: all that it puts out is taken in by zeros.
        constant: it is heard, but the layers that put it out have only zeros, so that it puts out the
            same whatever the input: the activation of its bias, the shift of a batch norm.
    """

    silent: Tensor
    constant: Tensor


def dead_units(
    layer: GroupLayer, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> DeadUnits:
    """The dead units of a layer: those whose entries are masked or exactly 0.

    Args:
        layer: whose units are looked at.
        weights: by dense name.
        masks: bool, by dense name; missing: all alive.
    """
    taking = [member for member in layer.ranked if member.consumes]
    giving = [member for member in layer.ranked if not member.consumes]
    everywhere = _all_zero(layer, layer.members, weights, masks)
    unheard = _all_zero(layer, taking, weights, masks) if taking else everywhere
    unfed = _all_zero(layer, giving, weights, masks) if giving else everywhere
    silent = everywhere | unheard
    return DeadUnits(silent, unfed & ~silent)


def _all_zero(
    layer: GroupLayer,
    members: Iterable[Member],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
) -> Tensor:
    nonzero = torch.zeros(layer.units, dtype=torch.float64)
    for member in members:
        weight = weights[member.parameter]
        heard = (weight != 0) & alive_in(weights, masks, member.parameter)
        nonzero += member.sum_per_unit(heard, layer.units)
    return nonzero == 0
