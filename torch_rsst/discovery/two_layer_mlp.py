"""Hidden neurons of two-layer MLPs, whatever their layers are called."""

from __future__ import annotations

import torch
from torch import nn

from torch_rsst.discovery.adapter import Probe, Unsupported
from torch_rsst.groups import GroupLayer, Member


class TwoLayerMLP:
    """Recognized by structure: exactly two linear children that fit each other.

    Between them only modules without parameters are allowed: a norm would join the neurons. A
    neuron's row of the first layer and its column of the second are ranked; its bias follows.
    """

    kind = "neurons"

    def find(self, name: str, module: nn.Module, probe: Probe) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        linear = [(k, m) for k, m in module.named_children() if isinstance(m, nn.Linear)]
        if len(linear) != 2 or any(p is not None for p in module._parameters.values()):
            return None
        (first_name, first), (second_name, second) = linear
        hidden = second.in_features
        if first.out_features == 2 * hidden:
            gated = f"{first_name} puts out twice what {second_name} takes in, as gated MLPs do"
            return Unsupported(name, self.kind, gated)
        if first.out_features != hidden:
            return None
        others = [
            (k, m)
            for k, m in module.named_children()
            if m not in (first, second) and any(True for _ in m.parameters())
        ]
        if others:
            kinds = ", ".join(f"{k} ({type(m).__name__})" for k, m in others)
            return Unsupported(name, self.kind, f"{kinds} may join its hidden neurons")
        unit = torch.arange(hidden)
        if reason := probe.why_mixed(module, first, second, unit, unit):
            return Unsupported(name, self.kind, reason)
        prefix = f"{name}." if name else ""
        members = [Member(f"{prefix}{first_name}.weight", 0, unit, ranked=True)]
        if first.bias is not None:
            members.append(Member(f"{prefix}{first_name}.bias", 0, unit, ranked=False))
        members.append(Member(f"{prefix}{second_name}.weight", 1, unit, ranked=True))
        return GroupLayer(name, self.kind, hidden, tuple(members))
