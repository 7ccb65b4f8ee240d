"""Heads of attention whose query, key and value are put out by one linear layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from torch_rsst.discovery.adapter import Adapter, Unsupported, columns, rows
from torch_rsst.discovery.head_attributes import head_width, reduce_head_attributes
from torch_rsst.discovery.transformers_families.parts import (
    Answer,
    is_of_transformers,
    returns_weights,
    shared_rows,
)
from torch_rsst.groups.groups import GroupLayer
from torch_rsst.groups.surgery import Removal


class FusedHeads(Adapter):
    """``qkv_proj``: the queries of all heads, then their keys, then their values, as in Phi-3.

    A unit is a key/value head with its query heads; one has to stay for the cache of the decoder.
    Its forward asks the configuration how many queries there are, so that the module gets its own.
    """

    kind = "heads"
    least = 1

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        packed, last = getattr(module, "qkv_proj", None), getattr(module, "o_proj", None)
        width, keys = head_width(module), getattr(module, "num_key_value_heads", 0)
        if not (is_of_transformers(module) and isinstance(last, nn.Linear) and width and keys):
            return None
        queries = last.in_features // width
        if not isinstance(packed, nn.Linear):
            return None
        if packed.out_features != (queries + 2 * keys) * width or queries % keys:
            return Unsupported("its qkv_proj is not as wide as its heads")
        of_query, of_key = shared_rows(keys, queries // keys * width), shared_rows(keys, width)
        members = rows("qkv_proj", packed, torch.cat([of_query, of_key, of_key]))
        layer = GroupLayer("", self.kind, keys, (*members, columns("o_proj", of_query)))
        return returns_weights(module) or layer

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        last = module.o_proj
        assert isinstance(last, nn.Linear)
        reduce_head_attributes(module, removal)
        config: Any = copy.copy(module.config)
        config.num_attention_heads = last.in_features // head_width(module)
        module.config = config
        return module


class StackedHeads(Adapter):
    """``Wqkv``: the queries of all heads, then their keys, then their values, and ``Wo``, as in ModernBERT."""

    kind = "heads"
    least = 1

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        packed, last = getattr(module, "Wqkv", None), getattr(module, "Wo", None)
        width = head_width(module)
        if not (is_of_transformers(module) and isinstance(packed, nn.Linear) and width):
            return None
        if not isinstance(last, nn.Linear) or packed.out_features != 3 * last.in_features:
            return None
        heads = last.in_features // width
        of_head = shared_rows(heads, width)
        members = (*rows("Wqkv", packed, of_head.repeat(3)), columns("Wo", of_head))
        return returns_weights(module) or GroupLayer("", self.kind, heads, members)

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        reduce_head_attributes(module, removal)
        return module


class InterleavedHeads(Adapter):
    """``query_key_value``: query, key and value of one head, then those of the next, as in GPT-NeoX."""

    kind = "heads"
    least = 1

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        packed, last = getattr(module, "query_key_value", None), getattr(module, "dense", None)
        width = head_width(module)
        if not (is_of_transformers(module) and isinstance(packed, nn.Linear) and width):
            return None
        if not isinstance(last, nn.Linear) or packed.out_features != 3 * last.in_features:
            return Unsupported("its query_key_value is not as wide as its heads")
        heads = last.in_features // width
        members = rows("query_key_value", packed, shared_rows(heads, 3 * width))
        last_member = columns("dense", shared_rows(heads, width))
        layer = GroupLayer("", self.kind, heads, (*members, last_member))
        return returns_weights(module) or layer

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        reduce_head_attributes(module, removal)
        return module
