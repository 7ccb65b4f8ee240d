"""What rules work with: the labels of the tensors at hand, and the ledger they write to."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.weak import WeakTensorKeyDictionary

from torch_rsst.discovery.channels.labels import Labels, compressed, varying, vector
from torch_rsst.discovery.channels.ledger import Ledger
from torch_rsst.discovery.trial import tensors_in
from torch_rsst.groups.surgery import OWNERS, noted_numbers, sizes_of

UNLABELED = Labels()
OUTPUT = "they are outputs of the model"
INPUT = "they meet the model's input"
STEM = "they come out of a convolution that reads the model's input, which is left alone"
KERNEL = "they are positions of a kernel"
UNNAMED = "they meet entries that are no channels"
TOGETHER = "they hang together, so that only all of them could go"
TAKE_OFF = "joins them; take it off before you find groups, with torch.nn.utils."
NORMS = {
    "_weight_norm_interface": f"weight_norm {TAKE_OFF}remove_weight_norm(module)",
    "mv": f"spectral_norm {TAKE_OFF}remove_spectral_norm(module)",
}
"""Operators of the hooks that make a weight of others before a forward → what to say of them."""
SILENT_REASONS = (OUTPUT, INPUT, STEM)
"""Reasons that need no report: there is nothing to prune."""


@dataclass
class Walk:
    """The state of a run whose channels are followed.

    Attributes:
        ledger: that rules write to.
        running: the modules that are running, the innermost last.
        paths: of all modules.
    """

    ledger: Ledger
    running: list[nn.Module] = field(default_factory=list)
    paths: Mapping[nn.Module, str] = field(default_factory=dict)
    _numbers: dict[nn.Module, list[tuple[str, int]]] = field(default_factory=dict)
    _labels: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _weighted: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def labels(self, tensor: Tensor) -> Labels:
        """What is known of a tensor."""
        found: Labels = self._labels.get(tensor, UNLABELED)
        return found

    def put(
        self,
        tensor: Any,
        fields: Iterable[Tensor],
        *,
        weight: bool = False,
        wild: bool = False,
        attribute: str = "",
    ) -> None:
        """Say what a tensor that an operator made is labeled with."""
        if isinstance(tensor, Tensor):
            fields = list(fields)
            weight = weight or self._parametrization() is not None
            self.freeze([f for f in fields if not varying(f)], TOGETHER)
            known = tuple(f for f in fields if varying(f))
            self._labels[tensor] = Labels(known, weight, wild, attribute)
            if not weight:
                self._note_sizes(fields)

    def put_like(self, source: Tensor, out: Any, fields: Iterable[Tensor]) -> None:
        """The same for what holds entries of another tensor, made of weights or of sizes if that one is."""
        known = self.labels(source)
        fields = map(compressed, fields)
        self.put(out, fields, weight=known.weight, wild=known.wild, attribute=known.attribute)

    def _note_sizes(self, fields: Iterable[Tensor]) -> None:
        """The running module may keep the number of channels that it works on."""
        sure = bool(self.running) and isinstance(self.running[-1], _NormBase)
        for labels in fields:
            if len(varying(labels)) == 1:
                for name, size in self.numbers():
                    if size == labels.numel():
                        self.ledger.note(name, labels.flatten(), sure=sure)

    def note(self, attribute: str, labels: Tensor) -> None:
        """Say what a number that the running module keeps counts."""
        if (path := self.paths.get(self.running[-1])) is not None:
            self.ledger.note(f"{path}.{attribute}" if path else attribute, labels, sure=True)

    def numbers(self) -> list[tuple[str, int]]:
        """The names and values of the numbers above 1 that the running module keeps; of a cell, the one around it."""
        keeping = [m for m in self.running[-2:] if not isinstance(m, nn.RNNCellBase)]
        module = keeping[-1] if keeping else None
        if module is None:
            return []
        if module not in self._numbers:
            found = noted_numbers(module, self.paths.get(module, ""))
            self._numbers[module] = [(name, size) for name, size in found.items() if size > 1]
        return self._numbers[module]

    def weigh(self, given: Iterable[Tensor], out: Iterable[Tensor]) -> None:
        """Note that weights have gone into what is made of tensors into which they went."""
        if any(tensor in self._weighted or _is_weight(tensor) for tensor in given):
            for tensor in out:
                self._weighted[tensor] = True

    def is_input(self, tensor: Tensor) -> bool:
        """Whether a tensor is the model's input, or made of it before any weights."""
        return tensor not in self._weighted and not self.labels(tensor).wild

    def splits_where_noted(self) -> bool:
        """Whether the running module notes, and is told, where it splits its channels."""
        return bool(self.running) and bool(sizes_of(self.running[-1], OWNERS))

    def _parametrization(self) -> ParametrizationList | None:
        """The parametrization that runs, which makes a weight of others."""
        lists = (module for module in self.running if isinstance(module, ParametrizationList))
        return next(lists, None)

    def freeze(self, fields: Iterable[Tensor], reason: str) -> None:
        """No channel in these labels can go."""
        if (made_by := self._parametrization()) is not None:
            kind, name = type(made_by[-1]).__name__, self.paths[made_by].rpartition(".")[2]
            remedy = f"parametrize.remove_parametrizations(module, {name!r})"
            reason = f"the parametrization {kind.lstrip('_')} {TAKE_OFF}{remedy}"
        for labels in fields:
            self.ledger.freeze(labels, reason)

    def along(self, tensor: Tensor, dim: int, reason: str) -> Tensor | None:
        """The labels along one dimension, one-dimensional; all others of the tensor are frozen."""
        dim %= max(1, tensor.ndim)
        found = None
        for labels in self.labels(tensor).fields:
            if varying(labels) == (dim,) and found is None:
                found = labels.flatten()
            else:
                self.ledger.freeze(labels, reason)
        return found

    def meet(self, one: Tensor | None, other: Tensor | None, reason: str) -> None:
        """One-dimensional labels that stand or fall together; frozen where one side has none."""
        if one is not None and other is not None:
            self.ledger.tie(one, other, reason)
        elif one is not None or other is not None:
            self.freeze([t for t in (one, other) if t is not None], reason)

    def emit(self, out: Tensor, labels: Tensor | None, dim: int) -> None:
        """An output whose channels lie along one dimension."""
        self.put(out, [] if labels is None else [vector(labels, out.ndim, dim)])


def _is_weight(tensor: Tensor) -> bool:
    """Vectors of scales and shifts, which a norm of the input may have, are none."""
    return isinstance(tensor, nn.Parameter) and tensor.ndim > 1


Arguments = Mapping[str, Any]
Rule = Callable[[Walk, str, Arguments, Any], None]
"""Takes the walk, the operator's name, its arguments by name, and its result."""

RULES: dict[str, Rule] = {}
"""Name of an operator, without overload and the mark of working in place → its rule.

Operators of other packages are named with their namespace: ``torchvision::roi_align``.
"""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def pass_on(walk: Walk, source: Tensor, out: Any, fields: Iterable[Tensor]) -> None:
    """Label every output that has as many dimensions as its source."""
    fields = list(fields)
    for tensor in tensors_in(out):
        walk.put_like(source, tensor, fields if tensor.ndim == source.ndim else [])


def unknown(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """What becomes of channels here is not known: all of them are frozen."""
    labeled = False
    for tensor in tensors_in(arguments):
        fields = walk.labels(tensor).fields
        labeled = labeled or bool(fields)
        through = f"they go through {name.rpartition('::')[2]}, which may join them"
        walk.freeze(fields, NORMS.get(name, through))
    made_of_sizes = not labeled and all(walk.labels(t).wild for t in tensors_in(arguments))
    for tensor in tensors_in(out):
        walk.put(tensor, [], wild=made_of_sizes)
