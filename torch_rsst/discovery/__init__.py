"""Discovery: one small file per family of modules, a registry, and the search."""

from torch_rsst.discovery.adapter import ADAPTERS, KINDS, Adapter, Unsupported, family, register
from torch_rsst.discovery.emptied import BiasOnly
from torch_rsst.discovery.finder import find_groups
from torch_rsst.discovery.fused_attention import FusedAttention
from torch_rsst.discovery.probe import Probe
from torch_rsst.discovery.two_layer_mlp import TwoLayerMLP
from torch_rsst.discovery.unknown_attention import UnknownAttention

register(UnknownAttention())  # asked last
register(FusedAttention())
register(TwoLayerMLP())

__all__ = [
    "ADAPTERS",
    "KINDS",
    "Adapter",
    "BiasOnly",
    "FusedAttention",
    "Probe",
    "TwoLayerMLP",
    "UnknownAttention",
    "Unsupported",
    "family",
    "find_groups",
    "register",
]
