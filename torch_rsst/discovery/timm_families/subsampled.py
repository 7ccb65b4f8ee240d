"""Keys and values from fewer tokens than queries: PVT V2, Twins, Next-ViT."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any

from timm.models.nextvit import EfficientAttention
from timm.models.pvt_v2 import Attention as PvtV2Attention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor
from torch.nn import functional

from torch_rsst.discovery.head_math import attend, join_heads, put_out, split_heads, unflatten
from torch_rsst.discovery.head_parts import HeadAdapter


def _as_map(x: Tensor, size: Any) -> Tensor:
    return unflatten(x.mT, -1, (int(size[0]), int(size[1])))


class SlimPvtV2Attention(PvtV2Attention):
    """With any number of heads."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """See timm."""
        (q,) = split_heads(self.q(x), 1, self.num_heads)
        if self.pool is not None:
            pooled = self.sr(self.pool(_as_map(x, feat_size)))
            x = self.act(self.norm(pooled.flatten(2).mT))
        elif self.sr is not None:
            x = self.norm(self.sr(_as_map(x, feat_size)).flatten(2).mT)
        k, v = split_heads(self.kv(x), 2, self.num_heads)
        return put_out(self, attend(self, q, k, v))


class SlimGlobalSubSampleAttn(GlobalSubSampleAttn):
    """With any number of heads."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See timm."""
        (q,) = split_heads(self.q(x), 1, self.num_heads)
        if self.sr is not None:
            x = self.norm(self.sr(_as_map(x, size)).flatten(2).mT)
        k, v = split_heads(self.kv(x), 2, self.num_heads)
        return put_out(self, attend(self, q, k, v))


class SlimLocallyGroupedAttn(LocallyGroupedAttn):
    """With any number of heads."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See timm."""
        (height, width), side = size, self.ws
        grid = unflatten(x, 1, (height, width))
        grid = functional.pad(grid, (0, 0, 0, -width % side, 0, -height % side))
        windows = unflatten(unflatten(grid, 2, (-1, side)), 1, (-1, side)).transpose(2, 3)
        tokens = windows.flatten(3, 4).flatten(1, 2)  # (batch, windows, side · side, features)
        q, k, v = split_heads(self.qkv(tokens), 3, self.num_heads)
        context = join_heads(attend(self, q, k, v))
        context = unflatten(unflatten(context, 1, windows.shape[1:3]), 3, (side, side))
        grid = context.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
        out: Tensor = self.proj_drop(self.proj(grid.flatten(1, 2)))
        return out


class SlimEfficientAttention(EfficientAttention):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        (q,) = split_heads(self.q(x), 1, self.num_heads)
        if self.sr is not None:
            x = self.norm(self.sr(x.mT)).mT
        k, v = (split_heads(layer(x), 1, self.num_heads)[0] for layer in (self.k, self.v))
        return put_out(self, attend(self, q, k, v))


class SubsampledAttention(HeadAdapter):
    """What reduces the tokens, or makes windows of them, stays."""

    classes = (PvtV2Attention, GlobalSubSampleAttn, EfficientAttention, LocallyGroupedAttn)
    former_names = ("TwinsLocalAttention",)
    slim = (
        SlimPvtV2Attention,
        SlimGlobalSubSampleAttn,
        SlimEfficientAttention,
        SlimLocallyGroupedAttn,
    )
