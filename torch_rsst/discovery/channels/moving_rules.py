"""Rules of operators that move entries: labels are moved along."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_rsst.discovery.channels.entry_rules import meet
from torch_rsst.discovery.channels.labels import Labels, compressed, varying, vector
from torch_rsst.discovery.channels.ledger import NOBODY
from torch_rsst.discovery.channels.walk import Arguments, Walk, rule, unknown
from torch_rsst.discovery.trial import tensors_in

UNEVEN = "they are split at a place that pruning would move"
AT_ONCE = "they are split evenly"
PICKED = (
    "an index picks them by their numbers, which change when some go: put what it picks, in its order, "
    "into the weights before it, and take the index out"
)


_SHAPED: dict[str, Callable[[Tensor, Arguments, torch.Size], Tensor]] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy", "squeeze"),
        lambda labels, _, shape: labels.reshape(shape),
    ),
    **dict.fromkeys(("expand", "expand_as"), lambda labels, _, shape: labels.expand(shape)),
    "flip": lambda labels, arguments, _: labels.flip(arguments["dims"]),
    "permute": lambda labels, arguments, _: labels.permute(arguments["dims"]),
    "repeat": lambda labels, arguments, _: labels.repeat(arguments["repeats"]),
    "t": lambda labels, *_: labels.t(),
    "transpose": lambda labels, given, _: labels.transpose(given["dim0"], given["dim1"]),
    "unsqueeze": lambda labels, arguments, _: labels.unsqueeze(arguments["dim"]),
}
"""Operators that put entries into another shape or order, or repeat them → the same done to their labels."""


@rule(*_SHAPED)
def shaped(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Labels are moved as their entries are."""
    shape = _filled(out.shape)
    if not out.numel() and _filled(arguments["self"].shape).numel() != shape.numel():
        return  # nothing in it, and no telling where labels would lie
    moved = (_SHAPED[name](f, arguments, shape) for f in _fields(walk, arguments))
    walk.put_like(arguments["self"], out, [_evened(walk, compressed(f)) for f in moved])


def _evened(walk: Walk, field: Tensor) -> Tensor:
    """Channels dealt out to several dimensions: each leading index must keep as many as the others."""
    for dim in varying(field)[:-1]:
        walk.ledger.tie(field.narrow(dim, 0, 1), field, AT_ONCE)
        field = field.narrow(dim, 0, 1)
    return field


def _fields(walk: Walk, arguments: Arguments) -> list[Tensor]:
    """Labels of every entry; no memory is spent."""
    x = arguments["self"]
    return [f.expand(_filled(x.shape)) for f in walk.labels(x).fields]


def _filled(shape: torch.Size) -> torch.Size:
    """As of one row where there is none: an expert without tokens says as much of its neurons."""
    return torch.Size(max(1, size) for size in shape)


@rule("slice", "narrow", "select", "unbind")
def part(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """Some of the entries along one dimension. Channels go there only evenly from all such parts."""
    x = arguments["self"]
    dim = arguments.get("dim", 0) % x.ndim
    fields = []
    for field in _fields(walk, arguments):
        if dim not in varying(compressed(field)):
            field = field.narrow(dim, 0, 1)
            fields.append(field.squeeze(dim) if name in ("select", "unbind") else field)
        elif name in ("select", "unbind") or arguments.get("step", 1) not in (1, None):
            walk.freeze([compressed(field)], UNEVEN)
        else:
            size = tensors_in(out)[0].shape[dim]
            begin = arguments.get("start") or 0
            begin = begin % x.shape[dim] if begin < 0 else begin
            if _even(walk, field, dim, [size], begin):
                fields.append(field.narrow(dim, begin, size))
    for tensor in tensors_in(out):
        walk.put_like(x, tensor, fields)


def _even(walk: Walk, field: Tensor, dim: int, sizes: Sequence[int], begin: int = 0) -> bool:
    """Tie what lies at the same place of parts of one size; freeze channels cut up otherwise."""
    size, total = max(sizes), field.shape[dim]
    if size == total:
        return True
    if size == 0:
        return False
    if walk.splits_where_noted() and (len(set(sizes)) > 1 or total % size or begin % size):
        return True
    if len(set(sizes)) > 1 or total % size or begin % size:
        walk.freeze([compressed(field)], UNEVEN)
        return False
    parts = compressed(field).unflatten(dim, (-1, size))
    walk.ledger.tie(parts.narrow(dim, 0, 1), parts, AT_ONCE)
    return True


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def split(walk: Walk, name: str, arguments: Arguments, out: Sequence[Tensor]) -> None:
    """Consecutive parts."""
    x = arguments["self"]
    dim = arguments.get("dim", 0) % x.ndim
    sizes = [tensor.shape[dim] for tensor in out]
    parts: list[list[Tensor]] = [[] for _ in out]
    for field in _fields(walk, arguments):
        if dim not in varying(compressed(field)):
            pieces: Sequence[Tensor] = [compressed(field)] * len(out)
        elif _even(walk, field, dim, sizes):
            pieces = field.split(sizes, dim)
        else:
            continue
        for fields, piece in zip(parts, pieces, strict=True):
            fields.append(piece)
    for tensor, fields in zip(out, parts, strict=True):
        walk.put_like(x, tensor, fields)


@rule("glu")
def gated(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """One half multiplied by a gate made of the other."""
    x = arguments["self"]
    dim = arguments["dim"] % x.ndim
    size = out.shape[dim]
    fields = []
    for field in _fields(walk, arguments):
        if dim not in varying(compressed(field)) or _even(walk, field, dim, [size]):
            fields.append(compressed(field.narrow(dim, 0, size)))
    walk.put(out, fields)


@rule("roll", "index_select", "index", "constant_pad_nd", "pad")
def pick(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Entries picked by position: channels elsewhere stay where they are."""
    x = arguments["self"]
    touched = _picked(name, arguments, x.ndim)
    by_number = name.startswith("index") and not walk.labels(x).weight
    fields = []
    for field in map(compressed, _fields(walk, arguments)):
        if out.ndim == x.ndim and touched is not None and not touched & set(varying(field)):
            fields.append(field)
        elif name == "constant_pad_nd" and len(varying(field)) == 1:
            dim = varying(field)[0]
            pads = arguments["pad"]
            before, after = pads[2 * (x.ndim - 1 - dim)], pads[2 * (x.ndim - 1 - dim) + 1]
            flat = torch.nn.functional.pad(field.flatten(), (before, after), value=NOBODY)
            fields.append(vector(flat, x.ndim, dim))
        else:
            walk.freeze([field], PICKED if by_number else UNEVEN)
    walk.put_like(x, out, fields)


@rule("index_put", "_index_put_impl")
def write(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Entries written at positions: their channels are those of the tensor that they are written to."""
    x, values = arguments["self"], arguments["values"]
    touched = {d for d, index in enumerate(arguments["indices"]) if index is not None}
    known = walk.labels(x), walk.labels(values)
    if values.ndim != x.ndim or any(touched & set(varying(f)) for k in known for f in k.fields):
        unknown(walk, name, arguments, out)
        return
    shape = tuple(1 if d in touched else size for d, size in enumerate(x.shape))
    fields = meet(walk, [(labels, shape) for labels in known], x.ndim)
    walk.put(out, fields, wild=all(labels.wild for labels in known))


def _picked(name: str, arguments: Arguments, ndim: int) -> set[int] | None:
    """The dimensions along which entries are picked."""
    if name == "index_select":
        return {arguments["dim"] % ndim}
    if name == "index":
        return {d for d, index in enumerate(arguments["indices"]) if index is not None}
    if name == "roll":
        return {d % ndim for d in arguments.get("dims") or ()} or None
    pads = arguments["pad"]
    return {ndim - 1 - i // 2 for i, size in enumerate(pads) if size}


@rule("pixel_shuffle")
def pixel_shuffle(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Channels become positions, a whole block of them at once."""
    x, factor = arguments["self"], arguments["upscale_factor"]
    fed = walk.along(x, x.ndim - 3, UNEVEN)
    if fed is not None:
        blocks = fed.reshape(-1, factor * factor)
        walk.ledger.tie(blocks[:, :1], blocks, AT_ONCE)
        fed = blocks[:, 0]
    walk.emit(out, fed, out.ndim - 3)


@rule("pixel_unshuffle")
def pixel_unshuffle(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Blocks of positions become channels, side by side for each channel."""
    x, factor = arguments["self"], arguments["downscale_factor"]
    fed = walk.along(x, x.ndim - 3, UNEVEN)
    repeated = None if fed is None else fed.repeat_interleave(factor * factor)
    walk.emit(out, repeated, out.ndim - 3)


@rule("cat", "concat")
def concatenate(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Channels one after the other; along any other dimension they stand or fall together."""
    tensors = [t for t in arguments["tensors"] if t.numel() or t.ndim == out.ndim]
    dim = arguments.get("dim", 0) % out.ndim
    known = [walk.labels(t) for t in tensors]
    labeled = any(dim in varying(f) for labels in known for f in labels.fields)
    # Beside inputs, the first hidden state of a recurrent layer: as wide as is asked for.
    states = dim == out.ndim - 1 and any(k.wild for k in known) and not all(k.wild for k in known)
    if labeled or (states and not any(k.fields for k in known)):
        parts = []
        for tensor, labels in zip(tensors, known, strict=True):
            found = walk.along(tensor, dim, "they are concatenated as positions")
            size = tensor.shape[dim]
            if found is None:
                found = walk.ledger.fresh(size) if labels.wild else torch.full((size,), NOBODY)
            parts.append(found)
        fields = [vector(torch.cat(parts), out.ndim, dim)]
    else:
        shapes = [tuple(1 if d == dim else s for d, s in enumerate(t.shape)) for t in tensors]
        fields = meet(walk, list(zip(known, shapes, strict=True)), out.ndim)
    _put_together(walk, known, out, fields)


@rule("stack")
def stack(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Tensors along a new dimension: their channels stand or fall together."""
    dim = arguments.get("dim", 0) % out.ndim
    known = [walk.labels(t) for t in arguments["tensors"]]
    shape = tuple(1 if d == dim else s for d, s in enumerate(out.shape))
    operands = [
        (Labels(tuple(f.unsqueeze(dim) for f in k.fields), k.weight, k.wild), shape) for k in known
    ]
    _put_together(walk, known, out, meet(walk, operands, out.ndim))


def _put_together(walk: Walk, known: Sequence[Labels], out: Tensor, fields: list[Tensor]) -> None:
    weight, wild = all(k.weight for k in known), all(k.wild for k in known)
    walk.put(out, fields, weight=weight, wild=wild)
