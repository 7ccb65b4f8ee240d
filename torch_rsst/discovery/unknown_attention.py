"""Attention that no adapter above knows: said aloud, so that no head stays whole unnoticed."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.adapter import Adapter, Unsupported

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


class UnknownAttention(Adapter):
    """Recognized by a number of heads and projections of its own; registered last.

    It never offers groups.
    """

    kind = "heads"

    def find(self, module: nn.Module) -> Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        heads = next((getattr(module, name) for name in _HEADS if hasattr(module, name)), None)
        projections = [m for m in module.children() if isinstance(m, (nn.Linear, nn.Conv2d))]
        if not isinstance(heads, int) or not heads or not projections:
            return None
        return Unsupported(f"no adapter knows the attention of {type(module).__name__}")
