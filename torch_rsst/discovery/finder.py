"""Ask every adapter about every module, and say what was not understood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from torch_rsst.discovery.account import account, routers, uncovered
from torch_rsst.discovery.adapter import ADAPTERS, KINDS, Unsupported, is_in
from torch_rsst.discovery.channels.base import Survey, WholeModelAdapter
from torch_rsst.discovery.families import load_families
from torch_rsst.discovery.fixed_width import MIXED, NOT_FED
from torch_rsst.discovery.flow_heads import search
from torch_rsst.discovery.noted import with_numbers
from torch_rsst.discovery.probe import Fact, Probe
from torch_rsst.discovery.whole_model import confirmed
from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.groups.groups import BLOCKS, GroupLayer, Groups
from torch_rsst.masking.names import named_refs, unwrap, without_wrappers
from torch_rsst.masking.parameter_ref import MASKABLE, ParameterRef
from torch_rsst.utils.errors import UnsupportedModuleWarning, check_choice, refuse, shown
from torch_rsst.utils.iterables import iterates
from torch_rsst.utils.module_state import kept_random_state, kept_state

LARGE = 0.05
"""Share of the parameters from which on what stays whole is named."""
_FOLLOWS = {
    "heads": "view(B, T, num_heads, -1) for the heads, reshape(B, T, -1) behind them; numbers for each head "
    "that it keeps belong in a buffer (register_buffer)"
}
"""Kind → how the sizes in a forward follow from its tensors."""
_IF_EXACT = "If such units can be cut, Extending in the documentation shows how to add a family."


def find_groups(
    model: nn.Module,
    kinds: Sequence[str] = KINDS,
    *,
    example_inputs: Any = None,
    on_unsupported: Literal["warn", "raise", "ignore"] = "warn",
) -> Groups:
    """Find the units of a model: heads of its attentions, hidden neurons of its MLPs, channels.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> print(groups)
        8 neurons in 1 layer

    Modules are recognized by structure; the channels of convolutions are followed through one run of
    the model. What is found is checked on copies with random weights: units that are zeroed must make
    the same output as units that are cut. The model is left as it was; it may be dense or pruned,
    wrapped or not.

    Args:
        model: any module.
        kinds: of ``"heads"``, ``"neurons"``, ``"channels"``; the default takes whatever there is,
            kinds that you name must all be found. Or ``"blocks"`` alone: whole residual sublayers, an
            attention or an MLP each.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for
            ``model``. Given, each module is checked on what it gets in that run instead of on
            random (batch, tokens, features), and all units once more on the outputs of the whole model, in
            eval and in training mode: needed where a module takes more than one tensor, for channels where the
            model takes no images, and where code outside a module reads its weights or sizes.
        on_unsupported: what to do about a module that looks like a known family but whose units
            cannot be removed exactly: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        the groups, in the order of ``model.named_modules()``; channels come last. Their ``whole`` lists
        what no unit owns: inputs, outputs, trunk, and what is left, each with its share and the reason.

    Raises:
        TypeError: unless ``model`` is a module; for what lists no kinds.
        ValueError: for an unknown kind, for no unit of a kind asked for, for inputs that the model does not
            run on, for lazy or scripted modules, or, with ``on_unsupported="raise"``, for a module that is
            not understood.
    """
    bare = unwrap(model)
    if isinstance(kinds, Tensor) or not iterates(kinds):
        remedy = "Pass inputs by name, find_groups(model, example_inputs=…), or leave out kinds."
        refuse(TypeError, "kinds", "names of kinds", shown(kinds), remedy)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        check_choice("kinds", kind, (*KINDS, BLOCKS))
    if BLOCKS in kinds and len(kinds) > 1:
        remedy = "Ask for them alone, find_groups(model, ('blocks',)): other units lie within them."
        refuse(ValueError, "kinds", "blocks without other kinds", repr(kinds), remedy)
    check_choice("on_unsupported", on_unsupported, ("warn", "raise", "ignore"))
    _check_runnable(bare)
    groups, refused = survey(bare, kinds, example_inputs=example_inputs)
    if on_unsupported == "raise" and refused:
        raise ValueError(_not_understood(refused))
    quantized = [type(m).__name__ for m in bare.modules() if "quantized" in type(m).__module__]
    if quantized and not groups.layers:
        got = f"quantized ones ({quantized[0]})"
        remedy = "Prune, compact, and quantize the smaller model then."
        refuse(ValueError, "find_groups", "layers with floating-point weights", got, remedy)
    # Before the warning, whose reasons the error gives.
    _require(kinds, groups, refused, lambda: survey(bare, example_inputs=example_inputs)[0])
    if on_unsupported == "warn":
        for sentence in _to_be_told(groups, refused, kinds):
            warnings.warn(sentence, UnsupportedModuleWarning, stacklevel=2)
    return groups


def _check_runnable(model: nn.Module) -> None:
    """Raise for modules that cannot be copied and tried as they are."""
    subject = "find_groups"
    if any(is_sharded(parameter) for parameter in model.parameters()):
        remedy = "Find the groups before sharding; they fit the sharded model."
        refuse(ValueError, subject, "whole parameters", "sharded ones", remedy)
    for path, module in model.named_modules():
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            expected, kind = "modules that know their sizes", "lazy"
            remedy = "Run the model once on inputs of its size."
        elif isinstance(module, torch.jit.ScriptModule):
            expected, kind = "modules of Python", "scripted"
            remedy = "Prune and compact the model before it is scripted or traced."
        else:
            continue
        got = f"{kind} {path or 'the model'} ({type(module).__name__})"
        refuse(ValueError, subject, expected, got, remedy)


def _to_be_told(groups: Groups, refused: Sequence[Unsupported], kinds: Sequence[str]) -> list[str]:
    """What a user should know of units that are not there, or cannot be cut."""
    sentences = [_not_understood(refused)] if refused else []
    told = [item.layer for item in refused]
    large = [
        whole
        for whole in groups.whole
        if whole.role == "left" and whole.share >= LARGE and tuple(kinds) == KINDS
        if not any(is_in(whole.name, path) for path in told)
    ]
    if large:
        sentences.append(f"These stay whole: {'; '.join(map(str, large[:3]))}.")
    if fixed := [layer for layer in groups.layers if layer.fixed]:
        listed = ", ".join(map(str, fixed[:3])) + (
            f" and {len(fixed) - 3} more" if fixed[3:] else ""
        )
        remedy = _FOLLOWS.get(fixed[0].kind, "chunk(2, -1)")
        sentences.append(
            f"Can be masked but not cut: {listed}: {fixed[0].fixed}. In its forward, let sizes follow "
            f"from the tensors: {remedy}."
        )
    return sentences


def survey(
    model: nn.Module, kinds: Sequence[str] = KINDS, *, example_inputs: Any = None
) -> tuple[Groups, list[Unsupported]]:
    """The groups of a model, and all that looks like a known family but cannot be offered, with reasons.

    Args:
        model: as for :func:`torch_rsst.find_groups`, not wrapped.
        kinds: to look for.
        example_inputs: as for :func:`torch_rsst.find_groups`.
    """
    # Tensors that are made in inference mode cannot be followed.
    kept = kept_random_state(model), _kept_parametrizations(model)
    with torch.inference_mode(False), _compiled_again(model), kept[0], kept[1]:
        probe = Probe.of(model, example_inputs)
        found = _ask_adapters(model, kinds, probe)
        groups = Groups(found.layers, account(model, found))
    return groups, uncovered(found.refused, groups, model)


@contextmanager
def _kept_parametrizations(model: nn.Module) -> Iterator[None]:
    """Reading a weight that others make can change them: spectral_norm goes on with its iteration in training mode."""
    with ExitStack() as stack:
        for module in model.modules():
            if is_parametrized(module):
                stack.enter_context(kept_state(cast(nn.Module, module.parametrizations)))
        yield


@contextmanager
def _compiled_again(model: nn.Module) -> Iterator[None]:
    """Let compiled parts, which run eagerly in the block, be compiled after it: some compilers would go on skipping them."""
    try:
        yield
    finally:
        if any("_orig_mod" in module._modules for module in model.modules()):
            torch.compiler.reset()


def _ask_adapters(model: nn.Module, kinds: Sequence[str], probe: Probe) -> Survey:
    load_families()
    reasons: dict[str, str] = {}
    not_run = ""
    layers: list[GroupLayer] = []
    refused: list[Unsupported] = []
    refs = named_refs(model)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    alike: dict[Fact, GroupLayer | Unsupported] = {}
    for path, module in model.named_modules():
        if unwrap(module) is not module:
            continue  # what is inside follows
        name = without_wrappers(path)
        for kind in kinds:
            # Part of a module whose units of this kind are known.
            if any(x.kind == kind and x.name != name and is_in(name, x.name) for x in layers):
                continue
            answer = _answer(kind, module, probe, alike)
            if isinstance(answer, GroupLayer):
                found = _relocated(answer, name)
                reason = _unfit(found, refs) or _shared(found, module, refs, paths)
                if reason is None:
                    layers.append(found)
                    continue
                answer = Unsupported(reason)
            if answer is not None:
                refused.append(replace(answer, layer=name, kind=kind))
    if "heads" in kinds:
        for name, answer in search(probe, layers, refused):
            if isinstance(answer, GroupLayer):
                answer = _checked(_relocated(answer, name), refs)
            if isinstance(answer, GroupLayer):
                layers.append(answer)
                refused = [item for item in refused if item.layer != name or item.kind == "heads"]
            else:
                inside = ".".join(filter(None, (name, answer.layer)))
                refused.append(replace(answer, layer=inside, kind="heads"))
        order = {without_wrappers(n): i for i, (n, _) in enumerate(model.named_modules())}
        layers.sort(key=lambda layer: order[layer.name])
    routing = routers(model, layers)
    for adapter in ADAPTERS:
        if isinstance(adapter, WholeModelAdapter) and set(adapter.kinds) & set(kinds):
            taken = {(m.parameter, d) for layer in layers for m in layer.members for d in m.dims}
            taken |= {(name, 0) for name in routing}
            answers = adapter.survey(probe, taken, kinds, refused)
            reasons.update(answers.reasons)
            not_run = not_run or answers.not_run
            offered = [_checked(layer, refs) for layer in answers.layers]
            said = tuple(refused)
            for item in (*offered, *answers.refused):
                about = [known for known in said if _is_about(item, known)]
                # What an adapter of single modules says of one stands, unless it was mistaken in the module.
                if item.kind not in kinds or not all(known.open for known in about):
                    continue
                others = [known for known in refused if known not in about]
                if isinstance(item, GroupLayer):
                    layers.append(item)
                    refused = others
                elif all(known.reason == NOT_FED for known in about if known in refused):
                    refused = [*others, item]  # which says more
    if probe.example_inputs is not None and {layer.kind for layer in layers} - {"channels"}:
        layers, answers = confirmed(model, probe.example_inputs, layers)
        refused += answers.refused
        reasons.update(answers.reasons)
    return Survey(tuple(layers), tuple(refused), {**reasons, **routing}, not_run)


def _checked(layer: GroupLayer, refs: Mapping[str, list[ParameterRef]]) -> GroupLayer | Unsupported:
    reason = _unfit(layer, refs)
    return layer if reason is None else Unsupported(reason, layer.name, layer.kind)


def _is_about(item: GroupLayer | Unsupported, known: Unsupported) -> bool:
    """Whether units, or their refusal, lie in a module whose units of this kind are refused already."""
    if item.kind != known.kind or item.kind == "channels":
        return False
    if isinstance(item, Unsupported):
        return is_in(item.layer, known.layer)
    return any(is_in(member.parameter, known.layer) for member in item.ranked)


def _answer(
    kind: str, module: nn.Module, probe: Probe, alike: dict[Fact, GroupLayer | Unsupported]
) -> GroupLayer | Unsupported | None:
    """What the first adapter that knows the module says of it, checked, or one whose units can be cut.

    What is known of modules alike stands.
    """
    refused: Unsupported | None = None
    for adapter in ADAPTERS:
        if adapter.kind != kind or (answer := adapter.find(module)) is None:
            continue
        if isinstance(answer, Unsupported):
            return refused or answer
        verdict = probe.check(module, adapter, answer)
        if verdict.refused:
            refused = refused or Unsupported(
                verdict.refused, open=verdict.refused in (MIXED, NOT_FED)
            )
            continue
        least = max(adapter.least, answer.least, verdict.least)
        answer = replace(answer, family=type(adapter).__name__, least=least)
        if not verdict.fixed:
            return answer
        key = (type(adapter), probe.signature(module))
        if refused is None and key not in alike:
            alike[key] = with_numbers(module, adapter, answer, probe.two_calls(module, answer))
        return refused or alike[key]
    return refused


def _relocated(layer: GroupLayer, path: str) -> GroupLayer:
    """A layer by names within its module, by names within the model."""
    if not path:
        return layer
    members, buffers = (
        tuple(replace(m, parameter=f"{path}.{m.parameter}") for m in part)
        for part in (layer.members, layer.buffers)
    )
    name = f"{path}.{layer.name}" if layer.name else path
    return replace(layer, name=name, members=members, buffers=buffers)


def _unfit(layer: GroupLayer, refs: Mapping[str, list[ParameterRef]]) -> str | None:
    """Why a layer whose weights serve another module too, or cannot be masked, is no such, or None."""
    for member in layer.members:
        places = refs.get(member.parameter, ())
        if len(places) != 1:
            return f"its {member.parameter} is tied to a parameter of another module"
        if (dtype := places[0].original.dtype) not in MASKABLE:
            return f"its {member.parameter} is {dtype}, which cannot be masked"
    return None


def _shared(
    layer: GroupLayer,
    owner: nn.Module,
    refs: Mapping[str, list[ParameterRef]],
    paths: Mapping[nn.Module, list[str]],
) -> str | None:
    """Why a layer one of whose modules also stands outside its owner cannot be cut, or None."""
    for member in layer.members:
        module = refs[member.parameter][0].module
        outside = [p for p in paths[module] if not any(is_in(p, path) for path in paths[owner])]
        if outside:
            return f"the module of its {member.parameter} also stands at {outside[0]}"
    return None


def _not_understood(refused: Sequence[Unsupported]) -> str:
    return (
        f"No groups for {len(refused)} module(s): {_first_of(refused)}. They stay whole, as all that "
        f"groups.whole lists. {_IF_EXACT}"
    )


def _first_of(refused: Sequence[Unsupported]) -> str:
    """The first few with their reasons, to be followed by a full stop."""
    rest = f"; and {len(refused) - 3} more" if refused[3:] else ""
    return "; ".join(str(item).removesuffix(".") for item in refused[:3]) + rest


def _require(
    kinds: Sequence[str],
    groups: Groups,
    refused: Sequence[Unsupported],
    look_for_all: Callable[[], Groups],
) -> None:
    found = {layer.kind for layer in groups.layers}
    missing = [kind for kind in kinds if kind not in found]
    if not missing or (found and tuple(kinds) == KINDS):
        return
    reasons = [item for item in refused if item.kind in missing]
    known = sorted({adapter.kind for adapter in ADAPTERS})
    if reasons:
        remedy = f"Not understood: {_first_of(reasons)}. {_IF_EXACT}"
    elif others := dict.fromkeys(layer.kind for layer in look_for_all().layers):
        remedy = f"It has units of kind {', '.join(others)}."
    else:
        whole = "; ".join(map(str, groups.whole[:3]))
        remedy = (f"It stays whole: {whole}. " if whole else "") + (
            f"Adapters exist for {', '.join(known)}; the documentation shows, under Extending, how "
            "to add one. Single weights can be pruned in any model: global_unstructured."
        )
    refuse(
        ValueError,
        "find_groups",
        f"units of kind {', '.join(missing)}",
        "none in this model",
        remedy,
    )
