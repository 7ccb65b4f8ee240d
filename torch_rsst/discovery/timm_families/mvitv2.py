"""MViT V2: queries, keys and values that are pooled, each head alike."""

from __future__ import annotations

from timm.models.mvitv2 import MultiScaleAttention
from torch import nn

from torch_rsst.discovery.head_parts import HeadAdapter


class MultiScaleHeads(HeadAdapter):
    """``timm.models.mvitv2.MultiScaleAttention``: runs with any number of heads but none.

    Pooling convolutions, their norms and the position tables are shared by all heads.
    """

    classes = (MultiScaleAttention,)
    scaled = ("dim_out",)
    least = 1

    def why_not(self, module: nn.Module) -> str | None:
        """See :class:`HeadAdapter`."""
        return "its pooled heads are normalized jointly" if module.unshared else None
