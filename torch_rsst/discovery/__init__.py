"""Discovery: which units a model has. One small file per family knows how to find its groups."""

from torch_rsst.discovery.adapter import ADAPTERS, KINDS, Adapter, Probe, Unsupported, register
from torch_rsst.discovery.finder import find_groups
from torch_rsst.discovery.fused_attention import FusedAttention
from torch_rsst.discovery.two_layer_mlp import TwoLayerMLP
from torch_rsst.discovery.unknown_attention import UnknownAttention

register(UnknownAttention())  # asked last
register(FusedAttention())
register(TwoLayerMLP())

__all__ = [
    "ADAPTERS",
    "KINDS",
    "Adapter",
    "FusedAttention",
    "Probe",
    "TwoLayerMLP",
    "UnknownAttention",
    "Unsupported",
    "find_groups",
    "register",
]
