"""Heads of attention with separate queries, keys and values, recognized by structure."""

from __future__ import annotations

from torch import nn

from torch_rsst.discovery.adapter import Unsupported, foreign
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces
from torch_rsst.groups.groups import GroupLayer
from torch_rsst.masking.names import named_weights

QUERIES = ("q", "q_proj", "query", "query_proj", "to_q", "wq")
KEYS = ("k", "k_proj", "key", "key_proj", "to_k", "wk")
VALUES = ("v", "v_proj", "value", "value_proj", "to_v", "wv")
KEYS_AND_VALUES = ("kv", "kv_proj", "to_kv", "wkv")
OUTPUTS = ("proj", "out_proj", "o_proj", "to_out", "to_out.0", "out", "wo", "fc_out")


class SeparateAttention(HeadAdapter):
    """Linear layers named as queries, keys (or keys and values), values, and an output, and a number of heads.

    Where a module notes fewer key/value heads than query heads, a unit is one of those with all the
    query heads that it serves. A linear layer of the module that is none of these makes it unknown.
    """

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not self.units_of(module) or not (parts := self.parts_of(module)):
            return None
        if any(part is not None for part in module._parameters.values()):
            return None
        found = self.found(module)
        if not isinstance(found, GroupLayer):
            return found
        widths = {(member.unit_of.numel() // found.units,) for member in found.members}
        output = next(part.name for part in parts if part.consumes).removesuffix("weight")
        shared = [
            n for n, w in named_weights(module).items() if tuple(w.shape) in widths and "." in n
        ]
        known = [*(member.parameter for member in found.members), f"{output}bias", *shared]
        if (name := foreign(module, known)) is not None:
            return Unsupported(f"its {name} spans heads or is not known to this adapter")
        return found

    def parts_of(self, module: nn.Module) -> tuple[Part, ...]:
        """See :class:`HeadAdapter`."""
        linear = {path for path, m in module.named_modules() if isinstance(m, nn.Linear)}
        query, key, value, both, output = (
            next((name for name in names if name in linear), None)
            for names in (QUERIES, KEYS, VALUES, KEYS_AND_VALUES, OUTPUTS)
        )
        if query is None or output is None:
            return ()
        if key is not None and value is not None:
            return (*produces(query), *produces(key), *produces(value), *consumes(output))
        return (*produces(query), *produces(both, 2), *consumes(output)) if both is not None else ()

    def emptied(self, module: nn.Module) -> nn.Module:
        """See :class:`HeadAdapter`."""
        output = next(part.name for part in self.parts_of(module) if part.consumes)
        return self.left_of(module, output.removesuffix(".weight"))
