"""Heads of attention with one fused ``qkv`` and a ``proj``, as in timm's vision transformers."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from torch_rsst.discovery.adapter import Adapter, columns, foreign, rows
from torch_rsst.discovery.emptied import BiasOnly
from torch_rsst.discovery.head_attributes import head_count, reduce_head_attributes
from torch_rsst.groups.groups import GroupLayer, head_rows
from torch_rsst.groups.surgery import Removal


class FusedAttention(Adapter):
    """Recognized by structure: ``qkv`` and ``proj`` (linear, or 1×1 convolutions) and ``num_heads``.

    Rows of ``qkv`` (and of a ``gate``) and columns of ``proj`` are ranked members of their head;
    the biases of ``qkv`` and ``gate`` follow. Norms over the width of one head are shared by all
    heads and stay.
    """

    kind = "heads"

    def find(self, module: nn.Module) -> GroupLayer | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        heads = head_count(module)
        if not (_is_projection(qkv) and _is_projection(proj)) or heads is None:
            return None
        given, width = _widths(qkv)[0], _widths(proj)[1]
        if given != 3 * width or heads < 1 or width % heads:
            return None
        members = rows("qkv", qkv, head_rows(3 * width, heads, 3))
        unit_of = head_rows(width, heads)
        gate = getattr(module, "gate", None)
        if _is_projection(gate):
            if _widths(gate)[0] != width:
                return None
            members += rows("gate", gate, unit_of)
        members.append(columns("proj", unit_of))
        shared = _of_one_head(module, width // heads)
        known = [*(m.parameter for m in members), "proj.bias", *shared]
        if foreign(module, known) is not None:
            return None
        return GroupLayer("", self.kind, heads, tuple(members))

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        proj = module.proj
        assert isinstance(proj, (nn.Linear, nn.Conv2d))
        return module if reduce_head_attributes(module, removal) else BiasOnly(proj)


def _is_projection(layer: object) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a layer maps the features of each position alone."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and set(layer.kernel_size) == {1} and set(layer.stride) == {1}
    return isinstance(layer, nn.Linear)


def _widths(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """How many features a projection puts out and takes in."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def _of_one_head(module: nn.Module, head_dim: int) -> list[str]:
    """Parameters over the width of one head: norms that treat every head alike."""
    named = module.named_parameters()
    return [name for name, p in named if "." in name and p.shape == (head_dim,)]
