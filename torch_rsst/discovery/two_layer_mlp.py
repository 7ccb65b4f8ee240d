"""Hidden neurons of two-layer MLPs, whatever their layers are called."""

from __future__ import annotations

import torch
from torch import nn

from torch_rsst.discovery.adapter import Adapter, Unsupported, columns, foreign, rows
from torch_rsst.discovery.emptied import BiasOnly
from torch_rsst.groups import GroupLayer
from torch_rsst.surgery import Removal


class TwoLayerMLP(Adapter):
    """Recognized by structure: exactly two linear children that fit each other.

    Between them only modules without parameters are allowed: a norm would join the neurons. A
    neuron's row of the first layer and its column of the second are ranked; its bias follows.
    """

    kind = "neurons"

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        linear = [(k, m) for k, m in module.named_children() if isinstance(m, nn.Linear)]
        if len(linear) != 2 or any(p is not None for p in module._parameters.values()):
            return None
        (first_name, first), (second_name, second) = linear
        hidden = second.in_features
        if first.out_features == 2 * hidden:
            return Unsupported(
                f"{first_name} puts out twice what {second_name} takes in, as gated MLPs do"
            )
        if first.out_features != hidden:
            return None
        unit = torch.arange(hidden)
        members = (*rows(first_name, first, unit), columns(second_name, unit))
        known = [*(m.parameter for m in members), f"{second_name}.bias"]
        if (name := foreign(module, known)) is not None:
            return Unsupported(f"its {name} may join its hidden neurons")
        return GroupLayer("", self.kind, hidden, members)

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        second = [m for m in module.children() if isinstance(m, nn.Linear)][-1]
        return module if second.in_features else BiasOnly(second)
