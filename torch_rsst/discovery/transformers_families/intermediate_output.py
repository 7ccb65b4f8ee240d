"""Hidden neurons of MLPs whose two layers stand in two modules side by side, as in BERT."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.projections import HiddenNeurons, Projection, projection_at
from torch_rsst.discovery.transformers_families.parts import is_of_transformers


class IntermediateOutput(HiddenNeurons):
    """A layer with an ``intermediate`` and an ``output``, each with a linear ``dense``."""

    def layers_of(self, module: nn.Module) -> list[Projection]:
        """The two of them."""
        if not is_of_transformers(module):
            return []
        first = projection_at(module, "intermediate.dense")
        second = projection_at(module, "output.dense")
        if first is None or second is None or first.given != second.taken:
            return []
        return [first, second]
