"""Which units of a masked model can be cut, read from its weights and masks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Member


@dataclass(frozen=True, eq=False)
class DeadUnits:
    """Bool tensors over the units of a layer.

    Attributes:
        silent: all entries of the unit are 0.
        constant: the layers that put it out have only zeros, so that it puts out the same whatever the
            input: the activation of its bias, the shift of a batch norm.
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
    giving = [member for member in layer.ranked if not member.consumes]
    silent = _all_zero(layer, layer.members, weights, masks)
    unfed = _all_zero(layer, giving, weights, masks) if giving else silent
    return DeadUnits(silent, unfed & ~silent)


def _all_zero(
    layer: GroupLayer,
    members: Iterable[Member],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
) -> Tensor:
    zero = torch.ones(layer.units, dtype=torch.bool)
    for member in members:
        zero &= ~_heard(member, weights[member.parameter], masks.get(member.parameter), layer.units)
    return zero


def _heard(member: Member, weight: Tensor, mask: Tensor | None, units: int) -> Tensor:
    """Per unit, whether some entry of it acts: is alive and not 0."""
    others = [d for d in range(weight.ndim) if d != member.dim]
    values = weight.abs()
    if mask is not None:
        alive = mask.to(device=weight.device, dtype=weight.dtype)
        # What is masked may be inf or NaN, which 0 would not silence.
        values = values.mul_(alive) if bool(values.sum().isfinite()) else values.where(mask, 0.0)
    along = (values.amax(others) if others else values) != 0
    owned = member.unit_of != NO_UNIT
    used = torch.zeros(units)
    used.index_add_(0, member.unit_of[owned], along.cpu()[owned].float())
    return used != 0
