"""Whole residual sublayers: an attention or an MLP whose output is added to what it was computed from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_map

from torch_rsst.discovery.adapter import Call, Unsupported, own_parameters
from torch_rsst.discovery.channels.base import Place, Survey, WholeModelAdapter
from torch_rsst.discovery.emptied import returns_tuple
from torch_rsst.discovery.examples import small_guesses
from torch_rsst.discovery.probe import Probe, Verdict, check_on
from torch_rsst.discovery.trial import is_half, one_line, randomized, tensors_in
from torch_rsst.groups.groups import BLOCKS, GroupLayer, Member
from torch_rsst.groups.surgery import Removal, replace_module
from torch_rsst.masking.names import named_refs, named_weights

_CACHES = ("cache", "past_key_values", "past_key_value")
_VIEWS = ("TBackward", "Transpose", "Permute", "View", "Reshape", "Expand", "Select", "Slice", "ToCopy")  # fmt: skip
_MOST_STEPS = 32


class ResidualBlocks(WholeModelAdapter):
    """A unit is a module with all its parameters, whose output is added to its input.

    Between that input and the module may stand norms, and scales behind it; no other matrices. What is left
    of a module that is gone is a module that puts out zeros.
    """

    kind = BLOCKS
    kinds = (BLOCKS,)
    told_apart = True  # each is a module of its own

    def survey(
        self,
        probe: Probe,
        taken: Collection[Place],
        kinds: Collection[str],
        refused: Collection[Unsupported],
    ) -> Survey:
        """See :class:`torch_rsst.discovery.channels.base.WholeModelAdapter`."""
        model, error = probe.model, "no example fits it; pass example_inputs"
        for call in probe.calls(model, GroupLayer("", BLOCKS, 0, ()), self):
            try:
                paths = _residual(randomized(model), call)
            except Exception as failure:
                error = f"it cannot be run ({one_line(failure)})"
                continue
            if paths:
                return self._offered(model, paths, probe)
            error = "no module of it puts out what is added to its own input"
            break
        return Survey(refused=(Unsupported(error, "", BLOCKS),))

    def _offered(self, model: nn.Module, paths: list[str], probe: Probe) -> Survey:
        """The blocks of a model as one layer of units, checked; one by one where that fails."""
        refused: list[Unsupported] = []
        layer, verdict = self._checked(model, paths, probe)
        if verdict.refused or verdict.fixed:
            cause, left = verdict.refused or verdict.fixed, []
            for path in paths:
                each = self._checked(model, [path], probe)[1]
                # Where the only unit has to stay, it is as in the check of all.
                if reason := each.refused or each.fixed or cause * (each.least > 0):
                    refused.append(Unsupported(reason, path, BLOCKS))
                else:
                    left.append(path)
            layer, verdict = self._checked(model, left, probe)
        if verdict.refused:
            refused.append(Unsupported(verdict.refused, "", BLOCKS))
        if verdict.refused or not layer.units:
            return Survey(refused=tuple(refused))
        family, least = type(self).__name__, max(self.least, verdict.least)
        return Survey(
            (replace(layer, family=family, fixed=verdict.fixed, least=least),), tuple(refused)
        )

    def _checked(
        self, model: nn.Module, paths: list[str], probe: Probe
    ) -> tuple[GroupLayer, Verdict]:
        layer = GroupLayer("", BLOCKS, len(paths), tuple(_members(model, paths)))
        if not paths:
            return layer, Verdict()
        call, error = probe.call_of(model, layer, self)
        return layer, Verdict(refused=error) if call is None else check_on(model, self, layer, call)

    def examples(self, module: nn.Module) -> Iterator[Call]:
        """See :class:`torch_rsst.discovery.Adapter`."""
        for guess in small_guesses(module):
            yield ((), guess) if isinstance(guess, dict) else ((guess,), {})

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        names: dict[int, list[str]] = {}
        for member in removal.layer.members:
            names.setdefault(int(member.unit_of.max()), []).append(member.parameter)
        for unit in removal.gone.nonzero().flatten().tolist():
            path = _owner_of(names[unit])
            module = replace_module(module, path, Nothing(module.get_submodule(path)))
        return module


class Nothing(nn.Module):
    """Zeros of the shape of the input: what is left of a residual block that is gone.

    Args:
        block: whose place it takes.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Modules around ask the block for these, as an encoder of PyTorch does its attentions.
        own = {k: v for k, v in vars(block).items() if isinstance(v, (bool, int, str))}
        self.__dict__.update({k: v for k, v in own.items() if k not in self.__dict__})
        for name in own_parameters(block):
            self.register_parameter(name, None)
        self.returns_pair = returns_tuple(block)
        # Other layers ask the cache of keys how many tokens it has seen.
        self.layer_idx = getattr(block, "layer_idx", None) if hasattr(block, "is_causal") else None
        self.train(block.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """Zeros, and None where the block returned a pair."""
        x = _first_tensor((args, kwargs))
        assert x is not None, "a block takes a tensor"
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        if cache is not None and self.layer_idx is not None:
            token = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            cache.update(token, token.clone(), self.layer_idx)
        zeros = torch.zeros_like(x)
        return (zeros, None) if self.returns_pair else zeros


def _first_tensor(values: Any) -> Tensor | None:
    return next((tensor for tensor in tensors_in(values) if tensor.is_floating_point()), None)


def _members(model: nn.Module, paths: Iterable[str]) -> Iterator[Member]:
    weights = named_weights(model)
    for unit, path in enumerate(paths):
        for name, weight in weights.items():
            if weight.ndim and name.startswith(f"{path}."):
                rows = torch.full((weight.shape[0],), unit)
                yield Member(name, 0, rows, ranked=weight.ndim > 1)


def _owner_of(names: Iterable[str]) -> str:
    """The innermost module that holds all of some parameters."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = []
    for level in levels:
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _residual(model: nn.Module, call: Call) -> list[str]:
    """The paths of the residual blocks of a model, from the graph of one run; the model is a copy."""
    # Of each run, the nodes of the graph from which the input came, and by which the output was made.
    runs: dict[nn.Module, list[tuple[Node, Node]]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, made = _first_tensor((args, kwargs)), _first_tensor(output)
        if given is None or made is None or given.shape != made.shape:
            return
        if given.requires_grad and made.requires_grad:
            edges = get_gradient_edge(given).node, get_gradient_edge(made).node
            runs.setdefault(module, []).append(edges)

    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in model.modules():
        module.register_forward_hook(note, with_kwargs=True)
    with torch.enable_grad():
        args, kwargs = tree_map(_differentiable, call)
        outputs = model(*args, **kwargs)
    users: dict[Node, list[Node]] = {}
    waiting = [get_gradient_edge(t).node for t in tensors_in(outputs) if t.requires_grad]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for source in _sources(node):
            users.setdefault(source, []).append(node)
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    refs = named_refs(model)
    found: dict[str, Node] = {}
    for path, module in model.named_modules():
        own = [name for name in refs if name.startswith(f"{path}.")]
        alone = own and _owner_of(own) == path and all(len(refs[name]) == 1 for name in own)
        once = len(done := runs.get(module, [])) == 1
        if alone and once and (added := _added_at(*done[0], users)) is not None:
            found[path] = added
    return [path for path in found if not any(_goes_before(p, path, found) for p in found)]


def _goes_before(other: str, path: str, found: dict[str, Node]) -> bool:
    """Whether another module is the block: a larger one that is added at the same place, or one of a stage."""
    if found[other] is found[path]:
        return path.startswith(f"{other}.")
    return other.startswith(f"{path}.")


def _added_at(given: Node, made: Node, users: dict[Node, list[Node]]) -> Node | None:
    """Where an output is added to what its input was made of, without matrices on the way; or None."""
    waiting, inside, end = [made], {made}, None
    while waiting and len(inside) < _MOST_STEPS:
        node = waiting.pop()
        for above in users.get(node, [node]):
            others = [source for source in _sources(above) if source not in inside]
            if above is node or any(map(_is_matrix, others)):
                return None  # it is put out, or followed by another layer
            is_sum = above.name().startswith("Add")
            if is_sum and any(_reaches(given, _viewed(other)) for other in others):
                if end is not None and end is not above:
                    return None
                end = above
            elif above not in inside:
                inside.add(above)
                waiting.append(above)
    return None if waiting else end


def _reaches(node: Node, target: Node) -> bool:
    """Whether a node was computed from another without matrices."""
    waiting, seen, met = [node], {node}, False
    while waiting:
        node = waiting.pop()
        if node is target:
            met = True
            continue
        if _is_matrix(node):
            return False
        new = [source for source in _sources(node) if source not in seen]
        seen.update(new)
        waiting += new
    return met


def _sources(node: Node) -> list[Node]:
    return [source for source, _ in node.next_functions if source is not None]


def _viewed(node: Node) -> Node:
    """What a node is a view of, or a copy of another type."""
    while node.name().startswith(_VIEWS):
        node = _sources(node)[0]
    return node


def _is_matrix(node: Node) -> bool:
    """Whether a node is a parameter of two dimensions or more, or a view of one."""
    variable = getattr(_viewed(node), "variable", None)
    return isinstance(variable, nn.Parameter) and sum(size > 1 for size in variable.shape) > 1


def _differentiable(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return (value.float() if is_half(value) else value).detach().requires_grad_().clone()
