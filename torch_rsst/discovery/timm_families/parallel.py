"""Blocks that project to an MLP's hidden features and to queries, keys and values at once."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Adapter, holds, register
from torch_rsst.discovery.become import become
from torch_rsst.discovery.head_math import attend, join_heads, split_heads
from torch_rsst.groups import NO_UNIT, GroupLayer, Member, head_rows
from torch_rsst.surgery import Removal


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


class ParallelScalingHeads(Adapter):
    """``timm.models.vision_transformer.ParallelScalingBlock``, with one output projection or two."""

    kind = "heads"
    least = 1

    def find(self, module: nn.Module) -> GroupLayer | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not isinstance(module, ParallelScalingBlock):
            return None
        heads, head_dim = int(module.num_heads), int(module.head_dim)
        hidden = torch.full((_in_split(module)[0],), NO_UNIT)
        rows = torch.cat([hidden, head_rows(3 * heads * head_dim, heads, 3)])
        columns = head_rows(heads * head_dim, heads)
        members = [Member("in_proj.weight", 0, rows, ranked=True)]
        if holds(module.get_submodule("in_proj"), "bias"):
            members.append(Member("in_proj.bias", 0, rows, ranked=False))
        output = "attn_out_proj.weight"
        if module.out_proj is not None:
            output, columns = "out_proj.weight", torch.cat([columns, hidden])
        members.append(Member(output, 1, columns, ranked=True, consumes=True))
        return GroupLayer("", self.kind, heads, tuple(members))

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        _lower(module, removal.count)
        become(module, SlimParallelScalingBlock)
        return module


def _in_split(module: Any) -> list[int]:
    return [int(width) for width in module.in_split]


def _lower(module: Any, by: int) -> None:
    module.num_heads -= by
    module.in_split = [_in_split(module)[0], *[module.num_heads * module.head_dim] * 3]


register(ParallelScalingHeads())
