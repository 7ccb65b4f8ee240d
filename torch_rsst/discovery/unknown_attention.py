"""Attention that no adapter above knows: said aloud, so that no head stays whole unnoticed."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.adapter import Adapter, Unsupported
from torch_rsst.discovery.head_attributes import head_count


class UnknownAttention(Adapter):
    """Recognized by a number of heads and projections of its own; registered last.

    It never offers groups.
    """

    kind = "heads"

    def find(self, module: nn.Module) -> Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        projections = [m for m in module.children() if isinstance(m, (nn.Linear, nn.Conv2d))]
        if not head_count(module) or not projections:
            return None
        return Unsupported(f"no adapter knows the attention of {type(module).__name__}")
