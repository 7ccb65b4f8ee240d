"""Vision transformers with relative positions."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor

from torch_rsst.discovery.head_math import attend, kept, put_out, split_heads
from torch_rsst.discovery.timm_families._positions import PositionedHeads


class SlimRelPosAttention(RelPosAttention):
    """With any number of heads; takes shared positions of all the heads that there once were."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """See timm."""
        bias = None if shared_rel_pos is None else kept(self, shared_rel_pos, -3)
        if self.rel_pos is not None:
            own = self.rel_pos.get_bias()
            bias = own if bias is None or self.fused_attn else own + bias
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        return put_out(self, attend(self, self.q_norm(q), self.k_norm(k), v, bias))


class RelPosVitAttention(PositionedHeads):
    """``timm.models.vision_transformer_relpos.RelPosAttention``."""

    classes = (RelPosAttention,)
    slim = (SlimRelPosAttention,)
    recalls = True
