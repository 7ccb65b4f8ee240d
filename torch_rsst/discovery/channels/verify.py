"""Check layers of channels all at once: on a copy, units that are zeroed must equal units that are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Unsupported, is_in
from torch_rsst.discovery.channels.layers import Candidates
from torch_rsst.discovery.channels.tracer import running_modules
from torch_rsst.discovery.cutting import cut_out
from torch_rsst.discovery.probe import too_few
from torch_rsst.discovery.trial import (
    agree,
    are_finite,
    choices,
    one_line,
    outputs_of_modules,
    shake,
    silence,
    take_signs,
    tensors_of,
    why_not_finite,
)
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.groups.surgery import Removal
from torch_rsst.utils.module_state import deep_copy

DIFFERS = "the model's output differs without some of them"
DIFFERS_IN_TRAINING = "the model's output in training mode differs without some of them"
REMEDY = ": let sizes follow from its tensors there, x.flatten(1) instead of x.view(-1, 64)"
MOST_TRIALS = 64
MOST_WAYS = 3
"""How many of the things that a number may count are tried."""


UNSTEADY = (
    "what follows depends on choices that rounding decides, such as boxes of equal scores, so that it "
    "cannot be compared"
)


@dataclass(frozen=True)
class Failure:
    """Why a trial failed.

    Attributes:
        reason: for users.
        place: the path of the module that raised, None where the outputs differ.
        unseen: names of the layers that it says nothing about; the others agree.
    """

    reason: str
    place: str | None = None
    unseen: frozenset[str] = frozenset()


@dataclass
class Trials:
    """Trials on a model; few, as each runs it several times.

    Attributes:
        whole: a dense copy with random weights, in eval mode.
        model: that it is a copy of.
        run: calls a model with the example inputs.
        trains: whether the model also runs in training mode.
        compares_training: whether outputs in training mode are compared as well, where nothing is random there.
        in_double: how much outputs in double precision may differ, relative to the largest.
        candidates: numbers that modules keep and that may count the units of a layer.
        refused: what cannot be cut, and why.
        reasons: dense name of a parameter → why the units that it puts out, or scales, cannot be cut.
    """

    whole: nn.Module
    model: nn.Module
    run: Callable[[nn.Module], Any]
    trains: bool
    compares_training: bool = False
    in_double: float = 1e-8
    candidates: Candidates = field(default_factory=dict)
    refused: list[Unsupported] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    _made: int = 0

    def are_exact(self, layers: Sequence[GroupLayer]) -> bool:
        """Whether the layers, each of more units than must stay, can all be cut exactly beyond doubt; notes nothing."""
        return not layers or (
            self._becomes_finite() and self._failure(layers, plainly=True) is None
        )

    def exact(self, layers: Sequence[GroupLayer]) -> list[GroupLayer]:
        """Those of the layers that can all be cut exactly; notes why the others cannot.

        All at once where that is exact; otherwise the culprits are searched where it failed.
        """
        if few := [layer for layer in layers if layer.units <= layer.least]:
            for layer in few:
                self._refuse([layer], Failure(too_few(layer.kind, layer.units)))
            layers = [layer for layer in layers if layer not in few]
        if layers and not self._made and not self._becomes_finite():
            return self._refuse(layers, Failure(why_not_finite(self.model)))
        if not layers or (failure := self._failure(layers)) is None:
            return list(layers)
        if failure.unseen:
            self._refuse([layer for layer in layers if layer.name in failure.unseen], failure)
            return self.exact([layer for layer in layers if layer.name not in failure.unseen])
        noted = self._with_numbers(layers, failure)
        if noted is not None:
            return self.exact(noted)
        if len(layers) == 1 or self._made >= MOST_TRIALS:
            return self._refuse(layers, failure)
        suspects, others = _divided(layers, failure)
        parts = [self.exact(suspects), self.exact(others)]
        order = {layer.name: place for place, layer in enumerate(layers)}
        found = sorted((*parts[0], *parts[1]), key=lambda layer: order[layer.name])
        if all(parts) and (failure := self._failure(found)) is not None:
            return self._refuse(found, failure)
        return found

    def _with_numbers(
        self, layers: Sequence[GroupLayer], failure: Failure
    ) -> list[GroupLayer] | None:
        """The layers with numbers that modules keep, if these get it further; None if none do.

        Where a module raised, its own numbers, or those of the one around it; where the outputs of one layer
        differ, all or each.
        """
        found = [pair for layer in layers for pair in self.candidates.get(layer.name, ())]
        trials: list[list[Member]] = []
        if (path := failure.place) is not None:
            paths = (path, path.rpartition(".")[0])
            kept = ([pair for pair in found if _kept_by(each, pair[1])] for each in paths)
            own = next(filter(None, kept), [])
            trials = [[n for place, n in own if place == way] for way in range(MOST_WAYS)]
        elif len(layers) == 1:
            trials = [[n for place, n in found if place == 0], *([number] for _, number in found)]
        for chosen in trials:
            noted = [self._noting(layer, chosen) for layer in layers]
            more = sum(len(a.buffers) - len(b.buffers) for a, b in zip(noted, layers, strict=True))
            if more and (again := self._failure(noted)) != failure:
                return noted if again is None or again.place != failure.place else None
        return None

    def _noting(self, layer: GroupLayer, chosen: Sequence[Member]) -> GroupLayer:
        """A layer with those of some numbers that it may have and does not have yet."""
        known = {member.parameter for member in layer.buffers}
        own = (number for _, number in self.candidates.get(layer.name, ()) if number in chosen)
        new = (number for number in own if number.parameter not in known)
        return replace(layer, buffers=(*layer.buffers, *new))

    def _refuse(self, layers: Sequence[GroupLayer], failure: Failure) -> list[GroupLayer]:
        self.refused += [Unsupported(failure.reason, layer.name, layer.kind) for layer in layers]
        own = (member for layer in layers for member in layer.members if not member.consumes)
        self.reasons.update((member.parameter, failure.reason) for member in own)
        return []

    def _failure(self, layers: Sequence[GroupLayer], *, plainly: bool = False) -> Failure | None:
        """Why the layers cannot be cut exactly, or None where they can.

        Args:
            layers: to cut all at once.
            plainly: whether outputs must be finite and agree, whatever rounding may have decided.
        """
        self._made += 1
        for trains, removals in zip((self.trains, False), _removals(layers), strict=True):
            small = deep_copy(self.whole)
            running: list[nn.Module] = []
            try:
                small, _ = cut_out(small, removals)
                with running_modules(small, running):
                    got = self._outputs(small)
                    got_in_training = self._outputs(small.train()) if trains else []
            except Exception as error:
                reason = f"its forward fixes how many it has ({one_line(error)}){REMEDY}"
                paths = {module: path for path, module in small.named_modules()}
                return Failure(reason, paths[running[-1]] if running else "")
            del small
            masked = deep_copy(self.whole)
            silence(masked, removals)
            expected = self._outputs(masked)
            if plainly and not are_finite([*got, *got_in_training]):
                return Failure(DIFFERS)
            if not agree(expected, got, self._tolerance()):
                if plainly:
                    return Failure(DIFFERS)
                return self._why_different(layers, removals, masked, expected)
            if trains and self.compares_training:
                before = torch.get_rng_state()
                expected = self._outputs(masked.train())
                is_random = not torch.equal(before, torch.get_rng_state())
                if not is_random and not agree(expected, got_in_training, self._tolerance()):
                    return Failure(DIFFERS_IN_TRAINING)
        return None

    def _why_different(
        self,
        layers: Sequence[GroupLayer],
        removals: Sequence[Removal],
        masked: nn.Module,
        expected: list[Tensor],
    ) -> Failure | None:
        """Why the outputs of a masked and a cut model differ; None where nothing but rounding decides them.

        What a detector chooses among boxes of equal scores changes with any rounding. Then what modules
        put out before is compared: all that takes in the channels of a layer must be steady.
        """
        shaken = deep_copy(masked)
        shake(shaken)
        if agree(expected, self._outputs(shaken), self._tolerance()):
            return Failure(DIFFERS)
        small, _ = cut_out(deep_copy(self.whole), removals)
        seen = [outputs_of_modules(model, self.run) for model in (masked, shaken, small)]
        alike = partial(agree, tolerance=self._tolerance())
        steady = {name for name, own in seen[0].items() if alike(own, seen[1].get(name, []))}
        for name in steady:
            own, other = seen[0][name], seen[2].get(name, [])
            if [t.shape for t in own] == [t.shape for t in other] and not alike(own, other):
                return Failure(DIFFERS)
        unseen = frozenset(layer.name for layer in layers if not _consumers(layer) <= steady)
        return Failure(UNSTEADY, unseen=unseen) if unseen else None

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return tensors_of(self.run(model))

    def _becomes_finite(self) -> bool:
        """Whether outputs are finite, if need be with weights of the signs that they have in the model."""
        if are_finite(self._outputs(deep_copy(self.whole))):
            return True
        take_signs(self.whole, self.model)
        return are_finite(self._outputs(deep_copy(self.whole)))

    def _tolerance(self) -> float:
        kinds = {p.dtype for p in self.whole.parameters() if p.is_floating_point()}
        coarsest = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
        if coarsest > torch.finfo(torch.float32).eps:
            return 16.0 * coarsest
        return 1e-4 if torch.float32 in kinds else self.in_double


def _consumers(layer: GroupLayer) -> set[str]:
    """Paths of the modules that take in what the units of a layer put out."""
    return {m.parameter.rpartition(".")[0] for m in layer.members if m.consumes}


def _kept_by(path: str, number: Member) -> bool:
    """Whether a module keeps a number."""
    own = number.parameter.removeprefix(f"{path}." if path else "")
    return own.count(".") == own.rstrip("0123456789").endswith(".")


def _divided(
    layers: Sequence[GroupLayer], failure: Failure
) -> tuple[Sequence[GroupLayer], Sequence[GroupLayer]]:
    """Layers that may have made a trial fail, and others; both are fewer."""
    if failure.place:
        suspects = [
            layer
            for layer in layers
            if any(is_in(m.parameter, failure.place) for m in (*layer.members, *layer.buffers))
        ]
        if 0 < len(suspects) < len(layers):
            return suspects, [layer for layer in layers if layer not in suspects]
    half = len(layers) // 2
    return layers[:half], layers[half:]


def trials_of(layer: GroupLayer) -> list[Tensor]:
    """Units that go in trials, more in each; at least one stays."""
    least = max(1, layer.least)
    return list(choices(layer.units, least, len(layer.parts), layer.multiple))


def _removals(layers: Sequence[GroupLayer]) -> Iterator[list[Removal]]:
    """Some of the units of every layer, of every other one a unit more, then as many of each as may go."""
    trials = [(layer, trials_of(layer)) for layer in layers]
    yield [Removal(x, going[min(i % 2, len(going) - 1)]) for i, (x, going) in enumerate(trials)]
    yield [Removal(layer, going[-1]) for layer, going in trials]
