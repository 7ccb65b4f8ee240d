"""EVA: rotary embeddings, fused or separate projections, no bias of the keys."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor

from torch_rsst.discovery.head_math import attend, join_heads, kept, split_heads
from torch_rsst.discovery.timm_families._bias import BIASES, biased_qkv
from torch_rsst.discovery.timm_families.shared_attention import TimmRopeAttention


class SlimEvaAttention(EvaAttention):
    """With any number of heads; takes rotary embeddings of all the heads there once were."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """See timm."""
        if self.qkv is not None:
            q, k, v = split_heads(biased_qkv(self, x), 3, self.num_heads)
        else:
            q, k, v = (
                split_heads(layer(x), 1, self.num_heads)[0]
                for layer in (self.q_proj, self.k_proj, self.v_proj)
            )
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            rope = kept(self, rope, -3) if rope.ndim > 2 else rope
            q, k = self._rotated(q, rope).type_as(v), self._rotated(k, rope).type_as(v)
        context = join_heads(attend(self, q, k, v, attn_mask, is_causal))
        if self.gate is not None:
            context = context * self.gate(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(context))
        return out

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, rest = x.tensor_split([self.num_prefix_tokens], dim=-2)
        rotated = apply_rot_embed_cat(rest, rope, half=getattr(self, "rotate_half", False))
        return torch.cat([prefix, rotated], dim=-2)


class EvaAttentionHeads(TimmRopeAttention):
    """``timm.models.eva.EvaAttention``."""

    classes = (EvaAttention,)
    parts = (*TimmRopeAttention.parts, *BIASES)
    slim = (SlimEvaAttention,)
