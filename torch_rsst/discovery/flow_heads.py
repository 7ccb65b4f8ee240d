"""Heads of attention that no other adapter knows, found by what flows in the modules that compute it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torch_rsst.discovery.adapter import Adapter, Call, Unsupported, is_in
from torch_rsst.discovery.data_flow import Flow, contracts
from torch_rsst.discovery.emptied import BiasOnly, NoFeatures
from torch_rsst.discovery.flow_units import divisions, has_one_head
from torch_rsst.discovery.head_attributes import head_count
from torch_rsst.discovery.noted import with_numbers
from torch_rsst.discovery.probe import (
    ON_META,
    Fact,
    Probe,
    is_on_meta,
    other_call,
    outputs_on,
    signature_of_call,
    too_few,
)
from torch_rsst.discovery.trial import are_finite, is_half, tensors_in, tried, why_not_finite
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Member
from torch_rsst.groups.surgery import Removal, module_at, replace_module
from torch_rsst.masking.names import named_weights, without_wrappers
from torch_rsst.utils.module_state import undisturbed

Answer = GroupLayer | Unsupported
MIXED = "its units mix before the output layer, so that none can be removed exactly"
NO_OUTPUT = (
    "activations are multiplied with each other in it, as in an attention, but what comes of it reaches "
    "no layer of its own that could take heads in"
)
WHOLE = "which fixes how wide all heads are together; heads of nn.MultiheadAttention can be cut"
_MOST_TRIALS, _FEW_TRIALS = 64, 4
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class _Open(Unsupported):
    """An answer in whose place something may be found in a module around this one."""


class FlowHeads(Adapter):
    """Heads that :func:`search` finds: they are cut together with the numbers that modules keep of them."""

    kind = "heads"
    told_apart = True

    def find(self, module: nn.Module) -> None:
        """None: the module has to be run."""
        return

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`: what has lost all of its features is replaced."""
        if bool(removal.gone.all()):
            output = next(m.parameter for m in removal.layer.members if m.consumes)
            inside = output.removeprefix(f"{removal.layer.name}.")
            last = module_at(module, inside.rpartition(".")[0])
            return BiasOnly(last) if isinstance(last, (nn.Linear, nn.Conv2d)) else module
        for path, part in list(module.named_modules()):
            weights = [w for w in part.parameters() if w.ndim > 1]
            if len(weights) > 1 and not any(w.numel() for w in weights):
                replace_module(module, path, NoFeatures())
        return module


def search(
    probe: Probe, layers: Sequence[GroupLayer], refused: Sequence[Unsupported]
) -> Iterator[tuple[str, Answer]]:
    """The heads of modules in which no adapter has found or refused any, or why there are none.

    The innermost are run first; where their attention leads to no output layer, those around them.

    Args:
        probe: of the model.
        layers: that are known.
        refused: modules whose units cannot be offered.

    Yields:
        the path of a module, and an answer by names within it.
    """
    own = _own_matrices(probe.model, {m.parameter for layer in layers for m in layer.members})
    known = [item.name for item in layers if item.kind == "heads"]
    known += [item.layer for item in refused if item.kind == "heads"]
    look = _Look(probe, FlowHeads())
    waiting: dict[str, list[Answer]] = {}
    tries: Counter[str] = Counter()
    for path, module in reversed(list(probe.model.named_modules())):
        name = without_wrappers(path)
        inside = [inner for inner in waiting if is_in(inner, name) and tries[inner] < 2]
        asked = inside or own[module] > 1 or (own[module] and head_count(module))
        if isinstance(module, _CONTAINERS) or not asked:
            continue
        if any(is_in(name, other) or is_in(other, name) for other in known):
            continue
        answers = look.at(module)
        settled = not all(isinstance(answer, _Open) for answer in answers)
        for inner in inside:
            tries[inner] += 1
            if settled:
                del waiting[inner]
        if settled:
            known.append(name)
        if settled or not inside:
            waiting[name] = answers
            tries[name] = 2 if settled else 0
    for name, answers in reversed(waiting.items()):
        yield from ((name, answer) for answer in answers)


@dataclass(frozen=True)
class _Look:
    """Looks at modules, at those alike once."""

    probe: Probe
    adapter: FlowHeads
    _answers: dict[Fact, list[Answer]] = field(default_factory=dict)

    def at(self, module: nn.Module) -> list[Answer]:
        """The heads of a module, or why there are none; nothing where it is no attention."""
        call, why = self._call(module)
        why = ON_META if is_on_meta(module) else why
        unknown = f"no adapter knows the attention of {type(module).__name__}"
        if call is None:
            return [_Open(f"{unknown}: {why}")] if head_count(module) else []
        key = (self.probe.signature(module), signature_of_call(call))
        if key not in self._answers:
            with undisturbed(module):
                self._answers[key] = self._looked_at(module, call)
        if self._answers[key] or not head_count(module):
            return self._answers[key]
        return [_Open(f"{unknown}: {why or 'nothing is attended in it'}")]

    def _call(self, module: nn.Module) -> tuple[Call | None, str]:
        """Arguments that fit, as wide as a matrix of the module; or None, and why there are none."""
        shapes = {tuple(w.shape): name for name, w in named_weights(module).items() if w.ndim > 1}
        why = "it holds no matrices"
        for name in reversed(shapes.values()):  # the first of each shape comes last
            stub = GroupLayer("", "heads", 1, (Member(name, 0, torch.arange(1), ranked=True),))
            call, why = self.probe.call_of(module, stub, self.adapter)
            if call is not None:
                break
        return call, why

    def _looked_at(self, module: nn.Module, call: Call) -> list[Answer]:
        flow = _flow(module, call)
        if flow is None:
            return []
        if flow.whole:
            return [Unsupported(f"it calls {flow.whole}, {WHOLE}")]
        noises = [product.noise for product in flow.products]
        ends = [i for i, product in enumerate(flow.products) if contracts(product.given, noises)]
        if not ends:
            attends = any(contracts(out, noises) for out in tensors_in(flow.out))
            return [_Open(NO_OUTPUT)] if attends else []
        if is_on_meta(module):
            return [Unsupported(ON_META)]
        if not are_finite(flow.products[place].given for place in ends):
            return [Unsupported(why_not_finite(module))]
        least = 0 if len(ends) == 1 and isinstance(flow.out, Tensor) else 1
        answers = [self._best(module, flow, place, least, call) for place in ends]
        if len(ends) == 1:
            return answers
        if together := self._together(module, answers, [call, other_call(module, call)]):
            return [together]
        first = answers[0]
        if isinstance(first, Unsupported) and all(answer == first for answer in answers):
            return [Unsupported(f"of each of its {len(ends)} attentions: {first.reason}")]
        return [_named(a, flow, place) for a, place in zip(answers, ends, strict=True)]

    def _together(
        self, module: nn.Module, answers: Sequence[Answer], calls: Sequence[Call]
    ) -> GroupLayer | None:
        """Heads of several attentions that one number counts, and that can be cut with each other only."""
        layers = [answer for answer in answers if isinstance(answer, GroupLayer)]
        alike = len(layers) == len(answers) and len({layer.units for layer in layers}) == 1
        if not (alike and any(layer.fixed for layer in layers)):
            return None
        members = tuple(m for layer in layers for m in layer.members)
        buffers = tuple(m for layer in layers for m in layer.buffers)
        whole = replace(layers[0], members=members, buffers=buffers, fixed="")
        answer = with_numbers(module, self.adapter, whole, calls)
        return answer if isinstance(answer, GroupLayer) and not answer.fixed else None

    def _best(self, module: nn.Module, flow: Flow, place: int, least: int, call: Call) -> Answer:
        """Of all ways to divide what a product takes in: one that can be cut, which owns the most."""
        ways = list(filter(None, (way.layer() for way in divisions(flow, place))))
        ways.sort(key=lambda way: _size(flow, way[0]), reverse=True)
        calls = [call, other_call(module, call)]
        single = head_count(module) == 1 or has_one_head(flow, place)
        best: Answer = Unsupported(too_few("heads", 1) if single else MIXED)
        for layer, shared in ways:
            layer = replace(layer, least=least)
            most = _FEW_TRIALS if shared else _MOST_TRIALS
            answer = with_numbers(module, self.adapter, layer, calls, most)
            if isinstance(answer, GroupLayer) and not answer.fixed:
                return answer
            if isinstance(answer, GroupLayer) and shared:
                # As where queries of all heads are normalized together.
                answer = Unsupported(f"its {shared} serves all of its heads: {answer.fixed}")
            if isinstance(best, Unsupported):
                best = answer
        return best


def _named(answer: Answer, flow: Flow, place: int) -> Answer:
    """Of one of several attentions in a module: named after the layer that takes its heads in."""
    output = next(iter(flow.takes(place, torch.tensor(True))))
    path = output.rpartition(".")[0]
    if isinstance(answer, Unsupported):
        return replace(answer, layer=path)
    if path:
        return replace(answer, name=path)
    return Unsupported(f"{output} belongs to one of several attentions of one module")


def _flow(module: nn.Module, call: Call) -> Flow | None:
    """What flows in a copy of a module; None where it does not run so."""
    call = tree_map(lambda value: value.float() if is_half(value) else value, call)
    with suppress(Exception):
        return Flow(tried(module, lambda copied: outputs_on(copied, call))[0], call)
    return None


def _size(flow: Flow, layer: GroupLayer) -> float:
    """How many entries of parameters units own."""
    owned = ((m, float((m.unit_of != NO_UNIT).float().mean())) for m in layer.ranked)
    return sum(flow.tensors[member.parameter].numel() * share for member, share in owned)


def _own_matrices(model: nn.Module, taken: Collection[str]) -> Counter[nn.Module]:
    """How many matrices that are no unit's a module holds itself, in layers or in containers of these.

    A module around a single layer counts as that layer where the one that holds it has heads.
    """
    modules = {without_wrappers(path): module for path, module in model.named_modules()}
    names = [n for n, w in named_weights(model).items() if w.ndim > 1 and n not in taken]
    direct = Counter(name.rpartition(".")[0] for name in names)
    below = Counter(part for name in names for part in _paths_to(name))

    def is_layer(path: str) -> bool:
        outer = modules[path.rpartition(".")[0]]
        return not modules[path]._modules or (below[path] == 1 and bool(head_count(outer)))

    found: Counter[nn.Module] = Counter()
    for path, count in direct.items():
        module = modules[path]
        if isinstance(module, (nn.Embedding, nn.modules.batchnorm._NormBase)):
            continue
        while path and (isinstance(module, _CONTAINERS) or (count < 2 and is_layer(path))):
            path = path.rpartition(".")[0]
            module = modules[path]
        found[module] += count
    return found


def _paths_to(name: str) -> Iterator[str]:
    """The paths of the modules that a parameter is in, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name
