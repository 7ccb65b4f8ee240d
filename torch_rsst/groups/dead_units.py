"""Which units of a masked model can be cut, read from its weights and masks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.masking.entry_blocks import acting, add_along
from torch_rsst.masking.mask_sets import mask_of


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
        masks: by dense name; missing: all alive.
    """
    acts = {
        member: acting_entries(
            member, weights[member.parameter], mask_of(weights, masks, member.parameter), layer
        )
        for member in layer.members
    }
    silent = ~_any(acts.values(), layer)
    giving = [member for member in layer.ranked if not member.consumes]
    unfed = ~_any((acts[member] for member in giving), layer) if giving else silent
    # What takes in the output of a block is no member, and has no bias to move a constant into.
    heard = torch.tensor(any(member.consumes for member in layer.members))
    return DeadUnits(silent, unfed & ~silent & heard)


def acting_entries(
    member: Member, weight: Tensor, mask: Tensor | None, layer: GroupLayer
) -> Tensor:
    """How many entries of each unit act: are alive and not 0."""
    along = member.zeros_along(weight)
    for index, block in acting(weight, mask):
        add_along(block.bool(), member.dims, index, along)
    return member.per_unit(along, layer.units, weight)


def _any(counts: Iterable[Tensor], layer: GroupLayer) -> Tensor:
    return torch.stack([torch.zeros(layer.units, dtype=torch.float64), *counts]).sum(0) > 0
