"""ConViT: gates between content and position, one per head."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.models.convit import GPSA, MHSA
from torch import Tensor

from torch_rsst.discovery.head_math import attend, put_out, split_heads
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces


class SlimMHSA(MHSA):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        return put_out(self, attend(self, *split_heads(self.qkv(x), 3, self.num_heads)))


class SlimGPSA(GPSA):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices: Tensor = self.get_rel_indices(x.shape[1])
        (v,) = split_heads(self.v(x), 1, self.num_heads)
        return put_out(self, self.get_attention(x) @ v)

    def get_attention(self, x: Tensor) -> Tensor:
        """See timm."""
        q, k = split_heads(self.qk(x), 2, self.num_heads)
        content = (q @ k.mT * self.scale).softmax(-1)
        position = self.pos_proj(self.rel_indices).movedim(-1, 1).softmax(-1)
        gate = self.gating_param.sigmoid().view(1, -1, 1, 1)
        mixed = (1.0 - gate) * content + gate * position
        weights: Tensor = self.attn_drop(mixed / mixed.sum(-1, keepdim=True))
        return weights


class ConVitAttention(HeadAdapter):
    """``MHSA`` and ``GPSA`` of ``timm.models.convit``."""

    classes = (MHSA, GPSA)
    parts = (
        *produces("qkv", 3),
        *produces("qk", 2),
        *produces("v"),
        Part("pos_proj.weight"),
        Part("pos_proj.bias"),
        Part("gating_param"),
        *consumes(),
    )
    slim = (SlimMHSA, SlimGPSA)
