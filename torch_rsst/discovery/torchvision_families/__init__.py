"""Modules of torchvision whose structure alone does not tell how to shrink them: one file per family."""

from torch import nn
from torchvision.ops import DeformConv2d

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.torchvision_families.maxvit import MaxVitAttention
from torch_rsst.discovery.torchvision_families.swin import TorchvisionSwinAttention
from torch_rsst.groups.surgery import SIZES


def _deformable(layer: nn.Module) -> dict[str, object]:
    assert isinstance(layer, DeformConv2d)
    rows, columns = layer.weight.shape[:2]
    groups = layer.groups * rows // layer.out_channels if layer.groups > 1 else 1
    return {"in_channels": columns * groups, "out_channels": rows, "groups": groups}


SIZES[DeformConv2d] = _deformable
register(MaxVitAttention())
register(TorchvisionSwinAttention())
