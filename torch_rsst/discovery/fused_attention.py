"""Heads of attention with one fused ``qkv`` and a ``proj``, as in timm's vision transformers."""

from __future__ import annotations

import torch
from torch import nn

from torch_rsst.discovery.adapter import Probe, Unsupported
from torch_rsst.groups import GroupLayer, Member, head_rows


class FusedAttention:
    """Recognized by structure: linear ``qkv`` and ``proj``, ``num_heads``, nothing else of shape.

    Rows of ``qkv`` (and of a ``gate``) and columns of ``proj`` are ranked members of their head;
    the biases of ``qkv`` and ``gate`` follow. Norms over the width of one head are shared by all
    heads and stay.
    """

    kind = "heads"

    def find(self, name: str, module: nn.Module, probe: Probe) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        heads = getattr(module, "num_heads", None)
        if not (
            isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(heads, int)
        ):
            return None
        width = proj.in_features
        gate = getattr(module, "gate", None)
        if qkv.out_features != 3 * width or heads < 1 or width % heads:
            return Unsupported(
                name,
                self.kind,
                f"qkv has {qkv.out_features} rows and proj {width} columns for {heads} heads; "
                "expected equal widths of q, k and v, split evenly",
            )
        if reason := _foreign_parameters(module, width, width // heads):
            return Unsupported(name, self.kind, reason)
        rows, columns = head_rows(3 * width, heads, 3), head_rows(width, heads)
        if reason := probe.why_mixed(module, qkv, proj, rows, columns):
            return Unsupported(name, self.kind, reason)
        members = _producer(name, "qkv", qkv, rows)
        if isinstance(gate, nn.Linear):
            members += _producer(name, "gate", gate, columns)
        members.append(Member(f"{_path(name, 'proj')}.weight", 1, columns, ranked=True))
        return GroupLayer(name, self.kind, heads, tuple(members))


def _path(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _producer(name: str, child: str, layer: nn.Linear, rows: torch.Tensor) -> list[Member]:
    path = _path(name, child)
    members = [Member(f"{path}.weight", 0, rows, ranked=True)]
    if layer.bias is not None:
        members.append(Member(f"{path}.bias", 0, rows, ranked=False))
    return members


def _foreign_parameters(module: nn.Module, width: int, head_dim: int) -> str | None:
    """Why the parameters beyond qkv, proj and gate forbid cutting heads, or None if they do not."""
    own = [key for key, parameter in module._parameters.items() if parameter is not None]
    if own:
        return f"it holds parameters of its own ({', '.join(own)}) that no adapter knows"
    for child_name, child in module.named_children():
        if child_name in ("qkv", "proj"):
            continue
        if child_name == "gate" and isinstance(child, nn.Linear):
            if child.out_features != width:
                return "its gate is not as wide as its heads"
            continue
        for parameter in child.parameters():
            # A norm over one head's width treats every head alike; a wider one joins them.
            if parameter.shape != (head_dim,):
                return f"its {child_name} ({type(child).__name__}) spans heads"
    return None
