"""What was cut out of a model, as plain data: enough to cut a fresh one to the same shapes.

A compacted model carries a list of *stages*, one per compaction, made of dicts, lists, numbers and text
alone: it is copied and pickled along, and can be written as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.discovery import family
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Groups, Member
from torch_rsst.groups.surgery import Removal, buffer_shape, module_at
from torch_rsst.masking.names import named_weights, without_wrappers
from torch_rsst.utils.errors import message, refuse

Stage = dict[str, Any]

_ATTRIBUTE = "_compaction_stages"


def stages_of(model: nn.Module) -> list[Stage] | None:
    """The stages that a model carries; None where :func:`torch_rsst.compact` did not make it."""
    stages: list[Stage] | None = vars(model).get(_ATTRIBUTE)
    return stages


def remember(model: nn.Module, stages: Iterable[Stage]) -> None:
    """Let a model carry these stages."""
    vars(model)[_ATTRIBUTE] = list(stages)


def bare_biases(model: nn.Module) -> set[str]:
    """The names of the modules that could have a bias and have none."""
    named = ((without_wrappers(name), module) for name, module in model.named_modules())
    return {name for name, module in named if module._parameters.get("bias", module) is None}


def stage_of(removals: Iterable[Removal], new_biases: Iterable[str]) -> Stage:
    """One compaction as plain data.

    Args:
        removals: what is cut.
        new_biases: modules that were given a bias for what removed units put out.
    """
    layers = [
        {
            "name": removal.layer.name,
            "kind": removal.layer.kind,
            "family": removal.layer.family,
            "units": removal.layer.units,
            "gone": pack(removal.gone.cpu().nonzero().flatten()),
            "members": [_table(member) for member in removal.layer.members],
            "buffers": [_table(member) for member in removal.layer.buffers],
        }
        for removal in removals
        if removal.count
    ]
    return {"new_biases": sorted(new_biases), "layers": layers}


def _table(member: Member) -> dict[str, Any]:
    return {
        "parameter": member.parameter,
        "dim": member.dim,
        **({"stacked": True} if member.unit_of.ndim > 1 else {}),
        "unit_of": pack(member.unit_of.cpu().flatten()),
        "ranked": member.ranked,
        "consumes": member.consumes,
    }


def pack(values: Tensor) -> list[list[int]]:
    """Integers as runs ``[first, count, repeat]``: first, first + 1 … (count of them), each repeated.

    >>> pack(torch.tensor([0, 0, 1, 1, 2, 2, 7]))
    [[0, 3, 2], [7, 1, 1]]
    """
    value, repeat = torch.unique_consecutive(values, return_counts=True)
    starts = torch.ones(value.numel(), dtype=torch.bool)
    starts[1:] = (value.diff() != 1) | (repeat.diff() != 0)
    first = starts.nonzero().flatten()
    count = torch.cat([first, torch.tensor([value.numel()])]).diff()
    packed: list[list[int]] = torch.stack([value[first], count, repeat[first]], dim=1).tolist()
    return packed


def unpack(runs: Any, *, size: int | None, at_most: int, low: int = 0) -> Tensor:
    """The integers of :func:`pack`, all of them at least ``low`` and below ``at_most``.

    Raises:
        ValueError: for anything else, or another number of integers than ``size``.
    """
    if not isinstance(runs, Sequence) or not all(map(_is_run, runs)):
        raise _damaged("runs of three numbers", runs)
    if any(first < low or first + count > at_most for first, count, _ in runs):
        raise _damaged(f"units from {low} to {at_most - 1}", runs)
    total = sum(count * repeat for _, count, repeat in runs)
    if total > at_most if size is None else total != size:
        raise _damaged(f"{at_most if size is None else size} indices", total)
    parts = (torch.arange(a, a + n).repeat_interleave(repeat) for a, n, repeat in runs)
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


def _is_run(run: Any) -> bool:
    whole = isinstance(run, Sequence) and len(run) == 3 and all(type(v) is int for v in run)
    return whole and run[1] >= 1 and run[2] >= 1


def removals_of(stage: Any, model: nn.Module) -> list[Removal]:
    """What a stage says is to be cut out of a model, checked against it.

    Args:
        stage: from :func:`stage_of`, or read from a file: nothing of it is taken for granted.
        model: dense, of the shapes that the compacted one had before this stage.

    Raises:
        KeyError, ValueError: for a stage of another model, or none at all.
    """
    sizes = {name: tuple(weight.shape) for name, weight in named_weights(model).items()}
    layers = _get(stage, "layers", list)
    for table in (table for layer in layers for table in _get(layer, "buffers", list)):
        name = _get(table, "parameter", str)
        if (shape := buffer_shape(model, name)) is not None:
            sizes.setdefault(name, shape)
    removals = [_removal(layer, sizes) for layer in layers]
    for removal in removals:
        _check_units(model, removal.layer)
    return removals


def new_biases_of(stage: Any) -> list[str]:
    """The modules that a stage gave a bias."""
    names: list[str] = _get(stage, "new_biases", list)
    if not all(isinstance(name, str) for name in names):
        raise _damaged("names of modules", names)
    return names


def recorded_module(model: nn.Module, name: str) -> nn.Module:
    """The module of a name that a stage holds.

    Raises:
        ValueError: where the model has none.
    """
    try:
        return module_at(model, name)
    except KeyError:
        raise _damaged(f"a module {name!r}", "no such name") from None


def _removal(data: Any, sizes: Mapping[str, tuple[int, ...]]) -> Removal:
    units = _get(data, "units", int)
    members, buffers = (
        tuple(_member(table, units, sizes) for table in _get(data, key, list))
        for key in ("members", "buffers")
    )
    name, kind, family_name = (_get(data, key, str) for key in ("name", "kind", "family"))
    layer = GroupLayer(name, kind, units, members, buffers, family_name)
    if units > max((member.unit_of.numel() for member in members), default=0):
        raise _damaged(f"fewer units of {layer.name or 'the model'}", units)
    gone = torch.zeros(units, dtype=torch.bool)
    gone[unpack(_get(data, "gone", list), size=None, at_most=units)] = True
    return Removal(layer, gone)


def _member(table: Any, units: int, sizes: Mapping[str, tuple[int, ...]]) -> Member:
    name, dim = _get(table, "parameter", str), _get(table, "dim", int)
    shape = sizes.get(name)
    if shape is None or not 0 <= dim < len(shape):
        got = "none" if shape is None else f"shape {shape}"
        raise _damaged(f"a parameter {name!r} with a dimension {dim}", got)
    of_dims = (shape[0], shape[dim]) if dim and table.get("stacked") is True else (shape[dim],)
    try:
        runs = _get(table, "unit_of", list)
        unit_of = unpack(runs, size=math.prod(of_dims), at_most=units, low=NO_UNIT).view(of_dims)
    except ValueError as error:
        raise ValueError(f"{name!r}, shape {shape}, dimension {dim}: {error}") from error
    return Member(name, dim, unit_of, _get(table, "ranked", bool), _get(table, "consumes", bool))


def _get(data: Any, key: str, kind: type[Any]) -> Any:
    value = data.get(key) if isinstance(data, Mapping) else None
    # A bool is an int to Python, and JSON has both.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _damaged(f"{key!r}, a {kind.__name__}", repr(value))
    if kind is int and value < 0:
        raise _damaged(f"{key!r} of at least 0", value)
    return value


def _damaged(expected: str, got: object) -> ValueError:
    text = str(got)
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    remedy = "The description is damaged, or of another model."
    return ValueError(message("stages", expected=expected, got=shown, remedy=remedy))


def _check_units(model: nn.Module, layer: GroupLayer) -> None:
    """Raise where a module divides its tensors into other units: shapes can agree by chance.

    An attention of another number of heads has the same parameters.
    """
    if not layer.family or family(layer.family).whole_model:
        return
    found = family(layer.family).find(recorded_module(model, layer.name))
    if not isinstance(found, GroupLayer):
        return
    prefix = f"{layer.name}." if layer.name else ""
    theirs = {(prefix + m.parameter, m.dim): m.unit_of for m in found.members}
    for member in layer.members:
        own, other = member.unit_of, theirs.get((member.parameter, member.dim))
        owned = own != NO_UNIT
        if other is None or other.shape != own.shape or not bool(owned.any()):
            continue
        pairs = torch.unique(torch.stack([own[owned], other[owned]]), dim=1)
        # Units may have been left out, not divided or joined.
        one_to_one = all(pairs.shape[1] == len(set(side)) for side in pairs.tolist())
        whole = int(torch.isin(other, pairs[1]).sum()) == int(owned.sum())
        if NO_UNIT in pairs[1] or not one_to_one or not whole:
            expected = f"the {layer.units} {layer.kind} that it was cut in"
            remedy = "Build the model with the arguments that the compacted one was built with."
            refuse(ValueError, str(layer), expected, f"{found.units}", remedy)


def of_kind(stages: Sequence[Stage], groups: Groups) -> dict[str, dict[str, int]]:
    """Per kind of unit, how many there were before the last stage and how many are left."""
    counts: dict[str, dict[str, int]] = {}
    for layer in groups.layers:
        entry = counts.setdefault(layer.kind, {"before": 0, "after": 0})
        for when in entry:
            entry[when] += layer.units
    for data in stages[-1]["layers"] if stages else []:
        if data["kind"] in counts:
            counts[data["kind"]]["after"] -= sum(run[1] * run[2] for run in data["gone"])
    return counts
