"""Attention that pools: a learned or averaged token asks all others."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from torch import Tensor, nn

from torch_rsst.discovery.head_math import attend, put_out, split_heads
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces


class SlimAttentionPoolLatent(AttentionPoolLatent):
    """With any number of heads."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """See timm."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        latent = self.q(self.latent.expand(x.shape[0], -1, -1))
        (q,) = split_heads(latent, 1, self.num_heads)
        k, v = split_heads(self.kv(x), 2, self.num_heads)
        out = put_out(self, attend(self, self.q_norm(q), self.k_norm(k), v, attn_mask))
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        if self.pool == "token":
            return out[:, 0]
        return out.mean(1) if self.pool == "avg" else out


class TimmLatentPool(HeadAdapter):
    """``AttentionPoolLatent``: separate ``q`` and ``kv``; without ``q`` the latent is the query."""

    classes = (AttentionPoolLatent,)
    least = 1
    slim = (SlimAttentionPoolLatent,)

    def parts_of(self, module: nn.Module) -> tuple[Part, ...]:
        """See :class:`HeadAdapter`."""
        direct = isinstance(module.q, nn.Identity)
        query = (Part("latent", 2, ranked=True),) if direct else produces("q")
        return (*produces("kv", 2), *query, *consumes())


class TimmAttentionPool2d(HeadAdapter):
    """``AttentionPool2d`` and ``RotAttentionPool2d``, with ``qkv`` or separate ``q``, ``k``, ``v``."""

    classes = (AttentionPool2d, RotAttentionPool2d)
    scaled = ("embed_dim",)
    least = 1
