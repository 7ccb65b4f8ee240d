"""Check layers of channels all at once: on a copy, units that are zeroed must equal units that are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Unsupported
from torch_rsst.discovery.channels.layers import Candidates
from torch_rsst.discovery.channels.tracer import running_modules
from torch_rsst.discovery.trial import agree, choices, one_line, silence, tensors_of
from torch_rsst.groups.groups import GroupLayer
from torch_rsst.groups.surgery import Removal, cut
from torch_rsst.utils.module_state import deep_copy

DIFFERS = "its output without some of its channels differs"
MOST_TRIALS = 64


@dataclass(frozen=True)
class Failure:
    """Why a trial failed, and the path of the module that raised, None where the outputs differ."""

    reason: str
    place: str | None = None


@dataclass
class Trials:
    """Trials on a model; few, as each runs it several times.

    Attributes:
        whole: a dense copy with random weights, in eval mode.
        run: calls a model with the example inputs.
        trains: whether the model also runs in training mode.
        candidates: numbers that modules keep and that may count the units of a layer.
        refused: what cannot be cut, and why.
    """

    whole: nn.Module
    run: Callable[[nn.Module], Any]
    trains: bool
    candidates: Candidates = field(default_factory=dict)
    refused: list[Unsupported] = field(default_factory=list)
    _made: int = 0

    def exact(self, layers: Sequence[GroupLayer]) -> list[GroupLayer]:
        """Those of the layers that can all be cut exactly; notes why the others cannot.

        All at once where that is exact; otherwise the culprits are searched where it failed.
        """
        if not layers or (failure := self._failure(layers)) is None:
            return list(layers)
        noted = self._with_numbers(layers, failure)
        if noted is not None:
            return self.exact(noted)
        if len(layers) == 1 or self._made >= MOST_TRIALS:
            return self._refuse(layers, failure)
        suspects, others = _divided(layers, failure)
        parts = [self.exact(suspects), self.exact(others)]
        found = [layer for layer in layers if any(layer in part for part in parts)]
        if all(parts) and (failure := self._failure(found)) is not None:
            return self._refuse(found, failure)
        return found

    def _with_numbers(
        self, layers: Sequence[GroupLayer], failure: Failure
    ) -> list[GroupLayer] | None:
        """The layers with the numbers kept by the module that failed, if that gets it further."""
        prefix = f"{failure.place}." if failure.place else ""
        noted = []
        for layer in layers:
            known = {member.parameter for member in layer.buffers}
            more = []
            for member in self.candidates.get(layer.name, ()):
                attribute = member.parameter.removeprefix(prefix)
                here = member.parameter.startswith(prefix) and attribute.count(".") <= 1
                if here and failure.place is not None and member.parameter not in known:
                    more.append(member)
                    known.add(member.parameter)
            noted.append(replace(layer, buffers=(*layer.buffers, *more)))
        if all(len(a.buffers) == len(b.buffers) for a, b in zip(layers, noted, strict=True)):
            return None
        again = self._failure(noted)
        return noted if again is None or again != failure else None

    def _refuse(self, layers: Sequence[GroupLayer], failure: Failure) -> list[GroupLayer]:
        self.refused += [Unsupported(failure.reason, layer.name, layer.kind) for layer in layers]
        return []

    def _failure(self, layers: Sequence[GroupLayer]) -> Failure | None:
        """Why the layers cannot be cut exactly, or None where they can."""
        self._made += 1
        for trains, removals in zip((self.trains, False), _removals(layers), strict=True):
            small = deep_copy(self.whole)
            running: list[nn.Module] = []
            try:
                cut(small, removals)
                with running_modules(small, running):
                    got = self._outputs(small)
                    if trains:
                        self._outputs(small.train())
            except Exception as error:
                reason = f"its forward fixes how many it has ({one_line(error)})"
                return Failure(reason, _path_of(running[-1], small) if running else "")
            del small
            masked = deep_copy(self.whole)
            silence(masked, removals)
            if not agree(self._outputs(masked), got, self._tolerance()):
                return Failure(DIFFERS)
        return None

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return tensors_of(self.run(model))

    def _tolerance(self) -> float:
        double = all(p.dtype != torch.float32 for p in self.whole.parameters())
        return 1e-8 if double else 1e-4


def _path_of(module: nn.Module, model: nn.Module) -> str:
    found: str = next(path for path, part in model.named_modules() if part is module)
    return found


def _divided(
    layers: Sequence[GroupLayer], failure: Failure
) -> tuple[Sequence[GroupLayer], Sequence[GroupLayer]]:
    """Layers that may have made a trial fail, and others; both are fewer."""
    if failure.place:
        inside = f"{failure.place}."
        suspects = [
            layer
            for layer in layers
            if any(m.parameter.startswith(inside) for m in (*layer.members, *layer.buffers))
        ]
        if 0 < len(suspects) < len(layers):
            return suspects, [layer for layer in layers if layer not in suspects]
    half = len(layers) // 2
    return layers[:half], layers[half:]


def _removals(layers: Sequence[GroupLayer]) -> Iterator[list[Removal]]:
    """Half of the units of every layer, then all but one of every layer."""
    for which in (0, -1):
        yield [Removal(layer, list(choices(layer.units, least=1))[which]) for layer in layers]
