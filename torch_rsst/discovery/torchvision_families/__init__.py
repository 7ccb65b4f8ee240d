"""Modules of torchvision whose structure alone does not tell how to shrink them: one file per family."""

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.torchvision_families.maxvit import MaxVitAttention
from torch_rsst.discovery.torchvision_families.swin import TorchvisionSwinAttention

register(MaxVitAttention())
register(TorchvisionSwinAttention())
