"""Attention without more than queries, keys, values and an output, under various classes of timm."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.models import crossvit, fastvit, metaformer, nest, tnt, visformer, vision_transformer_sam
from torch import Tensor

from torch_rsst.discovery.emptied_token import BiasOnlyToken
from torch_rsst.discovery.head_math import attend, put_out, split_heads, unflatten
from torch_rsst.discovery.head_parts import HeadAdapter, consumes, produces


class SlimNestAttention(nest.Attention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        context = attend(self, *split_heads(self.qkv(x), 3, self.num_heads))
        # Here the head counts fastest among the inputs of the output layer.
        out: Tensor = self.proj_drop(self.proj(context.movedim(-3, -1).flatten(-2)))
        return out


class SlimCrossAttention(crossvit.CrossAttention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        q, k, v = (
            split_heads(layer(tokens), 1, self.num_heads)[0]
            for layer, tokens in ((self.wq, x[:, :1]), (self.wk, x), (self.wv, x))
        )
        return put_out(self, attend(self, q, k, v))


class SlimMetaformerAttention(metaformer.Attention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        return put_out(self, attend(self, *split_heads(self.qkv(x), 3, self.num_heads)))


class SlimFastVitAttention(fastvit.Attention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        out = put_out(
            self, attend(self, *split_heads(self.qkv(x.flatten(2).mT), 3, self.num_heads))
        )
        return unflatten(out.mT, -1, x.shape[2:])


class NestAttention(HeadAdapter):
    """``timm.models.nest.Attention``."""

    classes = (nest.Attention,)
    parts = (*produces("qkv", 3), *consumes(interleaved=True))
    slim = (SlimNestAttention,)


class CrossVitAttention(HeadAdapter):
    """``timm.models.crossvit.CrossAttention``: one token asks all others."""

    classes = (crossvit.CrossAttention,)
    parts = (*produces("wq"), *produces("wk"), *produces("wv"), *consumes())
    slim = (SlimCrossAttention,)
    left = BiasOnlyToken


class PlainAttention(HeadAdapter):
    """``Attention`` of metaformer, fastvit, visformer and vision_transformer_sam: fused, over tokens or maps."""

    classes = tuple(
        file.Attention for file in (metaformer, fastvit, visformer, vision_transformer_sam)
    )
    former_names = ("MetaformerAttention", "FastVitAttention", "VisformerAttention", "SamAttention")
    scaled = ("attention_dim",)
    slim = (SlimMetaformerAttention, SlimFastVitAttention)


class TntAttention(HeadAdapter):
    """``timm.models.tnt.Attention``: runs with any number of heads."""

    classes = (tnt.Attention,)
    parts = (*produces("qk", 2), *produces("v"), *consumes())
    scaled = ("hidden_dim",)
