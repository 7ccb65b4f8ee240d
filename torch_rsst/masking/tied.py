"""Parameters that several modules share have one mask for all of them, or none.

A call that is given one module cannot see who else holds its parameter, so all modules that are alive are
asked. Calls that are given a model refuse what others have left half masked.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle

from torch_rsst.distributed.dtensor import local, placed_like
from torch_rsst.masking.live_weight import LIVE_MODULES, MASK, is_live
from torch_rsst.masking.parameter_ref import ParameterRef, dense_name, masked_refs
from torch_rsst.utils.errors import refuse

# What sys.getrefcount counts of its own argument.
_ARGUMENT = sys.getrefcount({0: object()}[0])


def by_parameter(refs: Iterable[ParameterRef]) -> list[list[ParameterRef]]:
    """The refs that share a parameter, together."""
    shared: dict[int, list[ParameterRef]] = {}
    for ref in refs:
        shared.setdefault(id(ref.original), []).append(ref)
    return list(shared.values())


def sharing(
    refs: Sequence[ParameterRef], *, references: int = 0, shallow: bool = True
) -> list[ParameterRef]:
    """The other places that hold the parameters of ``refs``, in whatever modules are alive.

    Args:
        refs: the places that are known.
        references: how many the caller itself has to each parameter, beside those of ``refs``.
        shallow: whether to look for what :func:`copy.copy` has made of modules, which have the same dicts of
            parameters; for callers that do not refer to these dicts.

    Takes time only where something else refers to a parameter: another module, or an optimizer. Then one
    pass over the heap, tens of milliseconds, tells of all parameters until one of them is registered again.
    There is none for parameters that are masked by us already. Modules that ``gc.freeze()`` has hidden are not found.
    """
    copied = {ref for ref in refs if shallow and _has_shallow_copy(ref.module)}
    suspects = [
        places
        for places in by_parameter(refs)
        if _is_held_elsewhere(places, references) or not copied.isdisjoint(places)
    ]
    live = all(is_live(ref.module, ref.name) for places in suspects for ref in places)
    if not live:
        suspects = [p for p in suspects if len(p) > 1 or p[0] in copied or not _ALONE.has(p[0])]
    if not suspects:
        return []
    given = {ref for places in suspects for ref in places}
    wanted = {id(places[0].original) for places in suspects}
    modules = list(LIVE_MODULES) if live else _modules_alive()
    if not live:
        _ALONE.note(modules)
    found = [
        ParameterRef(module, dense_name(module, key))
        for module in modules
        for key, parameter in list(module._parameters.items())
        if id(parameter) in wanted
    ]
    return [ref for ref in dict.fromkeys(found) if ref not in given]


def _is_held_elsewhere(places: Sequence[ParameterRef], references: int) -> bool:
    registry, key = places[0].module._parameters, places[0].key
    own = {(id(ref.module._parameters), ref.key) for ref in places}
    return sys.getrefcount(registry[key]) > len(own) + references + _ARGUMENT


def _has_shallow_copy(module: nn.Module) -> bool:
    """Whether something else, such as a copy by :func:`copy.copy`, refers to a module's dict of parameters."""
    return sys.getrefcount(module._parameters) > 1 + _ARGUMENT


def masks_of_several(refs: Iterable[ParameterRef]) -> set[int]:
    """The ids of masks of ``refs`` that belong to several parameters: they were tied, and are not any more."""
    if not any(_mask_is_held_elsewhere(ref) for ref in refs):
        return set()
    owners: dict[int, set[int]] = {}
    for each in masked_refs(list(LIVE_MODULES)):
        owners.setdefault(id(each.mask), set()).add(id(each.original))
    return {mask for mask, parameters in owners.items() if len(parameters) > 1}


def _mask_is_held_elsewhere(ref: ParameterRef) -> bool:
    registry, key = ref.module._buffers, ref.name + MASK
    return ref.mask is not None and sys.getrefcount(registry[key]) > 1 + _ARGUMENT


class _Alone:
    """Parameters that one module alone held when all were asked, until another registers one of them.

    What is written into a module's ``_parameters`` directly is not seen.
    """

    def __init__(self) -> None:
        # By the id of a parameter. No weak references to parameters: such cannot be swapped when models are
        # converted. One that has died and another that has its id: the latter was registered, and seen, too,
        # so that at worst all are asked once more.
        self._owner: dict[int, weakref.ref[nn.Module]] = {}
        self._hook: RemovableHandle | None = None

    def has(self, ref: ParameterRef) -> bool:
        known = self._owner.get(id(ref.held))
        return known is not None and known() is ref.module

    def note(self, modules: Iterable[nn.Module]) -> None:
        self._owner.clear()
        places: dict[int, list[nn.Module]] = {}
        for module in modules:
            for parameter in list(module._parameters.values()):
                if parameter is not None:
                    places.setdefault(id(parameter), []).append(module)
        for key, holders in places.items():
            if len(holders) == 1:
                self._owner[key] = weakref.ref(holders[0])
        if self._hook is None:
            # It stays: what ends it would be a registration, while PyTorch goes through such hooks.
            self._hook = register_module_parameter_registration_hook(self._registered)

    def _registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        known = self._owner.get(id(parameter))
        # Not where stock calls rename a parameter.
        if known is not None and known() is not module:
            self._owner.clear()


_ALONE = _Alone()


def _modules_alive() -> list[nn.Module]:
    """All but scripted ones, which are records of a program, and what gc.freeze() hides."""
    return [
        each
        for each in gc.get_objects()
        # By type: isinstance() asks proxies, some of whose objects are dead, for their class.
        if issubclass(type(each), nn.Module)
        and not issubclass(type(each), torch.jit.ScriptModule)
        and "_parameters" in vars(each)
    ]


def masked_with(refs: Sequence[ParameterRef]) -> list[ParameterRef]:
    """The other places of masked parameters: those that lose the mask with them.

    Raises:
        ValueError: where one of them has another mask, or none.
    """
    others = sharing(refs)
    check_shared({places[0].name: places for places in by_parameter([*refs, *others])})
    return others


def check_shared(shared: Mapping[str, Sequence[ParameterRef]]) -> None:
    """Raise a ValueError where modules that share a parameter have different masks for it, or none.

    Args:
        shared: by name, the places of each parameter.
    """
    for name, places in shared.items():
        check_one_mask(name, [ref.mask for ref in places])


def check_memory(shared: Mapping[str, Sequence[ParameterRef]]) -> None:
    """Raise a ValueError where two parameters lie in one memory: they look tied, and each would have a mask of its own.

    Loading with ``assign=True`` makes such of tied ones, and so does assigning ``.data``. Parts of one buffer that do not
    overlap, as sharding and recurrent layers make them, are no such.

    Args:
        shared: by name, the places of each parameter.
    """
    found = sorted(
        (*memory, name)
        for name, places in shared.items()
        if (memory := _memory(places[0].original))
    )
    for (device, start, end, one), (other_device, other_start, _, other) in pairwise(found):
        if device == other_device and (other_start == start or other_start < end):
            _refuse_memory((one, shared[one][0]), (other, shared[other][0]))


def _memory(parameter: Tensor) -> tuple[str, int, int] | None:
    """Where a parameter begins and ends; ends where it begins if there are gaps in it. None for those without an address."""
    part = local(parameter)
    plain = type(part) in (Tensor, nn.Parameter) and part.layout == torch.strided
    if not plain or part.is_meta or not part.numel() or not torch._C._has_storage(part):
        return None
    start = part.data_ptr()
    span = 1 + sum((n - 1) * step for n, step in zip(part.shape, part.stride(), strict=True))
    end = start + (span * part.element_size() if span == part.numel() else 0)
    return (str(part.device), start, end) if start else None


def _refuse_memory(*pair: tuple[str, ParameterRef]) -> NoReturn:
    (one, first), (other, second) = sorted(pair, key=lambda each: each[0])
    key = first.key if first.is_masked == second.is_masked else first.name
    remedy = (
        f"Tie them: b.{key} = a.{key}. Loading with assign=True and writing to .data untie them."
    )
    if first.is_masked != second.is_masked:
        masked = one if first.is_masked else other
        remedy = f"Remove the mask of {masked!r} with torch_rsst.remove(module, name). {remedy}"
    expected, got = "memory of their own, or one tied parameter", "two parameters in one memory"
    refuse(ValueError, f"{one!r} and {other!r}", expected, got, remedy)


def check_one_mask(name: str, masks: Sequence[Tensor | None]) -> None:
    """Raise a ValueError unless the masks of one parameter are all the same, or all None."""
    first = masks[0]
    if all(mask is first or _equal(mask, first) for mask in masks[1:]):
        return
    refuse(
        ValueError,
        f"tied parameter {name!r}",
        "one mask for all that share it",
        "none for some of them" if any(mask is None for mask in masks) else "different ones",
        "Call torch_rsst.refresh(model) to give all of them the mask that is there, or "
        "torch_rsst.apply_mask(model, masks) to set one.",
    )


def _equal(mask: Tensor | None, other: Tensor | None) -> bool:
    if mask is None or other is None:
        return False
    if mask.is_meta or other.is_meta:
        return mask.is_meta == other.is_meta
    return torch.equal(local(mask), local(placed_like(other, mask)).to(mask.dtype))
