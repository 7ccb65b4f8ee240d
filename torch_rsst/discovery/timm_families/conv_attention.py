"""LowFormer and CPUBone: attention on a smaller map, made by convolutions."""

from __future__ import annotations

from timm.models import cpubone, lowformer
from torch import nn

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces


class ConvAttentionHeads(HeadAdapter):
    """``ConvAttention`` of ``timm.models.lowformer`` and ``timm.models.cpubone``.

    They run with any number of heads but none. The output projection may be part of the upsampling.
    """

    classes = (lowformer.ConvAttention, cpubone.ConvAttention)
    scaled = ("o_proj_inpdim",)
    least = 1

    def why_not(self, module: nn.Module) -> str | None:
        """See :class:`HeadAdapter`."""
        return None if self.units_of(module) > 1 else "it does not run without its only head"

    def parts_of(self, module: nn.Module) -> tuple[Part, ...]:
        """See :class:`HeadAdapter`."""
        if not isinstance(module.o_proj, nn.Identity):
            return (*produces("pwise"), *consumes("o_proj"))
        if isinstance(module.upsampling, nn.ConvTranspose2d):
            return (*produces("pwise"), *consumes("upsampling", dim=0))
        return (*produces("pwise"), *consumes("upsampling.0"))


register(ConvAttentionHeads())
