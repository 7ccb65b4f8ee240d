"""Hidden neurons of gated MLPs one of whose layers puts out gates and values in turns."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from torch_rsst.discovery.gated_mlp import GatedMLP
from torch_rsst.groups.groups import GroupLayer


class AlternatingGates(GatedMLP):
    """The even rows of one layer are gates, the odd ones are values: asked where halves are mixed."""

    def find(self, module: nn.Module) -> GroupLayer | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        found = super().find(module)
        if not isinstance(found, GroupLayer):
            return None
        turns = torch.arange(found.units).repeat_interleave(2)
        both = [m.unit_of.numel() == turns.numel() for m in found.members]
        members = (
            replace(member, unit_of=turns) if is_both else member
            for member, is_both in zip(found.members, both, strict=True)
        )
        return replace(found, members=tuple(members)) if any(both) else None
