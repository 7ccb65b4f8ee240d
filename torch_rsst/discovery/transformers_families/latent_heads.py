"""Heads of latent attention, as DeepSeek-V2's: keys and values are put out by one layer, from a shared latent."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.adapter import Adapter, columns, rows
from torch_rsst.discovery.head_attributes import reduce_head_attributes
from torch_rsst.discovery.transformers_families.parts import Answer, returns_weights
from torch_rsst.groups.groups import GroupLayer, head_rows
from torch_rsst.groups.surgery import Removal


class LatentHeads(Adapter):
    """``q_b_proj`` or ``q_proj``, ``kv_b_proj`` and ``o_proj``, each with rows or columns for every head.

    The latents and their norms serve all heads, and stay; so does the cache, which holds latents.
    """

    kind = "heads"
    least = 1

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        query = next((n for n in ("q_b_proj", "q_proj") if _linear(module, n)), "")
        width = getattr(module, "v_head_dim", None)
        latent, last = _linear(module, "kv_b_proj"), _linear(module, "o_proj")
        if not query or latent is None or last is None or not isinstance(width, int):
            return None
        heads = last.in_features // max(1, width)
        first = _linear(module, query)
        if not heads or any(f.out_features % heads for f in (first, latent) if f is not None):
            return None
        members = [
            member
            for name, layer in ((query, first), ("kv_b_proj", latent))
            if layer is not None
            for member in rows(name, layer, head_rows(layer.out_features, heads))
        ]
        members.append(columns("o_proj", head_rows(heads * width, heads)))
        return returns_weights(module) or GroupLayer("", self.kind, heads, tuple(members))

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        reduce_head_attributes(module, removal)
        return module


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    layer = getattr(module, name, None)
    return layer if isinstance(layer, nn.Linear) else None
