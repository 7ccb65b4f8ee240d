"""Hiera and the image encoder of SAM 2: heads of their own width, queries pooled."""

from __future__ import annotations

from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention

from torch_rsst.discovery.head_parts import HeadAdapter


class HieraAttention(HeadAdapter):
    """``hiera.MaskUnitAttention`` and ``hieradet_sam2.MultiScaleAttention``: with any number of heads but none."""

    classes = (MaskUnitAttention, MultiScaleAttention)
    former_names = ("HieraDetAttention",)
    scaled = ("dim_out",)
    least = 1
