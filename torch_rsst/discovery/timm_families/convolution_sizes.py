"""Widths that timm's convolutional blocks note beside their layers."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

from timm.layers.blur_pool import BlurPool2d
from timm.layers.mixed_conv2d import MixedConv2d
from timm.layers.selective_kernel import SelectiveKernel
from timm.models.cspnet import CrossStage, CrossStage3
from timm.models.dla import DlaBottle2neck
from timm.models.dpn import DualPathBlock
from timm.models.res2net import Bottle2neck
from timm.models.rexnet import LinearBottleneck
from torch import nn

from torch_rsst.groups.surgery import OWNERS, SIZES

Noted = Mapping[str, object]


def _blur(layer: nn.Module) -> Noted:
    """One filter for each channel, or a single one for all."""
    assert isinstance(layer, BlurPool2d)
    return {} if layer.channels is None else {"channels": layer.filt.shape[0]}


def _scales(block: nn.Module) -> Noted:
    """It splits its hidden channels at this width."""
    assert isinstance(block, (Bottle2neck, DlaBottle2neck))
    return {"width": block.convs[0].in_channels}


def _halves(stage: nn.Module) -> Noted:
    """It splits the output of its first convolution in two."""
    assert isinstance(stage, (CrossStage, CrossStage3))
    return {"expand_chs": stage.conv_exp.conv.out_channels}


def _kernels(layer: nn.Module) -> Noted:
    """It splits its input among convolutions of several kernel sizes."""
    widths = [m.in_channels for m in layer.children() if isinstance(m, nn.Conv2d)]
    return {"splits": widths, "in_channels": sum(widths)}


def _paths(layer: nn.Module) -> Noted:
    """It may split its input among paths."""
    assert isinstance(layer, SelectiveKernel)
    widths = [path.conv.in_channels for path in layer.paths]
    return {"in_channels": sum(widths) if layer.split_input else widths[0]}


def _shortcut(block: nn.Module) -> Noted:
    """It adds its input to the first of its outputs."""
    assert isinstance(block, LinearBottleneck)
    first = block.conv_dw if block.conv_exp is None else block.conv_exp
    return {"in_channels": first.conv.in_channels}


def _dual_paths(block: nn.Module) -> Noted:
    """It adds to the first of its inputs; how many these are can only be told in its form "b"."""
    assert isinstance(block, DualPathBlock)
    return {} if block.c1x1_c1 is None else {"num_1x1_c": block.c1x1_c1.out_channels}


SIZES[BlurPool2d] = _blur
OWNERS.update(
    {
        Bottle2neck: _scales,
        DlaBottle2neck: _scales,
        CrossStage: _halves,
        CrossStage3: _halves,
        MixedConv2d: _kernels,
        SelectiveKernel: _paths,
        LinearBottleneck: _shortcut,
        DualPathBlock: _dual_paths,
    }
)
