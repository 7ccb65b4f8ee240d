"""Hidden neurons of gated MLPs that convolve some of their values over positions."""

from __future__ import annotations

import torch
from torch import nn

from torch_rsst.discovery.adapter import Adapter, Unsupported, columns, rows
from torch_rsst.discovery.emptied import BiasOnly, NoFeatures
from torch_rsst.groups.groups import GroupLayer
from torch_rsst.groups.surgery import Removal


class GatedConvolution(Adapter):
    """Recognized by structure: ``fc1``, ``conv``, ``fc2``, and how ``split_indices`` divides the first.

    The parts are the gate, the values that pass by, and those that a depthwise convolution sees. A neuron
    owns its row in the gate and in the values, its kernel, if it has one, and its column of ``fc2``.
    """

    kind = "neurons"

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        first, conv, last = (getattr(module, name, None) for name in ("fc1", "conv", "fc2"))
        split = getattr(module, "split_indices", None)
        linear = isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        if not (linear and isinstance(conv, nn.Conv2d) and isinstance(split, (tuple, list))):
            return None
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        hidden, seen = last.in_features, conv.out_channels
        if tuple(split) != (hidden, hidden - seen, seen) or first.out_features != 2 * hidden:
            return None
        unit = torch.arange(hidden)
        members = (
            *rows("fc1", first, unit.repeat(2)),
            *rows("conv", conv, unit[hidden - seen :]),
            columns("fc2", unit),
        )
        return GroupLayer("", self.kind, hidden, members)

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        conv, last = module.conv, module.fc2
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(last, nn.Linear)
        hidden, seen = last.in_features, conv.out_channels
        split = (hidden, hidden - seen, seen)
        setattr(module, "split_indices", split)  # noqa: B010 - mypy knows no attributes
        if not seen:
            module._modules["conv"] = nn.Identity()
        if not hidden:
            module._modules["fc1"] = NoFeatures()
            module._modules["fc2"] = BiasOnly(last)
        return module
