"""Discovery: one small file per family of modules, a registry, and the search."""

from torch_rsst.discovery.adapter import (
    ADAPTERS,
    KINDS,
    Adapter,
    Unsupported,
    columns,
    family,
    register,
    rows,
)
from torch_rsst.discovery.alternating_gates import AlternatingGates
from torch_rsst.discovery.blocks import ResidualBlocks
from torch_rsst.discovery.channels.convolutions import ConvolutionChannels
from torch_rsst.discovery.emptied import BiasOnly
from torch_rsst.discovery.finder import find_groups, survey
from torch_rsst.discovery.flow_heads import FlowHeads
from torch_rsst.discovery.fused_attention import FusedAttention
from torch_rsst.discovery.gated_convolution import GatedConvolution
from torch_rsst.discovery.gated_mlp import GatedMLP
from torch_rsst.discovery.probe import Probe
from torch_rsst.discovery.reduced_attention import ReducedMultiheadAttention
from torch_rsst.discovery.torch_attention import TorchAttention
from torch_rsst.discovery.two_layer_mlp import TwoLayerMLP

register(FlowHeads())
register(FusedAttention())
register(TorchAttention())
register(AlternatingGates())
register(GatedMLP())
register(GatedConvolution())
register(TwoLayerMLP())
register(ConvolutionChannels())
register(ResidualBlocks())

__all__ = [
    "ADAPTERS",
    "KINDS",
    "Adapter",
    "AlternatingGates",
    "BiasOnly",
    "ConvolutionChannels",
    "FlowHeads",
    "FusedAttention",
    "GatedConvolution",
    "GatedMLP",
    "Probe",
    "ReducedMultiheadAttention",
    "ResidualBlocks",
    "TorchAttention",
    "TwoLayerMLP",
    "Unsupported",
    "columns",
    "family",
    "find_groups",
    "register",
    "rows",
    "survey",
]
