"""timm's modules for relative positions: their parameters that belong to one head."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces
from torch_rsst.groups.surgery import Removal


def _position_parts(module: nn.Module) -> tuple[Part, ...]:
    """What belongs to one head of a module's ``rel_pos``, if it has one."""
    table = getattr(getattr(module, "rel_pos", None), "relative_position_bias_table", None)
    if table is None:
        return (Part("rel_pos.mlp.fc2.weight"), Part("rel_pos.mlp.fc2.bias"))  # of RelPosMlp
    return (Part("rel_pos.relative_position_bias_table", 1 if table.ndim == 2 else 0),)


class PositionedHeads(HeadAdapter):
    """Heads of a module whose ``rel_pos`` notes how many there are; each has its own positions."""

    def parts_of(self, module: nn.Module) -> tuple[Part, ...]:
        """See :class:`HeadAdapter`."""
        fused = produces("qkv", self.stacked(module))
        return (*fused, *_position_parts(module), *consumes())

    def stacked(self, module: nn.Module) -> int:
        """How many projections, each split into heads, lie one after the other in ``qkv``."""
        return 3

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        heads = removal.layer.units - removal.count
        rel_pos = getattr(module, "rel_pos", None)
        shape = getattr(rel_pos, "bias_shape", None)
        if rel_pos is not None and shape is not None:
            if hasattr(rel_pos, "num_heads"):
                rel_pos.num_heads = heads
            table = getattr(rel_pos, "relative_position_bias_table", None)
            first = table is not None and table.ndim == 3
            rel_pos.bias_shape = (heads, *shape[1:]) if first else (*shape[:-1], heads)
        return super().shrink(module, removal)
