"""What belongs together in a model, collected entry by entry, and its connected parts."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

NOBODY = -1
"""Stands for an entry that is no channel: a position, a constant."""


@dataclass(frozen=True)
class Axis:
    """A dimension of a parameter or buffer; each index along it is one atom.

    Attributes:
        tensor: the dense name.
        dim: the dimension.
        size: how many indices it has.
        start: the number of its first atom; the others follow.
        buffer: whether the tensor is a buffer.
    """

    tensor: str
    dim: int
    size: int
    start: int
    buffer: bool


@dataclass(frozen=True, eq=False)
class Note:
    """A number that a module keeps, and the label of everything that it may count.

    Attributes:
        name: of the number, within the model.
        labels: as many as the number says.
        sure: whether it does count them; otherwise trying tells.
    """

    name: str
    labels: Tensor
    sure: bool


@dataclass
class Ledger:
    """Atoms, what ties them, what freezes them, and what their axes do. Filled while a model runs."""

    axes: list[Axis] = field(default_factory=list)
    atoms: int = 0
    gives: set[int] = field(default_factory=set)
    """Atoms that begin an axis of rows that put channels out."""
    convolves: set[int] = field(default_factory=set)
    """Those of them that belong to convolutions."""
    takes: set[int] = field(default_factory=set)
    """Atoms that begin an axis of columns that take channels in."""
    unseen: set[str] = field(default_factory=set)
    """Parameters that no operator has used."""
    notes: dict[tuple[str, int], Note] = field(default_factory=dict)
    """By name and first label."""
    reasons: list[str] = field(default_factory=list)
    _ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _frozen: list[Tensor] = field(default_factory=list)

    def enter(self, name: str, tensor: Tensor, *, buffer: bool) -> tuple[Tensor, ...]:
        """Make atoms of a tensor's dimensions; returns their labels, broadcastable to its shape."""
        labels = []
        for dim, size in enumerate(tensor.shape):
            if size < 2:
                continue
            self.axes.append(Axis(name, dim, size, self.atoms, buffer))
            shape = [size if d == dim else 1 for d in range(tensor.ndim)]
            labels.append(torch.arange(self.atoms, self.atoms + size).reshape(shape))
            self.atoms += size
        return tuple(labels)

    def fresh(self, size: int) -> Tensor:
        """Labels of atoms that are no parameter's."""
        self.atoms += size
        return torch.arange(self.atoms - size, self.atoms)

    def tie(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Labels that stand or fall together, pair by pair, broadcast; with nobody: frozen."""
        if one is other:
            return
        one, other = (t.flatten() for t in torch.broadcast_tensors(one, other))
        alone = (one == NOBODY) | (other == NOBODY)
        if bool(alone.any()):
            self.freeze(torch.maximum(one[alone], other[alone]), reason)
            one, other = one[~alone], other[~alone]
        self._ties.append((one, other))

    def note(self, name: str, labels: Tensor, *, sure: bool) -> None:
        """Say what a number may count."""
        key = (name, int(labels[0]))
        if key not in self.notes or (sure and not self.notes[key].sure):
            self.notes[key] = Note(name, labels.clone(), sure)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Say why atoms can never go."""
        labels = labels.flatten()
        self._frozen.append(labels[labels != NOBODY])
        self.reasons.append(reason)

    def roots(self) -> Tensor:
        """Of every atom, the lowest number among those that stand or fall with it."""
        root = torch.arange(self.atoms)
        if not self._ties:
            return root
        one = torch.cat([pair[0] for pair in self._ties])
        other = torch.cat([pair[1] for pair in self._ties])
        while True:
            a, b = root[one], root[other]
            apart = a != b
            if not bool(apart.any()):
                return root
            low, high = torch.minimum(a, b)[apart], torch.maximum(a, b)[apart]
            root.scatter_reduce_(0, high, low, "amin")
            while not torch.equal(root, jumped := root[root]):
                root = jumped

    def why_frozen(self, roots: Tensor) -> Mapping[int, str]:
        """Root → the first reason why what hangs together under it can never go."""
        why: dict[int, str] = {}
        for atoms, reason in zip(self._frozen, self.reasons, strict=True):
            for root in roots[atoms].unique().tolist():
                why.setdefault(root, reason)
        return why
