"""Heads of attention with one fused ``qkv`` and a ``proj``, as in timm's vision transformers."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.head_attributes import head_count
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces
from torch_rsst.discovery.projections import projection_at
from torch_rsst.masking.names import named_weights


class FusedAttention(HeadAdapter):
    """Recognized by structure: ``qkv`` and ``proj`` (linear, or 1×1 convolutions) and ``num_heads``.

    Rows of ``qkv`` (and of a ``gate``) and columns of ``proj`` are ranked members of their head;
    the biases of ``qkv`` and ``gate`` follow. Norms over the width of one head are shared by all
    heads and stay.
    """

    classes = (nn.Module,)

    def parts_of(self, module: nn.Module) -> tuple[Part, ...]:
        """See :class:`HeadAdapter`."""
        gate = produces("gate") if projection_at(module, "gate") else ()
        return (*produces("qkv", 3), *gate, *consumes())

    def units_of(self, module: nn.Module) -> int:
        """See :class:`HeadAdapter`; none of another structure."""
        qkv, proj, gate = (projection_at(module, name) for name in ("qkv", "proj", "gate"))
        heads = head_count(module) or 0
        if qkv is None or proj is None or heads < 1:
            return 0
        width = proj.taken
        known = {*(part.name for part in self.parts_of(module)), "proj.bias"}
        # Norms over the width of one head treat every head alike.
        others = {
            name
            for name, weight in named_weights(module).items()
            if "." not in name or weight.shape != (width // heads,)
        }
        fits = qkv.given == 3 * width and width % heads == 0 and (not gate or gate.given == width)
        return heads if fits and others <= known else 0
