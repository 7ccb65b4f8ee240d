"""Ask every adapter about every module, and say what was not understood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torch_rsst.discovery.account import account, routers, uncovered
from torch_rsst.discovery.adapter import ADAPTERS, KINDS, Unsupported
from torch_rsst.discovery.channels.base import WholeModelAdapter
from torch_rsst.discovery.families import load_families
from torch_rsst.discovery.flow_heads import search
from torch_rsst.discovery.noted import with_numbers
from torch_rsst.discovery.probe import Fact, Probe
from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.groups.groups import BLOCKS, GroupLayer, Groups
from torch_rsst.masking.names import named_refs, unwrap, without_wrappers
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.utils.errors import UnsupportedModuleWarning, refuse, unknown_choice

LARGE = 0.05
"""Share of the parameters from which on what stays whole is named."""


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
        8 neurons in 1 layers

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
            random (batch, tokens, features): needed where a module takes more than one tensor, and
            for channels where the model takes no images.
        on_unsupported: what to do about a module that looks like a known family but whose units
            cannot be removed exactly: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        the groups, in the order of ``model.named_modules()``; channels come last. Their ``whole`` lists
        what no unit owns: inputs, outputs, trunk, and what is left, each with its share and the reason.

    Raises:
        TypeError: unless ``model`` is a module.
        ValueError: for an unknown kind, for no unit of a kind asked for, for inputs that the model does not
            run on, for lazy or scripted modules, or, with ``on_unsupported="raise"``, for a module that is
            not understood.
    """
    bare = unwrap(model)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in (*KINDS, BLOCKS):
            raise ValueError(unknown_choice("kinds", kind, (*KINDS, BLOCKS)))
    if BLOCKS in kinds and len(kinds) > 1:
        remedy = "Ask for them alone, find_groups(model, ('blocks',)): other units lie within them."
        refuse(ValueError, "kinds", "blocks without other kinds", repr(kinds), remedy)
    if on_unsupported not in ("warn", "raise", "ignore"):
        raise ValueError(
            unknown_choice("on_unsupported", on_unsupported, ("warn", "raise", "ignore"))
        )
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
        got = f"{path or 'the model'} ({type(module).__name__})"
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            remedy = "Run the model once on inputs of its size."
            refuse(ValueError, subject, "modules that know their sizes", f"lazy {got}", remedy)
        if isinstance(module, torch.jit.ScriptModule):
            remedy = "Prune and compact the model before it is scripted or traced."
            refuse(ValueError, subject, "modules of Python", f"scripted {got}", remedy)


def _to_be_told(groups: Groups, refused: Sequence[Unsupported], kinds: Sequence[str]) -> list[str]:
    """What a user should know of units that are not there, or cannot be cut."""
    sentences = [_not_understood(refused)] if refused else []
    told = [item.layer for item in refused]
    large = [
        whole
        for whole in groups.whole
        if whole.role == "left" and whole.share >= LARGE and tuple(kinds) == KINDS
        if not any(not path or f"{whole.name}.".startswith(f"{path}.") for path in told)
    ]
    if large:
        sentences.append(f"These stay whole: {'; '.join(map(str, large[:3]))}.")
    if fixed := [layer for layer in groups.layers if layer.fixed]:
        listed = ", ".join(map(str, fixed[:3])) + (
            f" and {len(fixed) - 3} more" if fixed[3:] else ""
        )
        remedy = "reshape(B, T, -1)" if fixed[0].kind == "heads" else "chunk(2, -1)"
        sentences.append(
            f"Can be masked but not cut: {listed}: {fixed[0].fixed}. In its forward, let a size follow "
            f"from the tensor: {remedy}."
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
    with torch.inference_mode(False):  # whose tensors are not followed
        layers, refused, reasons = _ask_adapters(model, kinds, Probe.of(model, example_inputs))
        groups = Groups(tuple(layers), account(model, layers, refused, reasons))
    if any("_orig_mod" in module._modules for module in model.modules()):
        # What ran eagerly here is compiled again: some versions of the compiler would go on skipping it.
        torch.compiler.reset()
    return groups, uncovered(refused, groups, model)


def _ask_adapters(
    model: nn.Module, kinds: Sequence[str], probe: Probe
) -> tuple[list[GroupLayer], list[Unsupported], dict[str, str]]:
    load_families()
    reasons: dict[str, str] = {}
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
            if _stands_inside(name, kind, layers):
                continue
            answer = _answer(kind, module, probe, alike)
            if isinstance(answer, GroupLayer):
                found = _relocated(answer, name)
                reason = _tied(found, refs) or _shared(found, module, refs, paths)
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
        order = {
            path: i for i, path in enumerate(without_wrappers(n) for n, _ in model.named_modules())
        }
        layers.sort(key=lambda layer: order[layer.name])
    routing = routers(model, layers)
    for adapter in ADAPTERS:
        if isinstance(adapter, WholeModelAdapter) and set(adapter.kinds) & set(kinds):
            taken = {(m.parameter, d) for layer in layers for m in layer.members for d in m.dims}
            taken |= {(name, 0) for name in routing}
            answers = adapter.survey(probe, taken, kinds)
            reasons.update(answers.reasons)
            offered = [_checked(layer, refs) for layer in answers.layers]
            known = list(refused)
            for item in (*answers.refused, *offered):
                # What an adapter of single modules says of one stands.
                if item.kind not in kinds or any(map(partial(_is_about, item), known)):
                    continue
                if isinstance(item, GroupLayer):
                    layers.append(item)
                else:
                    refused.append(item)
    return layers, refused, {**reasons, **routing}


def _checked(layer: GroupLayer, refs: Mapping[str, list[ParameterRef]]) -> GroupLayer | Unsupported:
    reason = _tied(layer, refs)
    return layer if reason is None else Unsupported(reason, layer.name, layer.kind)


def _is_about(item: GroupLayer | Unsupported, known: Unsupported) -> bool:
    """Whether units, or their refusal, lie in a module whose units of this kind are refused already."""
    if item.kind != known.kind or item.kind == "channels":
        return False
    inside = f"{known.layer}." if known.layer else ""
    if isinstance(item, Unsupported):
        return f"{item.layer}.".startswith(inside)
    return any(member.parameter.startswith(inside) for member in item.ranked)


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
            refused = refused or Unsupported(verdict.refused)
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


def _stands_inside(name: str, kind: str, layers: Sequence[GroupLayer]) -> bool:
    """Whether a module is part of one whose units of this kind are known."""
    outer = (layer.name for layer in layers if layer.kind == kind)
    return any(not path or name.startswith(f"{path}.") for path in outer if path != name)


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


def _tied(layer: GroupLayer, refs: Mapping[str, list[ParameterRef]]) -> str | None:
    """Why a layer whose weights serve another module too cannot be cut, or None if none do."""
    for member in layer.members:
        if len(refs.get(member.parameter, ())) != 1:
            return f"its {member.parameter} is tied to a parameter of another module"
    return None


def _shared(
    layer: GroupLayer,
    owner: nn.Module,
    refs: Mapping[str, list[ParameterRef]],
    paths: Mapping[nn.Module, list[str]],
) -> str | None:
    """Why a layer one of whose modules also stands outside its owner cannot be cut, or None."""
    inside = tuple(f"{path}." if path else "" for path in paths[owner])
    for member in layer.members:
        module = refs[member.parameter][0].module
        if outside := [
            p for p in paths[module] if not p.startswith(inside) and module is not owner
        ]:
            return f"the module of its {member.parameter} also stands at {outside[0]}"
    return None


def _not_understood(refused: Sequence[Unsupported]) -> str:
    return (
        f"No groups for {len(refused)} module(s): {_first_of(refused)}. They stay whole; the "
        "documentation shows, under Extending, how to add a family."
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
        remedy = (
            f"Not understood: {_first_of(reasons)}. The documentation shows, under Extending, how to "
            "add a family."
        )
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
