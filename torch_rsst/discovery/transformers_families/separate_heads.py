"""Heads of attention with separate linear layers for query, key and value."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from torch_rsst.discovery.adapter import Adapter, Unsupported, holds
from torch_rsst.discovery.head_attributes import head_width, reduce_head_attributes
from torch_rsst.discovery.head_parts import Part, consumes, dealt_out, produces, recall, slimmed
from torch_rsst.discovery.transformers_families.parts import (
    Answer,
    NoHeads,
    NothingAttended,
    is_of_transformers,
    may_be_emptied,
    returns_weights,
)
from torch_rsst.groups.surgery import Removal

_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
)
_OUTPUTS = ("o_proj", "out_proj", "dense", "o", "out_lin")
_TABLE = "relative_position_bias"
_BUCKETS = "relative_attention_bias"
_MAKES_BIASES = "has_relative_attention_bias"  # T5's, of which an adapter of its own takes care
_BIAS_MLP = "continuous_position_bias_mlp"


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention, found within the module that holds all of it.

    Attributes:
        path: where it stands, "" for the module itself.
        holder: the attention: query, key, value and the number of heads.
        names: of its query, key and value.
        output: the path of the output layer.
        last: the output layer.
    """

    path: str
    holder: nn.Module
    names: tuple[str, str, str]
    output: str
    last: nn.Linear

    def inside(self, name: str) -> str:
        """The name of a part of the attention within the module that holds all of it."""
        return f"{self.path}.{name}" if self.path else name

    @property
    def stands_in_layer(self) -> bool:
        """Whether the module is a whole layer, which drops the weights of attention."""
        return bool(self.path) and self.output.startswith(f"{self.path}.")

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Query, key and value."""
        q, k, v = (getattr(self.holder, name) for name in self.names)
        return q, k, v


class SeparateHeads(Adapter):
    """A unit is a key/value head with all its query heads: one of each, unless they are grouped.

    The output layer is part of the attention, or stands in the module beside it, as in BERT. A table of
    position biases goes along (Swin, BEiT). Where all heads go, nothing is attended any more; where the cache
    of a decoder, or a norm behind, needs one, one has to stay.
    """

    kind = "heads"
    former_names = ("SomeHeads",)
    slim: ClassVar[tuple[type[nn.Module], ...]] = ()
    """As of :class:`HeadAdapter`: they know which heads they have, as others hand them something per head."""

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        attention = attention_of(module)
        return None if attention is None else _units(module, attention)

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        attention = attention_of(module)
        assert attention is not None
        if self.slim:
            recall(attention.holder, removal.gone)
            slimmed(attention.holder, self.slim)
        reduce_head_attributes(attention.holder, removal)
        if attention.last.in_features:
            return module
        if not attention.path:
            return NoHeads(attention.last)
        if attention.stands_in_layer:
            module._modules[_TABLE] = None
            module._modules[attention.path] = NoHeads(attention.last)
        else:
            module._modules[attention.path] = NothingAttended()
        return module


def attention_of(module: nn.Module) -> Attention | None:
    """The attention that a module of transformers is, or all of which it holds."""
    if not is_of_transformers(module):
        return None
    for path, holder in [("", module), *module.named_children()]:
        names = next((n for n in _PROJECTIONS if all(map(_linear_in(holder), n))), None)
        if names is None:
            continue
        within = next(filter(_linear_in(holder), _OUTPUTS), None)
        beside = getattr(getattr(module, "output", None), "dense", None)
        if within is not None and (not path or _holds_table(module)):
            output = f"{path}.{within}" if path else within
            return Attention(path, holder, names, output, getattr(holder, within))
        if within is None and path and isinstance(beside, nn.Linear):
            return Attention(path, holder, names, "output.dense", beside)
    return None


def _linear_in(module: nn.Module):  # type: ignore[no-untyped-def]
    return lambda name: isinstance(getattr(module, name, None), nn.Linear)


def _holds_table(module: nn.Module) -> bool:
    """Whether a table with a column per head stands beside the attention."""
    holder = module._modules.get(_TABLE)
    return holder is not None and holds(holder, f"{_TABLE}_table")


def _is_mixed(attention: Attention) -> bool:
    """Whether something follows the output layer within the attention, which would be lost with it."""
    known = {*attention.names, attention.output.rpartition(".")[2], _TABLE}
    others = (m for n, m in attention.holder.named_children() if n not in known)
    return any(True for m in others for _ in m.parameters())


def _units(module: nn.Module, attention: Attention) -> Answer:
    q, k, v = attention.layers
    width = head_width(attention.holder)
    if not q.out_features:
        return None
    if _takes_biases(attention.holder) and not hasattr(attention.holder, _MAKES_BIASES):
        return Unsupported("its biases of positions, one for each head, are made elsewhere")
    if not width or q.out_features % width or k.out_features % width:
        return Unsupported("the width of its heads is not known")
    queries, units = q.out_features // width, k.out_features // width
    if v.out_features != k.out_features or attention.last.in_features != q.out_features:
        return Unsupported(
            "its query, key, value and output layers differ in their number of heads"
        )
    if queries % units:
        return Unsupported(f"its {queries} query heads do not share {units} key heads evenly")
    if not attention.stands_in_layer and (reason := returns_weights(attention.holder)):
        return Unsupported(reason)
    may_go = may_be_emptied(attention.holder) and not _is_mixed(attention)
    found = dealt_out(module, _parts(attention), units)
    return found if isinstance(found, Unsupported) else replace(found, least=0 if may_go else 1)


def _parts(attention: Attention) -> Iterator[Part]:
    """Query, key and value; position biases, or what makes them, and scales of scores; the output layer."""
    for name in attention.names:
        yield from produces(attention.inside(name))
    table = f"{_TABLE}.{_TABLE}_table"  # beside the attention or in it
    yield from (Part(name, 1) for name in {table, attention.inside(table)})
    if not _takes_biases(attention.holder):  # as in UMT5, unlike T5
        yield Part(attention.inside(f"{_BUCKETS}.weight"), 1)
    yield Part(attention.inside("logit_scale"))
    if isinstance(mlp := getattr(attention.holder, _BIAS_MLP, None), nn.Sequential):
        last = attention.inside(f"{_BIAS_MLP}.{len(mlp) - 1}")
        yield from (Part(f"{last}.weight"), Part(f"{last}.bias"))
    yield from consumes(attention.output)


def _takes_biases(holder: nn.Module) -> bool:
    return "position_bias" in inspect.signature(type(holder).forward).parameters
