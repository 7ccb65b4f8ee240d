"""Attention within a ResNet's bottleneck: its output projection is the block's last convolution."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models.byobnet import SelfAttnBlock
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Unsupported, rows
from torch_rsst.discovery.head_parts import HeadAdapter, become, consumes, normed, produces
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, head_rows
from torch_rsst.groups.surgery import Removal


class SlimLambdaLayer(LambdaLayer):
    """With any number of heads but none."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        batch, _, height, width = x.shape
        widths = [self.num_heads * self.dim_qk, self.dim_qk, self.dim_v]
        q, k, v = self.qkv(x).split(widths, dim=1)
        q = self.norm_q(q).reshape(batch, self.num_heads, self.dim_qk, -1).mT
        v = self.norm_v(v).flatten(2).mT
        content = q @ (k.flatten(2).softmax(-1) @ v).unsqueeze(1)
        position = (q.unsqueeze(-2) @ self._by_position(v, height, width)).squeeze(-2)
        out: Tensor = self.pool((content + position).mT.reshape(batch, -1, height, width))
        return out

    def _by_position(self, v: Tensor, height: int, width: int) -> Tensor:
        batch, positions, _ = v.shape
        near: Tensor
        if self.pos_emb is None:
            near = self.conv_lambda(v.reshape(batch, 1, height, width, self.dim_v))
            near = near.reshape(batch, self.dim_qk, positions, self.dim_v).transpose(1, 2)
        else:
            rows, columns = self.rel_pos_indices
            near = self.pos_emb[rows, columns].mT @ v.unsqueeze(1)
        return near.unsqueeze(1)


class BottleneckAttention(HeadAdapter):
    """``timm.models.byobnet.SelfAttnBlock`` around ``BottleneckAttn``, ``HaloAttn`` or ``LambdaLayer``.

    What a head puts out passes a batch norm of its own channels, and the convolution behind it. The
    layers run with any number of heads but none. Keys and values of a lambda layer serve all its heads.
    """

    classes = (SelfAttnBlock,)
    parts = (
        *produces("self_attn.q"),
        *produces("self_attn.kv"),
        *normed("self_attn.norm_q"),
        *normed("post_attn"),
        *consumes("conv3_1x1.conv"),
    )
    scaled = ("self_attn.num_heads", "self_attn.dim_out_qk", "self_attn.dim_out_v")
    least = 1

    def units_of(self, module: nn.Module) -> int:
        """See :class:`HeadAdapter`."""
        attention: Any = module.self_attn
        known = isinstance(attention, (BottleneckAttn, HaloAttn, LambdaLayer))
        return int(attention.num_heads) if known else 0

    def found(self, module: nn.Module) -> GroupLayer | Unsupported:
        """See :class:`HeadAdapter`."""
        found = super().found(module)
        if isinstance(found, Unsupported) or (table := _fused_rows(module.self_attn)) is None:
            return found
        fused = rows("self_attn.qkv", module.get_submodule("self_attn.qkv"), table)
        return replace(found, members=(*fused, *found.members))

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        attention = module.self_attn
        if isinstance(attention, LambdaLayer):
            become(attention, SlimLambdaLayer)
        return super().shrink(module, removal)


def _fused_rows(attention: Any) -> Tensor | None:
    """The head of each row of ``qkv``, if there is one; none of what all heads share."""
    heads = attention.num_heads
    if isinstance(attention, BottleneckAttn):
        widths = (attention.dim_head_qk, attention.dim_head_qk, attention.dim_head_v)
        return torch.cat([head_rows(heads * width, heads) for width in widths])
    if isinstance(attention, LambdaLayer):
        shared = torch.full((attention.dim_qk + attention.dim_v,), NO_UNIT)
        return torch.cat([head_rows(heads * attention.dim_qk, heads), shared])
    return None
