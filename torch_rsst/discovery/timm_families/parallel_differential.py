"""Blocks with an MLP beside attention that is the difference of two: every head has two of queries and keys."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import torch
from timm.models.vision_transformer import DiffParallelScalingBlock
from torch import Tensor

from torch_rsst.discovery.head_math import attend, join_heads, split_heads, unflatten
from torch_rsst.discovery.timm_families.parallel import ParallelScalingHeads


class SlimDiffParallelScalingBlock(DiffParallelScalingBlock):
    """With any number of heads but none."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """See timm."""
        hidden, *projected = self.in_proj(self.in_norm(x)).split(self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        hidden = self.mlp_drop(self.mlp_act(hidden))
        q, k = (split_heads(part, 1, 2 * self.num_heads)[0] for part in projected[:2])
        v = split_heads(projected[2], 1, self.num_heads)[0]
        # (batch, heads, two of each, tokens, width)
        q, k = (
            unflatten(part, 1, (self.num_heads, 2)) for part in (self.q_norm(q), self.k_norm(k))
        )
        one, other = (attend(self, q[:, :, i], k[:, :, i], v, attn_mask, is_causal) for i in (0, 1))
        context = self.sub_norm(one - self._compute_lambda().type_as(q) * other)
        context = join_heads(context * (1 - self.lambda_init))
        y = self.out_proj(torch.cat((context, hidden), dim=-1))
        out: Tensor = x + self.drop_path(self.ls(y))
        return out


class DiffParallelScalingHeads(ParallelScalingHeads):
    """``timm.models.vision_transformer.DiffParallelScalingBlock``."""

    classes = (DiffParallelScalingBlock,)
    slim = (SlimDiffParallelScalingBlock,)
