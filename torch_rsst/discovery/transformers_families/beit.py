"""Heads of BEiT where the model makes biases of positions for the heads of all its layers.

Loaded once BEiT, or what is made like it, has been.
"""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.models.beit.modeling_beit import BeitAttention
from transformers.models.data2vec import modeling_data2vec_vision as data2vec

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.head_math import kept
from torch_rsst.discovery.transformers_families.parts import Answer
from torch_rsst.discovery.transformers_families.separate_heads import SeparateHeads, attention_of


class _OwnPositions(nn.Module):
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


class BeitHeads(SeparateHeads):
    """Where ``use_shared_relative_position_bias`` is set; the shared table stays whole."""

    former_names = ("Data2VecVisionHeads",)
    slim = (SlimBeitAttention, SlimData2VecVisionSdpaAttention, SlimData2VecVisionAttention)

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        attention = attention_of(module)
        known = (BeitAttention, data2vec.Data2VecVisionSelfAttention)
        if attention is None or not isinstance(attention.holder, known):
            return None
        shared = getattr(attention.holder.config, "use_shared_relative_position_bias", False)
        return super().find(module) if shared else None


register(BeitHeads())
