"""Heads of ``nn.MultiheadAttention``, wherever it stands: in PyTorch's transformers, torchvision's …"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torch_rsst.discovery.adapter import Call
from torch_rsst.discovery.head_parts import HeadAdapter, Part, become, consumes
from torch_rsst.discovery.reduced_attention import ReducedMultiheadAttention
from torch_rsst.groups.surgery import Removal


class TorchAttention(HeadAdapter):
    """Packed or separate projections, with or without biases, batch first or not.

    A head owns its rows of the projections and its columns of the output layer. Without some of its
    heads the module becomes a :class:`~torch_rsst.discovery.ReducedMultiheadAttention`.
    """

    classes = (nn.MultiheadAttention,)
    parts = (
        Part("in_proj_weight", stacked=3, ranked=True),
        *(Part(f"{name}_proj_weight", ranked=True) for name in ("q", "k", "v")),
        Part("in_proj_bias", stacked=3),
        Part("bias_k", 2),
        Part("bias_v", 2),
        *consumes("out_proj"),
    )

    def why_not(self, module: nn.Module) -> str | None:
        """See :class:`HeadAdapter`."""
        known = (nn.MultiheadAttention.forward, ReducedMultiheadAttention.forward)
        changed = "its class changes what nn.MultiheadAttention computes"
        return None if type(module).forward in known else changed

    def examples(self, module: nn.Module) -> Iterable[Call]:
        """See :class:`torch_rsst.discovery.Adapter`: query, key and value."""
        if isinstance(module, nn.MultiheadAttention):
            output = module.out_proj.weight
            generator = torch.Generator().manual_seed(0)
            widths = (module.embed_dim, module.kdim, module.vdim)
            yield tuple(torch.randn(4, 4, w, generator=generator).to(output) for w in widths), {}

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        assert isinstance(module, nn.MultiheadAttention)
        if not isinstance(module, ReducedMultiheadAttention):
            become(module, ReducedMultiheadAttention)
            assert isinstance(module, ReducedMultiheadAttention)
            module.whole_heads = module.num_heads
            module.left = tuple(range(module.num_heads))
        stays = (~removal.gone).nonzero().flatten().tolist()
        module.left = tuple(module.left[head] for head in stays)
        module.num_heads = len(stays)
        # Encoder layers ask this before they take their fused path, which would read beyond the heads.
        module._qkv_same_embed_dim = False
        return module
