"""Blocks that project to an MLP's hidden features and to queries, keys and values at once."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Adapter, holds, register
from torch_rsst.discovery.change_class import become
from torch_rsst.discovery.head_math import attend, join_heads, split_heads
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Member, head_rows
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


class ParallelScalingHeads(Adapter):
    """``timm.models.vision_transformer.ParallelScalingBlock``, with one output projection or two."""

    kind = "heads"
    least = 1
    classes: ClassVar[tuple[type[nn.Module], ...]] = (ParallelScalingBlock,)
    """The modules that it knows."""
    widths: ClassVar[int] = 1
    """How many times as wide as it notes a head is."""

    def find(self, module: nn.Module) -> GroupLayer | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not isinstance(module, self.classes):
            return None
        heads, head_dim = _heads_of(module), self.widths * _head_dim_of(module)
        hidden = torch.full((_in_split(module)[0],), NO_UNIT)
        rows = torch.cat([hidden, head_rows(3 * heads * head_dim, heads, 3)])
        columns = head_rows(heads * head_dim, heads)
        members = [Member("in_proj.weight", 0, rows, ranked=True)]
        if holds(module.get_submodule("in_proj"), "bias"):
            members.append(Member("in_proj.bias", 0, rows, ranked=False))
        output = "attn_out_proj.weight"
        if getattr(module, "out_proj", None) is not None:
            output, columns = "out_proj.weight", torch.cat([columns, hidden])
        members.append(Member(output, 1, columns, ranked=True, consumes=True))
        return GroupLayer("", self.kind, heads, tuple(members))

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        heads = _heads_of(module) - removal.count
        split = [_in_split(module)[0], *[heads * self.widths * _head_dim_of(module)] * 3]
        setattr(module, "num_heads", heads)  # noqa: B010 - mypy knows no attributes
        setattr(module, "in_split", split)  # noqa: B010
        return self.slimmed(module)

    def slimmed(self, module: nn.Module) -> nn.Module:
        """The module as the subclass of its class that runs with any number of heads, in place."""
        become(module, SlimParallelScalingBlock)
        return module


def _heads_of(module: Any) -> int:
    return int(module.num_heads)


def _head_dim_of(module: Any) -> int:
    return int(module.head_dim)


def _in_split(module: Any) -> list[int]:
    return [int(width) for width in module.in_split]


register(ParallelScalingHeads())
