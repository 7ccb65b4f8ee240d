"""Heads of T5, whose first layer makes the biases of positions that all layers add to their scores.

Loaded once T5 has been.
"""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.head_math import kept
from torch_rsst.discovery.transformers_families.parts import Answer
from torch_rsst.discovery.transformers_families.separate_heads import SeparateHeads

if TYPE_CHECKING:
    _Base = T5Attention
else:
    _Base = object


class _AllPositions(_Base):
    """Hands the biases on as the layers behind take them, of all heads; adds those of its own ones."""

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of the heads that are left."""
        return kept(self, super().compute_bias(*args, **kwargs), 1)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See transformers."""
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        past = past.clone() if isinstance(past, Tensor) else past  # some caches count on in place
        output, own, weights = super().forward(
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=None if position_bias is None else kept(self, position_bias, 1),
            cache=cache,
            **kwargs,
        )
        if position_bias is not None:
            return output, position_bias, weights
        if not self.has_relative_attention_bias:
            return output, own.new_zeros(1, self.all_heads, *own.shape[2:]), weights
        queries, keys = own.shape[2:]
        every = super().compute_bias(queries, keys, device=own.device, past_seen_tokens=past)
        return output, every, weights


class SlimT5Attention(_AllPositions, T5Attention):
    """With any number of heads but none."""


class SlimMT5Attention(_AllPositions, MT5Attention):  # type: ignore[misc]
    """With any number of heads but none."""


class T5Heads(SeparateHeads):
    """``T5Attention`` and ``MT5Attention``; the table of biases stays whole, since all layers share it."""

    least = 1
    slim = (SlimT5Attention, SlimMT5Attention)

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        return super().find(module) if isinstance(module, (T5Attention, MT5Attention)) else None


if "cache" in inspect.signature(T5Attention.forward).parameters:
    register(T5Heads())
