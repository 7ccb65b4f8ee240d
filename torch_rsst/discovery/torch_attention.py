"""Heads of ``nn.MultiheadAttention``, wherever it stands: in PyTorch's transformers, torchvision's …"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torch_rsst.discovery.adapter import Adapter, Call, Unsupported, columns, holds
from torch_rsst.discovery.change_class import become
from torch_rsst.discovery.reduced_attention import ReducedMultiheadAttention
from torch_rsst.groups.groups import GroupLayer, Member, head_rows
from torch_rsst.groups.surgery import Removal


class TorchAttention(Adapter):
    """Packed or separate projections, with or without biases, batch first or not.

    A head owns its rows of the projections and its columns of the output layer. Without some of its
    heads the module becomes a :class:`~torch_rsst.discovery.ReducedMultiheadAttention`.
    """

    kind = "heads"

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not isinstance(module, nn.MultiheadAttention):
            return None
        known = (nn.MultiheadAttention.forward, ReducedMultiheadAttention.forward)
        if type(module).forward not in known:
            return Unsupported("its class changes what nn.MultiheadAttention computes")
        heads = module.num_heads
        if not heads:
            return None  # all are gone
        width = heads * module.head_dim
        one, packed = head_rows(width, heads), head_rows(3 * width, heads, 3)
        members = []
        if holds(module, "in_proj_weight"):
            members.append(Member("in_proj_weight", 0, packed, ranked=True))
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            members += [Member(name, 0, one, ranked=True) for name in names]
        if holds(module, "in_proj_bias"):
            members.append(Member("in_proj_bias", 0, packed, ranked=False))
        for name in ("bias_k", "bias_v"):
            if holds(module, name):
                members.append(Member(name, 2, one, ranked=False))
        members.append(columns("out_proj", one))
        return GroupLayer("", self.kind, heads, tuple(members))

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
