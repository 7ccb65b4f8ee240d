"""Hidden neurons of gated MLPs: SwiGLU and its kin."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.projections import HiddenNeurons, Projection, projections


class GatedMLP(HiddenNeurons):
    """Recognized by structure: an output layer, and a gate and a value as wide as what it takes in.

    Gate and value are two linear layers of the same shape, or the halves of one. A neuron owns its row
    in both, its column of the output layer, and its biases. 1×1 convolutions do as well.
    """

    def layers_of(self, module: nn.Module) -> list[Projection]:
        """The gate and the value, or the one that puts out both; then the output layer."""
        layers = projections(module)
        if not layers or len({layer.is_linear for layer in layers}) > 1:
            return []
        *giving, last = layers
        if len(giving) == 1:
            return layers if giving[0].given == 2 * last.taken else []
        same = len({(layer.taken, layer.given) for layer in giving}) == 1
        return layers if same and giving[0].given == last.taken else []
