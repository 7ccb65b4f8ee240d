"""DaViT: attention between channels of one head, and within windows."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any

from timm.models.davit import ChannelAttention, ChannelAttentionV2, WindowAttention
from torch import Tensor

from torch_rsst.discovery.head_math import attend, join_heads, split_heads
from torch_rsst.discovery.head_parts import HeadAdapter


class SlimChannelAttention(ChannelAttention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        weights = ((k * self.scale).mT @ v).softmax(-1)
        out: Tensor = self.proj(join_heads((weights @ q.mT).mT))
        return out


class SlimChannelAttentionV2(ChannelAttentionV2):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        q, k, v = split_heads(self.qkv(x), 3, self.groups)
        scale = (x.shape[1] if self.dynamic_scale else self.head_dim) ** -0.5
        weights = ((q * scale).mT @ k).softmax(-1)
        out: Tensor = self.proj(join_heads((weights @ v.mT).mT))
        return out


class SlimDavitWindowAttention(WindowAttention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        out: Tensor = self.proj(join_heads(attend(self, q, k, v)))
        return out


class DavitAttention(HeadAdapter):
    """``ChannelAttention`` and ``WindowAttention`` of ``timm.models.davit``."""

    classes = (ChannelAttention, WindowAttention)
    slim = (SlimChannelAttention, SlimDavitWindowAttention)


class DavitChannelGroups(HeadAdapter):
    """``timm.models.davit.ChannelAttentionV2``, which calls its heads groups."""

    classes = (ChannelAttentionV2,)
    scaled = ("groups",)
    slim = (SlimChannelAttentionV2,)

    def units_of(self, module: Any) -> int:
        """See :class:`HeadAdapter`."""
        return int(module.groups)
