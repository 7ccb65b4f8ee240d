"""Heads of BEiT where the model makes biases of positions for the heads of all its layers.

Loaded once BEiT, or what is made like it, has been.
"""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.beit.modeling_beit import BeitAttention
from transformers.models.data2vec import modeling_data2vec_vision as data2vec

from torch_rsst.discovery.adapter import Adapter, register
from torch_rsst.discovery.change_class import become
from torch_rsst.discovery.head_math import kept
from torch_rsst.discovery.head_parts import recall
from torch_rsst.discovery.transformers_families.parts import Answer
from torch_rsst.discovery.transformers_families.separate_heads import (
    SeparateHeads,
    SomeHeads,
    attention_of,
)
from torch_rsst.groups.surgery import Removal

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class _OwnPositions(_Base):
    """Takes the part of its heads of biases that have one for every head that there was."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See transformers."""
        names = list(inspect.signature(super().forward).parameters)[1:]
        kwargs |= zip(names, args, strict=False)
        for name in ("attention_mask", "relative_position_bias"):
            if isinstance(bias := kwargs.get(name), Tensor) and bias.ndim >= 3:
                kwargs[name] = kept(self, bias, bias.ndim - 3)  # (…, heads, queries, keys)
        return super().forward(hidden_states, **kwargs)


class SlimBeitAttention(_OwnPositions, BeitAttention):
    """With any number of heads."""


class SlimData2VecVisionAttention(_OwnPositions, data2vec.Data2VecVisionSelfAttention):
    """With any number of heads."""


class SlimData2VecVisionSdpaAttention(_OwnPositions, data2vec.Data2VecVisionSdpaSelfAttention):
    """With any number of heads."""


_SLIM: dict[type[nn.Module], type[nn.Module]] = {
    BeitAttention: SlimBeitAttention,
    data2vec.Data2VecVisionSdpaSelfAttention: SlimData2VecVisionSdpaAttention,
    data2vec.Data2VecVisionSelfAttention: SlimData2VecVisionAttention,
}


class _Sharing(Adapter):
    """Where ``use_shared_relative_position_bias`` is set; the shared table stays whole."""

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        attention = attention_of(module)
        if attention is None or not isinstance(attention.holder, tuple(_SLIM)):
            return None
        shared = getattr(attention.holder.config, "use_shared_relative_position_bias", False)
        return super().find(module) if shared else None

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        attention = attention_of(module)
        assert attention is not None
        holder = attention.holder
        recall(holder, removal.gone)
        become(holder, next(slim for known, slim in _SLIM.items() if isinstance(holder, known)))
        return super().shrink(module, removal)


class BeitHeads(_Sharing, SeparateHeads):
    """Of BEiT."""


class Data2VecVisionHeads(_Sharing, SomeHeads):
    """Of Data2Vec, one of whose heads has to stay."""


register(Data2VecVisionHeads())
register(BeitHeads())  # asked first: which of the two it is depends on the module
