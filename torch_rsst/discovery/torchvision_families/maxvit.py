"""Heads of torchvision's MaxViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention

from torch_rsst.discovery.adapter import Adapter, Unsupported, columns, rows
from torch_rsst.discovery.change_class import become
from torch_rsst.discovery.emptied import BiasOnly
from torch_rsst.discovery.head_attributes import reduce_head_attributes
from torch_rsst.groups.groups import GroupLayer, Member, head_rows
from torch_rsst.groups.surgery import Removal


class ReducedRelativeAttention(RelativePositionalMultiHeadAttention):  # type: ignore[misc] # untyped
    """Attention within partitions whose heads make less than the width of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention among the tokens of each partition: (batch, partitions, tokens, features)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)
        q, k, v = (t.transpose(-3, -2) for t in (q, k * self.scale_factor, v))
        weights = F.softmax(q @ k.mT + self.get_relative_positional_bias(), dim=-1)
        out: Tensor = self.merge((weights @ v).transpose(-3, -2).flatten(-2))
        return out


class MaxVitAttention(Adapter):
    """A head owns its column of the table of position biases as well."""

    kind = "heads"

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not isinstance(module, RelativePositionalMultiHeadAttention):
            return None
        heads, width = module.n_heads, module.merge.in_features
        each, one = torch.arange(heads), head_rows(width, heads)
        members = (
            *rows("to_qkv", module.to_qkv, head_rows(3 * width, heads, 3)),
            Member("relative_position_bias_table", 1, each, ranked=False),
            columns("merge", one),
        )
        return GroupLayer("", self.kind, heads, members)

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not reduce_head_attributes(module, removal):
            merge = module.merge
            assert isinstance(merge, nn.Linear)
            return BiasOnly(merge)
        become(module, ReducedRelativeAttention)
        return module
