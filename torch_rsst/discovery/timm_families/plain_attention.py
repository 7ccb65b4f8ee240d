"""Attention without more than queries, keys, values and an output, under various classes of timm."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.models import crossvit, fastvit, metaformer, nest, tnt, visformer, vision_transformer_sam
from torch import Tensor, nn

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.emptied_token import BiasOnlyToken
from torch_rsst.discovery.head_math import attend, join_heads, split_heads, unflatten
from torch_rsst.discovery.head_parts import HeadAdapter, consumes, produces
from torch_rsst.groups.surgery import module_at


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
        out: Tensor = self.proj_drop(self.proj(join_heads(attend(self, q, k, v))))
        return out


class SlimMetaformerAttention(metaformer.Attention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        context = attend(self, *split_heads(self.qkv(x), 3, self.num_heads))
        out: Tensor = self.proj_drop(self.proj(join_heads(context)))
        return out


class SlimFastVitAttention(fastvit.Attention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        context = attend(self, *split_heads(self.qkv(x.flatten(2).mT), 3, self.num_heads))
        out: Tensor = self.proj_drop(self.proj(join_heads(context)))
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

    def emptied(self, module: nn.Module) -> nn.Module:
        """See :class:`HeadAdapter`."""
        return BiasOnlyToken(module_at(module, "proj"))


class MetaformerAttention(HeadAdapter):
    """``timm.models.metaformer.Attention``."""

    classes = (metaformer.Attention,)
    parts = (*produces("qkv", 3), *consumes())
    scaled = ("attention_dim",)
    slim = (SlimMetaformerAttention,)


class FastVitAttention(HeadAdapter):
    """``timm.models.fastvit.Attention``: linear layers over feature maps."""

    classes = (fastvit.Attention,)
    parts = (*produces("qkv", 3), *consumes())
    slim = (SlimFastVitAttention,)
    least = 1


class VisformerAttention(HeadAdapter):
    """``timm.models.visformer.Attention``: runs with any number of heads."""

    classes = (visformer.Attention,)
    parts = (*produces("qkv", 3), *consumes())


class TntAttention(HeadAdapter):
    """``timm.models.tnt.Attention``: runs with any number of heads."""

    classes = (tnt.Attention,)
    parts = (*produces("qk", 2), *produces("v"), *consumes())
    scaled = ("hidden_dim",)


class SamAttention(HeadAdapter):
    """``timm.models.vision_transformer_sam.Attention``: runs with any number of heads."""

    classes = (vision_transformer_sam.Attention,)
    parts = (*produces("qkv", 3), *consumes())


for _adapter in (
    NestAttention(),
    CrossVitAttention(),
    MetaformerAttention(),
    FastVitAttention(),
    VisformerAttention(),
    TntAttention(),
    SamAttention(),
):
    register(_adapter)
