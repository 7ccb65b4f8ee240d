"""CoaT: factorized attention whose positions are convolutions that several blocks share."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import torch
from timm.models.coat import FactorAttnConvRelPosEnc
from torch import Tensor
from torch.nn import functional

from torch_rsst.discovery.head_math import put_out, split_heads, unflatten
from torch_rsst.discovery.head_parts import HeadAdapter


class SlimFactorAttention(FactorAttnConvRelPosEnc):
    """With any number of heads; of the shared convolutions it uses those of its own heads."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See timm."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        factors = q @ (k.softmax(2).mT @ v)
        return put_out(self, self.scale * factors + self._positions(q, v, size))

    def _positions(self, q: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        maps = unflatten(
            v[:, :, 1:].mT, -1, size
        )  # (batch, heads, width, height, width of the map)
        convolved, first, position = [], 0, 0
        for layer, heads in zip(self.crpe.conv_list, self.crpe.head_splits, strict=True):
            mine = [h - first for h in self.kept_heads if first <= h < first + heads]
            part = maps[:, position : position + len(mine)]
            if mine:
                convolved.append(_convolve(layer, part, mine, heads))
            first, position = first + heads, position + len(mine)
        around = torch.cat(convolved, dim=1).flatten(-2).mT
        return functional.pad(q[:, :, 1:] * around, (0, 0, 1, 0))


def _convolve(layer: torch.nn.Module, maps: Tensor, mine: list[int], heads: int) -> Tensor:
    """A depthwise convolution over the maps of some of its heads."""
    assert isinstance(layer, torch.nn.Conv2d)
    which = torch.tensor(mine, device=maps.device)
    weight = unflatten(layer.weight, 0, (heads, -1))[which].flatten(0, 1)
    bias = None
    if layer.bias is not None:
        bias = unflatten(layer.bias, 0, (heads, -1))[which].flatten(0, 1)
    out = functional.conv2d(
        maps.flatten(1, 2),
        weight,
        bias,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=weight.shape[0],
    )
    return unflatten(out, 1, maps.shape[1:3])


class CoatAttention(HeadAdapter):
    """``timm.models.coat.FactorAttnConvRelPosEnc``."""

    classes = (FactorAttnConvRelPosEnc,)
    slim = (SlimFactorAttention,)
    recalls = True
