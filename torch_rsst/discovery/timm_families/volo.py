"""VOLO: weights predicted for every neighborhood, and attention over maps of tokens."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import math

from timm.models.volo import Attention, ClassAttention, OutlookAttention
from torch import Tensor
from torch.nn import functional

from torch_rsst.discovery.emptied_token import BiasOnlyToken
from torch_rsst.discovery.head_math import attend, put_out, split_heads, unflatten
from torch_rsst.discovery.head_parts import HeadAdapter, consumes, produces


class SlimVoloAttention(Attention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        out = put_out(
            self, attend(self, *split_heads(self.qkv(x.flatten(1, 2)), 3, self.num_heads))
        )
        return unflatten(out, 1, x.shape[1:3])


class SlimOutlookAttention(OutlookAttention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        height, width = x.shape[1:3]
        places = math.ceil(height / self.stride) * math.ceil(width / self.stride)
        near = self.kernel_size**2
        values = self.v(x)
        head_width = values.shape[-1] // self.num_heads
        patches = self.unfold(values.movedim(-1, 1)).reshape(
            x.shape[0], self.num_heads, head_width, near, places
        )
        pooled = self.pool(x.movedim(-1, 1)).movedim(1, -1)
        scores = self.attn(pooled).reshape(x.shape[0], places, self.num_heads, near, near)
        weights = self.attn_drop((scores.transpose(1, 2) * self.scale).softmax(-1))
        mixed = weights @ patches.movedim(-1, 2).mT  # (batch, heads, places, near, width)
        mixed = mixed.movedim(2, -1).transpose(2, 3).reshape(x.shape[0], -1, places)
        out = functional.fold(
            mixed, (height, width), self.kernel_size, padding=self.padding, stride=self.stride
        )
        projected: Tensor = self.proj_drop(self.proj(out.movedim(1, -1)))
        return projected


class VoloAttention(HeadAdapter):
    """``timm.models.volo.Attention``."""

    classes = (Attention,)
    slim = (SlimVoloAttention,)


class VoloOutlook(HeadAdapter):
    """``timm.models.volo.OutlookAttention``: ``attn`` predicts the weights of each head."""

    classes = (OutlookAttention,)
    parts = (*produces("v"), *produces("attn"), *consumes())
    slim = (SlimOutlookAttention,)


class VoloClassAttention(HeadAdapter):
    """``timm.models.volo.ClassAttention``: runs with any number of heads."""

    classes = (ClassAttention,)
    left = BiasOnlyToken
