"""Account for a whole model: what units own, what stays whole, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torch_rsst.discovery.adapter import Unsupported, is_in
from torch_rsst.discovery.channels.base import Survey
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


def account(model: nn.Module, found: Survey) -> tuple[Whole, ...]:
    """The modules with parameters, or entries of them, that no unit owns; the largest share first.

    Args:
        model: whose units were found.
        found: these units, and what was said of others.
    """
    weights = named_weights(model)
    by_name: dict[str, list[Member]] = {}
    for layer in found.layers:
        for member in layer.members:
            by_name.setdefault(member.parameter, []).append(member)
    total = max(1, sum(weight.numel() for weight in weights.values()))
    embeddings = {p for p, m in model.named_modules() if isinstance(m, nn.Embedding)}
    by_order = _by_order(model, weights, by_name)
    left: dict[str, list[tuple[int, str]]] = {}
    for name, weight in weights.items():
        entries = weight.numel() - _owned(weight, by_name.get(name, ()))
        if entries:
            path = name.rpartition(".")[0]
            known = _EMBEDDING if path in embeddings else _reason(name, found)
            reason = known or by_order(name, weight)
            if reason == _UNKNOWN and found.not_run:
                reason = found.not_run
            left.setdefault(path, []).append((entries, reason))
    whole = []
    for path, parts in left.items():
        reason = max(parts)[1]
        share = sum(entries for entries, _ in parts) / total
        whole.append(Whole(path, _ROLES.get(reason, "left"), share, reason))
    return tuple(sorted(whole, key=lambda part: -part.share))


def routers(model: nn.Module, layers: Iterable[GroupLayer]) -> dict[str, str]:
    """Parameters with an entry for each expert of a mixture, beside these, and why experts stay whole."""
    weights = named_weights(model)
    total, found = max(1, sum(weight.numel() for weight in weights.values())), {}
    for layer in layers:
        if (experts := len(layer.parts)) > 1:
            own = {member.parameter for member in layer.members}
            share = sum(weights[name].numel() for name in own) / total
            beside = layer.name.rpartition(".")[0]
            for name, weight in weights.items():
                near = is_in(name, beside) and not is_in(name, layer.name)
                if near and weight.shape[:1] == (experts,):
                    found[name] = (
                        f"it routes to {experts} whole experts ({share:.1%} of the parameters), without "
                        "one of which the routing would change; neurons within them can go"
                    )
    return found


def uncovered(
    refused: Sequence[Unsupported], groups: Groups, model: nn.Module
) -> list[Unsupported]:
    """The refusals, but for those of modules in which units of another kind are found; the largest first."""
    # What is no attention is refused as such, too, for a reason that says less.
    refused_mixers = {item.layer for item in refused if item.kind == "channels"}
    stays = {item.name for item in groups.whole}
    weights = named_weights(model)
    matrices = {name for name, w in weights.items() if w.ndim > 1}
    produces = {m.parameter for la in groups.layers for m in la.members if not m.consumes}

    def is_left(item: Unsupported) -> bool:
        inside = {name for name in matrices if is_in(name, item.layer)}
        if item.kind != "heads":
            owners = {name: name.rpartition(".")[0] for name in inside}
            own = [name for name, path in owners.items() if path == item.layer]
            if own and not produces.issuperset(own):  # of a layer, whose outputs are no units
                return True
            none = item.kind == "channels" or produces.isdisjoint(inside)
            return not inside or (none and not stays.isdisjoint(owners.values()))
        within = (la for la in groups.layers if la.kind != "heads" and is_in(la.name, item.layer))
        has_units = {member.parameter for layer in within for member in layer.members}
        some = not inside or not inside <= has_units
        return some and item.layer not in refused_mixers

    def size(item: Unsupported) -> int:
        return sum(w.numel() for name, w in weights.items() if is_in(name, item.layer))

    return sorted(filter(is_left, refused), key=size, reverse=True)


def _owned(weight: Tensor, members: Sequence[Member]) -> int:
    """How many entries of a parameter some unit owns."""
    free = torch.ones([1] * weight.ndim, dtype=torch.bool)  # as large as the dimensions of members
    for member in members:
        free = free & member.laid(member.unit_of == NO_UNIT, weight.ndim)
    return weight.numel() - int(free.sum()) * (weight.numel() // max(1, free.numel()))


def _reason(name: str, found: Survey) -> str | None:
    """Why a parameter stays: what is said of the innermost module around it, or of itself."""
    if (own := found.reasons.get(name)) is not None:
        return own
    around = [r for r in found.refused if is_in(name, r.layer)]
    return max(around, key=lambda r: len(r.layer)).reason if around else None


def _by_order(
    model: nn.Module, weights: Mapping[str, Tensor], owned: Mapping[str, Sequence[Member]]
) -> Callable[[str, Tensor], str]:
    """Why a parameter stays in a model that was not followed, by the order of its modules: from where it begins to where it ends."""
    layers = dict(model.named_modules())
    paths = dict.fromkeys(name.rpartition(".")[0] for name, w in weights.items() if w.ndim > 1)
    ends = [path for path in paths if path and isinstance(layers.get(path), (nn.Linear, _ConvNd))]
    rows = {m.parameter for ms in owned.values() for m in ms if m.dim == 0}
    norms = (m for m in layers.values() if type(m).__name__.endswith(("LayerNorm", "RMSNorm")))
    stream = {p.shape[-1] for norm in norms for p in norm.parameters(recurse=False) if p.ndim}

    def reason(name: str, weight: Tensor) -> str:
        path = name.rpartition(".")[0]
        # No unit feeds on what the last layer puts out.
        if path in ends[-1:] and f"{path}.weight" not in rows:
            return OUTPUT
        if path in ends[:1]:
            return STEM if weight.ndim > 2 else INPUT
        # Rows, or what the one row of a table that is added to tokens is as wide as.
        along = weight.shape[-1:] if weight.shape[:1] == (1,) else weight.shape[:1]
        if stream & set(along):
            return _STREAM
        return _SINGLE if weight.shape[:1] == (1,) else _UNKNOWN

    return reason
