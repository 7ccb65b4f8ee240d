"""CoAtNet and MaxViT: heads first in a fused projection, positions per head."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.models.maxxvit import Attention2d, AttentionCl
from torch import Tensor, nn

from torch_rsst.discovery.head_math import kept
from torch_rsst.discovery.timm_families._positions import PositionedHeads


class _OwnPositions(nn.Module):
    """Takes shared positions of all the heads that there once were."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """See timm."""
        shared = None if shared_rel_pos is None else kept(self, shared_rel_pos, -3)
        out: Tensor = super().forward(x, shared_rel_pos=shared)
        return out


class SlimAttention2d(_OwnPositions, Attention2d):
    """With any number of heads."""


class SlimAttentionCl(_OwnPositions, AttentionCl):
    """With any number of heads."""


class MaxxVitAttention(PositionedHeads):
    """``Attention2d`` and ``AttentionCl`` of ``timm.models.maxxvit``."""

    classes = (Attention2d, AttentionCl)
    slim = (SlimAttention2d, SlimAttentionCl)
    recalls = True

    def stacked(self, module: nn.Module) -> int:
        """See :class:`PositionedHeads`."""
        return 1 if module.head_first else 3
