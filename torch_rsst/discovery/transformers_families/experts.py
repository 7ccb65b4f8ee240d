"""Inner neurons of the experts of a mixture, whose weights are stacked in one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Adapter, Call, holds
from torch_rsst.discovery.transformers_families.parts import Answer
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.groups.surgery import Removal
from torch_rsst.masking.parameter_ref import ParameterRef

_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim")


class StackedExperts(Adapter):
    """``gate_up_proj``, or ``up_proj``, and ``down_proj``, each with an expert for every index of dimension 0.

    A unit is one inner neuron of one expert; of each expert as many are left. Weights may be stored as
    (outputs, inputs) or (inputs, outputs), gate and value one behind the other or in turns.
    """

    kind = "neurons"
    least = 1

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        first = next((n for n in ("gate_up_proj", "up_proj") if holds(module, n)), "")
        if not first or not holds(module, "down_proj"):
            return None
        up, down = _shape(module, first), _shape(module, "down_proj")
        if len(up) != 3 or len(down) != 3 or up[0] != down[0]:
            return None
        times = 2 if first == "gate_up_proj" else 1
        transposed = getattr(module, "is_transposed", up[1] == down[2] and up[2] == times * down[1])
        rows, columns = (2, 1) if transposed else (1, 2)
        experts, neurons = down[0], down[columns]
        if up[rows] != times * neurons:
            return None
        own = torch.arange(experts * neurons).view(experts, neurons)
        in_turns = getattr(module, "is_concatenated", True) is False  # rows of gate and value
        halves = torch.stack([own] * times, dim=2 if in_turns else 1).flatten(1)
        members = [
            Member(first, rows, halves, ranked=True),
            Member("down_proj", columns, own, ranked=True, consumes=True),
        ]
        if holds(module, f"{first}_bias"):
            members.insert(1, Member(f"{first}_bias", 1, halves, ranked=False))
        step = math.gcd(_step(module), neurons)
        return GroupLayer("", self.kind, experts * neurons, tuple(members), multiple=step)

    def examples(self, module: nn.Module) -> Iterator[Call]:
        """See :class:`torch_rsst.discovery.Adapter`: tokens, the experts of each, and their weights."""
        down = ParameterRef(module, "down_proj").original
        experts, generator = down.shape[0], torch.Generator().manual_seed(0)
        widths = {*down.shape[1:]}
        for width in sorted(widths, reverse=True):
            tokens = torch.randn(4 * experts, width, generator=generator).to(down)
            chosen = torch.arange(4 * experts, device=down.device).view(-1, 1) % experts
            yield (tokens, chosen, torch.rand(chosen.shape, generator=generator).to(down)), {}
            yield (tokens,), {}

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        experts = len(removal.layer.parts)
        before, gone = removal.layer.units // experts, removal.count // experts
        for name in _WIDTHS:
            if vars(module).get(name) == before:
                setattr(module, name, before - gone)
        return module


def _step(module: nn.Module) -> int:
    """How many neurons make rows of 16 bytes, as kernels for all experts at once need them."""
    used = getattr(getattr(module, "config", None), "_experts_implementation", None)
    bytes_each = ParameterRef(module, "down_proj").original.element_size()
    return 1 if used in (None, "eager") else max(1, 16 // bytes_each)


def _shape(module: nn.Module, name: str) -> torch.Size:
    found: Tensor = ParameterRef(module, name).original
    return found.shape
