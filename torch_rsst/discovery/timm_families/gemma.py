"""Gemma 4's vision encoder."""

from __future__ import annotations

from timm.models.gemma4_vit import Gemma4Attention

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.head_parts import HeadAdapter, giving, taking


class GemmaVisionAttention(HeadAdapter):
    """``timm.models.gemma4_vit.Gemma4Attention``; a unit is a key/value head with its query heads."""

    classes = (Gemma4Attention,)
    parts = (
        *giving("q_proj.linear"),
        *giving("k_proj.linear"),
        *giving("v_proj.linear"),
        *taking("o_proj.linear"),
    )
    heads_at = "num_kv_heads"
    scaled = ("num_heads",)
    output = "o_proj.linear"


register(GemmaVisionAttention())
