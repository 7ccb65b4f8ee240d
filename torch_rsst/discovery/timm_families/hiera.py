"""Hiera and the image encoder of SAM 2: heads of their own width, queries pooled."""

from __future__ import annotations

from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.head_parts import HeadAdapter, consumes, produces


class HieraAttention(HeadAdapter):
    """``timm.models.hiera.MaskUnitAttention``: runs with any number of heads but none."""

    classes = (MaskUnitAttention,)
    parts = (*produces("qkv", 3), *consumes())
    scaled = ("dim_out",)
    least = 1


class HieraDetAttention(HeadAdapter):
    """``timm.models.hieradet_sam2.MultiScaleAttention``: runs with any number of heads but none."""

    classes = (MultiScaleAttention,)
    parts = (*produces("qkv", 3), *consumes())
    scaled = ("dim_out",)
    least = 1


for _adapter in (HieraAttention(), HieraDetAttention()):
    register(_adapter)
