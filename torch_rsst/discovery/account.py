"""Account for a whole model: what units own, what stays whole, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torch_rsst.discovery.adapter import Unsupported
from torch_rsst.discovery.channels.walk import INPUT, OUTPUT, STEM
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Groups, Member, Whole
from torch_rsst.masking.names import named_weights

_EMBEDDING = "it holds embeddings of the model's input"
_STREAM = "its features are those that norms over features join"
_SINGLE = "its one feature cannot go"
_ROLES = {
    **{OUTPUT: "output", INPUT: "input", STEM: "input", _EMBEDDING: "input"},
    **{_STREAM: "trunk", _SINGLE: "trunk"},
}
_UNKNOWN = "no adapter knows units of it"


def account(
    model: nn.Module,
    layers: Iterable[GroupLayer],
    refused: Sequence[Unsupported],
    reasons: Mapping[str, str],
) -> tuple[Whole, ...]:
    """The modules with parameters, or entries of them, that no unit owns; the largest share first.

    Args:
        model: whose units were found.
        layers: of units.
        refused: modules whose units cannot be offered.
        reasons: dense name → why a parameter stays, where the model was followed.
    """
    weights = named_weights(model)
    by_name: dict[str, list[Member]] = {}
    for layer in layers:
        for member in layer.members:
            by_name.setdefault(member.parameter, []).append(member)
    total = max(1, sum(weight.numel() for weight in weights.values()))
    ends = _Ends.of(model, weights, by_name)
    left: dict[str, list[tuple[int, str]]] = {}
    for name, weight in weights.items():
        entries = weight.numel() - _owned(weight, by_name.get(name, ()))
        if entries:
            path = name.rpartition(".")[0]
            known = _EMBEDDING if path in ends.embeddings else _reason(name, refused, reasons)
            reason = known or ends.reason(name, weight)
            left.setdefault(path, []).append((entries, reason))
    found = []
    for path, parts in left.items():
        reason = max(parts)[1]
        share = sum(entries for entries, _ in parts) / total
        found.append(Whole(path, _ROLES.get(reason, "left"), share, reason))
    return tuple(sorted(found, key=lambda whole: -whole.share))


def routers(model: nn.Module, layers: Iterable[GroupLayer]) -> dict[str, str]:
    """Parameters with an entry for each expert of a mixture, beside these, and why experts stay whole."""
    weights = named_weights(model)
    total, found = max(1, sum(weight.numel() for weight in weights.values())), {}
    for layer in layers:
        if (experts := len(layer.parts)) > 1:
            own = {member.parameter for member in layer.members}
            inside = f"{layer.name}." if layer.name else ""
            share = sum(weights[name].numel() for name in own) / total
            beside = layer.name.rpartition(".")[0]
            for name, weight in weights.items():
                near = f".{name}".startswith(f".{beside}." if beside else ".")
                if near and not name.startswith(inside) and weight.shape[:1] == (experts,):
                    found[name] = (
                        f"it routes to {experts} whole experts ({share:.1%} of the parameters), without "
                        "one of which the routing would change; neurons within them can go"
                    )
    return found


def uncovered(
    refused: Sequence[Unsupported], groups: Groups, model: nn.Module
) -> list[Unsupported]:
    """The refusals, but for those of modules all of whose layers have units of another kind."""
    # What is no attention is refused as such, too, for a reason that says less.
    refused_mixers = {item.layer for item in refused if item.kind == "channels"}
    stays = {item.name for item in groups.whole}
    matrices = {name for name, w in named_weights(model).items() if w.ndim > 1}

    def is_left(item: Unsupported) -> bool:
        around = f"{item.layer}." if item.layer else ""
        inside = {name for name in matrices if name.startswith(around)}
        if item.kind != "heads":
            return not inside or any(name.rpartition(".")[0] in stays for name in inside)
        within = (
            la for la in groups.layers if la.kind != "heads" and f"{la.name}.".startswith(around)
        )
        has_units = {member.parameter for layer in within for member in layer.members}
        some = not inside or not inside <= has_units
        return some and item.layer not in refused_mixers

    return [item for item in refused if is_left(item)]


def _owned(weight: Tensor, members: Sequence[Member]) -> int:
    """How many entries of a parameter some unit owns."""
    free = torch.ones([1] * weight.ndim, dtype=torch.bool)  # as large as the dimensions of members
    for member in members:
        free = free & member.laid(member.unit_of == NO_UNIT, weight.ndim)
    return weight.numel() - int(free.sum()) * (weight.numel() // max(1, free.numel()))


def _reason(name: str, refused: Sequence[Unsupported], reasons: Mapping[str, str]) -> str | None:
    """Why a parameter stays: what is said of the innermost module around it, or of itself."""
    if (own := reasons.get(name)) is not None:
        return own
    around = [r for r in refused if not r.layer or name.startswith(f"{r.layer}.")]
    return max(around, key=lambda r: len(r.layer)).reason if around else None


@dataclass(frozen=True)
class _Ends:
    """Where a model that was not followed begins and ends, by the order of its modules.

    Attributes:
        first: the path of the first layer, if it reads the input.
        last: the path of the last layer, if no unit feeds on what it puts out.
        embeddings: paths of embeddings.
        stream: widths that norms over features have.
    """

    first: str
    last: str
    embeddings: frozenset[str]
    stream: frozenset[int]

    @classmethod
    def of(
        cls, model: nn.Module, weights: Mapping[str, Tensor], owned: Mapping[str, Sequence[Member]]
    ) -> _Ends:
        modules = {name.rpartition(".")[0]: None for name, w in weights.items() if w.ndim > 1}
        paths = [path for path in modules if path]
        layers = dict(model.named_modules())
        kinds = (nn.Linear, _ConvNd)
        ends = [path for path in paths if isinstance(layers.get(path), kinds)]
        rows = {m.parameter for ms in owned.values() for m in ms if m.dim == 0}
        last = ends[-1] if ends and f"{ends[-1]}.weight" not in rows else ""
        embeddings = (p for p, m in layers.items() if isinstance(m, nn.Embedding))
        norms = (m for m in layers.values() if type(m).__name__.endswith(("LayerNorm", "RMSNorm")))
        widths = {p.shape[-1] for norm in norms for p in norm.parameters(recurse=False) if p.ndim}
        return cls(ends[0] if ends else "", last, frozenset(embeddings), frozenset(widths))

    def reason(self, name: str, weight: Tensor) -> str:
        path = name.rpartition(".")[0]
        if path in self.embeddings:
            return _EMBEDDING
        if path == self.last:
            return OUTPUT
        if path == self.first:
            return STEM if weight.ndim > 2 else INPUT
        # Rows, or what the one row of a table that is added to tokens is as wide as.
        along = weight.shape[-1:] if weight.shape[:1] == (1,) else weight.shape[:1]
        if self.stream & set(along):
            return _STREAM
        return _SINGLE if weight.shape[:1] == (1,) else _UNKNOWN
