"""Widths that timm's convolutional blocks note beside their layers."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

from timm.layers.blur_pool import BlurPool2d
from timm.models.dla import DlaBottle2neck
from timm.models.res2net import Bottle2neck
from torch import nn

from torch_rsst.surgery import OWNERS, SIZES


def _blur(layer: nn.Module) -> Mapping[str, object]:
    """One filter for each channel, or a single one for all."""
    assert isinstance(layer, BlurPool2d)
    return {} if layer.channels is None else {"channels": layer.filt.shape[0]}


def _scales(block: nn.Module) -> Mapping[str, object]:
    """It splits its hidden channels at this width."""
    assert isinstance(block, (Bottle2neck, DlaBottle2neck))
    return {"width": block.convs[0].in_channels}


SIZES[BlurPool2d] = _blur
OWNERS.update({Bottle2neck: _scales, DlaBottle2neck: _scales})
