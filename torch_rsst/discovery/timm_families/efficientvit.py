"""EfficientViT of MIT: linear attention over several scales of queries, keys and values."""

from __future__ import annotations

from typing import Any

from timm.models.efficientvit_mit import LiteMLA

from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, normed, produces


class MultiScaleLinearAttention(HeadAdapter):
    """``timm.models.efficientvit_mit.LiteMLA``; a unit is a head with its maps of every scale."""

    classes = (LiteMLA,)
    least = 1

    def units_of(self, module: Any) -> int:
        """See :class:`HeadAdapter`."""
        return int(module.qkv.conv.out_channels) // (3 * int(module.dim))

    def parts_of(self, module: Any) -> tuple[Part, ...]:
        """See :class:`HeadAdapter`."""
        scales = range(len(module.aggreg))
        return (
            *produces("qkv.conv"),
            *normed("qkv.norm"),
            *(part for i in scales for j in (0, 1) for part in produces(f"aggreg.{i}.{j}")),
            *consumes("proj.conv", stacked=1 + len(scales)),
        )
