"""timm's modules for relative positions: their parameters that belong to one head."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.head_parts import HeadAdapter, Part
from torch_rsst.groups.surgery import Removal

POSITION_PARTS = (
    Part("rel_pos.mlp.fc2.weight"),
    Part("rel_pos.mlp.fc2.bias"),
)
"""Of ``RelPosMlp``."""


def position_parts(module: nn.Module) -> tuple[Part, ...]:
    """What belongs to one head of a module's ``rel_pos``, if it has one."""
    table = getattr(getattr(module, "rel_pos", None), "relative_position_bias_table", None)
    if table is None:
        return POSITION_PARTS
    return (Part("rel_pos.relative_position_bias_table", 1 if table.ndim == 2 else 0),)


class PositionedHeads(HeadAdapter):
    """Heads of a module whose ``rel_pos`` notes how many there are."""

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        _note_heads(module, removal.layer.units - removal.count)
        return super().shrink(module, removal)


def _note_heads(module: nn.Module, heads: int) -> None:
    """Tell a module's ``rel_pos`` its number of heads."""
    rel_pos = getattr(module, "rel_pos", None)
    shape = getattr(rel_pos, "bias_shape", None)
    if rel_pos is None or shape is None:
        return
    if hasattr(rel_pos, "num_heads"):
        rel_pos.num_heads = heads
    table = getattr(rel_pos, "relative_position_bias_table", None)
    first = table is not None and table.ndim == 3
    rel_pos.bias_shape = (heads, *shape[1:]) if first else (*shape[:-1], heads)
