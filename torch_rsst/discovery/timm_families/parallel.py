"""Blocks that project to an MLP's hidden features and to queries, keys and values at once."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from torch_rsst.discovery.adapter import columns, rows
from torch_rsst.discovery.head_math import attend, join_heads, split_heads
from torch_rsst.discovery.head_parts import HeadAdapter
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, head_rows
from torch_rsst.groups.surgery import Removal


class SlimParallelScalingBlock(ParallelScalingBlock):
    """With any number of heads but none."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """See timm."""
        hidden, *projected = self.in_proj(self.in_norm(x)).split(self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        hidden = self.mlp_drop(self.mlp_act(hidden))
        q, k, v = (split_heads(part, 1, self.num_heads)[0] for part in projected)
        context = attend(self, self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal)
        context = join_heads(context)
        if self.out_proj is not None:
            y = self.out_proj(torch.cat((context, hidden), dim=-1))
        else:
            y = self.attn_out_proj(context) + self.mlp_out_proj(hidden)
        out: Tensor = x + self.drop_path(self.ls(y))
        return out


class ParallelScalingHeads(HeadAdapter):
    """``timm.models.vision_transformer.ParallelScalingBlock``, with one output projection or two."""

    classes = (ParallelScalingBlock,)
    least = 1
    slim = (SlimParallelScalingBlock,)

    def found(self, module: Any) -> GroupLayer:
        """See :class:`HeadAdapter`."""
        heads, (before, *projected) = self.units_of(module), module.in_split
        hidden = torch.full((before,), NO_UNIT)
        fused = torch.cat([hidden, head_rows(sum(projected), heads, 3)])
        output, taken = "attn_out_proj", head_rows(projected[-1], heads)
        if getattr(module, "out_proj", None) is not None:
            output, taken = "out_proj", torch.cat([taken, hidden])
        members = (*rows("in_proj", module.in_proj, fused), columns(output, taken))
        return GroupLayer("", self.kind, heads, members)

    def shrink(self, module: Any, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        before = module.in_split[0]
        module.in_split = [before, *[(module.in_proj.out_features - before) // 3] * 3]
        return super().shrink(module, removal)
