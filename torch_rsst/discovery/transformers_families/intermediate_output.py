"""Hidden neurons of MLPs whose two layers stand in two modules side by side, as in BERT."""

from __future__ import annotations

import torch
from torch import nn

from torch_rsst.discovery.adapter import Adapter, columns, rows
from torch_rsst.discovery.emptied import BiasOnly
from torch_rsst.discovery.transformers_families.parts import Answer, is_of_transformers
from torch_rsst.groups.groups import GroupLayer
from torch_rsst.groups.surgery import Removal

_FIRST, _SECOND = "intermediate.dense", "output.dense"


class IntermediateOutput(Adapter):
    """A layer with an ``intermediate`` and an ``output``, each with a linear ``dense``."""

    kind = "neurons"

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not is_of_transformers(module):
            return None
        first, second = (
            getattr(getattr(module, path.partition(".")[0], None), "dense", None)
            for path in (_FIRST, _SECOND)
        )
        if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear)):
            return None
        hidden = first.out_features
        if not hidden or second.in_features != hidden:
            return None
        unit = torch.arange(hidden)
        members = (*rows(_FIRST, first, unit), columns(_SECOND, unit))
        return GroupLayer("", self.kind, hidden, members)

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        intermediate, output = module.intermediate, module.output
        assert isinstance(intermediate, nn.Module)
        assert isinstance(output, nn.Module)
        second = output.dense
        assert isinstance(second, nn.Linear)
        if not second.in_features:
            intermediate._modules["dense"] = nn.Identity()
            output._modules["dense"] = BiasOnly(second)
        return module
