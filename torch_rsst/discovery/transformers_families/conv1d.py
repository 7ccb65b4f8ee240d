"""Hidden neurons of models whose linear layers are ``Conv1D``, as GPT-2's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
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
        first, second = _layers(module, "c_fc", "c_proj")
        if first is None or second is None:
            return None
        hidden = first.weight.shape[1]
        if not hidden or second.weight.shape[0] != hidden:
            return None
        unit = torch.arange(hidden)
        members = (*_outputs("c_fc", unit), _inputs("c_proj", unit))
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


def _layers(module: nn.Module, *names: str) -> list[Conv1D | None]:
    found = [getattr(module, name, None) for name in names if is_of_transformers(module)]
    if len(found) == len(names) and all(isinstance(layer, Conv1D) for layer in found):
        return found
    return [None] * len(names)


def _outputs(name: str, unit_of: Tensor) -> tuple[Member, Member]:
    """Members that put units out: weights are stored as (inputs, outputs)."""
    weight = Member(f"{name}.weight", 1, unit_of, ranked=True)
    return weight, Member(f"{name}.bias", 0, unit_of, ranked=False)


def _inputs(name: str, unit_of: Tensor) -> Member:
    return Member(f"{name}.weight", 0, unit_of, ranked=True, consumes=True)


def _sizes(layer: nn.Module) -> dict[str, int]:
    assert isinstance(layer, Conv1D)
    return {"nx": layer.weight.shape[0], "nf": layer.weight.shape[1]}


SIZES[Conv1D] = _sizes
