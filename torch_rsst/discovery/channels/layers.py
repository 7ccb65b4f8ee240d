"""Layers of channels from what stands or falls together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Unsupported
from torch_rsst.discovery.channels.base import Place
from torch_rsst.discovery.channels.ledger import NOBODY, Axis, Ledger
from torch_rsst.discovery.channels.walk import INPUT, KERNEL, OUTPUT, SILENT_REASONS, TOGETHER
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Member
from torch_rsst.masking.names import without_wrappers

Signature = tuple[tuple[int, int], ...]
"""Which axes a unit has entries on, by their place in the ledger, and how many."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The connected parts of a ledger.

    Attributes:
        ledger: whose parts they are.
        roots: of every atom.
        frozen: root → why the part can never go.
    """

    ledger: Ledger
    roots: Tensor
    frozen: Mapping[int, str]

    @classmethod
    def of(cls, ledger: Ledger) -> Parts:
        """Those of a model that has been traced."""
        roots = ledger.roots()
        return cls(ledger, roots, ledger.why_frozen(roots))

    def signatures(self) -> dict[int, Signature]:
        """Root → signature of every part that a layer puts out and that may go."""
        may_go = torch.zeros(self.ledger.atoms, dtype=torch.bool)
        for axis in _axes(self.ledger, self.ledger.gives):
            may_go[_on(axis, self.roots)] = True
        may_go[list(self.frozen)] = False
        found: dict[int, list[tuple[int, int]]] = {}
        for number, axis in enumerate(self.ledger.axes):
            roots = _on(axis, self.roots)
            for root, count in Counter(roots[may_go[roots]].tolist()).items():
                found.setdefault(root, []).append((number, count))
        return {root: tuple(signature) for root, signature in found.items()}


Candidates = Mapping[str, Sequence[tuple[int, Member]]]
"""Name of a layer → numbers that may count its units; each with a place among all that it may count."""


def layers_of(
    parts: Parts, family: str, taken: Collection[Place]
) -> tuple[list[GroupLayer], list[Unsupported], Candidates]:
    """The layers of channels among parts, which cannot be offered, and what may count their units.

    Units with entries on the same axes make a layer, named after a convolution that puts them out.

    Args:
        parts: of a traced model.
        family: of the layers.
        taken: places of other units; parts that reach one are left out.
    """
    ledger = parts.ledger
    by_signature: dict[Signature, list[int]] = {}
    for root, signature in parts.signatures().items():
        axes = [ledger.axes[number] for number, _ in signature]
        if any((axis.tensor, axis.dim) in taken for axis in axes):
            continue
        if any(axis.start in ledger.takes for axis in axes):
            by_signature.setdefault(signature, []).append(root)
    layers: dict[str, tuple[set[int], list[int]]] = {}
    for signature, roots in by_signature.items():
        name = _free_name(parts, signature, layers)
        numbers, units = layers.setdefault(name, (set(), []))
        numbers.update(number for number, _ in signature)
        units.extend(roots)
    found, refused = [], list(_refusals(parts, ledger.convolves, SILENT_REASONS))
    candidates: dict[str, Sequence[tuple[int, Member]]] = {}
    for name, (numbers, units) in layers.items():
        if len(units) > 1:
            axes = [ledger.axes[number] for number in sorted(numbers)]
            layer, unit_of_root = _layer(parts, name, axes, units, family)
            noted = (number for _, number in _counted(parts, unit_of_root, sure=True))
            found.append(replace(layer, buffers=(*layer.buffers, *noted)))
            candidates[name] = list(_counted(parts, unit_of_root, sure=False))
        else:
            refused.append(Unsupported(TOGETHER, name, "channels"))
    if not found and not refused and not taken:
        refused = list(_refusals(parts, ledger.gives, (OUTPUT, INPUT)))
    return found, refused, candidates


def must_stay(layer: GroupLayer, model: nn.Module) -> int:
    """How many units must stay: an LSTM has more hidden features than it projects them to."""
    least = layer.least
    for path, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            name = without_wrappers(f"{path}.weight_hr_l0" if path else "weight_hr_l0")
            for member in layer.members:
                if (member.parameter, member.dim) == (name, 1):
                    each = int((member.unit_of == 0).sum())
                    may_go = (module.hidden_size - module.proj_size - 1) // each
                    least = max(least, layer.units - may_go)
    return least


def reasons_of(parts: Parts) -> dict[str, str]:
    """Parameter → why what it puts out stays, or, where there is no such reason, what it takes in."""
    ledger, frozen = parts.ledger, parts.frozen
    found: dict[str, str] = {}
    for axis in sorted(ledger.axes, key=lambda axis: axis.start in ledger.takes):
        reason = next((frozen[r] for r in _on(axis, parts.roots).tolist() if r in frozen), None)
        if reason not in (None, KERNEL) and not axis.buffer:
            found.setdefault(axis.tensor, reason)
    return found


def _axes(ledger: Ledger, starts: Collection[int]) -> list[Axis]:
    return [axis for axis in ledger.axes if axis.start in starts]


def _on(axis: Axis, values: Tensor) -> Tensor:
    return values[axis.start : axis.start + axis.size]


def _module(axis: Axis) -> str:
    return axis.tensor.rpartition(".")[0]


def _free_name(parts: Parts, signature: Signature, used: Collection[str]) -> str:
    """A module that holds the units and names no layer yet: a convolution that puts them out first.

    Where one module holds many parameters, one of these.
    """
    ledger = parts.ledger
    axes = [ledger.axes[number] for number, _ in signature]
    axes.sort(key=lambda axis: (axis.start not in ledger.convolves, axis.start not in ledger.gives))
    names = [*map(_module, axes), *(axis.tensor for axis in axes if axis.start in ledger.gives)]
    return next((name for name in names if name not in used), names[0])


def _layer(
    parts: Parts, name: str, axes: Sequence[Axis], roots: Sequence[int], family: str
) -> tuple[GroupLayer, Tensor]:
    """A layer, and the unit of every root."""
    ledger = parts.ledger
    unit_of_root = torch.full((ledger.atoms,), NO_UNIT)
    unit_of_root[torch.tensor(roots)] = torch.arange(len(roots))
    members: list[Member] = []
    buffers: list[Member] = []
    for axis in axes:
        consumes = axis.start in ledger.takes
        ranked = consumes or axis.start in ledger.gives
        unit_of = unit_of_root[_on(axis, parts.roots)]
        member = Member(axis.tensor, axis.dim, unit_of, ranked, consumes)
        (buffers if axis.buffer else members).append(member)
    kind = "channels" if any(axis.start in ledger.convolves for axis in axes) else "neurons"
    layer = GroupLayer(name, kind, len(roots), tuple(members), tuple(buffers), family)
    return layer, unit_of_root


def _counted(parts: Parts, unit_of_root: Tensor, *, sure: bool) -> Iterator[tuple[int, Member]]:
    """The numbers that count, or may count, units; each with its place among those of one name."""
    places: Counter[str] = Counter()
    for note in parts.ledger.notes.values():
        places[note.name] += 1
        named = note.labels != NOBODY
        unit_of = torch.full(note.labels.shape, NO_UNIT)
        unit_of[named] = unit_of_root[parts.roots[note.labels[named]]]
        if note.sure is sure and bool((unit_of != NO_UNIT).any()):
            yield places[note.name] - 1, Member(note.name, 0, unit_of, ranked=False)


def _refusals(
    parts: Parts, starts: Collection[int], silent: Collection[str]
) -> Iterator[Unsupported]:
    """One for each set of layers, by their axes, that put out what hangs together and cannot go."""
    told: set[int] = set()
    for axis in _axes(parts.ledger, starts):
        kind = "channels" if axis.start in parts.ledger.convolves else "neurons"
        roots = set(_on(axis, parts.roots).tolist())
        reasons = [parts.frozen[root] for root in sorted(roots) if root in parts.frozen]
        reason = next((reason for reason in reasons if reason not in silent), None)
        if reason and not roots & told:
            yield Unsupported(reason, _module(axis), kind)
        told |= roots
