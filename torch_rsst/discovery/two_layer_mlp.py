"""Hidden neurons of two-layer MLPs, whatever their layers are called."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torch_rsst.discovery.adapter import Call, Unsupported
from torch_rsst.discovery.projections import HiddenNeurons, Projection, maps_between, projections
from torch_rsst.groups.groups import GroupLayer


class TwoLayerMLP(HiddenNeurons):
    """Recognized by structure: exactly two linear layers, or 1×1 convolutions, that fit each other.

    They are children of the module, or each is held by a child of its own together with its norm.
    A neuron's row of the first layer and its column of the second are ranked; its bias follows.
    Batch norms, PReLU and depthwise convolutions between them, which treat every neuron by itself, go
    along; a norm over all neurons would join them. What a module holds of other widths stays.
    1×1 convolutions beside a gate between 0 and 1 make no MLP: they weigh channels.
    """

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        found = super().find(module)
        mixed = found is not None and maps_between(module, self.layers_of(module))
        return None if mixed else found

    def layers_of(self, module: nn.Module) -> list[Projection]:
        """The two of them."""
        pair = projections(module)
        if len(pair) != 2 or len({layer.is_linear for layer in pair}) > 1:
            return []
        if pair[0].given != pair[1].taken:
            return []
        return pair if pair[0].is_linear or not any(map(_gates, module.modules())) else []

    def examples(self, module: nn.Module) -> Iterable[Call]:
        """See :class:`torch_rsst.discovery.Adapter`: targets and memory of a decoder's layer."""
        if isinstance(module, nn.TransformerDecoderLayer):
            weight, generator = module.linear1.weight, torch.Generator().manual_seed(0)
            tokens = torch.randn(4, 4, weight.shape[1], generator=generator).to(weight)
            yield (tokens, tokens.flip(0)), {}


def _gates(activation: nn.Module) -> bool:
    """Whether a module without parameters squeezes what it is given to 0 … 1."""
    if any(True for _ in activation.parameters()) or any(True for _ in activation.children()):
        return False
    try:
        squeezed = activation.forward(torch.tensor([[-100.0, 100.0]]))
        return bool(torch.allclose(squeezed, torch.tensor([[0.0, 1.0]]), atol=1e-6))
    except Exception:
        return False  # no activation
