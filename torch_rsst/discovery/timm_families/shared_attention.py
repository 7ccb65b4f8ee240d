"""timm's shared attention layers, but for the one that :class:`FusedAttention` knows by structure."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import torch
from timm.layers.attention import AttentionRope
from timm.layers.attention2d import Attention2d
from timm.layers.diff_attention import DiffAttention
from torch import Tensor, nn

from torch_rsst.discovery.head_math import attend, join_heads, kept, split_heads
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces


class SlimAttentionRope(AttentionRope):
    """Takes rotary embeddings of all the heads that there once were."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """See timm."""
        if rope is not None and rope.ndim > 2:
            rope = kept(self, rope, -3)
        out: Tensor = super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return out


class SlimDiffAttention(DiffAttention):
    """With any number of heads."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """See timm."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        q, k = (self._both(part, norm) for part, norm in ((q, self.q_norm), (k, self.k_norm)))
        first, second = (
            attend(self, q[which], k[which], v, attn_mask, is_causal) for which in (0, 1)
        )
        x = self.sub_norm(first - self._compute_lambda().type_as(v) * second)
        x = join_heads(x * (1 - self.lambda_init))
        out: Tensor = self.proj_drop(self.proj(x))
        return out

    @staticmethod
    def _both(x: Tensor, norm: nn.Module) -> Tensor:
        """(…, width) → (2, …, width / 2), each normalized: the two maps of every head."""
        return torch.stack([norm(half) for half in x.chunk(2, dim=-1)])


class _MayNormalizeJointly(HeadAdapter):
    def why_not(self, module: nn.Module) -> str | None:
        """Refuses attention whose outputs are normalized over all heads."""
        norm = getattr(module, "norm", None)
        if norm is None or isinstance(norm, nn.Identity):
            return None
        return "its norm spans all heads, so that none can be removed exactly"


class TimmRopeAttention(_MayNormalizeJointly):
    """``timm.layers.AttentionRope``; a unit is a key/value head with all the query heads it serves."""

    classes = (AttentionRope,)
    parts = (
        *produces("qkv", 3),
        *produces("q_proj"),
        *produces("k_proj"),
        *produces("v_proj"),
        *produces("gate"),
        *consumes(),
    )
    slim = (SlimAttentionRope,)
    recalls = True


class TimmDiffAttention(_MayNormalizeJointly):
    """``timm.layers.DiffAttention``: both maps of a head go with it."""

    classes = (DiffAttention,)
    slim = (SlimDiffAttention,)


class TimmAttention2d(HeadAdapter):
    """``timm.layers.attention2d.Attention2d``, over feature maps."""

    classes = (Attention2d,)

    def parts_of(self, module: nn.Module) -> tuple[Part, ...]:
        """See :class:`HeadAdapter`."""
        return (*produces("qkv", 1 if module.head_first else 3), *consumes())
