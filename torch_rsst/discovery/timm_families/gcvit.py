"""GCViT: windows that share queries made from the whole image."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.models.gcvit import WindowAttentionGlobal
from torch import Tensor, nn

from torch_rsst.discovery.head_math import kept, put_out, split_heads
from torch_rsst.discovery.timm_families._positions import PositionedHeads


class SlimWindowAttentionGlobal(WindowAttentionGlobal):
    """With any number of heads; takes global queries of all the heads that there once were."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """See timm."""
        if self.use_global and q_global is not None:
            k, v = split_heads(self.qkv(x), 2, self.num_heads)
            (q,) = split_heads(q_global.flatten(1, -2), 1, self.all_heads)
            q = kept(self, q, 1).repeat_interleave(x.shape[0] // q_global.shape[0], dim=0)
        else:
            q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        weights = self.rel_pos((q * self.scale) @ k.mT).softmax(-1)
        return put_out(self, self.attn_drop(weights) @ v)


class GcVitAttention(PositionedHeads):
    """``timm.models.gcvit.WindowAttentionGlobal``."""

    classes = (WindowAttentionGlobal,)
    slim = (SlimWindowAttentionGlobal,)
    recalls = True

    def stacked(self, module: nn.Module) -> int:
        """See :class:`PositionedHeads`."""
        return 2 if module.use_global else 3
