"""Gemma 4's vision encoder."""

from __future__ import annotations

from timm.models.gemma4_vit import Gemma4Attention

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.head_parts import HeadAdapter, consumes, produces


class GemmaVisionAttention(HeadAdapter):
    """``timm.models.gemma4_vit.Gemma4Attention``; a unit is a key/value head with its query heads."""

    classes = (Gemma4Attention,)
    parts = (
        *produces("q_proj.linear"),
        *produces("k_proj.linear"),
        *produces("v_proj.linear"),
        *consumes("o_proj.linear"),
    )
    output = "o_proj.linear"


register(GemmaVisionAttention())
