"""Ask every adapter about every module, and say what was not understood."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from torch_rsst.discovery.adapter import ADAPTERS, KINDS, Probe, Unsupported, undisturbed
from torch_rsst.errors import UnsupportedModuleWarning, message, unknown_choice
from torch_rsst.groups import GroupLayer, Groups
from torch_rsst.masks import named_sites, unwrap, without_wrappers
from torch_rsst.shards import is_sharded
from torch_rsst.site import Site


def find_groups(
    model: nn.Module,
    kinds: Sequence[str] = KINDS,
    *,
    example_inputs: Any = None,
    on_unsupported: Literal["warn", "raise", "ignore"] = "warn",
) -> Groups:
    """Find the units of a model: its attention heads and the hidden neurons of its MLPs.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> print(groups)
        8 neurons in 1 layers

    Modules are recognized by structure and then checked by running them once, alone: disturbing one
    unit must reach that unit's inputs of the following layer and no others. The model is left as
    it was; it may be dense or pruned, wrapped or not.

    Args:
        model: any module.
        kinds: of ``"heads"``, ``"neurons"``, ``"channels"``; the default takes whatever there is,
            kinds that you name must all be found.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for
            ``model``. Given, each module is checked on what it gets in that run instead of on
            random (batch, tokens, features): needed where a module takes more than one tensor.
        on_unsupported: what to do about a module that looks like a known family but whose units
            cannot be removed exactly: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Returns:
        the groups, in the order of ``model.named_modules()``.

    Raises:
        TypeError: unless ``model`` is a module.
        ValueError: for an unknown kind, for no unit of a kind asked for, or, with
            ``on_unsupported="raise"``, for a module that is not understood.
    """
    bare = unwrap(model)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(unknown_choice("kinds", kind, KINDS))
    if on_unsupported not in ("warn", "raise", "ignore"):
        raise ValueError(
            unknown_choice("on_unsupported", on_unsupported, ("warn", "raise", "ignore"))
        )
    if any(is_sharded(parameter) for parameter in bare.parameters()):
        remedy = "Find the groups before sharding; they fit the sharded model."
        raise ValueError(
            message("find_groups", expected="whole parameters", got="sharded ones", remedy=remedy)
        )
    probe = Probe(_record_inputs(bare, example_inputs))
    layers, refused = _ask_adapters(bare, kinds, probe)
    _report(refused, on_unsupported)
    _require(kinds, layers, refused)
    return Groups(tuple(layers))


def _ask_adapters(
    model: nn.Module, kinds: Sequence[str], probe: Probe
) -> tuple[list[GroupLayer], list[Unsupported]]:
    layers: list[GroupLayer] = []
    refused: list[Unsupported] = []
    sites = named_sites(model)
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    for name, module in model.named_modules():
        if unwrap(module) is not module:
            continue  # what is inside follows
        for kind in kinds:
            found = _first_answer(kind, without_wrappers(name), module, probe)
            if isinstance(found, GroupLayer) and (
                reason := _tied(found, sites) or _shared(found, module, sites, paths)
            ):
                found = Unsupported(found.name, found.kind, reason)
            if isinstance(found, GroupLayer):
                layers.append(found)
            elif found is not None:
                refused.append(found)
    return layers, refused


def _first_answer(
    kind: str, name: str, module: nn.Module, probe: Probe
) -> GroupLayer | Unsupported | None:
    answers = (adapter.find(name, module, probe) for adapter in ADAPTERS if adapter.kind == kind)
    return next((answer for answer in answers if answer is not None), None)


def _tied(layer: GroupLayer, sites: Mapping[str, list[Site]]) -> str | None:
    """Why a layer whose weights serve another module too cannot be cut, or None if none do."""
    for member in layer.members:
        if len(sites.get(member.parameter, ())) != 1:
            return f"its {member.parameter} is tied to a parameter of another module"
    return None


def _shared(
    layer: GroupLayer,
    owner: nn.Module,
    sites: Mapping[str, list[Site]],
    paths: Mapping[nn.Module, list[str]],
) -> str | None:
    """Why a layer one of whose modules also stands outside its owner cannot be cut, or None."""
    inside = tuple(f"{path}." if path else "" for path in paths[owner])
    for member in layer.members:
        module = sites[member.parameter][0].module
        if outside := [
            p for p in paths[module] if not p.startswith(inside) and module is not owner
        ]:
            return f"the module of its {member.parameter} also stands at {outside[0]}"
    return None


def _record_inputs(
    model: nn.Module, example_inputs: Any
) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each module gets when the model runs on the example inputs."""
    recorded: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    if example_inputs is None:
        return recorded

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.setdefault(module, (args, kwargs))

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        with undisturbed(model):
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            else:
                model(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _report(refused: Sequence[Unsupported], on_unsupported: str) -> None:
    if not refused or on_unsupported == "ignore":
        return
    listed = "; ".join(map(str, refused[:3])) + (
        f"; and {len(refused) - 3} more" if refused[3:] else ""
    )
    text = (
        f"No groups for {len(refused)} module(s): {listed}. They stay whole; the documentation shows, "
        f"under Extending, how to add a family."
    )
    if on_unsupported == "raise":
        raise ValueError(text)
    warnings.warn(text, UnsupportedModuleWarning, stacklevel=3)


def _require(
    kinds: Sequence[str], layers: Sequence[GroupLayer], refused: Sequence[Unsupported]
) -> None:
    found = {layer.kind for layer in layers}
    missing = [kind for kind in kinds if kind not in found]
    if not missing or (found and tuple(kinds) == KINDS):
        return
    reasons = [str(r) for r in refused if r.kind in missing]
    known = sorted({adapter.kind for adapter in ADAPTERS})
    remedy = (
        f"Not understood: {'; '.join(reasons[:3])}."
        if reasons
        else f"Adapters exist for {', '.join(known)}; the documentation shows, under Extending, how to "
        f"add one. Single weights can be pruned in any model: global_unstructured."
    )
    raise ValueError(
        message(
            "find_groups",
            expected=f"units of kind {', '.join(missing)}",
            got="none in this model",
            remedy=remedy,
        )
    )
