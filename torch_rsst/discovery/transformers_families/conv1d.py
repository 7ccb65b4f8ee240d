"""Hidden neurons of models whose linear layers are ``Conv1D``, as GPT-2's."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from torch_rsst.discovery.adapter import Adapter
from torch_rsst.discovery.emptied import BiasOnly
from torch_rsst.discovery.transformers_families.parts import Answer, is_of_transformers
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.groups.surgery import SIZES, Removal


class Conv1DMLP(Adapter):
    """``c_fc`` and ``c_proj``."""

    kind = "neurons"

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        first, last = (getattr(module, name, None) for name in ("c_fc", "c_proj"))
        if not (isinstance(first, Conv1D) and isinstance(last, Conv1D)):
            return None
        hidden = last.weight.shape[0]
        if not hidden or first.weight.shape[1] != hidden or not is_of_transformers(module):
            return None
        unit = torch.arange(hidden)
        members = (  # weights are stored as (inputs, outputs)
            Member("c_fc.weight", 1, unit, ranked=True),
            Member("c_fc.bias", 0, unit, ranked=False),
            Member("c_proj.weight", 0, unit, ranked=True, consumes=True),
        )
        return GroupLayer("", self.kind, hidden, members)

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        last = module.c_proj
        assert isinstance(last, Conv1D)
        return module if last.weight.shape[0] else BiasOnly(_as_linear(last))


def _as_linear(layer: Conv1D) -> nn.Linear:
    """A linear layer with the same outputs, whose inputs have all been cut."""
    linear = nn.Linear(1, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t())
    linear.bias = layer.bias
    return linear.train(layer.training)


def _sizes(layer: nn.Module) -> dict[str, int]:
    assert isinstance(layer, Conv1D)
    return {"nx": layer.weight.shape[0], "nf": layer.weight.shape[1]}


SIZES[Conv1D] = _sizes
