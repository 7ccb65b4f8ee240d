"""Heads of latent attention, as DeepSeek-V2's: keys and values are put out by one layer, from a shared latent."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.head_parts import HeadAdapter, consumes, produces
from torch_rsst.discovery.projections import projection_at
from torch_rsst.discovery.transformers_families.parts import returns_weights


class LatentHeads(HeadAdapter):
    """``q_b_proj`` or ``q_proj``, ``kv_b_proj`` and ``o_proj``, each with rows or columns for every head.

    The latents and their norms serve all heads, and stay; so does the cache, which holds latents.
    """

    classes = (nn.Module,)
    parts = (
        *(*produces("q_b_proj"), *produces("q_proj"), *produces("kv_b_proj")),
        *consumes("o_proj"),
    )
    least = 1

    def units_of(self, module: nn.Module) -> int:
        """See :class:`HeadAdapter`; none of another structure."""
        query = projection_at(module, "q_b_proj") or projection_at(module, "q_proj")
        latent, last = (projection_at(module, name) for name in ("kv_b_proj", "o_proj"))
        width = getattr(module, "v_head_dim", None)
        if not (query and latent and last and isinstance(width, int)):
            return 0
        heads = last.taken // max(1, width)
        even = heads and not any(layer.given % heads for layer in (query, latent))
        return heads if even else 0

    def why_not(self, module: nn.Module) -> str | None:
        """See :class:`HeadAdapter`."""
        return returns_weights(module)
